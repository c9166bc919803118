"""What capture tells, as frozen values whose identity is their hash, and the sinks it tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.worker import WorkerContext

INTERNAL = "tidyrows_internal"
"""The execution option of tidyrows' own statements, of which no sink hears."""
ROLLED_BACK = "tidyrows_rolled_back"
"""The execution option of an engine whose commits are undone: it concerns its own block only."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns that are compared, by the database's names.

    Nullable references are hashed apart: one that is NULL now went with the row that it referenced.

    Attributes:
        values: what must be equal.
        references: nullable columns of foreign keys; with ``either`` other values.
        either: a row is ours where one of both is equal.
    """

    values: tuple[str, ...]
    references: tuple[str, ...] = ()
    either: bool = False
    columns: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.values + self.references)


@dataclass(frozen=True, slots=True, eq=False)
class Hashes:
    """The hashes of rows of one shape, in the order of their keys."""

    shape: Shape
    values: array[int]

    def read(self) -> Hashes:
        """As ``Inserted.read_hashes``, of hashes that there are already."""
        return self


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Change:
    """The effect of one statement.

    Attributes:
        table: the real table.
        keys: the rows: scalars where the primary key is one column, else tuples.
        certain: False where it is not known whether it had this effect on these very rows.
    """

    table: KeyedTable
    keys: Sequence[Any] = ()
    certain: bool = field(default=True, kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class Inserted(Change):
    """Rows were inserted.

    Attributes:
        generated: the database made the keys, so that no stranger can hold them.
        named: the user named the rows.
        sent: the keys are as they were sent; the database may have stored others.
        read_hashes: returns hashes of the rows, where the database may give their keys to other
            rows; None where there are none. They are not needed before the COMMIT.
        incarnation: the table's, at the INSERT; None where it is not known.
    """

    generated: bool = False
    named: bool = False
    sent: bool = False
    read_hashes: Callable[[], Hashes | None] | None = None
    incarnation: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InsertedWhole(Change):
    """Rows were inserted into a table without a primary key.

    ``keys`` has whole rows in the order of the columns, or None for a row of unknown values.

    Attributes:
        incarnation: as of :class:`Inserted`.
    """

    incarnation: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Deleted(Change):
    """Rows were deleted."""


@dataclass(frozen=True, slots=True, eq=False)
class DeletedWhole(Change):
    """Rows of a table without a primary key were deleted: whole rows, or None for any row."""


@dataclass(frozen=True, slots=True, eq=False)
class KeysChanged(Change):
    """Primary keys were changed: ``keys`` has (old, new) pairs; new is None where not known.

    Attributes:
        sent: as of :class:`Inserted`, for the new keys.
    """

    sent: bool = False


def cascaded(parents: KeysChanged, child: KeyedTable, keys: Iterable[Any]) -> KeysChanged | None:
    """What ON UPDATE CASCADE does to rows of a table whose key has the changed one in it.

    The models need not say it: without it, the database refuses to change a key that has children.
    """
    names = [column.name for column in child.key_columns]
    by_target = {
        tuple(element.target_fullname.split(".")[-2:]): element.parent.name
        for constraint in child.table.foreign_key_constraints
        for element in constraint.elements
    }
    changed = parents.table
    targets = [(changed.table.name, column.name) for column in changed.key_columns]
    own = [str(by_target[each]) for each in targets if each in by_target]
    if child is changed or len(own) != len(targets) or not set(own) <= set(names):
        return None
    new_keys = dict(parents.keys)
    pairs: list[tuple[Any, Any]] = []
    for key in keys:
        parts = dict(zip(names, child.row(key).key, strict=True))
        old = tuple(parts[each] for each in own)
        old = old if len(old) > 1 else old[0]
        if old in new_keys:
            new = new_keys[old]
            parts.update(zip(own, new if len(own) > 1 else (new,), strict=True))
            moved = tuple(parts.values()) if len(names) > 1 else new
            pairs.append((key, None if new is None else moved))
    # sent: the database may not enforce the foreign key, so that the row has not moved
    return KeysChanged(child, pairs, sent=True) if pairs else None


@dataclass(frozen=True, slots=True, eq=False)
class KeysLost(Change):
    """Primary keys were changed, of unknown rows to unknown values; ``keys`` is empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Updated(Change):
    """Other columns were set; ``keys`` is empty where it may have been any row.

    Attributes:
        columns: those that were set.
        hashes: hashes of the rows as they are now, among them all columns that were compared.
    """

    columns: frozenset[str] = frozenset()
    hashes: Hashes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Noted(Change):
    """What concerns one sink only, and the rows of no store."""


@dataclass(frozen=True, slots=True, eq=False)
class Untracked(Noted):
    """Rows were inserted that nobody can name; ``keys`` is empty.

    Attributes:
        count: how many at most; None where nobody can tell.
    """

    count: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Touched(Noted):
    """Rows were updated or deleted that may be anybody's; for a sink that watches.

    Attributes:
        verb: ``updated`` or ``deleted``.
        count: how many rows.
    """

    verb: str = ""
    count: int = 0


class Sink(Protocol):
    """Receives the changes of an engine's transactions.

    An INSERT concerns the one sink that owns it. Every other change concerns all sinks of the
    engine, which look for their own rows in it.
    """

    @property
    def context(self) -> WorkerContext:
        """Whose tag marks a value as this sink's."""

    @property
    def active(self) -> bool:
        """Whether it takes new rows."""

    @property
    def is_shared(self) -> bool:
        """Whether its rows are for several tests."""

    # -- of a transaction, in this order; a warning of these is never raised as an error --------

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """A COMMIT is about to be sent: write, in its transaction, what it concerns.

        Called again with the same changes where the first COMMIT failed.
        """

    def apply(self, change: Change) -> Change:
        """A change has been committed; returns what is left of it for the other sinks.

        Only of deleted rows without a primary key less may be left than there was.
        """

    def mark_uncertain(self, change: Change) -> Change:
        """It is not known whether a change has been committed; returns what is left of it."""

    def note_untracked(self, untracked: Untracked) -> None:
        """Rows that cannot be tracked have been committed, or perhaps."""

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain; warn now."""

    # -- what it holds -------------------------------------------------------------------------

    def holds(self, table: TableName) -> bool:
        """Whether it holds rows of a table."""

    def held_keys(self, table: TableName, keys: Iterable[Any]) -> list[Any]:
        """Of these keys, those that it holds."""

    def count_of(self, table: TableName) -> int:
        """How many rows of a table are its own, at most."""

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """All keys that it holds."""

    # -- warnings ------------------------------------------------------------------------------

    def warn_once(self, subject: Any, message: str) -> None:
        """Warn of untracked rows, once per block and subject."""

    def warn_late(self, table: KeyedTable) -> None:
        """Warn that rows are committed after the sink has stopped; never raise it as an error."""

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A raw statement is about to drop a database."""
