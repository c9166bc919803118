"""PostgreSQL, with psycopg, psycopg2 and asyncpg; other drivers are handled with care."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from operator import attrgetter, methodcaller
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.driver import Fault, Loss
from tidyrows.dialects.postgresql import statements
from tidyrows.dialects.postgresql.capacity import PostgreSQLCapacity
from tidyrows.dialects.postgresql.locks import PostgreSQLLocks
from tidyrows.dialects.postgresql.outer import PostgreSQLOuter
from tidyrows.dialects.postgresql.spaces import PostgreSQLDatabase, PostgreSQLSchema
from tidyrows.dialects.postgresql.statements import INCARNATION, PostgreSQLStatements
from tidyrows.dialects.sessions import CommitOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place

_NO_DATABASE = "3D000"
_NO_DATABASE_TEXT = re.compile(r'FATAL: +database ".*" does not exist')
_IN_ERROR = "25P02"
# libpq's PGTransactionStatusType, which psycopg and psycopg2 both hand on.
_IDLE, _INERROR, _UNKNOWN = 0, 3, 4
_STATUS: dict[str, Callable[[Any], int]] = {
    "psycopg": attrgetter("pgconn.transaction_status"),
    "psycopg2": methodcaller("get_transaction_status"),
}
# Of a cursor: what tells the oid of the table of a column, by the column's number.
_TABLES: dict[tuple[str, bool], Callable[[Any], Callable[[int], int]]] = {
    ("psycopg", False): attrgetter("pgresult.ftable"),
    ("psycopg", True): attrgetter("_cursor.pgresult.ftable"),
    ("psycopg2", False): lambda cursor: lambda place: cursor.description[place].table_oid,
}
_BEGINNING = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE"
# A role left on a pooled connection goes, where the login has its rights anyway (INHERIT).
_SETTINGS = """
SELECT pg_catalog.set_config('lock_timeout', %s, true),
       pg_catalog.set_config('statement_timeout', COALESCE(
           CAST(%s AS pg_catalog.text), pg_catalog.current_setting('statement_timeout')), true),
       pg_catalog.set_config('role', CASE WHEN r.rolinherit THEN 'none'
                             ELSE pg_catalog.current_setting('role') END, true)
FROM pg_catalog.pg_roles r WHERE r.rolname = session_user"""
# These send several statements without parameters in one go.
_SEVERAL_AT_ONCE = frozenset({"psycopg", "psycopg2"})

_PREPARED_WRITERS = """
SELECT x.gid FROM pg_catalog.pg_prepared_xacts x
JOIN pg_catalog.pg_locks t ON t.transactionid = x.transaction
JOIN pg_catalog.pg_locks l ON l.virtualtransaction = t.virtualtransaction
JOIN pg_catalog.pg_class c ON c.oid = l.relation
WHERE x.database = pg_catalog.current_database() AND t.pid IS NULL AND l.pid IS NULL
      AND l.mode = 'RowExclusiveLock'
      AND c.relname = CAST(%s AS pg_catalog.name)"""
# pg_table_is_visible honours search_path, pg_temp first. Unlike to_regclass, this cannot raise.
# Of a trigger's type, 7 is BEFORE INSERT FOR EACH ROW, and 4 is INSERT. Functions of PostgreSQL's
# own have smaller numbers; one that inserts says so in its text, or runs another.
_RESOLVE = f"""
SELECT n.nspname, CAST(c.relkind AS pg_catalog.text), CAST(c.relpersistence AS pg_catalog.text),
       pg_catalog.has_table_privilege(c.oid, 'SELECT')
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_rewrite w
                       WHERE w.ev_class = c.oid AND w.ev_type IN ('3', '4'))
       AND (NOT pg_catalog.row_security_active(c.oid)
            OR EXISTS (SELECT FROM pg_catalog.pg_policy p
                       WHERE p.polrelid = c.oid AND p.polcmd IN ('r', '*'))),
       EXISTS (SELECT FROM pg_catalog.pg_trigger t
               WHERE t.tgtype & 7 = 7 AND t.tgenabled <> 'D'
                     AND (t.tgrelid = c.oid
                          OR t.tgrelid IN (SELECT i.inhrelid FROM pg_catalog.pg_inherits i
                                           WHERE i.inhparent = c.oid))),
       {INCARNATION},
       EXISTS (SELECT FROM pg_catalog.pg_trigger t
               JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.oid >= 16384
               WHERE t.tgtype & 4 = 4 AND t.tgenabled <> 'D' AND NOT t.tgisinternal
                     AND p.prosrc ~* 'insert|merge|copy|execute|perform|call|select'
                     AND (t.tgrelid = c.oid
                          OR t.tgrelid IN (SELECT i.inhrelid FROM pg_catalog.pg_inherits i
                                           WHERE i.inhparent = c.oid)))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = CAST(%s AS pg_catalog.name) AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND """
_VISIBLE = "pg_catalog.pg_table_is_visible(c.oid)"
_IN_SCHEMA = (
    "n.oid = CASE CAST(%s AS pg_catalog.text) WHEN 'pg_temp' "
    "THEN pg_catalog.pg_my_temp_schema() ELSE "
    "(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = CAST(%s AS pg_catalog.name)) END"
)

_REFERENCING = """
SELECT DISTINCT n.nspname FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
JOIN pg_catalog.pg_namespace m ON m.oid = p.relnamespace
WHERE k.contype = 'f' AND m.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_INHERITED = """
SELECT n.nspname, c.relname, k.conname FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_constraint o ON o.oid = k.conparentid AND o.conrelid <> k.conrelid
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE k.contype = 'f' AND n.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_HIDDEN = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relrowsecurity AND pg_catalog.row_security_active(c.oid)
      AND n.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_INVALID = """
SELECT i.relname FROM pg_catalog.pg_index x
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
JOIN pg_catalog.pg_class c ON c.oid = x.indrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE NOT x.indisvalid AND n.nspname = %s AND c.relname = %s"""

# Of a trigger's type, 2 is BEFORE and 8 is DELETE; '4' is the DELETE of a rule.
_SUPPRESSORS = """
WITH t AS (SELECT c.oid FROM pg_catalog.pg_class c
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname = %s AND c.relname = %s)
SELECT 'trigger "' || tgname || '"' FROM pg_catalog.pg_trigger JOIN t ON t.oid = tgrelid
WHERE NOT tgisinternal AND tgtype & 10 = 10
UNION ALL
SELECT 'rule "' || rulename || '"' FROM pg_catalog.pg_rewrite JOIN t ON t.oid = ev_class
WHERE ev_type = '4'
UNION ALL
SELECT 'row-level security policy "' || polname || '"' FROM pg_catalog.pg_policy
JOIN t ON t.oid = polrelid
WHERE polcmd IN ('d', 'r', '*') AND pg_catalog.row_security_active(polrelid)
ORDER BY 1"""

_NUMBER = "SELECT CAST(pg_catalog.txid_current_if_assigned() AS pg_catalog.text)"
_OUTCOME = "SELECT pg_catalog.txid_status(CAST(CAST(%s AS pg_catalog.text) AS pg_catalog.int8))"
_OUTCOMES = {
    "in progress": CommitOutcome.OPEN,
    "committed": CommitOutcome.COMMITTED,
    "aborted": CommitOutcome.GONE,
}
# Its older name, which all versions know.
_SNAPSHOT = "SELECT CAST(pg_catalog.txid_current_snapshot() AS pg_catalog.text)"
_OWN_SCHEMAS = """
SELECT nspname FROM pg_catalog.pg_namespace
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
      AND pg_catalog.has_schema_privilege(oid, 'USAGE')
ORDER BY nspname"""
_PARTITIONS = """
SELECT relname FROM pg_catalog.pg_class
WHERE relispartition AND relnamespace = (
    SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = %s)"""

_LESSER_WRITERS = """
SELECT r.rolname FROM pg_catalog.pg_roles r, pg_catalog.pg_roles own, pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND own.rolname = current_user AND own.rolsuper
      AND NOT r.rolsuper AND r.rolname !~ '^pg_'
      AND pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE')
      AND pg_catalog.has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE') ORDER BY 1"""


class PostgreSQL(PostgreSQLStatements, PostgreSQLLocks, PostgreSQLCapacity, PostgreSQLOuter):
    """A transaction that saw an error persists nothing, and its COMMIT raises nothing.

    Settings of the cleanup are for its transaction only: a pooler shares sessions.
    """

    name = "postgresql"
    has_server = True
    runs_code = True
    clock = "CAST(extract(epoch FROM pg_catalog.clock_timestamp()) AS double precision)"
    transient_codes = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
    timeout_codes = frozenset({"55P03", "57014"})
    foreign_key_codes = frozenset({"23503", "23001"})
    permission_codes = frozenset({"42501"})
    space_kinds = MappingProxyType({"schema": PostgreSQLSchema, "database": PostgreSQLDatabase})
    _busy = (
        "SELECT 1 FROM pg_catalog.pg_stat_activity WHERE pid = {} AND state IS DISTINCT FROM 'idle'"
    )

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._status = _STATUS.get(self.driver)
        self.returned_table = _TABLES.get((self.driver, dialect.is_async))
        self.counts_when_closed = self.driver != "psycopg"
        self._mark = _numbered if self.driver == "asyncpg" else None

    def driver_code(self, error: BaseException) -> str | None:
        """``sqlstate`` of psycopg and asyncpg, ``pgcode`` of psycopg2."""
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return code if isinstance(code, str) else None

    def driver_fault(self, error: BaseException) -> Fault:
        """By classes of codes: 08 and 57P0 are lost connections, 23 is a constraint."""
        # Before the code is looked for: SQLAlchemy makes it anew for asyncpg, without one.
        if type(error).__name__ == "InvalidCachedStatementError":
            return Fault.TRANSIENT
        code = self.driver_code(error)
        if code is None:
            # Only what happens to the connection itself comes without a code: server down,
            # too many connections, killed between two statements.
            lost = self._dbapi is not None and isinstance(error, self._dbapi.OperationalError)
            return Fault.LOST if lost else Fault.OTHER
        if code in self.transient_codes:
            return Fault.TRANSIENT
        if code.startswith(("08", "57P0")) or code == "25P03":
            return Fault.LOST
        return Fault.CONSTRAINT if code.startswith("23") else Fault.OTHER

    def is_database_missing(self, error: BaseException) -> bool:
        """invalid_catalog_name; of a refused connection libpq gives the text only."""
        code: Any = self.code(error)
        return code == _NO_DATABASE if code else bool(_NO_DATABASE_TEXT.search(str(error)))

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A rollback to a savepoint saves the rest; without one, ``commit_is_void`` sees it."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.NOTHING

    # ----- sessions

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """As libpq or asyncpg last heard; None on a broken connection and for other drivers."""
        raw: Any = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if self.driver == "asyncpg":
            return None if raw.is_closed() else bool(raw.is_in_transaction())
        if self._status is None:
            return None
        status = self._status(raw)
        return None if status == _UNKNOWN else bool(status != _IDLE)

    def driver_server_id(self, raw: Any) -> int | None:
        if self.driver == "psycopg":
            return int(raw.pgconn.backend_pid) or None
        ask = getattr(raw, "get_backend_pid", None) or raw.get_server_pid
        return int(ask())

    def session_setting(self, sql: str) -> bool:
        """SET, RESET and the like, DDL, and ``SELECT set_config(...)``."""
        return super().session_setting(sql) or "set_config" in sql

    def places_by_url(self, engine: sa.Engine) -> list[tuple[str, str]]:
        """The drivers take from the environment what the URL does not say."""
        url, given = engine.url, engine.url.query
        wanted = ["PGSERVICE"]
        if not (url.host or {"host", "hostaddr"} & given.keys()):
            wanted += ["PGHOST", "PGHOSTADDR"]
        if not (url.database or {"dbname", "database"} & given.keys()):
            wanted.append("PGDATABASE")
        return [(name, os.environ[name]) for name in wanted if os.environ.get(name)]

    def driver_places(self, raw: Any, cursor: Any) -> list[tuple[str, Any]]:
        """The host by the driver; the database by the server, since a pooler may rename it."""
        cursor.execute("SELECT pg_catalog.current_database()")
        (database,) = cursor.fetchone()
        info = getattr(raw, "info", None)
        host = getattr(info, "host", None)
        if self.driver == "asyncpg":
            address = getattr(raw, "_addr", None)  # no public name
            host = address[0] if isinstance(address, tuple) else address
        return [("database", database), ("host", host)]

    def driver_rows_inserted(self, dbapi_connection: Any, cursor: Any) -> Any:
        """By the statistics of this session, which are not yet handed over."""
        try:
            cursor.execute(statements.INSERTED)
        except self._dbapi.Error as error:
            if self.code(error) == _IN_ERROR:
                return {}, {}  # its COMMIT is a ROLLBACK
            raise
        counts = {(schema, name): count for schema, name, count in cursor.fetchall()}
        rest = counts
        if (self._dialect().server_version_info or ()) >= statements.HANDS_OVER:
            cursor.execute(statements.HAND_OVER)
            rest = {}
        return counts, rest

    def commit_is_void(self, connection: sa.Connection) -> bool | None:
        """True in an aborted transaction: its COMMIT is a silent ROLLBACK."""
        if self._status is not None:
            driver: Any = connection.connection.dbapi_connection
            status = self._status(getattr(driver, "driver_connection", driver))
            return None if status == _IDLE else status == _INERROR
        if self.in_transaction(connection.connection.dbapi_connection) is False:
            return None
        try:
            self._query(connection, "SELECT 1")
        except self._dbapi.Error as error:
            return bool(self.code(error) == _IN_ERROR)
        return False

    def mark_transaction(self, connection: sa.Connection) -> Any | None:
        """Its number."""
        return self._query(connection, _NUMBER)[0][0]

    def marked_outcome(self, connection: sa.Connection, mark: Any) -> CommitOutcome:
        """By its number the server tells what became of any transaction."""
        try:
            ((status,),) = self._query(connection, _OUTCOME, mark)
        except self._dbapi.Error as error:
            aborted = self.code(error) == _IN_ERROR
            return CommitOutcome.OPEN if aborted else CommitOutcome.UNKNOWN
        return _OUTCOMES.get(status, CommitOutcome.UNKNOWN)

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """A COMMIT that the server refused is rolled back; one without an answer is in doubt."""
        if connection.closed or connection.invalidated:
            return CommitOutcome.UNKNOWN
        if self.in_transaction(connection.connection.dbapi_connection):
            return CommitOutcome.OPEN
        refused = self.fault(error) is not Fault.LOST and self.code(error) is not None
        return CommitOutcome.GONE if refused else CommitOutcome.UNKNOWN

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """READ COMMITTED, READ WRITE, timeouts and no role, all for this transaction only."""
        self.refuse_open_transaction(connection)
        if getattr(connection.connection.dbapi_connection, "autocommit", False):
            connection.execution_options(isolation_level="READ COMMITTED")
        lock = max(1, round(lock_timeout * 1000))  # 0 would mean for ever
        statement = None if statement_timeout is None else max(1, round(statement_timeout * 1000))
        if self.driver in _SEVERAL_AT_ONCE:
            limits = f"'{lock}'", "NULL" if statement is None else f"'{statement}'"
            connection.exec_driver_sql(f"{_BEGINNING}; {_SETTINGS % limits}").close()
        else:
            connection.exec_driver_sql(_BEGINNING)
            given = None if statement is None else str(statement)
            self._execute(connection, _SETTINGS, str(lock), given)

    # ----- catalogue

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The table behind the name, by the search_path of this transaction."""
        if schema is None:
            rows = self._query(connection, _RESOLVE + _VISIBLE, name)
        else:
            rows = self._query(connection, _RESOLVE + _IN_SCHEMA, name, schema, schema)
        if not rows:
            return None
        real_schema, kind, persistence, returns, alters_keys, incarnation, fills = rows[0]
        if kind not in {"r", "p"}:
            return RealTable(real_schema, "other", plain=False, returns=returns)
        temporary = persistence == "t"
        return RealTable(
            real_schema,
            "temporary" if temporary else "table",
            plain=kind == "r",  # the root of a partitioned table has no system columns to return
            returns=returns,
            alters_keys=alters_keys,
            incarnation=incarnation,
            fills=("",) if fills else (),
        )

    def prepared_writers(self, connection: sa.Connection, table: str) -> set[str]:
        """Those that hold the lock of a writer on such a table: the lock outlives the session."""
        return {xid for (xid,) in self._query(connection, _PREPARED_WRITERS, table)}

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        return {row[0] for row in self._execute(connection, _REFERENCING, list(schemas))}

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, rules, and the policies of row-level security."""
        place = (table.name.schema, table.table.name)
        return [row[0] for row in self._execute(connection, _SUPPRESSORS, *place)]

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        """With those marked that a partition has from its partitioned table."""
        schemas = list(schemas)
        keys = super().foreign_keys(connection, schemas)
        inherited = {tuple(row) for row in self._execute(connection, _INHERITED, schemas)}
        return tuple(
            replace(key, inherited=True) if (*key.child, key.name) in inherited else key
            for key in keys
        )

    def hidden_tables(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str]]:
        """Those with row-level security, unless this role is above it."""
        return {(row[0], row[1]) for row in self._execute(connection, _HIDDEN, list(schemas))}

    def invalid_indexes(self, connection: sa.Connection, schema: str, table: str) -> set[str]:
        """What a CREATE INDEX CONCURRENTLY that failed leaves behind."""
        return {row[0] for row in self._execute(connection, _INVALID, schema, table)}

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """Which transactions are over: whoever changes anything, in any database, has a number."""
        return self._query(connection, _SNAPSHOT)

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """All but the system's own."""
        return [name for (name,) in self._query(connection, _OWN_SCHEMAS)]

    def is_system_table(self, schema: str, name: str) -> bool:
        own = schema.startswith("pg_") and not schema.startswith("pg_temp")
        return own or schema == "information_schema"

    def lesser_writers(self, connection: sa.Connection, table: Place) -> list[str]:
        return [name for (name,) in self._query(connection, _LESSER_WRITERS, *table)]

    def storage_tables(self, connection: sa.Connection, schema: str) -> set[str]:
        """Partitions: their rows are the partitioned table's."""
        return {name for (name,) in self._query(connection, _PARTITIONS, schema)}


def _numbered(sql: str) -> str:
    """With asyncpg's parameter marks, ``$1``, in place of ``%s``."""
    pieces = sql.split("%s")
    marks = [f"{piece}${number}" for number, piece in enumerate(pieces[:-1], 1)]
    return "".join(marks) + pieces[-1]
