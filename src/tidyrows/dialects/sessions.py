"""Role *sessions*: the user's transaction, and what is set on the cleanup's own connection."""

from __future__ import annotations

import re
from abc import abstractmethod
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy as sa

from tidyrows.dialects.bounds import BoundedConnection, closed_at_end
from tidyrows.dialects.driver import DriverAccess, database_name
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# What reads or writes rows, or moves the transaction in plain words, alone in its string. All else
# may end the transaction, or give an unqualified name a new meaning (CREATE TEMP TABLE hides a
# table); so may a comment that MariaDB executes.
_QUIET = re.compile(
    r"(?:\s|;|--[^\n]*(?:\n|$)|/\*(?!M?!).*?\*/|\()*"
    r"(?:(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|MERGE|WITH|VALUES|TABLE|SHOW|DESC|DESCRIBE|EXPLAIN|COPY"
    r"|FETCH|PRAGMA|LISTEN|UNLISTEN|NOTIFY|BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE)\b"
    r"(?!.*/\*M?!)[^;]*[;\s]*)?",
    re.IGNORECASE | re.DOTALL,
)


@lru_cache(maxsize=4096)
def is_quiet(sql: str) -> bool:
    """Whether SQL certainly neither ends a transaction by a side effect nor moves a name."""
    return _QUIET.fullmatch(sql) is not None


LOCK_SECONDS = 5.0
"""The longest wait for one lock of a connection that only looks."""


class CommitOutcome(Enum):
    """What became of a transaction."""

    OPEN = auto()
    """The transaction is still open on the connection."""
    COMMITTED = auto()
    """Certainly committed."""
    GONE = auto()
    """Certainly rolled back."""
    UNKNOWN = auto()
    """Ask the database."""


class Sessions(DriverAccess):
    """Transactions of the user, and the transaction of the cleanup.

    What is asked of the user's transaction is asked inside it: nothing here may make it fail. The
    cleanup's connection is used by nobody else: ``begin_cleanup`` begins its transaction, the
    caller commits or rolls back, ``end_cleanup`` restores the session.
    """

    has_server: ClassVar[bool] = False
    """Whether it is reached over a network, which may go silent."""
    ddl_commits: ClassVar[bool] = False
    """Whether DDL commits the transaction."""
    release_commits: ClassVar[bool] = False
    """Whether the RELEASE of an outermost savepoint may be a COMMIT."""
    clock: ClassVar[str] = "EXTRACT(EPOCH FROM CURRENT_TIMESTAMP)"
    """SQL for the server's time in seconds since 1970, with fractions, in any time zone."""
    _busy: ClassVar[str | None] = None
    """SQL that finds a row where the session of this number works."""

    # ----- the user's transaction

    def is_begun(self, dbapi_connection: Any) -> bool:
        """Whether somebody began a transaction; one that the driver always has does not count."""
        return bool(self.in_transaction(dbapi_connection))

    def is_autocommit(self, connection: sa.Connection) -> bool:
        """Whether every statement commits: no savepoint, and a failed INSERT undoes only itself."""
        driver = connection.connection.dbapi_connection
        # SQLite's driver can be in autocommit while an event of the engine's user has sent BEGIN.
        if driver is None or self.in_transaction(driver):
            return False
        try:
            return connection.dialect.detect_autocommit_setting(driver)
        except NotImplementedError:
            return False

    def session_setting(self, sql: str) -> bool:
        """Whether SQL may change which table an unqualified name means, or end the transaction."""
        return not is_quiet(sql)

    def watch_names(self, connection: sa.Connection, moved: Callable[[], None]) -> None:
        """Call ``moved`` when a method of the driver changes what names on a connection mean."""

    def before_savepoint(self, connection: sa.Connection) -> None:
        """Make sure that the next SAVEPOINT stands inside a transaction."""

    def commit_is_void(self, connection: sa.Connection) -> bool | None:
        """Just before a COMMIT: whether it will persist nothing, and raise nothing.

        None where the driver shows no open transaction: it was ended past SQLAlchemy.
        """
        driver = connection.connection.dbapi_connection
        return None if self.in_transaction(driver) is False else False

    def mark_transaction(self, connection: sa.Connection) -> Any | None:
        """A mark by which :meth:`marked_outcome` knows the open transaction again.

        It is called before a statement that may end the transaction in a way that no text tells.
        None where there is no such mark.
        """
        return self.in_transaction(connection.connection.dbapi_connection) or None

    def marked_outcome(self, connection: sa.Connection, mark: Any) -> CommitOutcome:
        """What became of the transaction with this mark; it does not raise the driver's errors."""
        is_open = self.in_transaction(connection.connection.dbapi_connection)
        return CommitOutcome.OPEN if is_open else CommitOutcome.UNKNOWN

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """What a COMMIT that raised left behind."""
        return CommitOutcome.UNKNOWN

    def guard_pool(self, engine: sa.Engine) -> None:
        """Roll back a transaction that a failed COMMIT left open, before the pool's next user.

        SQLAlchemy considers the transaction ended and returns the connection as it is, after
        SQLite's BUSY as after a commit listener that raised or was cancelled on any database; the
        next user would commit its rows.
        """
        # Not event.contains: it does not know the listeners of a pool that dispose() made anew.
        if self._roll_back_leftover not in engine.pool.dispatch.reset:
            sa.event.listen(engine.pool, "reset", self._roll_back_leftover)

    def _roll_back_leftover(self, dbapi_connection: Any, record: Any, state: Any) -> None:
        # Without asyncio_safe nothing can be sent, and the pool throws the connection away.
        if not (state.transaction_was_reset and state.asyncio_safe):
            return
        if self.in_transaction(dbapi_connection) is not False:
            dbapi_connection.rollback()
            if self.in_transaction(dbapi_connection):  # asyncpg, if the driver did not begin it
                record.invalidate()

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether the server still works for a connection although its client is gone."""
        return self._busy is not None and bool(
            self._query(connection, self._busy.format(server_id))
        )

    def prepared_transactions(self, connection: sa.Connection) -> set[str]:
        """The ids of the transactions that are prepared on the server (two-phase commit)."""
        found = connection.recover_twophase()
        return {x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in found}

    def prepared_writers(self, connection: sa.Connection, table: str) -> set[str]:
        """Of the prepared transactions those that may have written to a table of this name.

        All, where the server does not tell.
        """
        return self.prepared_transactions(connection)

    # ----- the cleanup's connection

    def connect(self, engine: sa.Engine, seconds: float) -> AbstractContextManager[sa.Connection]:
        """A connection of the engine, closed at the end, within so many seconds in all.

        Raises:
            SilentServerError: the server did not answer in that time.
        """
        return BoundedConnection(engine, seconds) if self.has_server else closed_at_end(engine)

    @contextmanager
    def looking(self, engine: sa.Engine, seconds: float, **options: Any) -> Iterator[sa.Connection]:
        """A connection to look with, closed at the end, that waits for no lock for long.

        Args:
            engine: of the database.
            seconds: for everything, connecting and closing included.
            options: execution options of the connection.

        Raises:
            SilentServerError: the server did not answer in that time.
        """
        with self.connect(engine, seconds) as connection:
            connection.execution_options(**options)
            # All users of a StaticPool share one connection, and perhaps a transaction.
            if not self.has_server or self.is_begun(connection.connection.dbapi_connection):
                yield connection
                return
            lock_timeout = min(LOCK_SECONDS, seconds)
            try:
                self.begin_reading(connection, lock_timeout=lock_timeout, statement_timeout=seconds)
                yield connection
            finally:
                self.end_cleanup(connection)

    @abstractmethod
    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """Begin the cleanup's own transaction, whatever state the connection was left in.

        It reads what others have committed before each statement (READ COMMITTED), may write, and
        no wait for a lock is longer than ``lock_timeout``. Call ``end_cleanup`` afterwards even
        where this raised.

        Args:
            connection: one that nobody else uses, without a transaction.
            lock_timeout: how long a statement may wait for a lock, in seconds; 0 for not at all.
            statement_timeout: how long a statement may run, in seconds, where the database can.
            foreign_keys: have foreign keys enforced, where the database does so only when asked.

        Raises:
            SessionStateError: a transaction is open on the connection.
        """

    def begin_reading(self, connection: sa.Connection, **limits: Any) -> None:
        """As ``begin_cleanup``, for a transaction that only reads and acquires no write lock.

        Args:
            connection: as there.
            limits: ``lock_timeout`` and perhaps ``statement_timeout``.
        """
        self.begin_cleanup(connection, **limits)

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Restore the session, after commit or rollback; the connection may be broken."""

    def enforces_foreign_keys(self, connection: sa.Connection) -> bool:
        """Whether ON DELETE acts, and a DELETE that breaks a foreign key fails."""
        return True

    def without_foreign_keys(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """Run the block without foreign keys, where the database can; then drop the connection."""
        return nullcontext()

    def refuse_open_transaction(self, connection: sa.Connection) -> None:
        """Raise SessionStateError if a transaction is open on the cleanup's connection."""
        raw = connection.connection.dbapi_connection
        if connection.in_transaction() or self.in_transaction(raw):
            raise self.open_transaction(connection)

    def open_transaction(self, connection: sa.Connection) -> SessionStateError:
        """The error where a transaction is open on the cleanup's connection."""
        return SessionStateError(
            f"The connection to {database_name(connection.engine)} that cleanup was given has "
            "a transaction open, which is not tidyrows' to end. Commit or roll back the "
            "session or connection that holds it (with sqlite:// in memory all of them share "
            "one connection), then clean up."
        )
