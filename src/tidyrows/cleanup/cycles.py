"""Delete the rows of a cycle of tables where the database checks foreign keys row by row.

A cycle of tables seldom holds a cycle of rows, so rows are put in levels, children first. A real
loop is opened by setting one nullable foreign key of our own rows to NULL, in the transaction
that deletes them. A loop of NOT NULL keys only cannot be deleted without special rights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.connection import SPOILED
from tidyrows.cleanup.plan import by_batch
from tidyrows.cleanup.schema_view import (
    CHUNK,
    is_one_of,
    referenced,
    referencing_pairs,
    with_columns,
)
from tidyrows.dialects.keys import chunks
from tidyrows.errors import TidyRowsError
from tidyrows.schema.graph import RowOrder, RowStep, levels
from tidyrows.schema.reflect import nullable_columns, reflect_foreign_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch, Step
    from tidyrows.keys import TableName
    from tidyrows.schema.graph import ForeignKey, Place

Row = tuple[int, Any]
"""A row of a step: the number of its batch, and its key."""

_DEEP = 16


class RowLoopError(TidyRowsError):
    """Rows reference each other in a circle that nothing can open."""

    def __init__(self, message: str, *, rows: Sequence[Row]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def delete_by_levels(
    connection: sa.Connection, database: Database, step: Step, *, foreign_keys_off: bool
) -> dict[TableName, int]:
    """Delete the rows of a cyclic step, level by level."""
    references = _all_references(connection, step)
    order = _order(step, references)
    for key in list(references):
        if not order.loops and len(order.steps) <= _DEEP:
            break
        if set(key.child_columns) & nullable_columns(connection, key.child):
            looped = {row for loop in order.loops for row in loop}
            children = {child for child, _parent in references[key]}
            _set_null(connection, step, key, children if not order.loops else children & looped)
            references[key] = [
                pair for pair in references[key] if order.loops and pair[0] not in looped
            ]
            order = _order(step, references)
    if order.loops:
        order = _order(step, references, cascading=order.loops)
    deleted: dict[TableName, int] = {batch.table.name: 0 for batch in step.batches}
    for rows in order.steps:
        foreign_keys: AbstractContextManager[object] = nullcontext()
        if rows.loops and not foreign_keys_off:
            raise RowLoopError(
                "its rows reference each other in a circle of NOT NULL foreign keys, which this "
                "database can only delete with foreign keys switched off. Make one key of the "
                "circle nullable, or write CleanupManager(tracker, allow_foreign_keys_off=True)",
                rows=rows.rows,
            )
        if rows.loops:
            _refuse_orphans(connection, database, step, rows.rows)
            connection.info[SPOILED] = True
            foreign_keys = database.dialect.without_foreign_keys(connection)
        with foreign_keys:
            for number, keys in by_batch(rows.rows).items():
                table = step.batches[number].table
                deleted[table.name] += database.dialect.delete_by_keys(connection, table, keys)
    return deleted


def row_order(connection: sa.Connection, step: Step) -> RowOrder[Row]:
    """The rows of a cyclic step in an order in which they can be deleted one after the other."""
    return _order(step, _all_references(connection, step))


def _all_references(
    connection: sa.Connection, step: Step
) -> dict[ForeignKey, list[tuple[Row, Row]]]:
    """Our rows that reference our rows, by foreign key of the database."""
    found: dict[ForeignKey, list[tuple[Row, Row]]] = {}
    for key in step.cycle:
        if key.source == "database":
            child_number, child = _batch_at(step, key.child)
            parent_number, parent = _batch_at(step, key.parent)
            ours = set(parent.keys)
            found[key] = [
                ((child_number, child_key), (parent_number, parent_key))
                for child_key, parent_key in referencing_pairs(
                    connection, key, child.table, child.keys, parent.table
                )
                if parent_key in ours
            ]
    return found


def _order(
    step: Step,
    references: dict[ForeignKey, list[tuple[Row, Row]]],
    cascading: Iterable[Sequence[Row]] = (),
) -> RowOrder[Row]:
    """Rows in levels.

    Of the circles in ``cascading``, those that are ON DELETE CASCADE all around count as one row:
    when no other row references them, one DELETE deletes them all.
    """
    rows = [(number, key) for number, batch in enumerate(step.batches) for key in batch.keys]
    members = _cascading(references, cascading)
    circle = {row: one[0] for one in members.values() for row in one}
    pairs = [
        (circle.get(child, child), circle.get(parent, parent))
        for found in references.values()
        for child, parent in found
        if child not in circle or circle[child] != circle.get(parent)
    ]
    order = levels((row for row in rows if circle.get(row, row) == row), pairs)
    if not members:
        return order

    def whole(some: Iterable[Row]) -> tuple[Row, ...]:
        return tuple(each for row in some for each in members.get(row, (row,)))

    steps = [RowStep(whole(one.rows), tuple(map(whole, one.loops))) for one in order.steps]
    return RowOrder(tuple(steps))


def _cascading(
    references: dict[ForeignKey, list[tuple[Row, Row]]], loops: Iterable[Sequence[Row]]
) -> dict[Row, Sequence[Row]]:
    """The circles that are ON DELETE CASCADE all around, by their first row."""
    circles = list(loops)
    # One key without it forbids the delete: the CASCADE comes around to a row still referenced.
    circle = {row: number for number, loop in enumerate(circles) for row in loop}
    forbidden = {
        circle[child]
        for key, pairs in references.items()
        for child, parent in pairs
        if key.on_delete != "CASCADE" and child in circle and circle[child] == circle.get(parent)
    }
    return {loop[0]: loop for number, loop in enumerate(circles) if number not in forbidden}


def _set_null(connection: sa.Connection, step: Step, key: ForeignKey, rows: Iterable[Row]) -> None:
    _number, batch = _batch_at(step, key.child)
    clause = with_columns(batch.table, key.child_columns)
    nullable = nullable_columns(connection, key.child)
    # Not None: SQLAlchemy refuses a bind for the column id_1 beside a condition on id.
    values = {column: sa.null() for column in key.child_columns if column in nullable}
    for chunk in chunks([row[1] for row in sorted(rows, key=repr)], CHUNK):
        connection.execute(
            sa.update(clause).where(is_one_of(batch.table, chunk, clause)).values(values)
        )


def _refuse_orphans(
    connection: sa.Connection, database: Database, step: Step, rows: Sequence[Row]
) -> None:
    """Refuse to delete rows that untracked rows reference, which would become orphans.

    A key that would CASCADE counts too: with foreign keys off it does nothing.
    """
    keys_of = by_batch(rows)  # locked first, which keeps new references out
    for number, keys in keys_of.items():
        table = step.batches[number].table
        for chunk in chunks(keys, CHUNK):
            lock = sa.select(*table.key_clauses).where(is_one_of(table, chunk, table.clause))
            connection.execute(lock.with_for_update()).all()
    batches = {batch.table.place: n for n, batch in enumerate(step.batches)}
    schemas = {batch.table.name.schema for batch in step.batches}
    schemas |= database.dialect.schemas_that_reference(connection, schemas)
    for key in reflect_foreign_keys(connection, sorted(schemas)):
        number = batches.get(key.parent, -1)
        if number not in keys_of:
            continue
        parent = step.batches[number].table
        child = batches.get(key.child, -1)
        ours = (step.batches[child].table, keys_of[child]) if child in keys_of else None
        held = referenced(connection, key, parent, keys_of[number], but_for=ours)
        if held:
            raise RowLoopError(
                f"a row of {'.'.join(key.child)} references {parent.row(min(held, key=repr))} by "
                f"({', '.join(key.child_columns)}) and is not tracked; with foreign keys off it "
                f"would be left an orphan",
                rows=rows,
            )


def _batch_at(step: Step, place: Place) -> tuple[int, Batch]:
    for number, batch in enumerate(step.batches):
        if batch.table.place == place:
            return number, batch
    raise LookupError(place)
