"""Finds who blocks a cleanup, on a connection of its own, while the cleanup waits.

It must be found while the cleanup waits: a lock that is released leaves no trace.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.pending_commits import driver_of
from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from tidyrows.capture.engine import Capture
    from tidyrows.dialects import Blocker

_OFTEN, _SELDOM = 0.05, 1.0
_PATIENCE = 2.0
"""Seconds that a poll under way is waited for at the end; its own time limits are shorter."""


class LockMonitor:
    """Who blocks the transactions of a cleanup in one database.

    Attributes:
        armed: whether transactions are watched. One that waits for nobody should not pay for it.
        trouble: why the last poll failed, or None.
    """

    def __init__(self, engine: sa.Engine, capture: Capture) -> None:
        self._engine = engine
        self._capture = capture
        self._found: dict[tuple[int, str | None], Blocker] = {}
        self._recent: dict[tuple[int, str | None], Blocker] = {}
        self.armed = False
        self.trouble: Exception | None = None

    @property
    def blockers(self) -> tuple[Blocker, ...]:
        """All blockers of the cleanup."""
        return tuple(self._found.values())

    @property
    def recent(self) -> tuple[Blocker, ...]:
        """The blockers since :meth:`begin`."""
        return tuple(self._recent.values())

    def begin(self) -> None:
        """Other rows are tried now, with other blockers."""
        self._recent = {}
        self.trouble = None

    @contextmanager
    def over(self, connection: sa.Connection, lock_timeout: float) -> Iterator[None]:
        """In the block, poll for who blocks this connection."""
        waiting = self._capture.dialect.waiter(connection)
        if waiting is None:
            yield
            return
        poll = _Poll(self._engine, self._capture, connection, waiting)

        def again() -> None:
            try:
                found = poll.blockers()
            except Exception as error:  # noqa: BLE001 -- a listener of the user's may raise anything; it is reported with the blockers
                self.trouble = error
                return
            seen = {(each.pid, None if each.pid else each.state): each for each in found}
            for known in (self._recent, self._found):
                # What was certain once stays so: a later poll may come when the wait is over.
                known.update(
                    {key: each for key, each in seen.items() if each.certain or key not in known}
                )

        every = min(max(lock_timeout / 4, _OFTEN), _SELDOM)
        with closing(poll), _repeating(again, every=every):
            yield


class _Poll:
    """A connection besides the cleanup's, opened at the first poll; the pool may be exhausted."""

    def __init__(
        self, engine: sa.Engine, capture: Capture, connection: sa.Connection, waiting: Any
    ) -> None:
        self._engine = engine
        self._capture = capture
        self._driver = driver_of(connection)
        self._waiting = waiting
        self._pool: sa.Pool | None = None
        self._opened: Any = None

    def blockers(self) -> list[Blocker]:
        dialect = self._capture.dialect
        if not dialect.blockers_need_cursor:
            found = dialect.blockers(None, self._waiting)
            # asked last: a lock that was found may be the cleanup's own by now
            if dialect.in_transaction(self._driver):
                return []
        else:
            if self._opened is None:
                self._pool = self._engine.pool.recreate()
                self._opened = self._pool.connect()
            with closing(self._opened.cursor()) as cursor:
                found = dialect.blockers(cursor, self._waiting)
            self._opened.rollback()
        if not found:
            return found
        own = self._capture.opened.by_id(self._driver)
        if not dialect.blockers_need_cursor:  # whatever else locks its files from here
            own.setdefault(os.getpid(), "another connection")
        return [replace(each, own=own.get(each.pid)) for each in found]

    def close(self) -> None:
        if self._opened is not None:
            self._opened.invalidate()
        if self._pool is not None:
            self._pool.dispose()


@contextmanager
def _repeating(poll: Callable[[], None], *, every: float) -> Iterator[None]:
    """Call ``poll`` every so many seconds beside the block; not at its beginning.

    In a thread; inside SQLAlchemy's greenlet in a task of the running loop, since the connections
    of an asynchronous driver work nowhere else.
    """
    with _task(poll, every) if in_greenlet() else _thread(poll, every):
        yield


@contextmanager
def _thread(poll: Callable[[], None], every: float) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            poll()

    thread = threading.Thread(target=run, name="tidyrows: who blocks the cleanup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_PATIENCE)


@contextmanager
def _task(poll: Callable[[], None], every: float) -> Iterator[None]:
    over = asyncio.Event()

    async def run() -> None:
        while True:
            try:
                await asyncio.wait_for(over.wait(), every)
            except TimeoutError:
                await spawn(poll)
            else:
                return

    task = asyncio.get_running_loop().create_task(run())
    try:
        yield
    finally:
        over.set()
        wait_for(asyncio.wait({task}, timeout=_PATIENCE))
