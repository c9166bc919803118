"""The audit's own way to a database: one connection, in a thread that asks for nothing else.

An asynchronous driver's connection belongs to a loop, and SQLite's to a thread; and the suite's own
loop runs while it connects for the first time. A thread with a loop of its own suits them all.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.greenlets import spawn

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that one look may take."""


class LookThread:
    """The thread, and its loop.

    A daemon, unlike an executor's: the process can end where a look hangs.

    Args:
        begin: called there first.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._late: Future[Any] | None = None
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        Thread(target=self._serve, args=[begin], name="tidyrows audit", daemon=True).start()

    def _serve(self, begin: Callable[[], None]) -> None:
        begin()
        while (asked := self._asked.get()) is not None:
            future, work = asked
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 -- it is raised where the answer is waited for
                future.set_exception(error)
        self._runner.close()

    def call(self, work: Callable[..., T], *arguments: Any, is_async: bool) -> T:
        """What the work returned, in the thread; in a greenlet that may await if asked.

        Raises:
            TimeoutError: it takes too long, or what was asked before is not done yet.
        """
        if self._late is not None and not self._late.done():
            raise TimeoutError
        future: Future[T] = Future()
        asked = partial(work, *arguments)
        self._asked.put((future, partial(self._await, asked) if is_async else asked))
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            self._late = future
            raise

    def _await(self, work: Callable[[], T]) -> T:
        return self._runner.run(spawn(work))

    def close(self) -> None:
        """End it; a look that hangs is not waited for."""
        self._asked.put(None)


class Reach:
    """A connection to the database of an engine, opened as the engine opens its own.

    Args:
        engine: the suite's; nothing is taken from its pool.
        thread: where the connection lives.
    """

    def __init__(self, engine: sa.Engine, thread: LookThread) -> None:
        self._thread = thread
        self._is_async = engine.dialect.is_async
        self._engine = sa.Engine(
            engine.pool.recreate(),
            engine.dialect,
            engine.url,
            hide_parameters=engine.hide_parameters,
        )
        self._connection: sa.Connection | None = None

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """What the work returned.

        Raises:
            TimeoutError: it takes too long.
            Exception: what the work, or the connection, has raised.
        """
        done: T = self._thread.call(self._work, work, is_async=self._is_async)
        return done

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


class SharedReach:
    """A database in memory, which can be reached through the suite's own connection only.

    Args:
        connection: of the suite.
        deaf: a block in which nobody listens to what is asked.
    """

    def __init__(
        self, connection: sa.Connection, deaf: Callable[[], AbstractContextManager[None]]
    ) -> None:
        driver: Any = connection.connection.dbapi_connection
        self._deaf = deaf
        # Given back, the connection is left as it is: the suite's own pool looks after it.
        pool = sa.StaticPool(lambda: driver, reset_on_return=None)
        self._engine = sa.Engine(pool, connection.dialect, connection.engine.url)

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """What the work returned, here and now."""
        with self._deaf(), self._engine.connect() as connection:
            return work(connection)

    def close(self) -> None:
        """Nothing: the connection is the suite's."""
