"""Finds untracked rows that reference ours, and sorts them by what happens to them.

The application under test writes such rows, and no listener sees that.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.options import Fate
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.schema_view import SILENT_ACTIONS, referenced, referencing_pairs, with_key

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.run import Kept, Scope
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.dialects import Dialect
    from tidyrows.schema.graph import ForeignKey, Place


class TooManyError(Exception):
    """More untracked rows reference these than one transaction is to delete."""


@dataclass(slots=True)
class Found:
    """Rows of one transaction, after looking for what references them, by key.

    Those without a primary key are unnamed: the values that they reference, and their number.
    """

    doomed: dict[Place, dict[Any, None]] = field(default_factory=dict)  # with the dependents
    dependents: dict[Place, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)  # to delete
    # by us or by the schema
    detached: dict[ForeignKey, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    detached_unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)
    # with references that the role of the cleanup may not see
    hidden: list[tuple[Place, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of the child table of a key that keep ours; all that reference ours if not named."""

    key: ForeignKey
    children: Sequence[Any] | None
    kind: LeftoverKind
    holders: Mapping[Any, str | None] = field(default_factory=dict)


class Discovery:
    """Looks for dependents in the transaction that is going to delete.

    Rows that are to be deleted are locked before their dependents are looked for: that waits for
    transactions that are inserting one, and keeps new ones out until this one ends. So no CASCADE
    deletes a row that was not found.
    """

    def __init__(
        self,
        scope: Scope,
        connection: sa.Connection,
        *,
        tracked: Mapping[Place, Container[Any]],
        limit: int,
    ) -> None:
        self._connection = connection
        self._dialect = scope.database.dialect
        self._view = scope.view
        self._rules = scope.rules
        self._tracked = tracked
        self._claimed = scope.run.claimed
        self._limit = limit
        self._enforced = self._dialect.enforces_foreign_keys(connection)
        self._before = scope.outcome.kept
        self.kept: Kept = {place: dict(kept) for place, kept in scope.stay.items()}

    def fate(self, key: ForeignKey) -> Fate:
        """What becomes of rows that reference ours by this key."""
        nullable: frozenset[str] = frozenset()
        if key.on_delete not in SILENT_ACTIONS or not self._enforced:
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
        if sum(map(len, roots.values())) == 1:
            self._limit = sys.maxsize
        self._keep_referenced(roots, [(place, key) for place, m in self.kept.items() for key in m])
        while True:
            doomed = {
                place: dict.fromkeys(key for key in keys if key not in self.kept.get(place, ()))
                for place, keys in roots.items()
            }
            found = Found(doomed=doomed)
            blocks = self._spread(found)
            stay = [row for block in blocks for row in self._blocked(block, found)] + found.hidden
            if not stay:
                return found
            self._keep_referenced(found.doomed, stay)

    # -- downwards: what references the rows that go -------------------------------------------

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
            roots: Sequence[Any] = keys
            if held:
                roots = [k for k in keys if k not in held] if len(held) != len(keys) else ()
            if roots:
                table = self._view.table(self._connection, place)
                self._dialect.lock(self._connection, table, roots)
            used = keys_in_use(
                self._connection, self._dialect, self._view, place, keys, incoming=incoming
            )
            for key, values in used:
                new = self._children(key, values, found, blocks)
                if new:
                    frontier.setdefault(key.child, []).extend(new)
                    if sum(map(len, found.dependents.values())) > self._limit:
                        raise TooManyError
        return blocks

    def _children(
        self, key: ForeignKey, values: Sequence[Any], found: Found, blocks: list[_Block]
    ) -> list[Any]:
        """Sort the rows that reference these values; those to be deleted are returned."""
        child = self._view.table(self._connection, key.child)
        reference = self._view.reference(self._connection, key)
        names = [column.name for column in child.key_columns] or [key.child_columns[0]]
        columns = [reference.clause.c[name] for name in names]
        # Locked: the application must not let one of them reference another row meanwhile.
        rows = self._dialect.find(self._connection, reference, values, columns, lock=True)
        if not rows:
            return []
        if not child.key_columns:
            self._unnamed(key, values, len(rows), found, blocks)
            return []
        fate = self.fate(key)
        doomed = found.doomed.setdefault(key.child, {})
        single = len(names) == 1
        new = [each for row in rows if (each := row[0] if single else row) not in doomed]
        if fate is Fate.BLOCKS and new:
            blocks.append(_Block(key, new, self._rules.kind_of_block(key)))
            return []
        new = self._free(key, new, blocks)
        if fate is Fate.DELETED:
            fresh = dict.fromkeys(new)
            doomed.update(fresh)
            found.dependents[key.child].update(fresh)
            return new
        found.detached[key].update(dict.fromkeys(new))
        return []

    def _unnamed(
        self, key: ForeignKey, values: Sequence[Any], count: int, found: Found, blocks: list[_Block]
    ) -> None:
        """Sort rows without a primary key that reference these values."""
        child, fate = self._view.table(self._connection, key.child), self.fate(key)
        if fate is Fate.BLOCKS:
            blocks.append(_Block(key, None, self._rules.kind_of_block(key)))
            return
        holder = self._claimed(self._connection, child, [()]).get(())
        if holder is not None:
            blocks.append(_Block(key, None, LeftoverKind.HELD, {None: holder}))
            return
        into = found.unnamed if fate is Fate.DELETED else found.detached_unnamed
        before, counted = into.get(key, ([], 0))
        into[key] = ([*before, *values], counted + count)

    def _free(self, key: ForeignKey, rows: list[Any], blocks: list[_Block]) -> list[Any]:
        """Leave out rows that stay, and note that they keep ours."""
        kept = self.kept.get(key.child)
        if kept:
            stay = {row: kept[row].holder for row in rows if row in kept}
            if stay:
                blocks.append(_Block(key, list(stay), LeftoverKind.REFERENCED, stay))
            rows = [row for row in rows if row not in kept]
        tracked = self._tracked.get(key.child)
        if tracked is not None:
            before = self._before.get(key.child, {})
            ours = {r: before[r].holder if r in before else None for r in rows if r in tracked}
            if ours:
                blocks.append(_Block(key, list(ours), LeftoverKind.REFERENCED, ours))
                rows = [row for row in rows if row not in ours]
        if not rows:
            return rows
        table = self._view.table(self._connection, key.child)
        claims = self._claimed(self._connection, table, rows)
        if not claims:
            return rows
        blocks.append(_Block(key, list(claims), LeftoverKind.HELD, claims))
        return [row for row in rows if row not in claims]

    def _keep_all(self, place: Place, rows: Sequence[Any], key: ForeignKey, found: Found) -> None:
        child = self._view.table(self._connection, key.child).name
        reason = Reason(LeftoverKind.HIDDEN, item=child, columns=key.child_columns)
        self.kept.setdefault(place, {}).update(dict.fromkeys(rows, reason))
        found.hidden += [(place, row) for row in rows]

    # -- upwards: what a row that stays needs ---------------------------------------------------

    def _blocked(self, block: _Block, found: Found) -> list[tuple[Place, Any]]:
        """Rows that were to go and that the rows of a block reference."""
        key = block.key
        doomed = found.doomed.get(key.parent, {})
        if block.children is not None:
            pairs = self._pairs(key, block.children)
        else:
            parent = self._view.with_referenced(self._connection, key.parent)
            pairs = [(None, row) for row in referenced(self._connection, key, parent, list(doomed))]
        return self._keep(key, pairs, doomed, block.kind, block.holders)

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
                holders = {row: self.kept[place][row].holder for row in rows}
                for key in self._view.graph.outgoing(place):
                    doomed_there = going.get(key.parent)
                    if key.source == "database" and doomed_there:
                        pairs = self._pairs(key, rows)
                        kind = LeftoverKind.REFERENCED
                        stay += self._keep(key, pairs, doomed_there, kind, holders)

    def _pairs(self, key: ForeignKey, children: Sequence[Any]) -> list[tuple[Any, Any]]:
        """Each of these rows that references a parent by this key, with the parent's key."""
        child = self._view.table(self._connection, key.child)
        parent = self._view.with_referenced(self._connection, key.parent)
        return list(referencing_pairs(self._connection, key, child, children, parent))

    def _keep(
        self,
        key: ForeignKey,
        pairs: Iterable[tuple[Any, Any]],
        going: Container[Any],
        kind: LeftoverKind,
        holders: Mapping[Any, str | None],
    ) -> list[tuple[Place, Any]]:
        """Keep the referenced rows of these pairs that were to go; returns the new ones."""
        child = self._view.table(self._connection, key.child)
        kept = self.kept.setdefault(key.parent, {})
        new: list[tuple[Place, Any]] = []
        for child_key, row in pairs:
            if row in going and row not in kept:
                item = child.name if child_key is None else child.row(child_key)
                holder = holders.get(child_key)
                kept[row] = Reason(kind, item=item, columns=key.child_columns, holder=holder)
                new.append((key.parent, row))
        return new


def acts_unseen(view: SchemaView, key: ForeignKey) -> bool:
    """Whether this key may take or change rows that the cleanup is not shown."""
    return key.on_delete in SILENT_ACTIONS and key.child in view.hidden


def keys_in_use(
    connection: sa.Connection,
    dialect: Dialect,
    view: SchemaView,
    place: Place,
    keys: Sequence[Any],
    *,
    incoming: Sequence[ForeignKey],
) -> list[tuple[ForeignKey, Sequence[Any]]]:
    """The foreign keys by which any row references these locked rows, and the values referenced.

    The tables of the others are not asked again: that may need rights for nothing.
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
            # An INSERT that references another unique key locks that key's own index entry.
            by_choice = with_key(table, [table.table.c[name] for name in choice], ())
            dialect.lock(connection, by_choice, values[choice])
    asked = [(view.reference(connection, key), values[key.parent_columns]) for key in incoming]
    return [
        (incoming[at], values[incoming[at].parent_columns])
        for at in dialect.tables_with_rows(connection, asked)
    ]
