"""MariaDB and MySQL, with PyMySQL and mysqlclient."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy.dialects.mysql import LONGTEXT

from tidyrows.dialects.catalogue import RealTable, filled_tables
from tidyrows.dialects.driver import Fault, Loss, raw_connection
from tidyrows.dialects.mysql.capacity import MySQLCapacity
from tidyrows.dialects.mysql.locks import MySQLLocks
from tidyrows.dialects.mysql.outer import MySQLOuter
from tidyrows.dialects.mysql.reflection import SHOWN_TRIGGERS, read_columns, read_foreign_keys
from tidyrows.dialects.mysql.spaces import MySQLDatabase
from tidyrows.dialects.mysql.statements import MySQLStatements
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.schema.reflect import reflect_foreign_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place
    from tidyrows.schema.reflect import Columns

_ROLLED_BACK = frozenset({1213, 1020})
# 1205 rolls back all with innodb_rollback_on_timeout; 1206 is a full lock table.
_PERHAPS_ROLLED_BACK = frozenset({1205, 1206})
# The server closes the connection after it; PyMySQL and SQLAlchemy consider it usable.
_PACKET_TOO_BIG = 1153
_NO_DATABASE = 1049
_TRANSACTION_OPEN = 1568
# SERVER_STATUS_IN_TRANS, SERVER_STATUS_AUTOCOMMIT; of drivers that keep the server's status.
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2
_KEEPS_STATUS = frozenset({"pymysql", "aiomysql", "asyncmy"})
_NO_SAVEPOINT = 1305
_MARK = "SAVEPOINT tidyrows_mark"
_IS_MARKED = "RELEASE SAVEPOINT tidyrows_mark"
_ROLLBACKS = "SHOW SESSION STATUS LIKE 'Handler_rollback'"
_SAVED = "tidyrows.mysql.session"

# The schema of a name, whether the session cuts values rather than refuse them, whether a trigger
# may change a new row, and what triggers do at an INSERT. With constants for its place, the server
# opens no other table's files.
_PLACE = """
SELECT COALESCE(%s, DATABASE()), @@SESSION.sql_mode, MAX(action_timing = 'BEFORE'),
       GROUP_CONCAT(action_statement SEPARATOR '; ')
FROM information_schema.triggers
WHERE event_object_schema = COALESCE(%s, DATABASE()) AND event_object_table = %s
      AND event_manipulation = 'INSERT'"""
# The line after the columns in SHOW CREATE TABLE, in upper case.
_ENGINE = re.compile(r"^\) ENGINE=(\w+)", re.MULTILINE)
_WITHOUT_TRANSACTIONS = frozenset({"MYISAM", "ARIA", "MEMORY", "CSV", "ARCHIVE", "MRG_MYISAM"})

_TEMPORARY = "CREATE TEMPORARY TABLE"
_NO_SUCH_TABLE = frozenset({1146, 1049})
_LOG = (
    "SHOW GLOBAL STATUS WHERE Variable_name IN "
    "('Innodb_lsn_current', 'Innodb_redo_log_current_lsn'{})"
)
# MyISAM and Aria write no log of InnoDB's. MySQL counts what it is asked here as written, too.
_WRITTEN = ", 'Handler_write', 'Handler_update', 'Handler_delete'"

_SUPERUSERS = (
    "SELECT GRANTEE FROM information_schema.USER_PRIVILEGES WHERE PRIVILEGE_TYPE = 'SUPER'"
)
# The name of a schema in a GRANT is a pattern.
_LESSER_WRITERS = f"""
SELECT GRANTEE FROM (
    SELECT GRANTEE, PRIVILEGE_TYPE FROM information_schema.USER_PRIVILEGES
    UNION SELECT GRANTEE, PRIVILEGE_TYPE FROM information_schema.SCHEMA_PRIVILEGES
    WHERE %s LIKE TABLE_SCHEMA
    UNION SELECT GRANTEE, PRIVILEGE_TYPE FROM information_schema.TABLE_PRIVILEGES
    WHERE (TABLE_SCHEMA, TABLE_NAME) = (%s, %s)
    UNION SELECT GRANTEE, PRIVILEGE_TYPE FROM information_schema.COLUMN_PRIVILEGES
    WHERE (TABLE_SCHEMA, TABLE_NAME) = (%s, %s)
) g WHERE PRIVILEGE_TYPE IN ('INSERT', 'UPDATE') AND GRANTEE NOT IN ({_SUPERUSERS})
AND CONCAT(CHAR(39), SUBSTRING_INDEX(CURRENT_USER(), '@', 1), CHAR(39), '@', CHAR(39),
           SUBSTRING_INDEX(CURRENT_USER(), '@', -1), CHAR(39)) IN ({_SUPERUSERS})
GROUP BY 1 ORDER BY 1"""
_OWN_SCHEMAS = frozenset({"mysql", "information_schema", "performance_schema", "sys"})


class MySQL(MySQLStatements, MySQLLocks, MySQLCapacity, MySQLOuter):
    """A deadlock rolls back the transaction, a lock timeout only the statement; DDL commits."""

    name = "mysql"
    has_server = True
    runs_code = True
    ddl_commits = True
    # Not UNIX_TIMESTAMP(NOW(6)): in the hour that a session's time zone has twice it is off by one.
    clock = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)"
    # 3572 and 3024 are NOWAIT and max_execution_time of MySQL 8, by its manual; MariaDB has 1205
    # and 1969 for them.
    timeout_codes = frozenset({1205, 1969, 3572, 3024})
    transient_codes = timeout_codes | {1213, 1020, 1040, 1317}
    # The first four are the drivers' own; 1927, or 4031 on MySQL 8: the server ended the session.
    lost_codes = frozenset({2002, 2003, 2006, 2013, 1927, 4031})
    foreign_key_codes = frozenset({1451, 1452, 1216, 1217})
    constraint_codes = foreign_key_codes | {1062, 1048, 4025, 3819}
    permission_codes = frozenset({1044, 1142, 1143})
    space_kinds = MappingProxyType({"schema": MySQLDatabase, "database": MySQLDatabase})
    table_options = MappingProxyType({"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"})
    long_text = LONGTEXT(charset="ascii")  # JSON, in which everything else is escaped
    _busy = "SELECT 1 FROM information_schema.PROCESSLIST WHERE ID = {} AND COMMAND <> 'Sleep'"

    def driver_code(self, error: BaseException) -> int | None:
        """The first argument; mariadbconnector has ``errno``."""
        code: Any = getattr(error, "errno", None) or (error.args[0] if error.args else None)
        return code if isinstance(code, int) else None

    def role(self, preparer: Any, name: str) -> str:
        """Name and host, each quoted."""
        return "@".join(f"'{part}'" for part in name.rpartition("@")[::2])

    def is_database_missing(self, error: BaseException) -> bool:
        return bool(self.code(error) == _NO_DATABASE)

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A deadlock loses all; a lock timeout the statement, or all where so configured."""
        code = self.code(error)
        lost = code == _PACKET_TOO_BIG or self.fault(error) is Fault.LOST
        if lost or code in _ROLLED_BACK:
            return Loss.EVERYTHING
        return Loss.UNKNOWN if code in _PERHAPS_ROLLED_BACK else Loss.NOTHING

    # ----- sessions

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """By the status in the server's last answer; mysqlclient only knows of autocommit."""
        raw = raw_connection(dbapi_connection)
        if self.driver == "mysqldb":
            return False if raw.get_autocommit() else None
        if self.driver not in _KEEPS_STATUS:
            return None
        result = raw._result  # noqa: SLF001 -- no public name; none after COMMIT, ROLLBACK, ping
        status = raw.server_status if result is None else result.server_status
        if status is not None:
            return bool(status & _IN_TRANSACTION)
        # PyMySQL and aiomysql do not keep the status that comes with rows. An older "yes" holds:
        # what ends a transaction and gives rows has been marked.
        if raw.server_status & _IN_TRANSACTION:
            return True
        return False if raw.server_status & _AUTOCOMMIT else None

    def driver_server_id(self, raw: Any) -> int | None:
        return int(raw.thread_id())

    def watch_names(self, connection: sa.Connection, moved: Callable[[], None]) -> None:
        """``select_db`` changes the database without a statement."""
        raw = raw_connection(connection.connection.dbapi_connection)
        select_db = raw.select_db

        def select(*args: Any, **options: Any) -> Any:
            moved()
            return select_db(*args, **options)

        raw.select_db = select

    def mark_transaction(self, connection: sa.Connection) -> Any | None:
        """A savepoint, which ends with its transaction; and how often the session rolled back."""
        ((_name, before),) = self._query(connection, _ROLLBACKS)
        self._query(connection, _MARK)
        return before

    def marked_outcome(self, connection: sa.Connection, mark: Any) -> CommitOutcome:
        """Where the savepoint is gone and nothing was rolled back, all was committed."""
        try:
            self._query(connection, _IS_MARKED)
        except self._dbapi.Error as error:
            if self.code(error) == _NO_SAVEPOINT:
                with suppress(self._dbapi.Error):
                    ((_name, now),) = self._query(connection, _ROLLBACKS)
                    return CommitOutcome.COMMITTED if now == mark else CommitOutcome.UNKNOWN
            return CommitOutcome.UNKNOWN
        return CommitOutcome.OPEN

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """An error packet carries no transaction status, so only two codes are certain."""
        return CommitOutcome.GONE if self.code(error) in _ROLLED_BACK else CommitOutcome.UNKNOWN

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """READ COMMITTED and READ WRITE for this transaction, checks on, every wait bounded."""
        self.refuse_open_transaction(connection)
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
        now = self._query(connection, f"{unhurried}SELECT {listed}")[0]
        before = {
            name: old for (name, new), old in zip(wanted.items(), now, strict=True) if old != new
        }
        connection.info[_SAVED] = before
        if before:
            self._set(connection, {name: wanted[name] for name in before})
        try:
            # For one transaction only, so nothing of it needs restoring; it holds under AUTOCOMMIT
            # too. The server refuses it where a transaction is open, of which drivers tell nothing.
            self._query(connection, "SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE")
        except self._dbapi.Error as error:
            if self.code(error) == _TRANSACTION_OPEN:
                raise self.open_transaction(connection) from error
            raise
        connection.begin()
        connection.exec_driver_sql("START TRANSACTION")

    def end_cleanup(self, connection: sa.Connection) -> None:
        """If the session cannot be restored, the connection is thrown away."""
        if connection.closed or connection.invalidated:
            return
        before = connection.info.pop(_SAVED, None)
        if not before:
            return
        try:
            self._set(connection, before)
        except self._dbapi.Error:
            connection.invalidate()

    @contextmanager
    def without_foreign_keys(self, connection: sa.Connection) -> Iterator[None]:
        """FOREIGN_KEY_CHECKS=0 for the block; throw the connection away afterwards."""
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION foreign_key_checks = 1")

    def _set(self, connection: sa.Connection, values: dict[str, float]) -> None:
        listed = ", ".join(f"SESSION {name} = {value}" for name, value in values.items())
        self._query(connection, f"SET {listed}")

    # ----- catalogue

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """SHOW CREATE TABLE: alone in telling a temporary table, which hides one of its name."""
        found = self._query(connection, _PLACE, schema, schema, name)
        ((schema, mode, changing, triggers),) = found
        if schema is None:
            return None
        alters_keys = bool(changing) or "STRICT_" not in mode
        if not alters_keys and self.returning:
            alters_keys = not self._is_shown_triggers(connection, schema, name)
        fills = filled_tables(triggers or "")
        definition = self._definition(connection, schema, name)
        if definition is None:
            # Without the right to look, there still is the table that the INSERT went to.
            return RealTable(schema, "table", plain=False, alters_keys=alters_keys, fills=fills)
        if not definition:
            return None
        if definition.startswith(_TEMPORARY):
            return RealTable(schema, "temporary", plain=False)
        is_table = definition.startswith("CREATE TABLE")
        kind: Literal["table", "other"] = "table" if is_table else "other"
        engine = _ENGINE.search(definition)
        transactional = engine is None or engine[1] not in _WITHOUT_TRANSACTIONS
        place = (schema, name)
        return RealTable(
            schema,
            kind,
            plain=False,
            alters_keys=alters_keys,
            transactional=transactional,
            incarnation=self.incarnations(connection, [place]).get(place) if is_table else None,
            fills=fills,
        )

    def _definition(self, connection: sa.Connection, schema: str, name: str) -> str | None:
        """SHOW CREATE TABLE in upper case; empty without such a table, None where it is refused."""
        try:
            row = self._query(connection, f"SHOW CREATE TABLE {_quoted(schema)}.{_quoted(name)}")[0]
        except self._dbapi.Error as error:
            if self.loss(error, dbapi_connection=None) is Loss.EVERYTHING:
                raise  # whatever was done before in this transaction is undone
            return "" if self.code(error) in _NO_SUCH_TABLE else None
        return str(row[1]).upper()

    def _is_temporary(self, connection: sa.Connection, schema: str, name: str) -> bool:
        return (self._definition(connection, schema, name) or "").startswith(_TEMPORARY)

    def driver_places(self, raw: Any, cursor: Any) -> list[tuple[str, Any]]:
        """The machine is known to the server only; a proxy or a tunnel may stand before it."""
        cursor.execute("SELECT DATABASE(), @@hostname")
        database, machine = cursor.fetchone()
        host = getattr(raw, "host", None) or getattr(raw, "server_host", None)
        if host is None and hasattr(raw, "get_host_info"):
            host = raw.get_host_info().partition(" via ")[0]
        socket = getattr(raw, "unix_socket", None)
        return [
            ("database", database),
            ("host", host),
            ("unix_socket", socket),
            ("host", machine),
        ]

    def places_of_schema(self, connection: sa.Connection, schema: str) -> list[tuple[str, str]]:
        """A schema is a database, whichever was connected to."""
        return [("database", schema)]

    def _is_shown_triggers(self, connection: sa.Connection, schema: str, name: str) -> bool:
        """Whether it is sure that this user sees a table's triggers; asked once per table."""
        shown = self._shown.get((schema, name))
        if shown is None:
            ((answer,),) = self._query(connection, SHOWN_TRIGGERS, schema, schema, name)
            shown = self._shown[schema, name] = bool(answer)
        return shown

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        return reflect_foreign_keys(connection, schemas, read=read_foreign_keys)

    def columns_of(
        self, connection: sa.Connection, places: Iterable[Place]
    ) -> Mapping[Place, Columns]:
        return read_columns(connection, places)

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

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, which may write the row again."""
        rows = connection.exec_driver_sql(
            "SELECT trigger_name FROM information_schema.triggers WHERE event_object_schema = %s "
            "AND event_object_table = %s AND event_manipulation = 'DELETE' ORDER BY trigger_name",
            (str(table.name.schema), str(table.name.name)),
        )
        return [f'trigger "{row[0]}"' for row in rows]

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """How far InnoDB's log is written; on MariaDB also how many rows, by any engine."""
        mariadb = getattr(self._dialect(), "is_mariadb", False)
        return self._query(connection, _LOG.format(_WRITTEN if mariadb else "")) or None

    def driver_rows_inserted(self, dbapi_connection: Any, cursor: Any) -> Any:
        """Rows that storage engines wrote for the session; on MySQL 8, temporary tables too."""
        cursor.execute("SHOW SESSION STATUS LIKE 'Handler_write'")
        total = {None: int(cursor.fetchone()[1])}
        return total, total

    def is_system_table(self, schema: str, name: str) -> bool:
        return schema.lower() in _OWN_SCHEMAS

    def lesser_writers(self, connection: sa.Connection, table: Place) -> list[str]:
        asked = self._query(connection, _LESSER_WRITERS, table[0], *table, *table)
        return [name for (name,) in asked]

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        ((database,),) = self._query(connection, "SELECT DATABASE()")
        return [] if database is None else [str(database)]


def _quoted(name: str) -> str:
    # SQLAlchemy's quoting doubles percent signs: wrong for a statement without parameters.
    return "`" + name.replace("`", "``") + "`"
