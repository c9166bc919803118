"""Keys for the MySQL family's JSON_TABLE, in columns that compare exactly as the real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime
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


def _form(real: RealType, values: Sequence[Any]) -> tuple[str, Callable[[Any], Any], str] | None:
    """JSON_TABLE's column type, how a value is written, and what is compared.

    No form may round or cut: a key that the real column cannot hold must find nothing.
    """
    kinds = {type(value) for value in values}
    match real.name:
        case "tinyint" | "smallint" | "mediumint" | "int" | "bigint" if kinds <= {int, bool}:
            return _integers(values)
        case "char" | "varchar" if kinds == {str}:
            size = max(map(len, values)) + 1
            text = f"VARCHAR({size}) CHARACTER SET {real.charset} COLLATE {real.collation}"
            return (text, str, "{}") if size <= _LONGEST else None
        case "binary" | "varbinary" if kinds <= {bytes, bytearray}:
            size = 2 * max(map(len, values)) + 1
            text = f"VARCHAR({size}) CHARACTER SET ascii"
            return (text, lambda value: value.hex(), "UNHEX({})") if size <= _LONGEST else None
        case "uuid" if kinds <= {str, UUID}:
            return "VARCHAR(36) CHARACTER SET ascii", str, "CAST({} AS UUID)"
        case "date" if kinds == {date}:
            return "DATE", str, "{}"
        case "datetime" | "timestamp" if kinds == {datetime}:
            naive = all(value.tzinfo is None for value in values)
            return ("DATETIME(6)", str, "{}") if naive else None
    return None


def _integers(values: Sequence[int]) -> tuple[str, Callable[[Any], Any], str] | None:
    # Always the widest: a narrow column would read a key too large as its own largest value.
    if min(values) >= -(2**63) and max(values) < 2**63:
        return "BIGINT", int, "{}"
    return ("BIGINT UNSIGNED", int, "{}") if min(values) >= 0 and max(values) < 2**64 else None
