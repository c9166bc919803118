"""Which rows an INSERT made.

A result of a flush or of a single insert has the keys, and an executemany
may have them in its parameters; where neither tells, see :mod:`~tidyrows.capture.returning`.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from tidyrows.capture.returning import makes_key
from tidyrows.dialects.keyless_rows import is_as_given

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects import Dialect, RealTable
    from tidyrows.keys import KeyedTable


def keys_from_result(
    insert: sa.Insert,
    result: sa.CursorResult[Any],
    target: KeyedTable,
    real: RealTable,
    dialect: Dialect,
) -> tuple[list[tuple[Any, ...]], bool] | None:
    """The keys of an INSERT that ran as it was written, and whether the database made them.

    Returns:
        None where they cannot be told.
    """
    context: Any = result.context
    parameters = context.compiled_parameters
    names = target.key_names
    returned = bool(context.compiled.effective_returning)
    if context.executemany and not returned:
        keys = [tuple(row.get(name) for name in names) for row in parameters]
        if _count(context) not in {-1, len(keys)}:
            return None
        return keys, False
    given = parameters[0] if parameters else {}
    missing = False
    for name in names:
        missing = missing or given.get(name) is None
    nothing = (not missing or not returned) and _nothing_inserted(context, returned=returned)
    if real.kind == "other" and not returned and (missing or nothing):
        return None  # what the trigger of a view makes is not counted, and its row id not told
    if nothing:
        return [], False
    rows = context.inserted_primary_key_rows
    if dialect.explicit_zero_is_generated and not missing and _zero(rows, target):
        return None
    generated = missing and makes_key(insert, parameters[:1], target)
    keys = []
    for row in rows:
        if row is not None:
            keys.append(tuple(row))
    return keys, generated


def whole_rows(insert: sa.Insert, context: Any, target: KeyedTable) -> list[Any]:
    """The rows of an INSERT as its parameters have them, or None for each where they do not."""
    count = row_count(insert, context)
    columns = target.table.columns
    given = context.compiled_parameters
    computed = {getattr(column, "key", column) for column in insert._values or ()}
    told = (
        len(given) == count
        and insert.select is None
        and not insert._multi_values
        and insert._post_values_clause is None
        and not insert._prefixes
        and all(column.key not in computed and is_as_given(column) for column in columns)
    )
    if not told or not all(column.key in row for row in given for column in columns):
        return [None] * count
    return [tuple(row[column.key] for column in columns) for row in given]


def row_count(insert: sa.Insert, context: Any) -> int:
    """How many rows an INSERT made; where the driver has closed its cursor, what it was given."""
    given = sum(map(len, insert._multi_values)) or max(len(context.compiled_parameters), 1)
    told = -1
    if not context.executemany and not context.compiled.effective_returning:
        told = _count(context)
    return given if told < 0 else told


def _nothing_inserted(context: Any, *, returned: bool) -> bool:
    """A rule, a trigger or a conflict clause of the table swallowed the row, without an error."""
    if returned:
        return _count(context) == 0
    return context.cursor is not None and _count(context) == 0


def keep_count(context: Any) -> None:
    """Note how many rows a statement changed, while its cursor is open and tells it."""
    go_on = context.post_exec

    def post_exec() -> None:
        context.tidyrows_count = context.cursor.rowcount
        go_on()

    context.post_exec = post_exec


def _count(context: Any) -> int:
    kept: int | None = getattr(context, "tidyrows_count", None)
    return int(context.rowcount) if kept is None else kept


def nameable(keys: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The keys that can name a row: without NULL, and without what no set can hold."""
    try:
        if len(keys) == 1:
            return keys if None not in keys[0] and (hash(keys[0]) or True) else []
        return [key for key in keys if None not in key and (hash(key) or True)]
    except TypeError:  # an array, a bytearray
        return [key for key in keys if None not in key and _is_hashable(key)]


def _is_hashable(key: tuple[Any, ...]) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _zero(rows: Iterable[Sequence[Any]], target: KeyedTable) -> bool:
    auto = target.table._autoincrement_column
    if auto is None:
        return False
    place = target.key_columns.index(auto)
    return any(row is not None and row[place] == 0 for row in rows)


def only_ours_can_hold(key: tuple[Any, ...], *, generated: bool, reused: bool) -> bool:
    """Whether a row that has this key must be the one that was inserted.

    A sequence or auto-increment never gives a number twice (SQLite does), and
    a random UUID is nobody else's.
    """
    if generated and not reused:
        return True
    return any(isinstance(value, uuid.UUID) and value.version == 4 for value in key)  # noqa: PLR2004 - random UUIDs
