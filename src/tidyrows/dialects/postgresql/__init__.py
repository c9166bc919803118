"""PostgreSQL, with psycopg, psycopg2 and asyncpg: errors, sessions, and the dialect.

Drivers that are not known are handled with care.
"""

from __future__ import annotations

import re
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.driver import Fault, Loss
from tidyrows.dialects.postgresql.catalogue import PostgreSQLCatalogue, PostgreSQLLocks
from tidyrows.dialects.postgresql.statements import PostgreSQLStatements
from tidyrows.dialects.sessions import CommitOutcome

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

_NO_DATABASE = "3D000"
_NO_DATABASE_TEXT = re.compile(r'FATAL: +database ".*" does not exist')
_IN_ERROR = "25P02"
# libpq's PGTransactionStatusType, which psycopg and psycopg2 both hand on.
_IDLE, _INERROR, _UNKNOWN = 0, 3, 4
_STATUS: dict[str, Callable[[Any], int]] = {
    "psycopg": attrgetter("pgconn.transaction_status"),
    "psycopg2": methodcaller("get_transaction_status"),
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


class PostgreSQL(PostgreSQLStatements, PostgreSQLLocks, PostgreSQLCatalogue):
    """A transaction that saw an error persists nothing, and its COMMIT raises nothing.

    Settings of the cleanup are for its transaction only: a pooler shares sessions.
    """

    name = "postgresql"
    clock = "CAST(extract(epoch FROM pg_catalog.clock_timestamp()) AS double precision)"
    transient_codes = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
    timeout_codes = frozenset({"55P03", "57014"})
    permission_codes = frozenset({"42501"})

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._status = _STATUS.get(self.driver)

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
        """The transaction status of libpq; None on a broken connection and for other drivers."""
        if self._status is None:
            return None
        status = self._status(getattr(dbapi_connection, "driver_connection", dbapi_connection))
        return None if status == _UNKNOWN else bool(status != _IDLE)

    def driver_server_id(self, raw: Any) -> int | None:
        if self.driver == "psycopg":
            return int(raw.pgconn.backend_pid) or None
        ask = getattr(raw, "get_backend_pid", None) or raw.get_server_pid
        return int(ask())

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether its session exists, in the middle of a statement or a transaction."""
        sql = (
            "SELECT 1 FROM pg_catalog.pg_stat_activity "
            f"WHERE pid = {int(server_id)} AND state IS DISTINCT FROM 'idle'"
        )
        return bool(self._query(connection, sql))

    def session_setting(self, sql: str) -> bool:
        """SET, RESET and the like, DDL, and ``SELECT set_config(...)``."""
        return super().session_setting(sql) or "set_config" in sql

    def commit_is_void(self, connection: sa.Connection) -> bool:
        """True in an aborted transaction: its COMMIT is a silent ROLLBACK."""
        if self._status is not None:
            return bool(self._status(connection.connection.driver_connection) == _INERROR)
        try:
            self._query(connection, "SELECT 1")
        except self._dbapi.Error as error:
            return bool(self.code(error) == _IN_ERROR)
        return False

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

    def _query(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        marked = _numbered(sql) if self.driver == "asyncpg" else sql
        return super()._query(connection, marked, *values)

    def _run(
        self, connection: sa.Connection, sql: str, values: tuple[Any, ...]
    ) -> sa.CursorResult[Any]:
        marked = _numbered(sql) if self.driver == "asyncpg" else sql
        return connection.exec_driver_sql(marked, values)


def _numbered(sql: str) -> str:
    """With asyncpg's parameter marks, ``$1``, in place of ``%s``."""
    pieces = sql.split("%s")
    marks = [f"{piece}${number}" for number, piece in enumerate(pieces[:-1], 1)]
    return "".join(marks) + pieces[-1]
