"""Delete the rows of a cycle of tables where the database checks foreign keys row by row.

A cycle of tables seldom holds a cycle of rows, so rows are put in levels, children first. A real
loop is opened by setting one nullable foreign key of our own rows to NULL, in the transaction
that deletes them. A loop of NOT NULL keys only cannot be deleted without special rights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from tidyrows.cleanup.connection import SPOILED
from tidyrows.cleanup.plan import by_place
from tidyrows.cleanup.schema_view import referenced, referencing_pairs, with_columns
from tidyrows.errors import TidyRowsError
from tidyrows.schema.graph import RowOrder, RowStep, levels
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Step
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.keys import TableName
    from tidyrows.schema.graph import ForeignKey, Place

Row: TypeAlias = "tuple[Place, Any]"
"""A row of a step: its place and its key."""

_DEEP = 16


class RowLoopError(TidyRowsError):
    """Rows reference each other in a circle that nothing can open."""


def delete_by_levels(
    connection: sa.Connection,
    database: Database,
    view: SchemaView,
    step: Step,
    *,
    foreign_keys_off: bool,
) -> dict[TableName, int]:
    """Delete the rows of a cyclic step, level by level."""
    dialect = database.dialect
    tables = {batch.table.place: batch.table for batch in step.batches}
    references = _all_references(connection, step)
    order = _order(step, references)
    for key in list(references):
        if not order.loops and len(order.steps) <= _DEEP:
            break
        nullable = view.nullable(connection, key.child).intersection(key.child_columns)
        if nullable:
            looped = {row for loop in order.loops for row in loop}
            children = {
                child for child, _parent in references[key] if not looped or child in looped
            }
            wide = with_columns(tables[key.child], key.child_columns)
            keys = in_order([row[1] for row in children if not looped or row in looped])
            dialect.set_null(connection, wide, keys, sorted(nullable))
            references[key] = [pair for pair in references[key] if looped and pair[0] not in looped]
            order = _order(step, references)
    if order.loops:
        order = _order(step, references, cascading=order.loops)
    deleted = {table.name: 0 for table in tables.values()}
    for rows in order.steps:
        foreign_keys: AbstractContextManager[object] = nullcontext()
        if rows.loops and not foreign_keys_off:
            raise RowLoopError(
                "its rows reference each other in a circle of NOT NULL foreign keys, which this "
                "database can only delete with foreign keys switched off. Make one key of the "
                "circle nullable, or write CleanupManager(tracker, allow_foreign_keys_off=True)"
            )
        if rows.loops:
            _refuse_orphans(connection, database, step, rows.rows)
            connection.info[SPOILED] = True
            foreign_keys = dialect.without_foreign_keys(connection)
        with foreign_keys:
            for place, keys in by_place(rows.rows).items():
                table = tables[place]
                deleted[table.name] += dialect.delete_by_keys(connection, table, keys)
    return deleted


def row_order(connection: sa.Connection, step: Step) -> RowOrder[Row]:
    """The rows of a cyclic step in an order in which they can be deleted one after the other."""
    return _order(step, _all_references(connection, step))


def _all_references(
    connection: sa.Connection, step: Step
) -> dict[ForeignKey, list[tuple[Row, Row]]]:
    """Our rows that reference our rows, by foreign key of the database."""
    rows = step.rows
    ours = {place: set(keys) for place, (_table, keys) in rows.items()}
    return {
        key: [
            ((key.child, child), (key.parent, parent))
            for child, parent in referencing_pairs(
                connection, key, *rows[key.child], rows[key.parent][0]
            )
            if parent in ours[key.parent]
        ]
        for key in step.cycle
        if key.source == "database"
    }


def _order(
    step: Step,
    references: dict[ForeignKey, list[tuple[Row, Row]]],
    cascading: Iterable[Sequence[Row]] = (),
) -> RowOrder[Row]:
    """Rows in levels.

    Of the circles in ``cascading``, those that are ON DELETE CASCADE all around count as one row:
    when no other row references them, one DELETE deletes them all.
    """
    rows = [(place, key) for place, (_table, keys) in step.rows.items() for key in keys]
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


def _refuse_orphans(
    connection: sa.Connection, database: Database, step: Step, rows: Sequence[Row]
) -> None:
    """Refuse to delete rows that untracked rows reference, which would become orphans.

    A key that would CASCADE counts too: with foreign keys off it does nothing.
    """
    keys_of, tables = by_place(rows), step.rows
    for place, keys in keys_of.items():  # locked first, which keeps new references out
        database.dialect.lock(connection, tables[place][0], keys)
    schemas = {schema for schema, _name in tables}
    schemas |= database.dialect.schemas_that_reference(connection, schemas)
    for key in database.dialect.foreign_keys(connection, sorted(schemas)):
        if key.parent not in keys_of:
            continue
        parent = tables[key.parent][0]
        ours = (tables[key.child][0], keys_of[key.child]) if key.child in keys_of else None
        held = referenced(connection, key, parent, keys_of[key.parent], but_for=ours)
        if held:
            raise RowLoopError(
                f"a row of {'.'.join(key.child)} references {parent.row(min(held, key=repr))} by "
                f"({', '.join(key.child_columns)}) and is not tracked; with foreign keys off it "
                f"would be left an orphan"
            )
