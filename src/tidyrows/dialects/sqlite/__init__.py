"""SQLite, with the driver of the standard library and aiosqlite: errors, sessions, the dialect."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.driver import Loss
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.dialects.sqlite.catalogue import SQLiteCatalogue
from tidyrows.dialects.sqlite.locks import SQLiteLocks
from tidyrows.dialects.sqlite.statements import SQLiteStatements

if TYPE_CHECKING:
    import sqlalchemy as sa

_BUSY, _LOCKED, _CONSTRAINT = 5, 6, 19
_SAVED = "tidyrows.sqlite.session"
_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, the only way there was before Python 3.12


class SQLite(SQLiteStatements, SQLiteLocks, SQLiteCatalogue):
    """One writer at a time; a failed COMMIT leaves its transaction open."""

    name = "sqlite"
    release_commits = True
    clock = "((julianday('now') - 2440587.5) * 86400.0)"
    transient_codes = frozenset({_BUSY, _LOCKED})
    timeout_codes = transient_codes
    constraint_codes = frozenset({_CONSTRAINT})

    def driver_code(self, error: BaseException) -> int | None:
        """The primary code: the low byte of the extended one."""
        code = getattr(error, "sqlite_errorcode", None)
        return code & 0xFF if isinstance(code, int) else None

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """Some errors roll the transaction back (disk full, RAISE(ROLLBACK)): ask the driver."""
        return Loss.NOTHING if self.in_transaction(dbapi_connection) else Loss.EVERYTHING

    # ----- sessions

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        return bool(raw.in_transaction)

    def is_begun(self, dbapi_connection: Any) -> bool:
        """False with ``autocommit=False``, where a transaction is always open."""
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        always = getattr(raw, "autocommit", _LEGACY) is False
        return not always and super().is_begun(raw)

    def driver_server_id(self, raw: Any) -> int | None:
        """Locks are the process's: its own id, for a connection that is in a transaction."""
        return os.getpid() if self.in_transaction(raw) else None

    def before_savepoint(self, connection: sa.Connection) -> None:
        """BEGIN in the legacy mode, where the RELEASE of an outermost savepoint would commit."""
        raw = connection.connection.dbapi_connection
        level = getattr(raw, "isolation_level", None)
        if level is not None and not self.in_transaction(raw):
            with closing(connection.connection.cursor()) as cursor:
                cursor.execute(f"BEGIN {level}")

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """BUSY and deferred foreign keys leave the transaction open."""
        if connection.closed or connection.invalidated:
            return CommitOutcome.UNKNOWN
        if self.in_transaction(connection.connection.dbapi_connection):
            return CommitOutcome.OPEN
        return CommitOutcome.UNKNOWN if self.code(error) is None else CommitOutcome.GONE

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """BEGIN IMMEDIATE: never a deadlock, whatever the driver or a begin listener does."""
        # Foreign keys are enforced although the connection's user has not switched them on: the
        # schema says what may happen to rows that reference ours.
        self._begin(connection, "BEGIN IMMEDIATE", lock_timeout, foreign_keys=foreign_keys)

    def begin_reading(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
    ) -> None:
        """BEGIN: no lock before the first look, and then a shared one."""
        self._begin(connection, "BEGIN", lock_timeout)

    def _begin(
        self,
        connection: sa.Connection,
        begin: str,
        lock_timeout: float,
        *,
        foreign_keys: bool | None = None,
    ) -> None:
        raw: Any = connection.connection.dbapi_connection
        mode = getattr(raw, "autocommit", _LEGACY)
        if mode is not False:  # in that mode of Python 3.12 a transaction is always open
            self.refuse_open_transaction(connection)
        (busy,) = self._query(connection, "PRAGMA busy_timeout")[0]
        enforced = self._query(connection, "PRAGMA foreign_keys")
        connection.info[_SAVED] = (busy, mode, enforced)
        if mode != _LEGACY:
            raw.autocommit = _LEGACY
            raw.rollback()
        self._query(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        if foreign_keys is not None and enforced != [(int(foreign_keys),)]:
            self._query(connection, f"PRAGMA foreign_keys = {int(foreign_keys)}")
        connection.begin()
        if self.in_transaction(raw):  # a begin listener, as SQLAlchemy's recipe has it
            self._query(connection, "ROLLBACK")
        connection.exec_driver_sql(begin)

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Also rolls back what a failed COMMIT left open."""
        if connection.closed or connection.invalidated or _SAVED not in connection.info:
            return
        busy, mode, enforced = connection.info.pop(_SAVED)
        raw: Any = connection.connection.dbapi_connection
        if self.in_transaction(raw):
            raw.rollback()
        self._query(connection, f"PRAGMA busy_timeout = {busy}")
        for (flag,) in enforced:  # no row where SQLite was built without foreign keys
            self._query(connection, f"PRAGMA foreign_keys = {flag}")
        if mode != _LEGACY:
            raw.autocommit = mode

    def enforces_foreign_keys(self, connection: sa.Connection) -> bool:
        return self._query(connection, "PRAGMA foreign_keys") == [(1,)]
