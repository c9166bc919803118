"""The MySQL family's statements by key: JSON_TABLE for many keys, IN for few."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.aliases import keys_beside
from tidyrows.dialects.base import Dialect
from tidyrows.dialects.keyless_rows import is_exact, stored_type
from tidyrows.dialects.keys import (
    chunks,
    delete_plainly,
    delete_runs,
    driver_values,
    find_plainly,
    integer_runs,
    quoted_names,
    run,
    typed_rows,
)
from tidyrows.dialects.mysql.json_table import json_rows, real_types
from tidyrows.dialects.statements import CycleForm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.mysql.json_table import RealType
    from tidyrows.dialects.statements import Select
    from tidyrows.keys import KeyedTable

_JSON_KEYS = 20_000
_INTEGER_TYPES = frozenset({"tinyint", "smallint", "mediumint", "int", "bigint"})
# From 1000 constants on MariaDB turns IN into a derived table, with conversions of its own, which
# integers alone survive for sure. An OR gets slower with its length.
_IN_KEYS, _OR_KEYS, _INTEGERS = 900, 100, 5000


class MySQLStatements(Dialect):
    """A join with JSON_TABLE finds rows by the key, so it locks no other rows."""

    cycle_form = CycleForm.LEVELS
    reuses_keys = False
    explicit_zero_is_generated = True
    deletes_keyless_rows = True
    verified_together = _OR_KEYS

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._types: weakref.WeakKeyDictionary[KeyedTable, list[RealType]]
        self._types = weakref.WeakKeyDictionary()

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
        """RETURNING of INSERT IGNORE yields the inserted rows; MySQL has no RETURNING."""
        sure = self._prefixes(insert) == {"IGNORE"} and self._post_values(insert) is None
        return sure and self.returning, None

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> int:
        """A join with JSON_TABLE: it finds its rows by the key, so it locks nobody else's."""
        self._refuse_temporary(connection, table)
        # No alias: MariaDB looks for DELETE's alias in the current database, if there is one.
        place, _columns = quoted_names(connection.dialect, table)
        runs = integer_runs(table, keys)
        if runs is not None and self._holds_integers(connection, table, None):
            return delete_runs(connection, table, runs)
        deleted = 0
        for part, joined in self._joined(connection, table, keys):
            if joined is None:
                deleted += delete_plainly(connection, table, part)
                continue
            source, sent = joined
            sql = f"DELETE FROM {place} USING {source}"
            deleted += connection.exec_driver_sql(sql, (sent,)).rowcount
        return deleted

    def insert_exactly(
        self,
        connection: sa.Connection,
        table: sa.TableClause,
        values: Mapping[str, Any],
        *,
        always: bool,
    ) -> None:
        """NO_AUTO_VALUE_ON_ZERO, or a key 0 would become the next number."""
        before = str(self._query(connection, "SELECT @@SESSION.sql_mode")[0][0])
        wanted = ",".join(filter(None, (before, "NO_AUTO_VALUE_ON_ZERO")))
        connection.exec_driver_sql("SET SESSION sql_mode = %s", (wanted,))
        try:
            super().insert_exactly(connection, table, values, always=always)
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION sql_mode = %s", (before,))

    def find(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        columns: Sequence[sa.ColumnElement[Any]],
        *,
        lock: bool = False,
        first: bool = False,
    ) -> list[tuple[Any, ...]]:
        """IN for few keys; else, and to lock nobody else's rows, a join with JSON_TABLE."""
        if len(keys) <= _OR_KEYS and not lock:
            return find_plainly(connection, table, keys, columns, lock=False, first=first)
        tail = (" LIMIT 1" if first else "") + (" FOR UPDATE" if lock else "")
        place, _columns = quoted_names(connection.dialect, table)
        quote = connection.dialect.identifier_preparer.quote
        listed = ", ".join(f"{place}.{quote(str(column.key))}" for column in columns)
        found: list[tuple[Any, ...]] = []
        for part, joined in self._joined(connection, table, keys):
            if joined is None:
                found += find_plainly(connection, table, part, columns, lock=lock, first=first)
                continue
            sql, sent = joined
            result = connection.exec_driver_sql(f"SELECT {listed} FROM {sql}{tail}", (sent,))
            found += typed_rows(result, columns, connection.dialect)
        return found

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """A join with JSON_TABLE, which locks nobody else's rows; what is counted is not sent."""
        for part, joined in self._joined(connection, table, keys):
            if joined is None:
                super().lock(connection, table, part)
                continue
            sql, sent = joined
            connection.exec_driver_sql(f"SELECT COUNT(*) FROM {sql} FOR UPDATE", (sent,)).one()

    def _real_types(self, connection: sa.Connection, table: KeyedTable) -> list[RealType] | None:
        types = self._types.get(table)
        if types is None:
            types = real_types(connection, table)
            if types is not None:
                self._types[table] = types
        return types

    def _holds_integers(self, connection: sa.Connection, table: KeyedTable, types: Any) -> bool:
        real = self._real_types(connection, table)
        return real is not None and real[0].name in _INTEGER_TYPES

    def _joined(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> Iterator[tuple[Sequence[Any], tuple[str, str] | None]]:
        """Parts of the keys, each with what to select from and its parameter, if that can be."""
        values = driver_values(table, connection.dialect, keys)
        types = None if values is None else self._real_types(connection, table)
        place, names = quoted_names(connection.dialect, table)
        alias = keys_beside(table)
        for start in range(0, len(keys), _JSON_KEYS):
            part = keys[start : start + _JSON_KEYS]
            sent = None
            if values is not None and types is not None:
                few = [column[start : start + _JSON_KEYS] for column in values]
                sent = json_rows(types, few, alias)
            if sent is None:
                yield part, None
                continue
            equal = " AND ".join(
                f"{place}.{name} = {value}"
                for name, value in zip(names, sent.expressions, strict=True)
            )
            source = f"JSON_TABLE(%s, '$[*]' COLUMNS ({sent.columns})) AS {alias}"
            yield part, (f"{source} STRAIGHT_JOIN {place} ON {equal}", sent.json)

    def _refuse_temporary(self, connection: sa.Connection, table: KeyedTable) -> None:
        """A temporary table that an earlier user left hides the real one, qualified or not.

        Raises:
            ConnectionError: the connection is thrown away; another one will do.
        """
        real = self.resolve(connection, table.name.schema, table.name.name)
        if real is not None and real.kind == "temporary":
            connection.invalidate()
            raise ConnectionError(
                f"A temporary table {table.name} was left on a pooled connection and hides the "
                f"real one; the connection was thrown away."
            )

    # ----- rows without a key

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
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
        limit = {"mysql_limit": count, "mariadb_limit": count}
        del limit["mysql_limit" if connection.dialect.name == "mariadb" else "mariadb_limit"]
        delete = sa.delete(table.clause).where(condition).with_dialect_options(**limit)
        return run(connection, delete).rowcount

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        kind = stored_type(column, self._dialect())
        if isinstance(kind, sa.Float):
            exact = column.op("+")(sa.literal_column("0e0"))
            return _equal(exact, sa.bindparam(None, value, type_=sa.Double()))
        if is_exact(kind) and not isinstance(kind, sa.Interval):
            return _equal(column, sa.bindparam(None, value, type_=kind))
        # bytes of one character set: a collation takes a and A, or a and a with a space, for equal
        text: Any = sa.bindparam(None, value, type_=sa.String())
        return _equal(_octets(sa.cast(column, sa.CHAR())), _octets(text))

    # ----- verification, which shares nothing with the statements above

    def _verification_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[Any]:
        """Nothing, but no temporary table may hide a real one."""
        for table in tables:
            self._refuse_temporary(connection, table)
        return [None] * len(tables)

    def _can_select(self, types: Any, values: list[list[Any]]) -> bool:
        return True

    def _select_keys(
        self, connection: sa.Connection, table: KeyedTable, types: Any, sent: Sequence[Any]
    ) -> Iterator[Select]:
        """By IN and the driver's own values, for as many at once as the database takes well."""
        place, names = quoted_names(connection.dialect, table)
        head = f"SELECT {', '.join(names)} FROM {place} WHERE "
        if len(names) > 1:
            # No tuple IN: MariaDB then compares 'é' to a latin1 column in the wrong character set.
            one = " AND ".join(f"{name} = %s" for name in names)
            for part in chunks(sent, _OR_KEYS):
                yield head + " OR ".join([one] * len(part)), tuple(v for row in part for v in row)
        elif set(map(type, sent)) == {int}:
            for part in chunks(sent, _INTEGERS):
                yield f"{head}{names[0]} IN ({', '.join(map(str, part))})", ()
        else:
            for part in chunks(sent, _IN_KEYS):
                yield f"{head}{names[0]} IN ({', '.join(['%s'] * len(part))})", tuple(part)


def _octets(text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.hex(sa.func.convert(text.op("USING")(sa.literal_column("utf8mb4"))))


def _equal(column: sa.ColumnElement[Any], value: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    return column.op("<=>", is_comparison=True, return_type=sa.Boolean())(value)
