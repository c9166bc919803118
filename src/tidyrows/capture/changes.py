"""What a statement did to rows of one table: a few frozen values, whose identity is their hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.capture.hashes import Hashes
    from tidyrows.keys import KeyedTable


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
        hashes: hashes of the rows, where the database may give their keys to other rows.
    """

    generated: bool = False
    named: bool = False
    hashes: Hashes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InsertedWhole(Change):
    """Rows were inserted into a table without a primary key.

    ``keys`` has whole rows in the order of the columns, or None for a row of unknown values.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Deleted(Change):
    """Rows were deleted."""


@dataclass(frozen=True, slots=True, eq=False)
class DeletedWhole(Change):
    """Rows of a table without a primary key were deleted: whole rows, or None for any row."""


@dataclass(frozen=True, slots=True, eq=False)
class KeysChanged(Change):
    """Primary keys were changed: ``keys`` has (old, new) pairs; new is None where not known."""


@dataclass(frozen=True, slots=True, eq=False)
class KeysLost(Change):
    """Primary keys were changed, of unknown rows to unknown values; ``keys`` is empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Updated(Change):
    """Other columns were set; ``keys`` is empty where it may have been any row."""

    columns: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Touched(Change):
    """Rows were updated or deleted that may be anybody's; for a sink that watches.

    Attributes:
        verb: ``updated`` or ``deleted``.
        count: how many rows.
    """

    verb: str = ""
    count: int = 0
