"""Rows that nobody tracked and that reference ours: found, and sorted by what becomes of them.

What the application under test writes is seen by no listener, but it references our rows. The
schema says, foreign key by foreign key, what must happen to it when our rows go.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.graphs import with_key
from tidyrows.cleanup.references import referenced, referencing_pairs, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.graphs import SchemaView
    from tidyrows.dialects.base import Dialect
    from tidyrows.schema import ForeignKey, Place


class Dependents(Enum):
    """What a cleanup does with untracked rows that reference tracked ones."""

    FOLLOW_SCHEMA = auto()
    """What each foreign key says. Where it has no action: a row that cannot be without ours (NOT
    NULL) is deleted, one that can is detached, its foreign key set to NULL."""
    DELETE = auto()
    """Delete them all, also where the schema would detach them."""
    ERROR = auto()
    """Touch none: our rows that they reference stay and are reported with them."""


class Fate(Enum):
    """What becomes of a row that references one of ours by a certain foreign key."""

    DELETED = auto()
    DETACHED = auto()
    DETACHED_BY_SCHEMA = auto()
    KEEPS = auto()


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rows go, whatever the schema says.

    Attributes:
        policy: for all other tables.
        own: tables whose rows that reference ours are ours.
        protect: tables whose rows are never touched.
    """

    policy: Dependents = Dependents.FOLLOW_SCHEMA
    own: frozenset[Place] = frozenset()
    protect: frozenset[Place] = frozenset()

    def fate(self, key: ForeignKey, nullable: Iterable[str], *, enforced: bool) -> Fate:
        """What becomes of rows that reference ours by this key.

        Args:
            key: the foreign key.
            nullable: the columns of its table that may become NULL.
            enforced: whether the database does what ON DELETE says.
        """
        if key.child in self.protect:
            return Fate.KEEPS
        if key.child in self.own or self.policy is Dependents.DELETE:
            return Fate.DELETED
        if self.policy is Dependents.ERROR:
            return Fate.KEEPS
        if key.on_delete == "CASCADE":
            return Fate.DELETED
        if key.on_delete in {"SET NULL", "SET DEFAULT"} and enforced:
            return Fate.DETACHED_BY_SCHEMA
        return Fate.DETACHED if set(key.child_columns) & set(nullable) else Fate.DELETED

    def why_kept(self, key: ForeignKey) -> str:
        """Why a row that keeps ours is not touched."""
        if key.child in self.protect:
            return "is protected"
        return "is not tracked (Dependents.ERROR leaves it alone)"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row stays.

    Attributes:
        cause: in words.
        by: who else's row needs it, if that is all.
    """

    cause: str
    by: str | None = None


Kept = dict["Place", dict[Any, Reason]]
"""Rows that stay, by place and key."""


@dataclass(slots=True)
class Found:
    """Rows of one transaction, after looking who references them.

    Attributes:
        doomed: the rows to delete, dependents among them, by place and key.
        dependents: those of ``doomed`` that are not tracked.
        unnamed: rows without a primary key to delete, by the key that they reference ours with:
            the values referenced, and how many rows do.
        detached: rows to detach or that the schema detaches, by foreign key.
        detached_unnamed: the same of rows without a primary key.
    """

    doomed: dict[Place, dict[Any, None]] = field(default_factory=dict)
    dependents: dict[Place, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)
    detached: dict[ForeignKey, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    detached_unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that keep ours: of the child table of a key; all that reference ours if not named."""

    key: ForeignKey
    children: Sequence[Any] | None
    why: Callable[[Any], Reason]


class Discovery:
    """Looks for dependents in the transaction that is going to delete.

    Rows that are to be deleted are locked before their dependents are looked for: that waits for
    those who are inserting one, and keeps new ones out until the transaction ends. So no CASCADE
    takes a row that nobody saw.

    Args:
        connection: in the cleanup's transaction.
        dialect: of its database.
        view: the schema.
        rules: what becomes of dependents.
        is_tracked: whether a row is one of ours that is not to be deleted in this transaction.
        claimed: of these rows, who else in this process tracks them.
        kept: rows that are known to stay; grows.
    """

    def __init__(
        self,
        connection: sa.Connection,
        dialect: Dialect,
        view: SchemaView,
        rules: Rules,
        *,
        is_tracked: Callable[[Place, Any], bool],
        claimed: Callable[[Place, Sequence[Any]], Mapping[Any, str]],
        kept: Kept,
    ) -> None:
        self._connection = connection
        self._dialect = dialect
        self._view = view
        self._rules = rules
        self._is_tracked = is_tracked
        self._claimed = claimed
        self._enforced = dialect.enforces_foreign_keys(connection)
        self.kept = kept

    def fate(self, key: ForeignKey) -> Fate:
        """What becomes of rows that reference ours by this key."""
        nullable: frozenset[str] = frozenset()
        if key.on_delete not in {"CASCADE", "SET NULL", "SET DEFAULT"} or not self._enforced:
            nullable = self._view.nullable(self._connection, key.child)
        return self._rules.fate(key, nullable, enforced=self._enforced)

    def nulled(self, key: ForeignKey) -> list[str]:
        """The columns that detach a row: those that no other key of its table needs, if any."""
        nullable = self._view.nullable(self._connection, key.child)
        own = [name for name in key.child_columns if name in nullable]
        shared = {
            name
            for other in self._view.graph.outgoing(key.child)
            if other.meaning != key.meaning and other.source == "database"
            for name in other.child_columns
        }
        return [name for name in own if name not in shared] or own

    def look(self, roots: Mapping[Place, Sequence[Any]]) -> Found:
        """Find what goes with these rows; rows that must stay are put into :attr:`kept`."""
        self._keep_referenced(roots, list(_pairs(self.kept)))
        while True:
            doomed = {
                place: dict.fromkeys(key for key in keys if key not in self.kept.get(place, ()))
                for place, keys in roots.items()
            }
            found = Found(doomed=doomed)
            blocks = self._spread(found)
            stay = [(place, key) for block in blocks for place, key in self._kept_by(block, found)]
            if not stay:
                return found
            self._keep_referenced(found.doomed, stay)

    # -- downwards: who references what goes ---------------------------------------------------

    def _spread(self, found: Found) -> list[_Block]:
        blocks: list[_Block] = []
        frontier = {place: list(keys) for place, keys in found.doomed.items() if keys}
        while frontier:
            place = max(frontier, key=lambda place: (self._view.graph.rank(place), place))
            keys = frontier.pop(place)
            incoming = self._view.incoming(place)
            if not incoming:
                continue
            values = referenced_values(
                self._connection, self._dialect, self._view, place, keys, incoming=incoming
            )
            for key in self._with_children(incoming, values):
                sent = values[key.parent_columns]
                new = self._children(key, sent, found, blocks)
                if new:
                    frontier.setdefault(key.child, []).extend(new)
        return blocks

    def _with_children(
        self, incoming: Sequence[ForeignKey], values: Mapping[tuple[str, ...], Sequence[Any]]
    ) -> Sequence[ForeignKey]:
        """The keys by which any row references these; one statement where they are few."""
        most = max(map(len, values.values()))
        if len(incoming) == 1 or most > self._dialect.probed_together:
            return incoming
        asked = [
            (self._view.reference(self._connection, key), values[key.parent_columns])
            for key in incoming
        ]
        return [incoming[at] for at in self._dialect.first_found(self._connection, asked)]

    def _children(
        self, key: ForeignKey, values: Sequence[Any], found: Found, blocks: list[_Block]
    ) -> list[Any]:
        """Sort the rows that reference these values; those to be deleted are returned."""
        child = self._view.table(self._connection, key.child)
        reference = self._view.reference(self._connection, key)
        fate = self.fate(key)
        names = [column.name for column in child.key_columns] or [key.child_columns[0]]
        columns = [reference.clause.c[name] for name in names]
        rows = self._dialect.find(self._connection, reference, values, columns)
        if not rows:
            return []
        why = self._rules.why_kept(key)
        if not child.key_columns:
            if fate is Fate.KEEPS:
                cause = f"a row of {'.'.join(key.child)} {why} and references it"
                blocks.append(_Block(key, None, lambda _row: Reason(cause)))
                return []
            into = found.unnamed if fate is Fate.DELETED else found.detached_unnamed
            before, counted = into.get(key, ([], 0))
            into[key] = ([*before, *values], counted + len(rows))
            return []
        doomed = found.doomed.setdefault(key.child, {})
        new = [each for row in rows if (each := stored(row)) not in doomed]
        if fate is Fate.KEEPS and new:
            blocks.append(_Block(key, new, lambda row: Reason(f"{row} {why} and references it")))
            return []
        new = self._free(key, new, blocks)
        if fate is Fate.DELETED:
            doomed.update(dict.fromkeys(new))
            found.dependents[key.child].update(dict.fromkeys(new))
            return new
        found.detached[key].update(dict.fromkeys(new))
        return []

    def _free(self, key: ForeignKey, rows: list[Any], blocks: list[_Block]) -> list[Any]:
        """Leave out rows that stay, and note that they keep ours."""
        if not rows:
            return rows
        kept = self.kept.get(key.child, {})
        staying = [row for row in rows if row in kept]
        if staying:
            table = self._view.table(self._connection, key.child)
            reasons = {str(table.row(row)): kept[row].by for row in staying}
            blocks.append(
                _Block(
                    key,
                    staying,
                    lambda row: Reason(f"{row} stays and references it", reasons.get(str(row))),
                )
            )
        tracked = [row for row in rows if row not in kept and self._is_tracked(key.child, row)]
        if tracked:
            cause = "is tracked too, could not be deleted and references it"
            blocks.append(_Block(key, tracked, lambda row: Reason(f"{row} {cause}")))
        taken = {*staying, *tracked}
        rows = [row for row in rows if row not in taken]
        claims = self._claimed(key.child, rows)
        if claims:
            table = self._view.table(self._connection, key.child)
            owners = {str(table.row(row)): owner for row, owner in claims.items()}
            blocks.append(
                _Block(
                    key,
                    list(claims),
                    lambda row: Reason(
                        f"{row} of {owners[str(row)]} references it",
                        owners[str(row)],
                    ),
                )
            )
        return [row for row in rows if row not in claims]

    # -- upwards: what a row that stays needs ---------------------------------------------------

    def _kept_by(self, block: _Block, found: Found) -> list[tuple[Place, Any]]:
        """Rows that were to go and that the rows of a block reference."""
        key = block.key
        doomed = found.doomed.get(key.parent, {})
        parent = self._view.with_referenced(self._connection, key.parent)
        columns = f"({', '.join(key.child_columns)})"
        kept = self.kept.setdefault(key.parent, {})
        stay: list[tuple[Place, Any]] = []
        if block.children is None:
            for row in referenced(self._connection, key, parent, list(doomed)):
                kept[row] = Reason(f"{block.why(None).cause} by {columns}")
                stay.append((key.parent, row))
            return stay
        child = self._view.table(self._connection, key.child)
        pairs = referencing_pairs(self._connection, key, child, block.children, parent)
        for child_key, row in list(pairs):
            if row in doomed and row not in kept:
                reason = block.why(child.row(child_key))
                kept[row] = Reason(f"{reason.cause} by {columns}", reason.by)
                stay.append((key.parent, row))
        return stay

    def _keep_referenced(
        self, doomed: Mapping[Place, Iterable[Any]], stay: list[tuple[Place, Any]]
    ) -> None:
        """Keep every row that was to go and that a row which stays references, and so on."""
        going = {place: set(keys) for place, keys in doomed.items()} if stay else {}
        while stay:
            by_place: dict[Place, list[Any]] = defaultdict(list)
            for place, row in stay:
                by_place[place].append(row)
            stay = []
            for place, rows in by_place.items():
                child = self._view.table(self._connection, place)
                for key in self._view.graph.outgoing(place):
                    if key.source != "database" or not going.get(key.parent):
                        continue
                    parent = self._view.with_referenced(self._connection, key.parent)
                    kept = self.kept.setdefault(key.parent, {})
                    pairs = referencing_pairs(self._connection, key, child, rows, parent)
                    for child_key, row in list(pairs):
                        if row in going[key.parent] and row not in kept:
                            columns = ", ".join(key.child_columns)
                            kept[row] = Reason(
                                f"{child.row(child_key)} stays and references it by ({columns})",
                                self.kept.get(place, {})[child_key].by,
                            )
                            stay.append((key.parent, row))


def referenced_values(
    connection: sa.Connection,
    dialect: Dialect,
    view: SchemaView,
    place: Place,
    keys: Sequence[Any],
    *,
    incoming: Sequence[ForeignKey],
) -> dict[tuple[str, ...], Sequence[Any]]:
    """Lock these rows, and read what these foreign keys may reference of them.

    Returns:
        For each choice of columns that a foreign key references, the values of the rows.
    """
    table = view.with_referenced(connection, place)
    names = tuple(column.name for column in table.key_columns)
    choices = dict.fromkeys(key.parent_columns for key in incoming)
    extra = sorted({name for choice in choices for name in choice} - set(names))
    if not (dialect.locks_rows or extra or any(choice != names for choice in choices)):
        return dict.fromkeys(choices, keys)
    listed = [*names, *extra]
    columns = [table.clause.c[name] for name in listed]
    rows = dialect.find(connection, table, keys, columns, lock=dialect.locks_rows)
    values: dict[tuple[str, ...], Sequence[Any]] = {}
    for choice in choices:
        at = [listed.index(name) for name in choice]
        picked = (tuple(row[number] for number in at) for row in rows)
        values[choice] = [stored(each) for each in picked if None not in each]
        if dialect.locks_rows and set(choice) - set(names) and values[choice]:
            # A reference to another unique key is held by that key's own index entry.
            by_choice = with_key(table, [table.table.c[name] for name in choice], ())
            held = [by_choice.clause.c[choice[0]]]
            dialect.find(connection, by_choice, values[choice], held, lock=True)
    return values


def _pairs(kept: Kept) -> Iterable[tuple[Place, Any]]:
    return [(place, key) for place, rows in kept.items() for key in rows]
