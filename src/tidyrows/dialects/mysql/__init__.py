"""MariaDB and MySQL, with PyMySQL and mysqlclient: errors, sessions, and the dialect."""

from __future__ import annotations

import math
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.driver import Fault, Loss
from tidyrows.dialects.mysql.catalogue import MySQLCatalogue, MySQLLocks
from tidyrows.dialects.mysql.statements import MySQLStatements
from tidyrows.dialects.sessions import CommitOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

_ROLLED_BACK = frozenset({1213, 1020})
# 1205 rolls back all with innodb_rollback_on_timeout; 1206 is a full lock table.
_PERHAPS_ROLLED_BACK = frozenset({1205, 1206})
# The server closes the connection after it; PyMySQL and SQLAlchemy consider it usable.
_PACKET_TOO_BIG = 1153
_NO_DATABASE = 1049
_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS
_SAVED = "tidyrows.mysql.session"


class MySQL(MySQLStatements, MySQLLocks, MySQLCatalogue):
    """A deadlock rolls back the transaction, a lock timeout only the statement; DDL commits."""

    name = "mysql"
    ddl_commits = True
    # Not UNIX_TIMESTAMP(NOW(6)): in the hour that a session's time zone has twice it is off by one.
    clock = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)"
    # 3572 and 3024 are NOWAIT and max_execution_time of MySQL 8, by its manual; MariaDB has 1205
    # and 1969 for them.
    timeout_codes = frozenset({1205, 1969, 3572, 3024})
    transient_codes = timeout_codes | {1213, 1020, 1040, 1317}
    # The first four are the drivers' own; 1927, or 4031 on MySQL 8: the server ended the session.
    lost_codes = frozenset({2002, 2003, 2006, 2013, 1927, 4031})
    constraint_codes = frozenset({1451, 1452, 1216, 1217, 1062, 1048, 4025, 3819})
    permission_codes = frozenset({1044, 1142, 1143})

    def driver_code(self, error: BaseException) -> int | None:
        """The first argument; mariadbconnector has ``errno``."""
        code: Any = getattr(error, "errno", None) or (error.args[0] if error.args else None)
        return code if isinstance(code, int) else None

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
        """Yes by PyMySQL's last status; no under autocommit; else unknown."""
        # Rows of a SELECT or of RETURNING come without a status, so the last one may be older than
        # the transaction.
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if self.driver == "pymysql" and raw.server_status & _IN_TRANSACTION:
            return True
        if self.driver in {"pymysql", "mysqldb"}:
            return False if raw.get_autocommit() else None
        return None

    def driver_server_id(self, raw: Any) -> int | None:
        return int(raw.thread_id())

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether its thread is there, in the middle of a statement."""
        sql = (
            "SELECT 1 FROM information_schema.PROCESSLIST "
            f"WHERE ID = {int(server_id)} AND COMMAND <> 'Sleep'"
        )
        return bool(self._query(connection, sql))

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
        connection.begin()
        # For one transaction only, so nothing of it needs restoring; it holds under AUTOCOMMIT too.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE")
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
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(f"SET {listed}")
