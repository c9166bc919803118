"""The cleanup's own connection, on which nothing that an earlier user left is trusted."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.capture.engine import capture_for
from tidyrows.cleanup.lock_monitor import Waiting
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError, TakenOverError
from tidyrows.execution import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.keys import TableName

_AT_LEAST = 0.2
"""Seconds for the last statements of a cleanup whose time is over: less would end none."""
SPOILED = "tidyrows.spoiled"
"""In ``connection.info``: nobody else may use this connection again, so the pool drops it."""


class Database:
    """One database that rows are to be deleted from.

    Args:
        engine: the engine that reaches it.
        lock_timeout: the longest wait for one lock, in seconds.
        statement_timeout: the longest that one statement may run, in seconds, where the database
            can say so; never less than the wait for a lock.
    """

    def __init__(self, engine: sa.Engine, *, lock_timeout: float, statement_timeout: float) -> None:
        self.engine = engine
        self.capture = capture_for(engine)
        self.dialect = self.capture.dialect
        self.lock_timeout = lock_timeout
        self.statement_timeout = statement_timeout
        self.waiting = Waiting(self)
        # False once the database has turned out not to be able to: SQLite takes a foreign key to
        # columns that are not unique, and then refuses every statement that would have to check it.
        self.enforced = True

    def passes(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed another time."""
        return self.dialect.fault(error) in {Fault.TRANSIENT, Fault.LOST}

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """In the block no transaction waits for a lock."""
        usual, self.lock_timeout = self.lock_timeout, 0.0
        try:
            yield
        finally:
            self.lock_timeout = usual

    @contextmanager
    def writing(
        self, *, seconds: float | None = None, committed: Callable[[], None] | None = None
    ) -> Iterator[sa.Connection]:
        """A transaction to delete in: committed at the end, rolled back if anything is raised.

        Args:
            seconds: the longest that one statement may run or wait, if less than the usual.
            committed: called as soon as the COMMIT has succeeded: what follows may yet fail.
        """
        left = max(self.statement_timeout if seconds is None else seconds, _AT_LEAST)
        lock_timeout = min(self.lock_timeout, left)
        with self._connected(lock_timeout) as connection:
            try:
                self.dialect.begin_cleanup(
                    connection,
                    lock_timeout=lock_timeout,
                    statement_timeout=left,
                    foreign_keys=self.enforced,
                )
                yield connection
                connection.commit()
                if committed is not None:
                    committed()
            except TakenOverError:
                self._give_up(connection)
                raise
            except SessionStateError:
                raise  # the transaction that is open there is somebody else's
            except BaseException:
                self._give_up(connection)
                raise
            finally:
                self.dialect.end_cleanup(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction to look in; takes no write lock, and waits no longer than the other."""
        with self._connected(self.lock_timeout) as connection:
            try:
                self.dialect.begin_reading(
                    connection,
                    lock_timeout=self.lock_timeout,
                    statement_timeout=max(self.statement_timeout, self.lock_timeout),
                )
                yield connection
                # Not ROLLBACK: that makes psycopg forget every statement that it has prepared.
                connection.commit()
            except SessionStateError:
                raise  # as above
            except BaseException:
                self._give_up(connection)
                raise
            finally:
                self.dialect.end_cleanup(connection)

    def has_table(self, name: TableName) -> bool:
        """Whether the table is still there; True where nobody can tell."""
        try:
            with self.reading() as connection:
                return bool(sa.inspect(connection).has_table(name.name, schema=name.schema))
        except sa.exc.SQLAlchemyError:
            return True

    @contextmanager
    def _connected(self, lock_timeout: float) -> Iterator[sa.Connection]:
        self._refuse_shared_transaction()
        connection = self.engine.connect().execution_options(**{INTERNAL: True})
        try:
            with self.waiting.over(connection, lock_timeout):
                yield connection
        finally:
            try:
                if not connection.invalidated and connection.info.get(SPOILED):
                    connection.invalidate()
                connection.close()
            except sa.exc.DBAPIError:  # the server has closed it already: it must not come back
                connection.invalidate()

    def _refuse_shared_transaction(self) -> None:
        """A StaticPool has one connection for all: giving it back would roll back what they do."""
        pool = self.engine.pool
        if isinstance(pool, sa.StaticPool) and self.dialect.is_begun(
            pool.connection.dbapi_connection
        ):
            raise SessionStateError(
                f"All users of {self.capture.database} share one connection (StaticPool), and a "
                f"transaction is open on it, which is not tidyrows' to end. Commit or roll back "
                f"the session or connection that began it, then call cleanup() again; all rows "
                f"stay tracked."
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
