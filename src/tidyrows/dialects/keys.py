"""Keys on their way to the database and back, and the aliases of generated SQL."""

from __future__ import annotations

import uuid
from contextlib import suppress
from decimal import Decimal
from itertools import chain, islice, pairwise
from operator import index, lt
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import sqlalchemy as sa

from tidyrows.keys import python_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.keys import KeyedTable

    Look = Callable[[Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]

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
_INTEGERS = 5000
# An engine may carry a schema_translate_map; real schema names must not go through it again.
_AS_WRITTEN = {"schema_translate_map": None}


Select: TypeAlias = "tuple[str, tuple[Any, ...]]"
"""A SELECT in the driver's own parameter style, and its parameters."""


class RowsByKey(NamedTuple):
    """SQL for the driver that names the rows of some keys."""

    select: str  # after SELECT ... FROM
    delete: str  # after DELETE FROM
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
    split: Any = [keys]
    if len(columns) > 1:
        split = list(zip(*keys, strict=True)) or [()] * len(columns)
    out = []
    for column, values in zip(columns, split, strict=True):
        if column.type.bind_expression(sa.bindparam("x", type_=column.type)) is not None:
            return None
        processor = column.type.dialect_impl(dialect).bind_processor(dialect)
        out.append(list(values) if processor is None else [processor(value) for value in values])
    return out


_EXACT: dict[type, tuple[type, ...]] = {
    int: (bool, float, Decimal, str),
    float: (int, Decimal),
    Decimal: (int, str),
    str: (int, uuid.UUID),
    uuid.UUID: (str,),
}
"""By a column's own type, the types of which a database makes the value that Python makes."""


def own_keys(
    table: KeyedTable, dialect: sa.Dialect, keys: list[tuple[Any, ...]]
) -> tuple[list[tuple[Any, ...]], bool]:
    """Keys that were sent, as a SELECT would give them: 10 for the text ``10`` in an Integer.

    Returns:
        The keys, each a tuple, and whether all are such: one that is not stays as it was sent.
    """
    split = list(zip(*keys, strict=True))
    own, exact = keys, True
    for number, (types, values) in enumerate(zip(table.own_types, split, strict=False)):
        if not types.issuperset(map(type, values)):
            found = [_own_value(table, number, dialect, value) for value in values]
            split[number] = tuple(value for value, _exact in found)
            exact = exact and all(each for _value, each in found)
            own = split
    return (keys if own is keys else list(zip(*split, strict=True))), exact


def _own_value(table: KeyedTable, number: int, dialect: sa.Dialect, value: Any) -> tuple[Any, bool]:
    """One value of a key as a SELECT would give it, and whether it is."""
    column, types = table.key_columns[number], table.own_types[number]
    if type(value) in types:
        return value, True
    kind = python_type(column)
    with suppress(Exception):  # whatever a type raises, it does not tell
        read = _as_read(column.type.dialect_impl(dialect), dialect, value)
        if kind is None and type(read) is type(value):
            types.add(type(value))
        if kind is None or type(read) is kind:
            return (value if type(read) is type(value) else read), True
    if kind in _EXACT and type(value) in _EXACT[kind]:
        with suppress(ValueError, ArithmeticError):
            made = kind(value)
            # "010" and " 10" are no number's own text: databases do not agree about such
            if kind is uuid.UUID or type(value)(made) == value:
                return made, True
    elif kind is int and hasattr(value, "__index__"):
        is_int = isinstance(value, int)
        with suppress(TypeError):  # SQLite stores the bytes of numpy's integers
            in_bytes = dialect.name == "sqlite" and not is_int
            return bytes(memoryview(value)) if in_bytes else index(value), is_int
    elif kind is None or kind not in _EXACT or isinstance(value, kind):
        return value, True
    return value, False


def _as_read(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect, value: Any) -> Any:
    """What a type makes of a value, to the database and back; the driver gets the same for both."""
    bind, result = kind.bind_processor(dialect), kind.result_processor(dialect, None)
    sent = bind(value) if bind else value
    read = result(sent) if result else sent
    if (bind(read) if bind else read) != sent or hash(read) is None:
        raise ValueError(value)
    return read


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


def delete_plainly(
    connection: sa.Connection, table: KeyedTable, keys: Sequence[Any], guard: str = ""
) -> int:
    """Delete by key with SQLAlchemy's own statements; the number of rows deleted."""
    delete = sa.delete(table.clause).where(*[sa.text(guard)] if guard else [])
    return sum(
        run(connection, delete.where(plain_condition(table, part))).rowcount
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
    if set(map(type, keys)) != {int} or not all(map(lt, keys, islice(keys, 1, None))):
        return None
    gaps = (at for at, (one, two) in enumerate(pairwise(keys), 1) if two > one + 1)
    starts = [0] if keys[-1] - keys[0] < len(keys) else [0, *islice(gaps, most)]
    if most is not None and len(starts) > most:
        return None
    ends = [*starts[1:], len(keys)]
    return [(keys[start], keys[end - 1]) for start, end in zip(starts, ends, strict=True)]


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


def selects_of_keys(
    dialect: sa.Dialect, table: KeyedTable, sent: Sequence[Any], mark: str
) -> list[Select]:
    """SQL for the driver: the keys that are there, in parts that a database handles well."""
    place, names = quoted_names(dialect, table)
    head = f"SELECT {', '.join(names)} FROM {place} WHERE "
    if len(names) > 1:
        # No tuple IN: MariaDB then compares 'é' to a latin1 column in the wrong character set.
        equal = f"({' AND '.join(f'{name} = {mark}' for name in names)})"
        return [
            (head + " OR ".join([equal] * len(part)), tuple(chain.from_iterable(part)))
            for part in chunks(sent, _PLAIN_COMPOSITE_CHUNK)
        ]
    if set(map(type, sent)) == {int}:
        parts = chunks(sent, _INTEGERS)
        return [(f"{head}{names[0]} IN ({', '.join(map(str, part))})", ()) for part in parts]
    # From 1000 constants on MariaDB turns IN into a derived table, with conversions of its own,
    # which integers alone survive for sure.
    return [
        (f"{head}{names[0]} IN ({', '.join([mark] * len(part))})", tuple(part))
        for part in chunks(sent, _PLAIN_CHUNK)
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


def keys_found(keys: Sequence[Any], look: Look) -> list[Any]:
    """Which keys name a row, where the database alone knows when two keys are equal.

    ``look`` gives the values that were sent for some keys, and the rows that came back. A row that
    comes back under another value ('ABC' asked, 'abc' stored) is found by halving.
    """
    sent, rows = look(keys) if keys else ((), ())
    if not rows or len(keys) == 1:
        return list(keys) if rows else []
    values = [tuple(row) if len(row) > 1 else row[0] for row in rows]
    with suppress(TypeError):  # a value without a hash: halving finds it
        there = set(values)
        if there <= set(sent):
            return [key for key, value in zip(keys, sent, strict=True) if value in there]
    middle = len(keys) // 2
    return keys_found(keys[:middle], look) + keys_found(keys[middle:], look)
