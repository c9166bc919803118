"""The cleanup's own connection, on which nothing that an earlier user left is trusted."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.tracking.capture import INTERNAL, capture_for

if TYPE_CHECKING:
    from collections.abc import Iterator


class Database:
    """One database that rows are to be deleted from.

    Args:
        engine: the engine that reaches it.
        lock_timeout: the longest wait for one lock, in seconds.
    """

    def __init__(self, engine: sa.Engine, *, lock_timeout: float) -> None:
        self.engine = engine
        self.capture = capture_for(engine)
        self.dialect = self.capture.dialect
        self.lock_timeout = lock_timeout

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction to delete in: committed at the end, rolled back if anything is raised."""
        with self._connected() as connection:
            try:
                self.dialect.begin_cleanup(connection, lock_timeout=self.lock_timeout)
                yield connection
                connection.commit()
            except BaseException:
                self._give_up(connection)
                raise
            finally:
                self.dialect.end_cleanup(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction to look in; takes no write lock, and waits no longer than the other."""
        with self._connected() as connection:
            try:
                self.dialect.begin_reading(connection, lock_timeout=self.lock_timeout)
                yield connection
            finally:
                self._give_up(connection)
                self.dialect.end_cleanup(connection)

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        connection = self.engine.connect().execution_options(**{INTERNAL: True})
        try:
            yield connection
        finally:
            try:
                connection.close()
            except sa.exc.DBAPIError:  # the server has closed it already: it must not come back
                connection.invalidate()

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
