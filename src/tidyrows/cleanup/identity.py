"""Whether the rows that have our keys now are still ours, where a key may come again.

A row whose values have the recorded hash is ours. Any other may be ours and changed, or somebody
else's; it stays. It is read and locked in the transaction that deletes; a key that names no row
then is not deleted either, since a row of somebody else may come before the DELETE. In a
sweep several trackers may have recorded a hash under one key, one after the other: any will do.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tidyrows.capture.affected_rows import only_ours_can_hold
from tidyrows.capture.changes import Shape
from tidyrows.capture.fingerprints import (
    NEVER,
    VALUES,
    hashes_as_read,
    raw_columns,
    row_hashes,
)
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.dialects import dialect_for, was_dropped
from tidyrows.dialects.keys import chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKeyGraph, Place
    from tidyrows.tracking.store import TableHoldings

_ROWS_AT_ONCE = 5_000


class Incarnations:
    """Which rows were inserted in another incarnation of their table than the present one.

    A TRUNCATE waits for every transaction that has locked a row of the table. So a table is asked
    for its incarnation by the DELETE itself, or after it.

    Attributes:
        present: the incarnation of each table; "" where nobody knows it.
        highest: the highest key that the database has generated, where it has generated all.
        unasked: tables that must be asked before the DELETE: their rows are of several.
        former: rows of another incarnation, which are no targets, and why.
        dropped: those among them that are gone with their table.
    """

    def __init__(self) -> None:
        self.present: dict[Place, str] = {}
        self.highest: dict[Place, int] = {}
        self.unasked: set[Place] = set()
        self.former: dict[Place, dict[Any, Reason]] = {}
        self.dropped: dict[Place, set[Any]] = {}
        self._held: dict[Place, TableHoldings] = {}

    def add(self, held: TableHoldings, keys: Sequence[Any]) -> None:
        """These rows, with these keys in order, are to be deleted."""
        place = held.table.place
        if held.named or held.former:
            keys = [key for key in keys if key not in held.named and key not in held.former]
        last = keys[-1] if keys and held.generated else None
        self.highest[place] = last if type(last) is int else 0
        if held.incarnation or self.highest[place]:
            self._held[place] = held
            self.present[place] = held.incarnation or ""
            if held.former:
                self.unasked.add(place)

    def learn(self, place: Place, now: str) -> bool:
        """The table is in this incarnation; whether that is news."""
        known, held = self.present[place], self._held[place]
        if known == now and place not in self.unasked:
            return False
        self.unasked.discard(place)
        self.present[place] = now
        before = held.of_another(now)
        dropped = {key for key in before if now and was_dropped(before[key], now)}
        unknown: Iterable[Any] = ()
        if now.endswith("<"):
            unknown = (*held.keys, *held.in_doubt)
        elif before:
            unknown = [key for key, each in held.former.items() if each is None]
        former = [*before, *(key for key in unknown if key not in held.named)]
        reason = Reason(LeftoverKind.UNCERTAIN, names=(str(held.table.name),))
        self.former[place] = dict.fromkeys(former, reason)
        self.dropped[place] = dropped
        return bool(known or former)


class Identity:
    """Tells whether rows are still those that a tracker held at the beginning of the cleanup."""

    def __init__(
        self, held: Iterable[TableHoldings], dead: Iterable[TableHoldings], *, trusts_named: bool
    ) -> None:
        self._trusts_named = trusts_named
        self._dead: dict[Place, list[TableHoldings]] = {}
        for each in dead:
            self._dead.setdefault(each.table.place, []).append(each)
        self._held: dict[Place, TableHoldings] = {each.table.place: each for each in held}
        self._hashes: dict[Place, list[tuple[Shape, dict[Any, int]]]] = {}

    def uncertain(
        self,
        connection: sa.Connection,
        graph: ForeignKeyGraph,
        table: KeyedTable,
        keys: Sequence[Any],
    ) -> Mapping[Any, Reason]:
        """Of rows with these keys, those that may not be ours, and why.

        So are rows whose key contains that of such a row: joined inheritance, association tables.
        """
        held = self._held.get(table.place)
        if held is None or not keys:
            return {}
        parents = list(self._parents(graph, table))
        unsure = self._changed(connection, held, keys, parents)
        for parent, at in parents:
            if parent.hashes is None:
                continue
            by_parent: dict[Any, list[Any]] = {}
            for key in keys:
                if key not in held.named:
                    by_parent.setdefault(table.row(key).key[at], []).append(key)
            ours = [key for key in by_parent if key in parent.keys]
            for key in self.uncertain(connection, graph, parent.table, ours):
                reason = Reason(LeftoverKind.UNCERTAIN, item=parent.table.row(key))
                unsure.update((child, reason) for child in by_parent[key] if child not in unsure)
        return unsure

    def _changed(
        self,
        connection: sa.Connection,
        held: TableHoldings,
        keys: Sequence[Any],
        parents: Iterable[tuple[TableHoldings, int]],
    ) -> dict[Any, Reason]:
        """The rows that are not as they were inserted, and why.

        A row that references a row of ours by its key, which is final, is as much ours.
        """
        table, place = held.table, held.table.place
        if held.hashes is None:
            return {}
        if place not in self._hashes:
            self._hashes[place] = list(held.hashes.by_shape())
        told = held.named if self._trusts_named else ()
        compared = [key for key in keys if key not in told] if told else keys
        for parent, at in parents:
            final = self._final(connection, parent)
            compared = [key for key in compared if not final(table.row(key).key[at])]
        unsure = _uncertain(connection, table, compared, held, self._hashes[place])
        for each in self._dead.get(place, ()) if unsure else ():
            asked = [key for key in unsure if key in each.keys]
            hashes = () if each.hashes is None or not asked else each.hashes.by_shape()
            still = _uncertain(connection, table, asked, each, hashes)
            for key in set(asked).difference(still):
                del unsure[key]
        return unsure

    def _parents(
        self, graph: ForeignKeyGraph, table: KeyedTable
    ) -> Iterable[tuple[TableHoldings, int]]:
        """What each column of the primary key references, with the column's number in the key."""
        for key in graph.outgoing(table.place):
            parent = self._held.get(key.parent)
            if parent is None or key.is_self_reference:
                continue
            names, theirs = ([c.name for c in t.key_columns] for t in (table, parent.table))
            column, *others = key.child_columns
            if column in names and not others and theirs == [*key.parent_columns]:
                yield parent, names.index(column)

    def _final(self, connection: sa.Connection, parent: TableHoldings) -> Callable[[Any], bool]:
        """Tells of a key whether it is that of a row of ours and of no other row, ever."""
        reused = dialect_for(connection.engine).reuses_keys

        def is_final(key: Any) -> bool:
            generated = parent.generated and key not in parent.named
            return key in parent.keys and only_ours_can_hold(
                (key,), generated=generated, reused=reused
            )

        return is_final


def identity_of(
    held: Sequence[TableHoldings], *, is_sweep: bool, dead: Sequence[TableHoldings]
) -> Identity | None:
    """What answers for these rows; None where no key of theirs can come back.

    Rows that the user named are believed until their worker has died. ``dead`` has what each
    tracker of dead workers held.
    """
    for each in held:
        if each.hashes is not None:
            return Identity(held, dead, trusts_named=not is_sweep)
    return None


def _uncertain(
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    held: TableHoldings,
    by_shape: Iterable[tuple[Shape, Mapping[Any, int]]],
) -> dict[Any, Reason]:
    unsure: dict[Any, Reason] = {}
    for shape, hashes in by_shape:
        compared = [key for key in keys if key in hashes]
        if shape.columns or not _are_final(connection, table, compared, held):
            for asked in chunks(compared, _ROWS_AT_ONCE):
                unsure |= uncertain_keys(connection, table, asked, shape, hashes, lock=True)
    return unsure


def uncertain_keys(
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    shape: Shape,
    hashes: Mapping[Any, int],
    *,
    lock: bool = False,
) -> dict[Any, Reason]:
    """Of the rows that exist with these keys, those whose hash has changed, and why.

    With ``lock`` the rows are locked, and keys that name no row are among them, unless the
    transaction locks the whole database.
    """
    dialect = dialect_for(connection.engine)
    names = tuple(name for name in shape.columns if name in table.clause.c)
    asked = [*table.key_clauses, *raw_columns(Shape(names))]
    rows = dialect.find(connection, table, keys, asked, lock=lock)
    width = len(table.key_columns)
    found = list(map(itemgetter(0 if width == 1 else slice(width)), rows))
    if not hashes.keys() >= set(found):  # the database reads a key in another form
        if len(keys) > 1:
            parts = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
            first, second = (
                uncertain_keys(connection, table, part, shape, hashes, lock=lock) for part in parts
            )
            return first | second
        found = [*keys] * len(rows)
    gone: dict[Any, Reason] = {}
    if lock and dialect.has_row_locks and len(found) < len(keys):
        reason = Reason(LeftoverKind.UNCERTAIN, columns=shape.columns)
        gone = dict.fromkeys(set(keys).difference(found), reason)
    if not shape.columns:
        bare = tuple(str(column.name) for column in table.key_columns)
        reason = Reason(LeftoverKind.UNCERTAIN, columns=bare, names=(str(table.name),))
        return gone | dict.fromkeys(found, reason)
    recorded = list(map(hashes.get, found))
    now: Sequence[int] = [NEVER] * len(rows)
    if rows and names == shape.columns:  # else a column was dropped
        if hashes_as_read(shape, rows, width) == recorded:  # the usual case, at a third of the time
            return gone
        now = row_hashes(shape, list(zip(*rows, strict=True))[width:])
    return gone | {
        key: reason
        for key, old, new, row in zip(found, recorded, now, rows, strict=True)
        if old is not None and (old != new or old == NEVER)
        for reason in _reason(shape, old, new, row[width:])
    }


def _reason(shape: Shape, old: int, new: int, row: Sequence[Any]) -> list[Reason]:
    """Why a row with another hash may not be ours; none where only references became NULL."""
    if shape.either:
        same = not (old ^ new) & VALUES or (shape.references and old >> 32 == new >> 32)
        return (
            [] if same and old != NEVER else [Reason(LeftoverKind.UNCERTAIN, columns=shape.columns)]
        )
    detached = old != NEVER and not (old ^ new) & VALUES and None in row[len(shape.values) :]
    if not detached:
        return [Reason(LeftoverKind.UNCERTAIN, columns=shape.columns)]
    return [] if shape.values else [Reason(LeftoverKind.UNCERTAIN)]


def _are_final(
    connection: sa.Connection, table: KeyedTable, keys: Sequence[Any], held: TableHoldings
) -> bool:
    """Whether the database made these keys, as far as its counter tells none of them twice."""
    return (
        held.generated
        and len(table.key_columns) == 1
        and set(map(type, keys)) == {int}
        and not dialect_for(connection.engine).may_reuse_key(connection, table, max(keys))
    )
