"""Keys for the MySQL family's JSON_TABLE, in columns that compare exactly as the real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable

_COLUMNS = """
SELECT column_name, data_type, character_set_name, collation_name
FROM information_schema.columns WHERE table_schema = %s AND table_name = %s"""
_LONGEST = 4000  # characters; beyond that plain IN does
_DIGITS, _SCALE = 65, 30  # the most that DECIMAL has on MySQL; MariaDB has some more
_Form = tuple[str, "Callable[[Any], Any]", str]
"""JSON_TABLE's column type, how a value is written, and what the real column is compared to."""


@dataclass(frozen=True, slots=True)
class RealType:
    """A column's type as the database has it."""

    name: str
    charset: str | None
    collation: str | None


@dataclass(frozen=True, slots=True)
class JsonRows:
    """One JSON value, the columns to read it with, and what to compare the real columns to."""

    json: str
    columns: str
    expressions: list[str]


def real_types(connection: sa.Connection, table: KeyedTable) -> list[RealType] | None:
    """The key columns' types; None where JSON_TABLE or the table's description is missing."""
    dialect: Any = connection.dialect
    first = (10, 6) if getattr(dialect, "is_mariadb", False) else (8, 0, 4)
    if (getattr(dialect, "server_version_info", None) or ()) < first:
        return None
    rows = connection.exec_driver_sql(_COLUMNS, (str(table.name.schema), str(table.table.name)))
    known = {row[0]: RealType(row[1].lower(), row[2], row[3]) for row in rows}
    try:
        return [known[column.name] for column in table.key_columns]
    except KeyError:
        return None


def json_rows(
    types: Sequence[RealType], values: Sequence[Sequence[Any]], alias: str
) -> JsonRows | None:
    """The keys (one list per column) for JSON_TABLE; None where a value does not fit exactly."""
    columns, expressions, written = [], [], []
    for number, (real, column) in enumerate(zip(types, values, strict=True)):
        form = _form(real, column)
        if form is None:
            return None
        type_name, write, expression = form
        path = "$" if len(types) == 1 else f"$[{number}]"
        columns.append(f"k{number} {type_name} PATH '{path}'")
        expressions.append(expression.format(f"{alias}.k{number}"))
        written.append([write(value) for value in column])
    rows = written[0] if len(types) == 1 else list(zip(*written, strict=True))
    text = json.dumps(rows, separators=(",", ":"))
    return JsonRows(text, ", ".join(columns), expressions)


def _form(real: RealType, values: Sequence[Any]) -> _Form | None:
    """How the values of one column travel.

    No form may round or cut: a key that the real column cannot hold must find nothing.
    """
    kinds = {type(value) for value in values}
    found = _FORMS.get(real.name)
    if found is None or not kinds <= found[0]:
        return None
    return found[1](real, values)


def _integer(real: RealType, values: Sequence[int]) -> _Form | None:
    # The widest: a narrow type reads a key that is too large as its own largest value.
    if min(values) >= -(2**63) and max(values) < 2**63:
        return "BIGINT", int, "{}"
    unsigned = min(values) >= 0 and max(values) < 2**64
    return ("BIGINT UNSIGNED", int, "{}") if unsigned else None


def _text(real: RealType, values: Sequence[str]) -> _Form | None:
    size = max(map(len, values)) + 1
    type_name = f"VARCHAR({size}) CHARACTER SET {real.charset} COLLATE {real.collation}"
    return (type_name, str, "{}") if size <= _LONGEST else None


def _binary(real: RealType, values: Sequence[bytes]) -> _Form | None:
    size = 2 * max(map(len, values)) + 1
    type_name = f"VARCHAR({size}) CHARACTER SET ascii"
    return (type_name, lambda value: value.hex(), "UNHEX({})") if size <= _LONGEST else None


def _uuid(real: RealType, values: Sequence[Any]) -> _Form | None:
    return "VARCHAR(36) CHARACTER SET ascii", str, "CAST({} AS UUID)"


def _decimal(real: RealType, values: Sequence[Decimal]) -> _Form | None:
    for value in values:
        exponent = value.as_tuple().exponent
        if not isinstance(exponent, int) or exponent < -_SCALE:  # NaN and its kin are no int
            return None
        if value.adjusted() >= _DIGITS - _SCALE:
            return None
    return f"DECIMAL({_DIGITS}, {_SCALE})", "{:f}".format, "{}"


def _date(real: RealType, values: Sequence[date]) -> _Form | None:
    return "DATE", str, "{}"


def _moment(real: RealType, values: Sequence[datetime | time]) -> _Form | None:
    type_name = "TIME(6)" if real.name == "time" else "DATETIME(6)"
    return None if any(value.tzinfo for value in values) else (type_name, str, "{}")


_INTEGER = (frozenset({int, bool}), _integer)
_TEXT = (frozenset({str}), _text)
_BINARY = (frozenset({bytes, bytearray}), _binary)
_DATETIME = (frozenset({datetime}), _moment)
_FORMS: dict[str, tuple[frozenset[type], Callable[[RealType, Any], _Form | None]]] = {
    "tinyint": _INTEGER,
    "smallint": _INTEGER,
    "mediumint": _INTEGER,
    "int": _INTEGER,
    "bigint": _INTEGER,
    "char": _TEXT,
    "varchar": _TEXT,
    "enum": _TEXT,
    "binary": _BINARY,
    "varbinary": _BINARY,
    "uuid": (frozenset({str, UUID}), _uuid),
    "decimal": (frozenset({Decimal}), _decimal),
    "date": (frozenset({date}), _date),
    "time": (frozenset({time}), _moment),
    "datetime": _DATETIME,
    "timestamp": _DATETIME,
}
"""By real type: the Python types that fit, and how they travel."""
