"""The MySQL family's statements by key: JSON_TABLE for many keys, IN for few."""

from __future__ import annotations

import json
import weakref
from abc import abstractmethod
from dataclasses import dataclass
from datetime import date, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.keyless_rows import is_exact, stored_type
from tidyrows.dialects.keys import (
    RowsByKey,
    chunks,
    driver_values,
    keys_beside,
    quoted_names,
    run,
    selects_of_keys,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.keys import Select
    from tidyrows.dialects.statements import Proof
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import Place


_COLUMNS = """
SELECT table_name, column_name, data_type, character_set_name, collation_name
FROM information_schema.columns WHERE table_schema = %s"""
_LONGEST = 4000  # characters; beyond that plain IN does
_Form = tuple[str, "Callable[[Any], Any]", str]
"""JSON_TABLE's column type, how a value is written, and what the real column is compared to."""


@dataclass(frozen=True, slots=True)
class RealType:
    """A column's type as the database has it."""

    name: str
    charset: str | None
    collation: str | None


def json_rows(
    types: Sequence[RealType], values: Sequence[Sequence[Any]], alias: str
) -> tuple[str, str, list[str]] | None:
    """The keys (one list per column) for JSON_TABLE; None where a value does not fit exactly.

    One JSON value, SQL for the columns to read it with, and for what each real column must equal.
    """
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
    return json.dumps(rows, separators=(",", ":")), ", ".join(columns), expressions


def _form(real: RealType, values: Sequence[Any]) -> _Form | None:
    # No form may round or cut: a key that the real column cannot hold must find nothing.
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


def _moment(real: RealType, values: Sequence[datetime]) -> _Form | None:
    return None if any(value.tzinfo for value in values) else ("DATETIME(6)", str, "{}")


_INTEGER_TYPES = frozenset({"tinyint", "smallint", "mediumint", "int", "bigint"})
_FORMS: dict[str, tuple[frozenset[type], Callable[[RealType, Any], _Form | None]]] = {
    **dict.fromkeys(_INTEGER_TYPES, (frozenset({int, bool}), _integer)),
    **dict.fromkeys(("char", "varchar", "enum"), (frozenset({str}), _text)),
    **dict.fromkeys(("binary", "varbinary"), (frozenset({bytes, bytearray}), _binary)),
    **dict.fromkeys(("datetime", "timestamp"), (frozenset({datetime}), _moment)),
    "uuid": (
        frozenset({str, UUID}),
        lambda _real, _values: ("VARCHAR(36) CHARACTER SET ascii", str, "CAST({} AS UUID)"),
    ),
    "date": (frozenset({date}), lambda _real, _values: ("DATE", str, "{}")),
}
"""By real type: the Python types that fit, and how they travel. Rarer types go by IN."""


_JSON_KEYS = 20_000

# The names of files, in their own character set: what it makes of a text is read as bytes.
_FILE = "CONVERT(CAST(CONVERT(%s USING filename) AS BINARY) USING utf8mb3)"
_WANTED = f"SELECT {{}} AS number, CONCAT({_FILE}, '/', {_FILE}) AS file"
# Letters' case may be all the difference between two names.
_NUMBERS = (
    "SELECT number, MAX(TABLE_ID), NULL FROM ({}) tidyrows_wanted "
    "JOIN information_schema.INNODB_{}TABLES ON NAME = file GROUP BY number HAVING COUNT(*) = 1"
)
_NEXT = (
    "SELECT {}, NULL, AUTO_INCREMENT "
    "FROM information_schema.TABLES WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s"
)
_UNIQUE = (
    "SELECT TABLE_SCHEMA, TABLE_NAME, INDEX_NAME, COLUMN_NAME FROM information_schema.STATISTICS "
    "WHERE NON_UNIQUE = 0 AND (TABLE_SCHEMA, TABLE_NAME) IN"
)
_NO_SUCH_VIEW = 1109
NEEDS_PROCESS = 1227


class MySQLStatements(Dialect):
    """A join with JSON_TABLE finds rows by the key, so it locks no other rows."""

    _shows_incarnations = True
    reuses_keys = False
    explicit_zero_is_generated = True
    rounded_types = (*Dialect.rounded_types, sa.BINARY)  # which is filled up with zeros
    deletes_keyless_rows = True

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._types: weakref.WeakKeyDictionary[KeyedTable, list[RealType]]
        self._types = weakref.WeakKeyDictionary()
        # what a transaction has read, by place and column
        self._read: weakref.WeakKeyDictionary[sa.Connection, dict[Place, dict[str, RealType]]]
        self._read = weakref.WeakKeyDictionary()
        self._shown: dict[tuple[str, str], bool] = {}

    def read_key(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """A FLOAT as the double that it is: the six digits that are shown find no row."""
        if not isinstance(stored_type(column, self._dialect()), sa.Float):
            return column
        return sa.type_coerce(self.read_exactly(column), column.type)

    def inserted_proof(self, insert: sa.Insert, real: RealTable) -> Proof:
        """RETURNING of INSERT IGNORE yields the inserted rows; MySQL has no RETURNING."""
        sure = self._prefixes(insert) == {"IGNORE"} and self._post_values(insert) is None
        return sure and self.returning, None

    def incarnations(
        self,
        connection: sa.Connection,
        tables: Iterable[Place],
        highest: Mapping[Place, int] = MappingProxyType({}),
    ) -> dict[Place, str]:
        """InnoDB's number of a table, which TRUNCATE and a rebuild replace; needs PROCESS.

        MySQL 8 tells the next key of a table as it was up to a day ago, so it is not asked.
        """
        tables = list(tables)
        mariadb = getattr(self._dialect(), "is_mariadb", False)
        asked = {tables.index(place): key for place, key in highest.items() if mariadb}
        parts, sent = [_NEXT.format(number) for number in asked], [tables[n] for n in asked]
        if self._shows_incarnations and tables:
            wanted = " UNION ALL ".join(map(_WANTED.format, range(len(tables))))
            parts.append(_NUMBERS.format(wanted, "SYS_" if mariadb else ""))
            sent += tables
        if not parts:
            return {}
        sql, values = " UNION ALL ".join(parts), [str(each) for pair in sent for each in pair]
        try:
            rows = self._query(connection, sql, *values)
        except self._dbapi.Error as error:
            if self.code(error) not in {NEEDS_PROCESS, _NO_SUCH_VIEW}:
                raise
            self._shows_incarnations = False
            return self.incarnations(connection, tables, highest)
        found = {tables[number]: f"/{table_id}" for number, table_id, _next in rows if table_id}
        for number, _table_id, following in rows:
            if following is not None and following <= asked[number]:
                found[tables[number]] = found.get(tables[number], "/") + "<"
        return found

    def unique_columns(
        self, connection: sa.Connection, tables: Iterable[Place]
    ) -> Iterable[tuple[str, str, str, str]]:
        places = [str(each) for place in tables for each in place]
        marks = ", ".join(["(%s, %s)"] * (len(places) // 2))
        return self._query(connection, f"{_UNIQUE} ({marks})", *places)

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any], guard: str = ""
    ) -> int:
        self._refuse_temporary(connection, table)
        return super().delete_by_keys(connection, table, keys, guard)

    def insert_exactly(self, connection: sa.Connection, *row: Any, **options: Any) -> None:
        """NO_AUTO_VALUE_ON_ZERO, or a key 0 would become the next number."""
        before = str(self._query(connection, "SELECT @@SESSION.sql_mode")[0][0])
        wanted = ",".join(filter(None, (before, "NO_AUTO_VALUE_ON_ZERO")))
        connection.exec_driver_sql("SET SESSION sql_mode = %s", (wanted,))
        try:
            super().insert_exactly(connection, *row, **options)
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION sql_mode = %s", (before,))

    def _real_types(self, connection: sa.Connection, table: KeyedTable) -> list[RealType] | None:
        """The key columns' types; None where JSON_TABLE or the table's description is missing."""
        if table not in self._types:
            dialect: Any = connection.dialect
            first = (10, 6) if getattr(dialect, "is_mariadb", False) else (8, 0, 4)
            if (getattr(dialect, "server_version_info", None) or ()) < first:
                return None
            place = str(table.name.schema), str(table.table.name)
            read = self._read.setdefault(connection, {})
            if place not in read:
                # of one table, or of all where one transaction asks for more
                some = _COLUMNS if read else f"{_COLUMNS} AND table_name = %s"
                for name, *row in connection.exec_driver_sql(some, place[: 1 if read else 2]):
                    found = RealType(row[1].lower(), row[2], row[3])
                    read.setdefault((place[0], name), {})[row[0]] = found
            known = read.setdefault(place, {})
            if any(column.name not in known for column in table.key_columns):
                return None
            self._types[table] = [known[column.name] for column in table.key_columns]
        return self._types[table]

    def holds_integers(self, connection: sa.Connection, table: KeyedTable, types: Any) -> bool:
        real = self._real_types(connection, table)
        return real is not None and real[0].name in _INTEGER_TYPES

    def guards_of_range(
        self, connection: sa.Connection, table: KeyedTable
    ) -> Sequence[sa.ColumnElement[bool]] | None:
        return () if self.holds_integers(connection, table, None) else None

    def rows_by_key(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[RowsByKey] | None:
        """A join with JSON_TABLE."""
        types = self._real_types(connection, table)
        # MariaDB looks for the alias of a DELETE in the current database, if there is one: only
        # the keys have an alias.
        alias = keys_beside(table)
        place, names = quoted_names(connection.dialect, table)
        parts = []
        for part in chunks(keys, _JSON_KEYS):
            values = driver_values(table, connection.dialect, part)
            sent = json_rows(types, values, alias) if types and values else None
            if sent is None:
                return None
            text, columns, expressions = sent
            pairs = zip(names, expressions, strict=True)
            equal = " AND ".join(f"{place}.{name} = {value}" for name, value in pairs)
            source = f"JSON_TABLE(%s, '$[*]' COLUMNS ({columns})) AS {alias}"
            source = f"{source} STRAIGHT_JOIN {place} ON {equal}"
            parts.append(RowsByKey(source, f"{place} USING {source}", (text,)))
        return parts

    @abstractmethod
    def _is_temporary(self, connection: sa.Connection, schema: str, name: str) -> bool:
        """Whether this connection has a temporary table of this name."""

    def _refuse_temporary(self, connection: sa.Connection, table: KeyedTable) -> None:
        """Drop the connection if a temporary table of an earlier user hides the real one."""
        if self._is_temporary(connection, *table.place):
            connection.invalidate()
            raise ConnectionError(
                f"A temporary table {table.name} was left on a pooled connection and hides the "
                f"real one; the connection was thrown away."
            )

    # ----- rows without a key

    def read_exactly(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """A FLOAT as the double that it is, not the six digits that are shown; else as text."""
        kind = stored_type(column, self._dialect())
        if isinstance(kind, sa.Float):
            return sa.type_coerce(column.op("+")(sa.literal_column("0e0")), sa.Double())
        if is_exact(kind) and not isinstance(kind, sa.Interval):
            return sa.type_coerce(column, kind)
        return sa.cast(column, sa.CHAR())

    def delete_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """DELETE has a LIMIT of its own."""
        self._refuse_temporary(connection, table)
        condition = self._equals_row(table, table.clause, row)
        limit = "mariadb_limit" if connection.dialect.name == "mariadb" else "mysql_limit"
        delete = sa.delete(table.clause).where(condition).with_dialect_options(**{limit: count})
        return run(connection, delete).rowcount

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        exact = self.read_exactly(column)
        if not isinstance(exact.type, sa.CHAR):
            return super()._equals(column, value)
        # Bytes of one character set: by a collation a and A, or a and "a ", may be equal.
        text: Any = sa.bindparam(None, value, type_=sa.String())
        return _octets(exact).is_not_distinct_from(_octets(text))

    # ----- verification, which shares nothing with the statements above

    def verification_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[Any]:
        """Nothing, but no temporary table may hide a real one."""
        for table in tables:
            self._refuse_temporary(connection, table)
        return [None] * len(tables)

    def select_keys(
        self, connection: sa.Connection, table: KeyedTable, types: Any, sent: Sequence[Any]
    ) -> list[Select]:
        return selects_of_keys(connection.dialect, table, sent, "%s")


def _octets(text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.hex(sa.func.convert(text.op("USING")(sa.literal_column("utf8mb4"))))
