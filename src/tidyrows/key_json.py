"""Keys and rows as JSON values, and back: for entries of a ledger and for ``to_json``."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import ipaddress
import math
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import TidyRowsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.keys import KeyedTable

UNTYPED = sa.types.NullType
"""The type of a column whose values are the driver's own: a type would convert them again."""
_BYTES = (bytes, bytearray, memoryview)
_LOW, _HIGH = -(2**63), 2**63 - 1  # what every reader of JSON, a database too, takes exactly
_MICROSECOND = dt.timedelta(microseconds=1)

_FORMS: tuple[tuple[Any, str, Callable[[Any], str], Callable[[str], Any]], ...] = (
    (int, "int", lambda value: str(int(value)), int),
    (float, "float", float.__repr__, float),
    (uuid.UUID, "uuid", str, uuid.UUID),
    # a datetime is a date, too
    (dt.datetime, "datetime", dt.datetime.isoformat, dt.datetime.fromisoformat),
    (dt.date, "date", dt.date.isoformat, dt.date.fromisoformat),
    (dt.time, "time", dt.time.isoformat, dt.time.fromisoformat),
    (
        dt.timedelta,
        "microseconds",
        lambda value: str(value // _MICROSECOND),
        lambda text: int(text) * _MICROSECOND,
    ),
    (decimal.Decimal, "decimal", str, decimal.Decimal),
    (_BYTES, "bytes", lambda value: base64.b64encode(value).decode(), base64.b64decode),
    # an interface is an address, too
    ((ipaddress.IPv4Interface, ipaddress.IPv6Interface), "interface", str, ipaddress.ip_interface),
    ((ipaddress.IPv4Address, ipaddress.IPv6Address), "address", str, ipaddress.ip_address),
    ((ipaddress.IPv4Network, ipaddress.IPv6Network), "network", str, ipaddress.ip_network),
)
"""Types without a form of their own in JSON: the name of the form, the writer and the reader."""
_READERS = {name: read for _type, name, _write, read in _FORMS}


def to_project_values(
    held: KeyedTable, keys: Iterable[Any], table: sa.Table, dialect: Any
) -> list[Any]:
    """Keys as the driver takes them, converted to values of the project's own Table."""
    places = {column.name: place for place, column in enumerate(held.key_columns)}
    order = [
        (places[column.name], _converter(column, held, dialect)) for column in table.primary_key
    ]
    rows = [held.row(key).key for key in keys]
    found = [tuple(convert(row[place]) for place, convert in order) for row in rows]
    return [row[0] if len(order) == 1 else row for row in found]


def _converter(column: sa.Column[Any], held: KeyedTable, dialect: Any) -> Callable[[Any], Any]:
    is_untyped = isinstance(held.table.c[column.name].type, UNTYPED)
    is_own = isinstance(column.type, sa.types.TypeDecorator)  # only it knows what its values are
    converts = (sa.Date, sa.DateTime, sa.Time, sa.Enum, sa.Uuid)
    if not is_untyped or not (is_own or isinstance(column.type, converts)):
        return lambda value: value
    process = column.type.dialect_impl(dialect).result_processor(dialect, None)
    if process is None:
        return lambda value: value
    if is_own:
        return process
    # what JSON has a form of its own for may be the project's value already
    done = column.type.python_type
    return lambda value: value if isinstance(value, done) else process(value)


def keys_to_json(table: KeyedTable, dialect: sa.Dialect, keys: Iterable[Any]) -> list[list[Any]]:
    """Keys as JSON has them, each a list of the values that the database's driver takes."""
    keys = list(keys)
    columns = table.key_columns
    if len(columns) == 1:
        return [[value] for value in _column_to_json(table, columns[0], dialect, keys)]
    if not keys:
        return []
    written = [
        _column_to_json(table, column, dialect, values)
        for column, values in zip(columns, zip(*keys, strict=True), strict=True)
    ]
    return [list(key) for key in zip(*written, strict=True)]


def row_to_json(table: KeyedTable, row: Sequence[Any]) -> list[Any]:
    """A whole row of a table without a primary key, as it was read: no type converts it."""
    cells = zip(table.table.columns, row, strict=True)
    return [_value_to_json(table, column, None, value) for column, value in cells]


def keys_from_json(written: Sequence[Sequence[Any]]) -> list[Any]:
    """Keys of :func:`keys_to_json`, as the driver takes them: scalars, or tuples of several."""
    if written and len(written[0]) == 1:
        return _column_from_json([value for (value,) in written])
    columns = [_column_from_json(list(column)) for column in zip(*written, strict=True)]
    return list(zip(*columns, strict=True))


def _column_from_json(values: list[Any]) -> list[Any]:
    """The values of one column, as the driver takes them."""
    if set(map(type, values)) <= {int, str}:
        return values
    return [_value_from_json(value) for value in values]


def _value_from_json(value: Any) -> Any:
    if isinstance(value, dict):
        ((name, text),) = value.items()
        return _READERS[name](text)
    if isinstance(value, list):
        raise TypeError(value)
    return value


def _column_to_json(
    table: KeyedTable, column: sa.Column[Any], dialect: sa.Dialect, values: Sequence[Any]
) -> Sequence[Any]:
    kind = column.type
    if _converts_in_sql(kind):
        raise TidyRowsError(
            f"The type {type(kind).__name__} of {table.name}.{column.name} changes its values in "
            f"SQL, so nobody knows here what the database made of them, and they have no JSON "
            f"form. Clean up in the process that made the rows: CleanupManager(tracker).cleanup()."
        )
    process = kind.dialect_impl(dialect).bind_processor(dialect)
    if process is None and set(map(type, values)) == {int} and isinstance(kind, sa.Integer):
        return values
    return [_value_to_json(table, column, process, value) for value in values]


def _converts_in_sql(kind: sa.types.TypeEngine[Any]) -> bool:
    if type(kind).bind_expression is sa.types.TypeEngine.bind_expression:
        return False
    return kind.bind_expression(sa.bindparam("x", type_=kind)) is not None


def _value_to_json(
    table: KeyedTable, column: sa.Column[Any], process: Callable[[Any], Any] | None, value: Any
) -> Any:
    try:
        return _plain(value if process is None or value is None else _unwrapped(process(value)))
    except Exception as error:
        # neither the value nor the type's arguments are shown: a project's own may have a secret
        raise TidyRowsError(
            f"A key value of type {type(value).__name__} has no JSON form yet: it stands in "
            f"{table.name}.{column.name}, of type {type(column.type).__name__}. Clean up in the "
            f"process that made the rows, CleanupManager(tracker).cleanup(), or make them with "
            f"a plain number, text, date or UUID there."
        ) from error


def _unwrapped(sent: Any) -> Any:
    """What the driver takes, without the wrapper that some drivers have for bytes."""
    if isinstance(sent, _BYTES):
        return sent
    inside = getattr(sent, "obj", getattr(sent, "adapted", None))
    return inside if isinstance(inside, _BYTES) else sent


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # half of a surrogate pair is no text: no database has such a key
        return _same_for_all_drivers(value, str.__str__(value))
    if isinstance(value, int) and _LOW <= value <= _HIGH:
        return _same_for_all_drivers(value, int(value))
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    for kind, name, write, _read in _FORMS:
        if isinstance(value, kind):
            return {name: write(value)}
    raise TypeError(type(value).__name__)


def _same_for_all_drivers(value: Any, plain: Any) -> Any:
    """The plain value; of a class (str, Enum) some drivers send the name, others the value."""
    if type(value) is not type(plain) and str(value) != str(plain):
        raise TypeError(type(value).__name__)
    return plain
