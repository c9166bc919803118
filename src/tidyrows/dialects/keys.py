"""Keys on their way to the database and back, and the aliases of generated SQL."""

from __future__ import annotations

from itertools import islice
from operator import lt
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.keys import KeyedTable

# The names that generated SQL gives, none of which can be a table of the project. A statement knows
# a table that has an alias by that alias alone. So either *all* tables have one (``parent_1``, the
# anonymous alias of ``parent``, may be another table), or, where the project's table can have
# none (a DELETE on MariaDB, conditions of the caller), `keys_beside` names the keys. Columns are
# always qualified. A statement that selects from catalogues only may use any alias.
ROW = "tidyrows_row"
KEYS = "tidyrows_keys"


def keys_beside(table: KeyedTable) -> str:
    """The alias of the keys in a statement that names this table without an alias."""
    # MariaDB ignores case where lower_case_table_names says so.
    return ROW if table.table.name.lower() == KEYS else KEYS


_LONG = 100
"""Keys of a run, on average, from which a range is quicker than their list."""
_NUMBERS = (sa.Integer, sa.types.NullType)
_PLAIN_CHUNK = 500
_PLAIN_COMPOSITE_CHUNK = 100
# An engine may carry a schema_translate_map; real schema names must not go through it again.
_AS_WRITTEN = {"schema_translate_map": None}


class RowsByKey(NamedTuple):
    """SQL for the driver that names the rows of some keys."""

    select: str  # after SELECT ... FROM
    delete: str  # after DELETE FROM
    update: tuple[str, str] | None  # after UPDATE, and after SET ...; None: by SQLAlchemy
    sent: tuple[Any, ...]


def chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Slices of at most ``size`` values, in order."""
    if 0 < len(values) <= size:
        return (values,)
    return (values[start : start + size] for start in range(0, len(values), size))


def as_sent(values: list[list[Any]]) -> Sequence[Any]:
    """Driver values, one list per column, as one scalar or tuple per key."""
    return values[0] if len(values) == 1 else list(zip(*values, strict=True))


def quoted_names(dialect: sa.Dialect, table: KeyedTable) -> tuple[str, list[str]]:
    """A table's qualified name and the names of its key columns, for SQL text."""
    quote = dialect.identifier_preparer.quote
    place = f"{quote(table.name.schema)}.{quote(table.table.name)}"
    return place, [quote(column.name) for column in table.key_columns]


def run(connection: sa.Connection, statement: Any) -> sa.CursorResult[Any]:
    """Execute a statement whose tables are real ones."""
    result: sa.CursorResult[Any] = connection.execute(statement, execution_options=_AS_WRITTEN)
    return result


def driver_values(
    table: KeyedTable, dialect: sa.Dialect, keys: Sequence[Any]
) -> list[list[Any]] | None:
    """The keys as the driver gets them, one list per key column; None for ``bind_expression``."""
    columns = table.key_clauses
    split = [list(column) for column in zip(*keys, strict=True)] if len(columns) > 1 else [keys]
    out = []
    for column, values in zip(columns, split, strict=True):
        if column.type.bind_expression(sa.bindparam("x", type_=column.type)) is not None:
            return None
        processor = column.type.dialect_impl(dialect).bind_processor(dialect)
        out.append(list(values) if processor is None else [processor(value) for value in values])
    return out


def plain_condition(table: KeyedTable, keys: Sequence[Any]) -> sa.ColumnElement[bool]:
    """IN, or OR of ANDs: right for every type, quick for few keys."""
    # Never a tuple IN: SQLite scans the whole table for it, PostgreSQL runs out of stack.
    columns = table.key_clauses
    if len(columns) == 1:
        return columns[0].in_(keys)
    return sa.or_(
        *(
            sa.and_(*(column == value for column, value in zip(columns, key, strict=True)))
            for key in keys
        )
    )


def plain_chunks(table: KeyedTable, keys: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """As many keys as :func:`plain_condition` takes well."""
    composite = len(table.key_clauses) > 1
    return chunks(keys, _PLAIN_COMPOSITE_CHUNK if composite else _PLAIN_CHUNK)


def delete_plainly(connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> int:
    """Delete by key with SQLAlchemy's own statements; the number of rows deleted."""
    return sum(
        run(connection, sa.delete(table.clause).where(plain_condition(table, part))).rowcount
        for part in plain_chunks(table, keys)
    )


def integer_runs(table: KeyedTable, keys: Sequence[Any]) -> list[tuple[int, int]] | None:
    """First and last of each run of integers without a gap; None where that is not worth it.

    A range names no other row, provided that the column holds integers only: the caller checks it.
    """
    columns = table.key_clauses
    if len(columns) != 1 or len(keys) < _LONG or not isinstance(columns[0].type, _NUMBERS):
        return None
    return runs_of(keys, most=len(keys) // _LONG)


def runs_of(keys: Sequence[Any], *, most: int | None = None) -> list[tuple[int, int]] | None:
    """First and last of each run of sorted integers; None for other keys, or more runs."""
    if set(map(type, keys)) != {int}:
        return None
    if keys[-1] - keys[0] + 1 == len(keys) and all(map(lt, keys, islice(keys, 1, None))):
        return [(keys[0], keys[-1])]
    runs: list[tuple[int, int]] = []
    first = last = keys[0]
    for key in islice(keys, 1, None):
        if key == last + 1:
            last = key
        elif key > last and (most is None or len(runs) + 1 < most):
            runs.append((first, last))
            first = last = key
        else:
            return None
    return [*runs, (first, last)]


def set_null_plainly(
    connection: sa.Connection, table: KeyedTable, keys: Sequence[Any], names: Sequence[str]
) -> None:
    """Set columns to NULL with SQLAlchemy's own statements."""
    update = sa.update(table.clause).values({table.clause.c[name]: sa.null() for name in names})
    for part in plain_chunks(table, keys):
        run(connection, update.where(plain_condition(table, part)))


def find_plainly(
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    columns: Sequence[sa.ColumnElement[Any]],
    *,
    lock: bool = False,
    first: bool = False,
) -> list[tuple[Any, ...]]:
    """Columns of the rows of these keys, with SQLAlchemy's own statements."""
    found: list[tuple[Any, ...]] = []
    select = sa.select(*columns).limit(1 if first else None)
    if lock:
        select = select.with_for_update()
    for part in plain_chunks(table, keys):
        found += map(tuple, run(connection, select.where(plain_condition(table, part))))
        if first and found:
            break
    return found


def marked_condition(names: Sequence[str], count: int, mark: str) -> str:
    """SQL for "the key is one of so many": IN, or OR of ANDs, with marks for the values."""
    if len(names) == 1:
        return f"{names[0]} IN ({', '.join([mark] * count)})"
    return " OR ".join([" AND ".join(f"{name} = {mark}" for name in names)] * count)


def exists_sql(dialect: sa.Dialect, tables: Sequence[tuple[KeyedTable, int]]) -> str:
    """SQL for the driver, as :func:`select_bits`: which tables have one of so many keys."""
    mark = "?" if dialect.paramstyle == "qmark" else "%s"
    parts = []
    for table, count in tables:
        place, names = quoted_names(dialect, table)
        parts.append(f"SELECT 1 FROM {place} WHERE {marked_condition(names, count, mark)}")
    return select_bits(parts)


_BITS = 30


def select_bits(selects: Sequence[str]) -> str:
    """One SELECT that tells which of these have a row, as bits: a driver is slow with columns."""
    bits = [
        f"CASE WHEN EXISTS({select}) THEN {1 << at % _BITS} ELSE 0 END"
        for at, select in enumerate(selects)
    ]
    return f"SELECT {', '.join(' + '.join(part) for part in chunks(bits, _BITS))}"


def positions_of_bits(row: Sequence[int]) -> list[int]:
    """The positions in :func:`select_bits` of those that have a row."""
    return [
        column * _BITS + at
        for column, bits in enumerate(row)
        if bits
        for at in range(_BITS)
        if bits >> at & 1
    ]


def typed_rows(
    result: sa.CursorResult[Any], columns: Sequence[sa.ColumnElement[Any]], dialect: sa.Dialect
) -> list[tuple[Any, ...]]:
    """The driver's rows, with Python values of the columns' types, and no Row objects."""
    codes = [described[1] for described in result.cursor.description]
    rows: list[tuple[Any, ...]] = list(result.cursor.fetchall())
    result.close()
    processors = [
        column.type.dialect_impl(dialect).result_processor(dialect, code)
        for column, code in zip(columns, codes, strict=True)
    ]
    if not any(processors):
        return rows
    return [
        tuple(
            value if process is None else process(value)
            for process, value in zip(processors, row, strict=True)
        )
        for row in rows
    ]


def select_keys_plainly(
    connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """The keys that are there, as rows, with SQLAlchemy's own statements."""
    found: list[tuple[Any, ...]] = []
    for part in plain_chunks(table, keys):
        statement = sa.select(*table.key_clauses).where(plain_condition(table, part))
        found.extend(tuple(row) for row in run(connection, statement))
    return found


def keys_found(
    keys: Sequence[Any],
    sent: Sequence[Any],
    look: Callable[[Sequence[Any]], Sequence[tuple[Any, ...]]],
) -> list[Any]:
    """Which keys name a row, where the database alone knows when two keys are equal.

    ``look`` gives the rows for a part of ``sent`` (a scalar or tuple per key). A row that comes
    back under another value ('ABC' asked, 'abc' stored) is found by halving.
    """
    found: set[int] = set()
    asked: list[Sequence[int]] = [range(len(keys))] if keys else []
    while asked:
        positions = asked.pop()
        whole = len(positions) == len(keys)
        part = sent if whole else [sent[position] for position in positions]
        rows = [tuple(row) if len(row) > 1 else row[0] for row in look(part)]
        if not rows:
            continue
        if len(positions) == 1:
            found.update(positions)
            continue
        equal, strange = _matched(rows, sent, positions)
        found.update(equal)
        if strange:
            rest = [position for position in positions if position not in equal]
            middle = (len(rest) + 1) // 2
            asked.extend(half for half in (rest[:middle], rest[middle:]) if half)
    return [keys[position] for position in sorted(found)] if found else []


def _matched(
    rows: list[Any], sent: Sequence[Any], positions: Sequence[int]
) -> tuple[set[int], bool]:
    """Positions whose value came back as it is, and whether other values came back too."""
    try:
        by_value: dict[Any, list[int]] = {}
        for position in positions:
            by_value.setdefault(sent[position], []).append(position)
        equal = {position for row in rows for position in by_value.get(row, ())}
        return equal, any(row not in by_value for row in rows)
    except TypeError:  # a value without a hash: halving finds it
        return set(), True
