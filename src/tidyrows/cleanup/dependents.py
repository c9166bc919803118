"""Rows that nobody tracked and that reference ours: found, and sorted by what becomes of them.

What the application under test writes is seen by no listener, but it references our rows. The
schema says, foreign key by foreign key, what must happen to it when our rows go.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.options import Fate, Rules
from tidyrows.cleanup.references import referenced, referencing_pairs
from tidyrows.cleanup.schema_view import SILENT_ACTIONS, with_key

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.dialects import Dialect
    from tidyrows.keys import KeyedTable
    from tidyrows.schema import ForeignKey, Place


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row stays.

    Attributes:
        cause: in words.
        by: who else's row needs it, if that is all.
    """

    cause: str
    by: str | None = None


class TooManyError(Exception):
    """More untracked rows reference these than one transaction is to take."""


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
        hidden: rows of which nobody can see what references them.
    """

    doomed: dict[Place, dict[Any, None]] = field(default_factory=dict)
    dependents: dict[Place, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)
    detached: dict[ForeignKey, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    detached_unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)
    hidden: list[tuple[Place, Any]] = field(default_factory=list)


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
        tracked: our rows, those too that are not to be deleted in this transaction.
        claimed: of rows of a table, who else tracks them; of a table without a primary key, who
            else tracks any row, under the key ``()``.
        kept: rows that are known to stay; grows.
        before: rows that transactions before this one have kept, and why.
        limit: how many dependents may be found, unless all of them are one row's.
    """

    def __init__(
        self,
        connection: sa.Connection,
        dialect: Dialect,
        view: SchemaView,
        rules: Rules,
        *,
        tracked: Mapping[Place, Container[Any]],
        claimed: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]],
        kept: Kept,
        before: Kept,
        limit: int,
    ) -> None:
        self._connection = connection
        self._dialect = dialect
        self._view = view
        self._rules = rules
        self._tracked = tracked
        self._claimed = claimed
        self._limit = limit
        self._enforced = dialect.enforces_foreign_keys(connection)
        self._before = before
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
        """Find what goes with these rows; rows that must stay are put into :attr:`kept`.

        Raises:
            TooManyError: more dependents than the limit, and fewer rows could be asked for.
        """
        if sum(map(len, roots.values())) == 1:
            self._limit = sys.maxsize
        self._keep_referenced(roots, list(_pairs(self.kept)))
        while True:
            doomed = {
                place: dict.fromkeys(key for key in keys if key not in self.kept.get(place, ()))
                for place, keys in roots.items()
            }
            found = Found(doomed=doomed)
            blocks = self._spread(found)
            stay = [row for block in blocks for row in self._kept_by(block, found)] + found.hidden
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
            hidden = [key for key in incoming if acts_unseen(self._view, key)]
            if hidden:
                self._keep_all(place, keys, hidden[0], found)
                continue
            held = found.dependents.get(place, ())  # which were locked when they were found
            roots = [key for key in keys if key not in held] if held else keys
            if roots:
                table = self._view.table(self._connection, place)
                self._dialect.lock(self._connection, table, roots)
            values = referenced_values(
                self._connection, self._dialect, self._view, place, keys, incoming=incoming
            )
            for key in self._with_children(incoming, values):
                sent = values[key.parent_columns]
                new = self._children(key, sent, found, blocks)
                if new:
                    frontier.setdefault(key.child, []).extend(new)
                    if sum(map(len, found.dependents.values())) > self._limit:
                        raise TooManyError
        return blocks

    def _with_children(
        self, incoming: Sequence[ForeignKey], values: Mapping[tuple[str, ...], Sequence[Any]]
    ) -> Sequence[ForeignKey]:
        """The keys by which any row references these: the others may ask for rights in vain."""
        asked = [
            (self._view.reference(self._connection, key), values[key.parent_columns])
            for key in incoming
        ]
        return [incoming[at] for at in self._dialect.tables_with_rows(self._connection, asked)]

    def _children(
        self, key: ForeignKey, values: Sequence[Any], found: Found, blocks: list[_Block]
    ) -> list[Any]:
        """Sort the rows that reference these values; those to be deleted are returned."""
        child = self._view.table(self._connection, key.child)
        reference = self._view.reference(self._connection, key)
        fate = self.fate(key)
        names = [column.name for column in child.key_columns] or [key.child_columns[0]]
        columns = [reference.clause.c[name] for name in names]
        # Held as they are: one that somebody makes reference another row is none of ours then.
        rows = self._dialect.find(self._connection, reference, values, columns, lock=True)
        if not rows:
            return []
        why = self._rules.why_kept(key)
        if not child.key_columns:
            self._nameless(key, values, len(rows), found, blocks)
            return []
        doomed = found.doomed.setdefault(key.child, {})
        single = len(names) == 1
        new = [each for row in rows if (each := row[0] if single else row) not in doomed]
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

    def _nameless(
        self,
        key: ForeignKey,
        values: Sequence[Any],
        count: int,
        found: Found,
        blocks: list[_Block],
    ) -> None:
        """Sort rows without a primary key that reference these values."""
        child, fate = self._view.table(self._connection, key.child), self.fate(key)
        if fate is Fate.KEEPS:
            cause = f"a row of {'.'.join(key.child)} {self._rules.why_kept(key)} and references it"
            blocks.append(_Block(key, None, lambda _row: Reason(cause)))
            return
        whose = self._claimed(self._connection, child, [()]).get(())
        if whose is not None:
            cause = f"a row of {'.'.join(key.child)} of {whose} may be one that references it"
            blocks.append(_Block(key, None, lambda _row: Reason(cause, whose)))
            return
        into = found.unnamed if fate is Fate.DELETED else found.detached_unnamed
        before, counted = into.get(key, ([], 0))
        into[key] = ([*before, *values], counted + count)

    def _free(self, key: ForeignKey, rows: list[Any], blocks: list[_Block]) -> list[Any]:
        """Leave out rows that stay, and note that they keep ours."""
        if not rows:
            return rows
        table = self._view.table(self._connection, key.child)
        kept = self.kept.get(key.child)
        if kept:
            by = {table.row(row): kept[row].by for row in rows if row in kept}
            blocks.append(
                _Block(
                    key,
                    [row for row in rows if row in kept],
                    lambda row: Reason(f"{row} stays and references it", by[row]),
                )
            )
            rows = [row for row in rows if row not in kept]
        tracked = self._tracked.get(key.child)
        if tracked is not None:
            ours = [row for row in rows if row in tracked]
            cause = "is tracked too, could not be deleted and references it"
            before = self._before.get(key.child, {})
            whose = {table.row(row): before[row].by for row in ours if row in before}
            blocks.append(_Block(key, ours, lambda row: Reason(f"{row} {cause}", whose.get(row))))
            rows = [row for row in rows if row not in tracked]
        claims = self._claimed(self._connection, table, rows)
        if not claims:
            return rows
        owners = {table.row(row): owner for row, owner in claims.items()}

        def why(row: Any) -> Reason:
            return Reason(f"{row} of {owners[row]} references it", owners[row])

        blocks.append(_Block(key, list(claims), why))
        return [row for row in rows if row not in claims]

    def _keep_all(self, place: Place, rows: Sequence[Any], key: ForeignKey, found: Found) -> None:
        cause = (
            f"row-level security may hide rows of {'.'.join(key.child)} that reference it by "
            f"({', '.join(key.child_columns)}), and ON DELETE {key.on_delete} would change them "
            f"unseen; clean up with a role that has BYPASSRLS"
        )
        self.kept.setdefault(place, {}).update(dict.fromkeys(rows, Reason(cause)))
        found.hidden += [(place, row) for row in rows]

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
                reason = block.why(None)
                kept[row] = Reason(f"{reason.cause} by {columns}", reason.by)
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


def acts_unseen(view: SchemaView, key: ForeignKey) -> bool:
    """Whether this key may take or change rows that the cleanup is not shown."""
    return key.on_delete in SILENT_ACTIONS and key.child in view.hidden


def referenced_values(
    connection: sa.Connection,
    dialect: Dialect,
    view: SchemaView,
    place: Place,
    keys: Sequence[Any],
    *,
    incoming: Sequence[ForeignKey],
) -> dict[tuple[str, ...], Sequence[Any]]:
    """What these foreign keys may reference of these rows, which are locked already.

    Returns:
        For each choice of columns that a foreign key references, the values of the rows.
    """
    table = view.with_referenced(connection, place)
    names = tuple(column.name for column in table.key_columns)
    choices = dict.fromkeys(key.parent_columns for key in incoming)
    extra = sorted({name for choice in choices for name in choice} - set(names))
    values: dict[tuple[str, ...], Sequence[Any]] = {}
    if any(choice != names for choice in choices):
        listed = [*names, *extra]
        rows = dialect.find(connection, table, keys, [table.clause.c[name] for name in listed])
    for choice in choices:
        at = [listed.index(name) for name in choice] if choice != names else []
        if not at:
            values[choice] = keys
        elif len(at) == 1:
            values[choice] = [row[at[0]] for row in rows if row[at[0]] is not None]
        else:
            picked = (tuple(row[number] for number in at) for row in rows)
            values[choice] = [each for each in picked if None not in each]
        if set(choice) - set(names) and values[choice]:
            # Who inserts a reference to another unique key holds that key's own index entry.
            by_choice = with_key(table, [table.table.c[name] for name in choice], ())
            dialect.lock(connection, by_choice, values[choice])
    return values


def _pairs(kept: Kept) -> Iterable[tuple[Place, Any]]:
    return [(place, key) for place, rows in kept.items() for key in rows]
