"""Whether the rows that have our keys now are still ours, where a database reuses keys.

Asked in the transaction that deletes, which keeps other writers out: a row that shows the values
that were inserted is ours, and so is one that still has a value that only ours can have. Any other
may be ours, changed by the application, or a stranger's: it cannot be known, so it stays.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.digests import CELL, UNCOMPARED, digests, is_same
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.dialects import dialect_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.tracking.fingerprints import Fingerprints
    from tidyrows.tracking.store import TableHoldings


class Identity:
    """Tells whether rows are still those that a tracker held at the beginning of the cleanup."""

    def __init__(self, held: Iterable[TableHoldings]) -> None:
        self._held: dict[TableName, TableHoldings] = {each.table.name: each for each in held}

    def uncertain(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> Mapping[Any, Reason]:
        """Of rows with these keys, those that may not be ours, and why.

        A row whose key is, or contains, the key of a row that may not be ours is not certain
        either: the other tables of a class with joined inheritance, association tables.
        """
        held = self._held.get(table.name)
        unsure: dict[Any, Reason] = {}
        if held is None or not keys:
            return unsure
        if held.prints is not None:
            unsure = uncertain_keys(connection, table, keys, held.prints)
        for parent, place in self._parents(table):
            if parent.prints is None or parent.table.name == table.name:
                continue
            by_parent: dict[Any, list[Any]] = {}
            for key in keys:
                if key not in held.told:
                    by_parent.setdefault(table.row(key).key[place], []).append(key)
            ours = [key for key in by_parent if key in parent.keys]
            for key in self.uncertain(connection, parent.table, ours):
                reason = Reason(LeftoverKind.UNCERTAIN, item=parent.table.row(key))
                unsure.update((child, reason) for child in by_parent[key] if child not in unsure)
        return unsure

    def _parents(self, table: KeyedTable) -> Iterable[tuple[TableHoldings, int]]:
        """What columns of the primary key reference alone, and where they stand in it."""
        for place, column in enumerate(table.key_columns):
            for reference in column.foreign_keys:
                constraint = reference.constraint
                alone = constraint is None or len(constraint.elements) == 1
                parent = self._found(reference) if alone else None
                if parent is not None:
                    yield parent, place

    def _found(self, reference: sa.ForeignKey) -> TableHoldings | None:
        target = reference.target_fullname.rpartition(".")
        for held in self._held.values():
            key = held.table.key_columns
            if (
                len(key) == 1
                and held.prints is not None
                and held.table.name.name == target[0].rpartition(".")[2]
                and key[0].key == target[2]
            ):
                return held
        return None


def identity_of(held: Sequence[TableHoldings]) -> Identity | None:
    """What answers for these rows; None where no key of theirs can come back."""
    for each in held:
        if each.prints is not None:
            return Identity(held)
    return None


def uncertain_keys(
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    known: Fingerprints,
) -> dict[Any, Reason]:
    """Of rows with these keys, those that may not be ours, and why; rows that are gone are not.

    Args:
        connection: in the transaction that will delete them.
        table: their table.
        keys: as the tracker holds them.
        known: what the rows looked like.
    """
    dialect = dialect_for(connection.engine)
    if not keys or not dialect.reuses_keys or _are_final(connection, dialect, table, keys, known):
        return {}
    columns = table.clause.c
    places = [at for at in known.compared() if known.names[at] in columns]
    asked = known.known(keys) if places else ()
    if not asked:
        return {}
    # as the driver has them: digests were taken from what went to it
    raw = [
        sa.column(sa.quoted_name(known.names[at], quote=None), sa.types.NullType()) for at in places
    ]
    rows = dialect.find(connection, table, asked, [*table.key_clauses, *raw])
    if not rows:
        return {}
    width = len(table.key_columns)
    values = list(zip(*rows, strict=True))
    found = values[0] if width == 1 else list(zip(*values[:width], strict=True))
    now = dict(zip(places, values[width:], strict=True))
    then = known.columns(found)
    unsure: dict[Any, Reason] = {}
    for number, changed in _differing(then, now).items():
        equal = [at for at in places if then[at][number] != UNCOMPARED and at not in changed]
        if any(then[-1][number] >> at & 1 for at in equal):
            continue  # a value that only our row can have
        against = [
            known.names[at]
            for at in changed
            if now[at][number] is not None or not table.table.c[known.names[at]].foreign_keys
        ]  # a reference that is NULL now went with the row that it referenced
        if against or not equal:
            unsure[found[number]] = Reason(LeftoverKind.UNCERTAIN, columns=tuple(against))
    return unsure


def _are_final(
    connection: sa.Connection,
    dialect: Dialect,
    table: KeyedTable,
    keys: Sequence[Any],
    known: Fingerprints,
) -> bool:
    """Whether the database made these keys and makes none of them twice."""
    return (
        known.generated
        and len(table.key_columns) == 1
        and set(map(type, keys)) == {int}
        and not dialect.may_reuse_key(connection, table, max(keys))
    )


def _differing(
    then: Sequence[array[int]], now: Mapping[int, Sequence[Any]]
) -> dict[int, list[int]]:
    """By the number of a row, the columns that have other values now."""
    differing: dict[int, list[int]] = {}
    for at, values in now.items():
        seen = array(CELL, digests(values))
        if seen == then[at]:
            continue
        for number, (old, new) in enumerate(zip(then[at], seen, strict=True)):
            if old not in {new, UNCOMPARED} and not is_same(old, values[number]):
                differing.setdefault(number, []).append(at)
    return differing
