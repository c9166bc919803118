"""The cleanup's own connection; no setting that an earlier user left on it is relied on."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.engine import capture_for
from tidyrows.cleanup.lock_monitor import LockMonitor
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError, TakenOverError
from tidyrows.execution import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tidyrows.keys import KeyedTable, TableName

_AT_LEAST = 0.2
"""The shortest statement timeout in seconds, also after the deadline: less would end nothing."""
_UNWATCHED = nullcontext()
SPOILED = "tidyrows.spoiled"
"""In ``connection.info``: the connection must not be used again, so the pool drops it."""


class Database:
    """One database that rows are to be deleted from."""

    def __init__(self, engine: sa.Engine, *, lock_timeout: float, statement_timeout: float) -> None:
        self.engine = engine
        self.capture = capture_for(engine)
        self.name = self.capture.database
        self.dialect = self.capture.dialect
        self.lock_timeout = lock_timeout
        self.statement_timeout = statement_timeout
        self.monitor = LockMonitor(engine, self.capture)
        # False once the database has turned out not to be able to: SQLite takes a foreign key to
        # columns that are not unique, and then refuses every statement that would have to check it.
        self.enforced = True

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed another time."""
        return self.dialect.fault(error) in {Fault.TRANSIENT, Fault.LOST}

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
        """In the block no transaction waits for a lock."""
        usual, self.lock_timeout = self.lock_timeout, 0.0
        try:
            yield
        finally:
            self.lock_timeout = usual

    def writing(
        self, *, seconds: float | None = None, committed: Callable[[], None] | None = None
    ) -> AbstractContextManager[sa.Connection]:
        """A transaction to delete in: committed at the end, rolled back if anything is raised."""
        left = max(self.statement_timeout if seconds is None else seconds, _AT_LEAST)
        lock_timeout = min(self.lock_timeout, left)
        begin = partial(self.dialect.begin_cleanup, foreign_keys=self.enforced)
        return self._transaction(begin, lock_timeout, left, committed)

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A transaction to look in; takes no write lock, and waits no longer than the other."""
        left = max(self.statement_timeout, self.lock_timeout)
        return self._transaction(self.dialect.begin_reading, self.lock_timeout, left, None)

    @contextmanager
    def _transaction(
        self,
        begin: Callable[..., None],
        lock_timeout: float,
        statement_timeout: float,
        committed: Callable[[], None] | None,
    ) -> Iterator[sa.Connection]:
        if isinstance(self.engine.pool, sa.StaticPool):
            self._refuse_shared_transaction(self.engine.pool)
        monitor = self.monitor
        connection = self.engine.connect().execution_options(**{INTERNAL: True})
        try:
            with monitor.over(connection, lock_timeout) if monitor.armed else _UNWATCHED:
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
                except TakenOverError:
                    self._give_up(connection)
                    raise
                except SessionStateError:
                    raise  # the open transaction belongs to another user of the connection
                except BaseException:
                    self._give_up(connection)
                    raise
                finally:
                    self.dialect.end_cleanup(connection)
        finally:
            try:
                if not connection.invalidated and connection.info.get(SPOILED):
                    connection.invalidate()
                connection.close()
            except sa.exc.DBAPIError:  # the server has closed it already: it must not come back
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
        except sa.exc.SQLAlchemyError:
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
        """Roll back, whatever state a failure has left.

        A COMMIT that failed leaves SQLite's transaction open, and SQLAlchemy believes it over: so
        the driver is asked to roll back too, or the next user of the pool would commit it.
        """
        try:
            connection.rollback()
            if not connection.invalidated:
                connection.connection.rollback()
        except (sa.exc.DBAPIError, self.engine.dialect.loaded_dbapi.Error):
            connection.invalidate()
