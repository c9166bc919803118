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

    from tidyrows.rows import KeyedTable

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


def json_rows(types: Sequence[RealType], values: Sequence[Sequence[Any]]) -> JsonRows | None:
    """The keys (one list per column) for JSON_TABLE; None where a value does not fit exactly."""
    columns, expressions, written = [], [], []
    for number, (real, column) in enumerate(zip(types, values, strict=True)):
        form = _form(real, column)
        if form is None:
            return None
        type_name, write, expression = form
        columns.append(f"k{number} {type_name} PATH '$[{number}]'")
        expressions.append(expression.format(f"j.k{number}"))
        written.append([write(value) for value in column])
    text = json.dumps(list(zip(*written, strict=True)), separators=(",", ":"))
    return JsonRows(text, ", ".join(columns), expressions)


def _form(real: RealType, values: Sequence[Any]) -> _Form | None:
    """How the values of one column travel.

    No form may round or cut: a key that the real column cannot hold must find nothing.
    """
    kinds = {type(value) for value in values}
    form: _Form | None = None
    match real.name:
        case "tinyint" | "smallint" | "mediumint" | "int" | "bigint" if kinds <= {int, bool}:
            # The widest: a narrow type reads a key that is too large as its own largest value.
            least, most = min(values), max(values)
            if least >= -(2**63) and most < 2**63:
                form = "BIGINT", int, "{}"
            elif least >= 0 and most < 2**64:
                form = "BIGINT UNSIGNED", int, "{}"
        case "char" | "varchar" | "enum" if kinds == {str}:
            size = max(map(len, values)) + 1
            if size <= _LONGEST:
                charset = f"CHARACTER SET {real.charset} COLLATE {real.collation}"
                form = f"VARCHAR({size}) {charset}", str, "{}"
        case "binary" | "varbinary" if kinds <= {bytes, bytearray}:
            size = 2 * max(map(len, values)) + 1
            if size <= _LONGEST:
                form = f"VARCHAR({size}) CHARACTER SET ascii", bytes.hex, "UNHEX({})"
        case "uuid" if kinds <= {str, UUID}:
            form = "VARCHAR(36) CHARACTER SET ascii", str, "CAST({} AS UUID)"
        case "decimal" if kinds == {Decimal} and all(map(_fits, values)):
            form = "DECIMAL(65, 30)", "{:f}".format, "{}"
        case "date" if kinds == {date}:
            form = "DATE", str, "{}"
        case "time" if kinds == {time} and not any(value.tzinfo for value in values):
            form = "TIME(6)", str, "{}"
        case "datetime" | "timestamp" if kinds == {datetime}:
            if not any(value.tzinfo for value in values):
                form = "DATETIME(6)", str, "{}"
    return form


def _fits(value: Decimal) -> bool:
    """Into DECIMAL(65, 30), to the last digit."""
    exponent = value.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -_SCALE and value.adjusted() < _DIGITS - _SCALE
