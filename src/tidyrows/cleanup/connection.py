"""The cleanup's own connection; no setting that an earlier user left on it is relied on."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import INTERNAL
from tidyrows.capture.connections import driver_of
from tidyrows.capture.engine import capture_for
from tidyrows.capture.unseen import ignore_driver
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.dialects import Fault, SilentServerError
from tidyrows.errors import SessionStateError, TakenOverError, TidyRowsError
from tidyrows.locks.monitor import LockMonitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tidyrows.keys import KeyedTable, TableName

_AT_LEAST = 0.2
"""The shortest statement timeout in seconds, also after the deadline: less would end nothing."""
_MARGIN = 0.3
"""Seconds that the server gets to end a statement itself, before its connection is given up."""
_GRACE = 0.4
"""Seconds after the deadline in which a transaction may begin yet: to look, and to record."""
_UNWATCHED: AbstractContextManager[None] = nullcontext()
SPOILED = "tidyrows.spoiled"
"""In ``connection.info``: the connection must not be used again, so the pool drops it."""


class DeadlineError(TidyRowsError):
    """The cleanup's time was over; what was not committed is rolled back."""


class Database:
    """One database that rows are to be deleted from."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        lock_timeout: float,
        statement_timeout: float,
        remaining: Callable[[], float] | None = None,
    ) -> None:
        self.engine = engine
        self.capture = capture_for(engine)
        self.name = self.capture.database
        self.dialect = self.capture.dialect
        self.lock_timeout = lock_timeout
        # the seconds that are left for one more transaction
        self._remaining = remaining or (lambda: statement_timeout)
        self.is_silent = False  # it gave no answer until the deadline: it is asked nothing more
        self.monitor = LockMonitor(engine, self.dialect, own=self.capture.opened.by_id)
        # False once the database cannot check foreign keys: SQLite accepts a foreign key to columns
        # that are not unique, and then refuses every statement that has to check it.
        self.enforced = True

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed another time."""
        return self.dialect.is_transient(error)

    def reason(self, error: BaseException) -> Reason:
        """Why the rows of a transaction that failed with this error stay."""
        fault = self.dialect.fault(error)
        if fault not in {Fault.TRANSIENT, Fault.LOST}:
            return Reason(LeftoverKind.REFUSED, error)
        kind = LeftoverKind.LOCKED if fault is Fault.TRANSIENT else LeftoverKind.DISCONNECTED
        monitor = self.monitor
        return Reason(kind, error, blockers=monitor.recent, trouble=monitor.trouble)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """In the block no transaction waits for a lock, and none is tried again."""
        usual, self.lock_timeout = self.lock_timeout, 0.0
        try:
            yield
        finally:
            self.lock_timeout = usual

    def writing(
        self, *, committed: Callable[[], None] | None = None
    ) -> AbstractContextManager[sa.Connection]:
        """A transaction to delete in: committed at the end, rolled back if anything is raised."""
        begin = partial(self.dialect.begin_cleanup, foreign_keys=self.enforced)
        return self._transaction(begin, committed)

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A transaction to look in; takes no write lock, and waits no longer than the other."""
        return self._transaction(self.dialect.begin_reading, None)

    @contextmanager
    def _transaction(
        self, begin: Callable[..., None], committed: Callable[[], None] | None
    ) -> Iterator[sa.Connection]:
        if isinstance(self.engine.pool, sa.StaticPool):
            self._refuse_shared_transaction(self.engine.pool)
        remaining = self._remaining()
        if self.is_silent or remaining < -_GRACE:
            raise DeadlineError("the cleanup's deadline had passed, so the database was not asked")
        left = max(remaining, _AT_LEAST)
        lock_timeout = min(self.lock_timeout, left)
        try:
            with self.dialect.connect(self.engine, left + _MARGIN) as connection:
                connection.execution_options(**{INTERNAL: True})
                ignore_driver(connection)
                yield from self._inside(connection, begin, committed, lock_timeout, left)
        except SilentServerError:
            self.is_silent = True
            raise

    def _inside(
        self,
        connection: sa.Connection,
        begin: Callable[..., None],
        committed: Callable[[], None] | None,
        lock_timeout: float,
        statement_timeout: float,
    ) -> Iterator[sa.Connection]:
        monitor = self.monitor
        try:
            watching = _UNWATCHED
            if monitor.armed:
                driver = driver_of(connection)
                watching = monitor.watching(connection, driver, lock_timeout, self._remaining)
            with watching:
                try:
                    begin(
                        connection, lock_timeout=lock_timeout, statement_timeout=statement_timeout
                    )
                    yield connection
                    # Not ROLLBACK even after reading: that makes psycopg forget every statement
                    # that it has prepared.
                    connection.commit()
                    if committed is not None:
                        committed()
                except BaseException as error:
                    foreign = isinstance(error, SessionStateError)
                    if not foreign or isinstance(error, TakenOverError):
                        self._give_up(connection)  # else another user of it began a transaction
                    raise
                finally:
                    self.dialect.end_cleanup(connection)
        finally:
            if not connection.invalidated and connection.info.get(SPOILED):
                connection.invalidate()

    def existing_inside(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any] | None:
        """Which of these rows exist, inside a transaction that deletes; None if that fails."""
        found: list[Any] | None = None
        # It may have to switch off what hides rows, or fail: neither must outlast the look.
        with suppress(sa.exc.DBAPIError), connection.begin_nested() as look:
            found = self.dialect.existing_keys(connection, table, keys)
            look.rollback()
        return found

    def has_table(self, name: TableName) -> bool:
        """Whether the table still exists; True if that cannot be found out."""
        try:
            with self.reading() as connection:
                return bool(sa.inspect(connection).has_table(name.name, schema=name.schema))
        except (sa.exc.SQLAlchemyError, ConnectionError, DeadlineError):
            return True

    def _refuse_shared_transaction(self, pool: sa.StaticPool) -> None:
        """A StaticPool has one connection for all: giving it back would roll back what they do."""
        if self.dialect.is_begun(pool.connection.dbapi_connection):
            raise SessionStateError(
                f"All users of {self.name} share one connection (StaticPool), and a transaction is "
                f"open on it, which is not tidyrows' to end. Commit or roll back the session or "
                f"connection that began it, then call cleanup() again; all rows stay tracked."
            )

    def _give_up(self, connection: sa.Connection) -> None:
        """Roll back, whatever state a failure has left."""
        try:
            connection.rollback()
            # A COMMIT that failed leaves SQLite's transaction open, which SQLAlchemy does not see;
            # the next user of the pool would commit it.
            if not connection.invalidated:
                connection.connection.rollback()
        except (sa.exc.DBAPIError, self.engine.dialect.loaded_dbapi.Error):
            connection.invalidate()
