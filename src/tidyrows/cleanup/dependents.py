"""Finds untracked rows that reference ours, and sorts them by what happens to them.

The application under test writes such rows, and no listener sees that.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
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
    """Too many untracked rows reference these for one transaction, or to find them takes long."""


@dataclass(slots=True)
class Found:
    """Rows of one transaction, after looking for what references them, by key.

    Those without a primary key are unnamed: the values that they reference, and their number.
    """

    doomed: dict[Place, dict[Any, None]]  # with the dependents
    dependents: dict[Place, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    # by us or by the schema
    detached: dict[ForeignKey, dict[Any, None]] = field(default_factory=lambda: defaultdict(dict))
    parents: set[Place] = field(default_factory=set)  # tables with rows that others reference
    # to delete or to detach, as is the fate of the key
    unnamed: dict[ForeignKey, tuple[list[Any], int]] = field(default_factory=dict)


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
        self._remaining = scope.run.remaining
        self._limit = limit
        self._enforced = self._dialect.enforces_foreign_keys(connection)
        self._before = scope.outcome.kept
        self._again = False  # rows were kept that were to go
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
        self._until = 0.75 * self._remaining()  # what is left when a smaller part is tried instead
        if sum(map(len, roots.values())) == 1:
            self._limit, self._until = sys.maxsize, 0.0
        while True:
            doomed = {
                place: dict.fromkeys(key for key in keys if key not in self.kept.get(place, ()))
                for place, keys in roots.items()
            }
            found, self._again = Found(doomed), False
            self._spread(found)
            if not self._again:
                return found

    # -- downwards: what references the rows that go -------------------------------------------

    def _spread(self, found: Found) -> None:
        frontier = {place: list(keys) for place, keys in found.doomed.items() if keys}
        while frontier:
            place = self._next(frontier)
            keys = frontier.pop(place)
            incoming = self._view.incoming(place)
            if not incoming:
                continue
            hidden = [key for key in incoming if acts_unseen(self._view, key)]
            if hidden:
                child = self._view.table(self._connection, hidden[0].child).name
                columns = hidden[0].child_columns
                reason = Reason(LeftoverKind.HIDDEN, item=child, columns=columns)
                self.kept.setdefault(place, {}).update(dict.fromkeys(keys, reason))
                self._again = True
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
            if used:
                found.parents.add(place)
            for key, values in used:
                new = self._children(key, values, found)
                if new:
                    frontier.setdefault(key.child, []).extend(new)
                    if sum(map(len, found.dependents.values())) > self._limit:
                        raise TooManyError

    def _next(self, frontier: Iterable[Place]) -> Place:
        if self._remaining() < self._until:
            raise TooManyError
        return max(frontier, key=lambda place: (self._view.graph.rank(place), place))

    def _children(self, key: ForeignKey, values: Sequence[Any], found: Found) -> list[Any]:
        """Sort the rows that reference these values; those to be deleted are returned."""
        child = self._view.table(self._connection, key.child)
        reference = self._view.reference(self._connection, key)
        names = [column.name for column in child.key_columns] or [key.child_columns[0]]
        columns = [reference.clause.c[name] for name in names]
        # Locked: the application must not let one of them reference another row meanwhile.
        rows = self._dialect.find(self._connection, reference, values, columns, lock=True)
        if not rows:
            return []
        fate = self.fate(key)
        if not child.key_columns:
            holder = None
            if fate is not Fate.BLOCKS:
                holder = self._claimed(self._connection, child, [()]).get(())
            if holder is None and fate is not Fate.BLOCKS:
                before, count = found.unnamed.get(key, ([], 0))
                found.unnamed[key] = [*before, *values], count + len(rows)
            else:
                kind = LeftoverKind.HELD if holder else self._rules.kind_of_block(key)
                self._keep(key, None, kind, {None: holder}, found)
            return []
        doomed = found.doomed.setdefault(key.child, {})
        single = len(names) == 1
        new = [each for row in rows if (each := row[0] if single else row) not in doomed]
        if fate is Fate.BLOCKS:
            if new:
                self._keep(key, new, self._rules.kind_of_block(key), {}, found)
            return []
        new = self._free(key, new, found)
        if fate is Fate.DELETED:
            fresh = dict.fromkeys(new)
            doomed.update(fresh)
            found.dependents[key.child].update(fresh)
            return new
        found.detached[key].update(dict.fromkeys(new))
        return []

    def _free(self, key: ForeignKey, rows: list[Any], found: Found) -> list[Any]:
        """Leave out rows that stay; they keep ours."""
        kept, tracked = self.kept.get(key.child, {}), self._tracked.get(key.child, ())
        before = self._before.get(key.child, {})
        stay = {
            row: reason.holder if (reason := kept.get(row, before.get(row))) else None
            for row in rows
            if row in kept or row in tracked
        }
        if stay:
            self._keep(key, list(stay), LeftoverKind.REFERENCED, stay, found)
            rows = [row for row in rows if row not in stay]
        table = self._view.table(self._connection, key.child)
        claims = self._claimed(self._connection, table, rows) if rows else {}
        if not claims:
            return rows
        self._keep(key, list(claims), LeftoverKind.HELD, claims, found)
        return [row for row in rows if row not in claims]

    # -- upwards: what a row that stays needs ---------------------------------------------------

    def _keep(
        self,
        key: ForeignKey,
        children: Sequence[Any] | None,
        kind: LeftoverKind,
        holders: Mapping[Any, str | None],
        found: Found,
    ) -> None:
        """Keep the rows that were to go and that these children reference, and so on upwards.

        Without children: all rows that are referenced by this key.
        """
        todo = [(key, children, holders)]
        for key, children, holders in todo:  # noqa: PLR1704 -- it grows
            child = self._view.table(self._connection, key.child)
            parent = self._view.with_referenced(self._connection, key.parent)
            doomed = found.doomed.get(key.parent, {})
            pairs: Iterable[tuple[Any, Any]]
            if children is None:
                rows = referenced(self._connection, key, parent, list(doomed))
                pairs = [(None, row) for row in rows]
            else:
                pairs = referencing_pairs(self._connection, key, child, children, parent)
            kept = self.kept.setdefault(key.parent, {})
            new: dict[Any, str | None] = {}
            for child_key, row in pairs:
                if row in doomed and row not in kept:
                    item = child.name if child_key is None else child.row(child_key)
                    new[row] = holders.get(child_key)
                    kept[row] = Reason(kind, item=item, columns=key.child_columns, holder=new[row])
                    self._again = True
            kind = LeftoverKind.REFERENCED
            todo += [
                (each, list(new), new)
                for each in self._view.graph.outgoing(key.parent)
                if new and each.source == "database" and found.doomed.get(each.parent)
            ]


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
    choices = dict.fromkeys([key.parent_columns for key in incoming])
    choices.pop(names, None)
    values: dict[tuple[str, ...], Sequence[Any]] = {names: keys}
    if choices:
        listed = list(dict.fromkeys(name for choice in (names, *choices) for name in choice))
        rows = dialect.find(connection, table, keys, [table.clause.c[name] for name in listed])
    for choice in choices:
        picked = map(itemgetter(*map(listed.index, choice)), rows)
        single = len(choice) == 1
        values[choice] = [each for each in picked if None not in ((each,) if single else each)]
        if set(choice) - set(names) and values[choice]:
            # An INSERT that references another unique key locks that key's own index entry.
            by_choice = with_key(table, [table.table.c[name] for name in choice], ())
            dialect.lock(connection, by_choice, values[choice])
    asked = [(view.reference(connection, key), values[key.parent_columns]) for key in incoming]
    return [
        (incoming[at], values[incoming[at].parent_columns])
        for at in dialect.tables_with_rows(connection, asked)
    ]
