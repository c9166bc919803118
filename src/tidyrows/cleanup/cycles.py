"""Delete the rows of a cycle of tables where the database checks foreign keys row by row.

A cycle of tables seldom holds a cycle of rows, so rows are put in levels, children first. A real
loop is opened by setting one nullable foreign key of our own rows to NULL, in the transaction
that deletes them. A loop of NOT NULL keys only cannot be deleted without special rights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import TidyRowsError
from tidyrows.schema import levels, nullable_columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch, Step
    from tidyrows.rows import KeyedTable, TableName
    from tidyrows.schema import ForeignKey, Place, RowOrder

Row = tuple[int, Any]
"""A row of a step: the number of its batch, and its key."""

_CHUNK = 500
_DEEP = 16
_NEVER_BLOCK = frozenset({"CASCADE", "SET NULL"})


class RowLoopError(TidyRowsError):
    """Rows reference each other in a circle that nothing can open.

    Attributes:
        rows: the rows, as (batch number, key).
    """

    def __init__(self, message: str, *, rows: Sequence[Row]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def delete_by_levels(
    connection: sa.Connection, database: Database, step: Step, *, foreign_keys_off: bool
) -> dict[TableName, int]:
    """Delete the rows of a cyclic step, level by level.

    Args:
        connection: the cleanup's, in its transaction.
        database: where.
        step: the tables of one cycle, or one table that references itself.
        foreign_keys_off: loops that nothing opens may be deleted with foreign keys switched off;
            the caller throws the connection away afterwards.

    Returns:
        Rows deleted, by table.

    Raises:
        RowLoopError: a loop that nothing opens, and ``foreign_keys_off`` is not allowed.
    """
    references = _all_references(connection, step)
    order = _order(step, references)
    if order.loops:
        for key in list(references):
            if key.on_delete in _NEVER_BLOCK:
                del references[key]  # it only ordered the deletes; it does not forbid them
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
    deleted: dict[TableName, int] = {batch.table.name: 0 for batch in step.batches}
    for rows in order.steps:
        if rows.loops and not foreign_keys_off:
            raise RowLoopError(
                "its rows reference each other in a circle of NOT NULL foreign keys, which this "
                "database can only delete with foreign keys switched off. Make one key of the "
                "circle nullable, or write CleanupManager(tracker, allow_foreign_keys_off=True)",
                rows=rows.rows,
            )
        if rows.loops:
            _refuse_orphans(connection, step, rows.rows)
            with database.dialect.without_foreign_keys(connection):
                _delete(connection, database, step, rows.rows, deleted)
        else:
            _delete(connection, database, step, rows.rows, deleted)
    return deleted


def row_order(connection: sa.Connection, step: Step) -> RowOrder[Row]:
    """The rows of a cyclic step in an order in which they can be deleted one after the other."""
    return _order(step, _all_references(connection, step))


def _all_references(
    connection: sa.Connection, step: Step
) -> dict[ForeignKey, list[tuple[Row, Row]]]:
    """By foreign key; what only the models declare forbids no delete."""
    return {
        key: list(_references(connection, step, key))
        for key in step.cycle
        if key.source == "database"
    }


def _order(step: Step, references: dict[ForeignKey, list[tuple[Row, Row]]]) -> RowOrder[Row]:
    rows = [(number, key) for number, batch in enumerate(step.batches) for key in batch.keys]
    return levels(rows, (pair for pairs in references.values() for pair in pairs))


def _delete(
    connection: sa.Connection,
    database: Database,
    step: Step,
    rows: Iterable[Row],
    deleted: dict[TableName, int],
) -> None:
    by_batch: dict[int, list[Any]] = {}
    for number, key in rows:
        by_batch.setdefault(number, []).append(key)
    for number, keys in sorted(by_batch.items()):
        table = step.batches[number].table
        deleted[table.name] += database.dialect.delete_by_keys(connection, table, keys)


def _references(
    connection: sa.Connection, step: Step, key: ForeignKey
) -> Iterator[tuple[Row, Row]]:
    """Which of our rows reference which of our rows by this foreign key."""
    child_number, child_batch = _batch_at(step, key.child)
    parent_number, parent_batch = _batch_at(step, key.parent)
    ours = set(parent_batch.keys)
    child = _with_columns(child_batch.table, key.child_columns)
    parent = _with_columns(parent_batch.table, key.parent_columns).alias("parent")
    width = len(child_batch.table.key_columns)
    query = sa.select(
        *(child.c[column.name] for column in child_batch.table.key_columns),
        *(parent.c[column.name] for column in parent_batch.table.key_columns),
    ).select_from(child.join(parent, _join(child, parent, key)))
    for chunk in _chunks(child_batch.keys):
        for row in connection.execute(query.where(is_one_of(child_batch.table, chunk, child))):
            parent_key = _stored(tuple(row[width:]))
            if parent_key in ours:
                yield (child_number, _stored(tuple(row[:width]))), (parent_number, parent_key)


def _join(child: Any, parent: Any, key: ForeignKey) -> sa.ColumnElement[bool]:
    pairs = zip(key.child_columns, key.parent_columns, strict=True)
    return sa.and_(*(child.c[c] == parent.c[p] for c, p in pairs))


def _set_null(connection: sa.Connection, step: Step, key: ForeignKey, rows: Iterable[Row]) -> None:
    _number, batch = _batch_at(step, key.child)
    clause = _with_columns(batch.table, key.child_columns)
    nullable = nullable_columns(connection, key.child)
    values = {column: None for column in key.child_columns if column in nullable}
    for chunk in _chunks([row[1] for row in sorted(rows, key=repr)]):
        connection.execute(
            sa.update(clause).where(is_one_of(batch.table, chunk, clause)).values(values)
        )


def _refuse_orphans(connection: sa.Connection, step: Step, rows: Sequence[Row]) -> None:
    """With foreign keys off nothing would stop us from orphaning somebody's row: so look first."""
    ours = set(rows)
    for key in step.cycle:
        child_number, child_batch = _batch_at(step, key.child)
        parent_number, parent_batch = _batch_at(step, key.parent)
        child = _with_columns(child_batch.table, key.child_columns).alias("child")
        parent = _with_columns(parent_batch.table, key.parent_columns)
        query = sa.select(
            *(child.c[column.name] for column in child_batch.table.key_columns)
        ).select_from(child.join(parent, _join(child, parent, key)))
        for chunk in _chunks([key_ for number, key_ in rows if number == parent_number]):
            for row in connection.execute(
                query.where(is_one_of(parent_batch.table, chunk, parent))
            ):
                if (child_number, _stored(tuple(row))) not in ours:
                    raise RowLoopError(
                        f"{child_batch.table.row(_stored(tuple(row)))} references this circle and "
                        f"is not tracked; with foreign keys off it would be left an orphan",
                        rows=rows,
                    )


def _with_columns(table: KeyedTable, names: Iterable[str]) -> sa.TableClause:
    """The table with these columns too, which the project's own Table may not know."""
    known = {column.name: column.type for column in table.table.columns}
    columns = {**known, **{name: known.get(name) for name in names}}
    return sa.table(
        table.clause.name,
        *(sa.column(name, type_) for name, type_ in columns.items()),
        schema=table.clause.schema,
    )


def is_one_of(
    table: KeyedTable, keys: Sequence[Any], clause: sa.FromClause
) -> sa.ColumnElement[bool]:
    """A condition for a few keys, in SQL that every database runs by its index."""
    columns = [clause.c[column.name] for column in table.key_columns]
    if len(columns) == 1:
        return columns[0].in_(keys)
    return sa.or_(
        *(
            sa.and_(*(column == value for column, value in zip(columns, key, strict=True)))
            for key in keys
        )
    )


def _batch_at(step: Step, place: Place) -> tuple[int, Batch]:
    for number, batch in enumerate(step.batches):
        if (batch.table.name.schema, batch.table.name.name) == place:
            return number, batch
    raise LookupError(place)


def _stored(key: tuple[Any, ...]) -> Any:
    return key[0] if len(key) == 1 else key


def _chunks(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]
