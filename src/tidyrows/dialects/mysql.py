"""MariaDB and MySQL, with PyMySQL and mysqlclient."""

from __future__ import annotations

import math
import weakref
from contextlib import closing, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGTEXT

from tidyrows.dialects.aliases import keys_beside
from tidyrows.dialects.base import CommitOutcome, CycleForm, Dialect, Fault, Look, Loss, RealTable
from tidyrows.dialects.blockers import blockers_on_mysql
from tidyrows.dialects.json_table import json_rows, real_types
from tidyrows.dialects.keys import (
    as_sent,
    chunks,
    delete_plainly,
    delete_runs,
    driver_values,
    find_plainly,
    integer_runs,
    look_plainly,
    run,
    those_there,
    typed_rows,
)
from tidyrows.dialects.liveness_lock import PATIENCE, ConnectionLife, Life, LockWords
from tidyrows.dialects.whole_rows import is_exact, same_row, stored_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidyrows.dialects.blocker import Blocker
    from tidyrows.dialects.json_table import RealType
    from tidyrows.keys import KeyedTable

_TRANSIENT = frozenset({1213, 1205, 1020, 1969, 1040, 1317})
# NOWAIT and max_execution_time of MySQL 8, by its manual; MariaDB has 1205 and 1969 for them.
_TRANSIENT |= {3572, 3024}
_WAITED = frozenset({1205, 1969, 3572, 3024})
# The first four are the drivers' own; 1927 is what MariaDB says to whom it ends, 4031 MySQL 8.
_LOST = frozenset({2002, 2003, 2006, 2013, 1927, 4031})
_NO_RIGHT = frozenset({1044, 1142, 1143})
_CONSTRAINT = frozenset({1451, 1452, 1216, 1217, 1062, 1048, 4025, 3819})
_ROLLED_BACK = frozenset({1213, 1020})
# 1205 rolls back all with innodb_rollback_on_timeout; 1206 is a full lock table.
_PERHAPS_ROLLED_BACK = frozenset({1205, 1206})
# The server hangs up after it; PyMySQL and SQLAlchemy take the connection for usable.
_PACKET_TOO_BIG = 1153
_NO_DATABASE = 1049
_NO_SUCH_TABLE = frozenset({1146, _NO_DATABASE})
_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS
_JSON_KEYS = 20_000
_INTEGER_TYPES = frozenset({"tinyint", "smallint", "mediumint", "int", "bigint"})
# From 1000 constants on MariaDB turns IN into a derived table, with conversions of its own, which
# integers alone survive for sure. An OR gets slower with its length.
_IN_KEYS, _OR_KEYS, _INTEGERS = 900, 100, 5000
_SAVED = "tidyrows.mysql.session"
_LOG = (
    "SHOW GLOBAL STATUS WHERE Variable_name IN "
    "('Innodb_lsn_current', 'Innodb_redo_log_current_lsn'{})"
)
# MyISAM and Aria write no log of InnoDB's. MySQL counts what it is asked here as written, too.
_WRITTEN = ", 'Handler_write', 'Handler_update', 'Handler_delete'"


class MySQL(Dialect):
    """The MySQL family: a deadlock takes the whole transaction, DDL commits."""

    name = "mysql"
    reuses_keys = False
    ddl_commits = True
    whole_rows = True
    table_options = MappingProxyType({"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"})
    long_text = LONGTEXT(charset="ascii")  # JSON, in which everything else is escaped
    cycle_form = CycleForm.LEVELS
    explicit_zero_is_generated = True
    # Not UNIX_TIMESTAMP(NOW(6)): in the hour that a session's time zone has twice it is off by one.
    clock = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)"

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._types: weakref.WeakKeyDictionary[KeyedTable, list[RealType]]
        self._types = weakref.WeakKeyDictionary()

    # ----- errors ------------------------------------------------------------------------------

    def _fault_of(self, error: BaseException) -> Fault:
        code = _code(error)
        if code in _TRANSIENT:
            return Fault.TRANSIENT
        if code in _LOST:
            return Fault.LOST
        return Fault.CONSTRAINT if code in _CONSTRAINT else Fault.OTHER

    def waited(self, error: BaseException) -> bool:
        """A lock timeout, NOWAIT, or a statement timeout."""
        return _code(error) in _WAITED

    def lacks_right(self, error: BaseException) -> bool:
        """Access denied to a database, a table or a column."""
        return _code(error) in _NO_RIGHT

    def lacks_database(self, error: BaseException) -> bool:
        """Unknown database."""
        return _code(error) == _NO_DATABASE

    def _server_id(self, raw: Any) -> int | None:
        return int(raw.thread_id())

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether its thread is there, in the middle of a statement."""
        sql = (
            "SELECT 1 FROM information_schema.PROCESSLIST "
            f"WHERE ID = {int(server_id)} AND COMMAND <> 'Sleep'"
        )
        return bool(self._ask(connection, sql))

    def blockers(self, cursor: Any, waiting: int) -> list[Blocker]:
        """By InnoDB's lock waits, which only the PROCESS right shows, else by the process list."""
        mariadb = bool(getattr(self._own(), "is_mariadb", False))
        if mariadb:
            cursor.execute("SET max_statement_time = 1.5")
        return blockers_on_mysql(cursor, waiting, mariadb=mariadb, error=self._dbapi.Error)

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A deadlock takes all; a lock timeout the statement, or all where so configured."""
        code = _code(error)
        lost = code == _PACKET_TOO_BIG or self.fault(error) is Fault.LOST
        if lost or code in _ROLLED_BACK:
            return Loss.EVERYTHING
        return Loss.DOUBT if code in _PERHAPS_ROLLED_BACK else Loss.NOTHING

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """An error packet carries no transaction status, so only two codes are certain."""
        return CommitOutcome.GONE if _code(error) in _ROLLED_BACK else CommitOutcome.DOUBT

    # ----- the user's transaction --------------------------------------------------------------

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """Yes by the last status that PyMySQL was sent; no under autocommit; else nobody knows.

        The rows of a SELECT or of RETURNING come without a status, so that the last one may be
        older than the transaction.
        """
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if self.driver == "pymysql" and raw.server_status & _IN_TRANSACTION:
            return True
        if self.driver in {"pymysql", "mysqldb"}:
            return False if raw.get_autocommit() else None
        return None

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """SHOW CREATE TABLE: alone in telling a temporary table, which hides one of its name."""
        if schema is None:
            schema = self._ask(connection, "SELECT DATABASE()")[0][0]
            if schema is None:
                return None
        try:
            row = self._ask(connection, f"SHOW CREATE TABLE {_quoted(schema)}.{_quoted(name)}")[0]
        except self._dbapi.Error as error:
            if self.loss(error, dbapi_connection=None) is Loss.EVERYTHING:
                raise  # whatever was done before in this transaction is undone
            # Without the right to look, there still is the table that the INSERT went to.
            missing = _code(error) in _NO_SUCH_TABLE
            return None if missing else RealTable(schema, "table", plain=False)
        definition = str(row[1]).upper()
        if definition.startswith("CREATE TEMPORARY TABLE"):
            return RealTable(schema, "temporary", plain=False)
        is_table = definition.startswith("CREATE TABLE")
        return RealTable(schema, "table" if is_table else "other", plain=False)

    # ----- inserts -----------------------------------------------------------------------------

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
        """RETURNING of INSERT IGNORE yields the inserted rows; MySQL has no RETURNING."""
        sure = self._prefixes(insert) == {"IGNORE"} and self._post_values(insert) is None
        return sure and self.returning, None

    # ----- cleanup -----------------------------------------------------------------------------

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """READ COMMITTED and READ WRITE for this transaction, checks on, every wait bounded."""
        self._refuse_open_transaction(connection)
        seconds = math.ceil(lock_timeout)  # MySQL 8 makes 1 of 0, MariaDB does not wait
        wanted: dict[str, float] = {
            "foreign_key_checks": 1,
            "sql_safe_updates": 0,
            "sql_select_limit": 2**64 - 1,
            "innodb_lock_wait_timeout": seconds,
            "lock_wait_timeout": seconds,
        }
        unhurried = ""
        if getattr(connection.dialect, "is_mariadb", False):
            wanted["max_statement_time"] = statement_timeout or 0
            unhurried = "SET STATEMENT max_statement_time = 0 FOR "
        listed = ", ".join(f"@@{name}" for name in wanted)
        now = self._ask(connection, f"{unhurried}SELECT {listed}")[0]
        before = {
            name: old for (name, new), old in zip(wanted.items(), now, strict=True) if old != new
        }
        connection.info[_SAVED] = before
        if before:
            self._set(connection, {name: wanted[name] for name in before})
        connection.begin()
        # For one transaction only, so nothing of it needs restoring; it holds under AUTOCOMMIT too.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE")
        connection.exec_driver_sql("START TRANSACTION")

    def end_cleanup(self, connection: sa.Connection) -> None:
        """A connection whose session cannot be restored is thrown away."""
        if connection.closed or connection.invalidated:
            return
        before = connection.info.pop(_SAVED, None)
        if not before:
            return
        try:
            self._set(connection, before)
        except self._dbapi.Error:
            connection.invalidate()

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> int:
        """A join with JSON_TABLE: it finds its rows by the key, so it locks nobody else's."""
        self._refuse_temporary(connection, table)
        # No alias: MariaDB looks for DELETE's alias in the current database, if there is one.
        place, _columns = _names(connection, table)
        runs = integer_runs(table, keys)
        if runs is not None and self._holds_integers(connection, table):
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

    def existing_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any]:
        """Asks with IN and the driver's own values."""
        self._refuse_temporary(connection, table)
        values = driver_values(table, connection.dialect, keys)
        if values is None:
            return those_there(keys, keys, lambda few: look_plainly(connection, table, few))
        sent = as_sent(values)
        return those_there(keys, sent, lambda few: _look(connection, table, few))

    def _looks(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[Look | None]:
        """As ``existing_keys`` asks."""
        looks: list[Look | None] = []
        for table, keys in tables:
            values = None
            if 0 < len(keys) <= _OR_KEYS:
                self._refuse_temporary(connection, table)
                values = driver_values(table, connection.dialect, keys)
            look = None if values is None else next(_selects(connection, table, as_sent(values)))
            looks.append(look)
        return looks

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """A FLOAT as the double that it is, not the six digits that are shown; else as text."""
        kind = stored_type(column, self._own())
        if isinstance(kind, sa.Float):
            return sa.type_coerce(column.op("+")(sa.literal_column("0e0")), sa.Double())
        if is_exact(kind) and not isinstance(kind, sa.Interval):
            return sa.type_coerce(column, kind)
        return sa.cast(column, sa.CHAR())

    def delete_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """DELETE has a LIMIT of its own."""
        self._refuse_temporary(connection, table)
        condition = same_row(table, table.clause, row, self._same)
        limit = {"mysql_limit": count, "mariadb_limit": count}
        del limit["mysql_limit" if connection.dialect.name == "mariadb" else "mariadb_limit"]
        delete = sa.delete(table.clause).where(condition).with_dialect_options(**limit)
        return run(connection, delete).rowcount

    def _same(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        kind = stored_type(column, self._own())
        if isinstance(kind, sa.Float):
            exact = column.op("+")(sa.literal_column("0e0"))
            return _equal(exact, sa.bindparam(None, value, type_=sa.Double()))
        if is_exact(kind) and not isinstance(kind, sa.Interval):
            return _equal(column, sa.bindparam(None, value, type_=kind))
        # bytes of one character set: a collation takes a and A, or a and a with a space, for equal
        text: Any = sa.bindparam(None, value, type_=sa.String())
        return _equal(_octets(sa.cast(column, sa.CHAR())), _octets(text))

    def _own(self) -> Any:
        return self._dialect()

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
        place, _columns = _names(connection, table)
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

    def _holds_integers(self, connection: sa.Connection, table: KeyedTable) -> bool:
        types = self._real_types(connection, table)
        return types is not None and types[0].name in _INTEGER_TYPES

    def _joined(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> Iterator[tuple[Sequence[Any], tuple[str, str] | None]]:
        """Parts of the keys, each with what to select from and its parameter, if that can be."""
        values = driver_values(table, connection.dialect, keys)
        types = None if values is None else self._real_types(connection, table)
        place, names = _names(connection, table)
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

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """Databases of the whole server: a foreign key may stand in any of them."""
        wanted = [str(schema) for schema in schemas]
        marks = ", ".join(["%s"] * len(wanted))
        rows = connection.exec_driver_sql(
            "SELECT DISTINCT constraint_schema FROM information_schema.referential_constraints "
            f"WHERE unique_constraint_schema IN ({marks})",
            tuple(wanted),
        )
        return {row[0] for row in rows}

    def what_keeps(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, which may write the row again."""
        rows = connection.exec_driver_sql(
            "SELECT trigger_name FROM information_schema.triggers WHERE event_object_schema = %s "
            "AND event_object_table = %s AND event_manipulation = 'DELETE' ORDER BY trigger_name",
            (str(table.name.schema), str(table.name.name)),
        )
        return [f'trigger "{row[0]}"' for row in rows]

    @contextmanager
    def without_foreign_keys(self, connection: sa.Connection) -> Iterator[None]:
        """FOREIGN_KEY_CHECKS=0 for the block; throw the connection away afterwards."""
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION foreign_key_checks = 1")

    def insert_exactly(
        self,
        connection: sa.Connection,
        table: sa.TableClause,
        values: Mapping[str, Any],
        *,
        always: bool,
    ) -> None:
        """NO_AUTO_VALUE_ON_ZERO, or a key 0 would become the next number."""
        before = str(self._ask(connection, "SELECT @@SESSION.sql_mode")[0][0])
        wanted = ",".join(filter(None, (before, "NO_AUTO_VALUE_ON_ZERO")))
        connection.exec_driver_sql("SET SESSION sql_mode = %s", (wanted,))
        try:
            super().insert_exactly(connection, table, values, always=always)
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION sql_mode = %s", (before,))

    # ----- who is alive ------------------------------------------------------------------------

    def life(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> Life:
        """GET_LOCK, on a connection of its own."""
        lock = _life_lock(number)
        words = LockWords(
            "AUTOCOMMIT",
            begin=None,
            take=f"SELECT GET_LOCK({lock}, 0)",
            keep=f"SELECT IS_USED_LOCK({lock}) = CONNECTION_ID()",
            release=f"SELECT RELEASE_LOCK({lock})",
        )
        return ConnectionLife(engine, number, words, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        """By IS_USED_LOCK."""
        ((held,),) = self._ask(connection, f"SELECT IS_USED_LOCK({_life_lock(number)}) IS NOT NULL")
        return bool(held)

    # ----- raw SQL -----------------------------------------------------------------------------

    # ----- what has changed --------------------------------------------------------------------

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """How far InnoDB's log is written, by MariaDB's name or MySQL's; None for either's lack.

        On MariaDB also how many rows were written, by any engine.
        """
        mariadb = getattr(self._own(), "is_mariadb", False)
        return self._ask(connection, _LOG.format(_WRITTEN if mariadb else "")) or None

    def own_schemas(self, connection: sa.Connection) -> list[str]:
        """The connection's database."""
        ((database,),) = self._ask(connection, "SELECT DATABASE()")
        return [] if database is None else [str(database)]

    def _ask(self, connection: sa.Connection, sql: str) -> list[Any]:
        """Past SQLAlchemy's events, on the connection's own cursor."""
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def _set(self, connection: sa.Connection, values: dict[str, float]) -> None:
        listed = ", ".join(f"SESSION {name} = {value}" for name, value in values.items())
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(f"SET {listed}")


def _look(
    connection: sa.Connection, table: KeyedTable, sent: Sequence[Any]
) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for sql, values in _selects(connection, table, sent):
        found.extend(tuple(row) for row in connection.exec_driver_sql(sql, values))
    return found


def _selects(connection: sa.Connection, table: KeyedTable, sent: Sequence[Any]) -> Iterator[Look]:
    """What finds the rows of these keys, of as many at once as the database takes well."""
    place, names = _names(connection, table)
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


def _names(connection: sa.Connection, table: KeyedTable) -> tuple[str, list[str]]:
    quote = connection.dialect.identifier_preparer.quote
    place = f"{quote(table.name.schema)}.{quote(table.table.name)}"
    return place, [quote(column.name) for column in table.key_columns]


def _life_lock(number: int) -> str:
    return f"'tidyrows:{int(number):016x}'"  # names are the server's, of at most 64 characters


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _code(error: BaseException | None) -> int | None:
    if isinstance(error, sa.exc.DBAPIError):
        error = error.orig
    code = getattr(error, "errno", None) or (error.args[0] if error and error.args else None)
    return code if isinstance(code, int) else None


def _octets(text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.hex(sa.func.convert(text.op("USING")(sa.literal_column("utf8mb4"))))


def _equal(column: sa.ColumnElement[Any], value: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    return column.op("<=>", is_comparison=True, return_type=sa.Boolean())(value)
