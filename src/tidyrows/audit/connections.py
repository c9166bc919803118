"""The audit's own connection to each database.

An asynchronous driver's connection belongs to a loop, and SQLite's to a thread; and the suite's own
loop runs while it connects for the first time. A thread with its own loop serves them all.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.capture.changes import INTERNAL
from tidyrows.greenlets import spawn

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that one look may take."""


class AuditThread:
    """The thread and its loop; a daemon, so that the process can end where a look hangs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._overdue: Future[Any] | None = None
        threading.Thread(target=self._serve, name="tidyrows audit", daemon=True).start()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def call(self, work: Callable[[], T], *, is_async: bool) -> T:
        """Do the work in the thread, in a greenlet that may await if ``is_async``."""
        if self._overdue is not None and not self._overdue.done():
            raise TimeoutError
        task = spawn(work) if is_async else _run(work)
        future = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            self._overdue = future
            raise

    def close(self) -> None:
        """End the thread, without waiting for a look that hangs."""
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _run(work: Callable[[], T]) -> T:
    return work()


class AuditConnection:
    """A connection to the database of an engine, opened as the engine opens its own."""

    def __init__(self, engine: sa.Engine, thread: AuditThread) -> None:
        self._thread = thread
        self._is_async = engine.dialect.is_async
        self._engine = sa.Engine(
            engine.pool.recreate(),
            engine.dialect,
            engine.url,
            hide_parameters=engine.hide_parameters,
            execution_options={INTERNAL: True},
        )
        self._connection: sa.Connection | None = None

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """Do the work with the connection."""
        return self._thread.call(partial(self._work, work), is_async=self._is_async)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._thread.call(self._close, is_async=self._is_async)

    def _work(self, work: Callable[[sa.Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            done = work(self._connection)
            self._connection.rollback()
        except BaseException:
            self._close()
            raise
        return done

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            finally:
                self._engine.dispose()


class SharedConnection:
    """The suite's own connection, where the database is in its memory."""

    def __init__(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        # The connection is returned as it is: the suite's own pool resets it.
        pool = sa.StaticPool(lambda: driver, reset_on_return=None)
        options = {INTERNAL: True}
        self._engine = sa.Engine(
            pool, connection.dialect, connection.engine.url, execution_options=options
        )

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """Do the work in this thread."""
        with self._engine.connect() as connection:
            return work(connection)

    def has_ended(self, error: Exception) -> bool:
        """Whether the database has ended with its connection."""
        return self._engine.dialect.is_disconnect(error, None, None)  # type: ignore[arg-type]

    def close(self) -> None:
        """Nothing: the connection is the suite's."""


LookConnection = AuditConnection | SharedConnection
