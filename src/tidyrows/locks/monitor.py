"""Who blocks a connection that waits for a lock: polled beside the wait, which leaves no trace."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.dialects import DriverSocket
from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from tidyrows.dialects import Blocker, Dialect

_AT_LEAST = 0.2
"""Seconds that a poll under way is waited for at the end where nothing remains."""
_OFTEN, _SELDOM = 0.05, 1.0
_PATIENCE = 2.0
"""Seconds that a poll under way is waited for at the end; its own time limits are shorter."""


class LockMonitor:
    """Finds the transactions that block a connection, on a connection of its own.

    Args:
        engine: of the database.
        dialect: of the engine.
        own: by a connection of the driver, what else this process has open: the number of each
            connection on the server, and what it is.
    """

    def __init__(
        self,
        engine: sa.Engine,
        dialect: Dialect,
        *,
        own: Callable[[Any], dict[int, str]] = lambda _driver: {},
    ) -> None:
        self._engine = engine
        self._dialect = dialect
        self._own = own
        self._found: dict[tuple[int, str | None], Blocker] = {}
        self._recent: dict[tuple[int, str | None], Blocker] = {}
        self.armed = False  # a cleanup's first attempt does not pay for polls
        self.trouble: Exception | None = None  # why the last poll failed

    @property
    def blockers(self) -> tuple[Blocker, ...]:
        """All blockers."""
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
    def watching(
        self,
        connection: sa.Connection,
        driver: Any,
        lock_timeout: float,
        remaining: Callable[[], float],
    ) -> Iterator[None]:
        """In the block, poll for the transactions that block this connection.

        Where its driver's connection is given, a lock that is found while that is in a transaction
        is its own. At the end a poll under way is waited for, for as long as remains.
        """
        waiting = self._dialect.waiter(connection)
        if waiting is None:
            yield
            return
        spare = _SpareConnection(self._engine.pool.recreate())

        def poll() -> None:
            try:
                with spare.use(needed=self._dialect.blockers_need_cursor) as opened:
                    found = self._blockers(driver, waiting, opened)
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
        # In SQLAlchemy's greenlet a task of the running loop, since the connections of an
        # asynchronous driver work nowhere else.
        repeating = _task if in_greenlet() else _thread
        try:
            with repeating(poll, every, lambda: min(max(remaining(), _AT_LEAST), _PATIENCE)):
                yield
        finally:
            spare.give_up()

    def _blockers(
        self, driver: Any, waiting: Any, opened: sa.PoolProxiedConnection | None = None
    ) -> list[Blocker]:
        dialect = self._dialect
        if opened is not None:
            with closing(opened.cursor()) as cursor:
                found = dialect.blockers(cursor, waiting)
            opened.rollback()
        else:
            found = dialect.blockers(None, waiting)
            # asked last: a lock that was found may be the waiter's own by now
            if driver is not None and dialect.in_transaction(driver):
                return []
        own = self._own(driver) if found else {}
        if opened is None:  # whatever else locks its files from here
            own.setdefault(os.getpid(), "another connection")
        return [replace(each, own=own.get(each.pid)) for each in found]


class _SpareConnection:
    """A connection besides the cleanup's, opened at the first poll; its pool may be exhausted."""

    def __init__(self, pool: sa.Pool) -> None:
        self._pool = pool
        self._opened: sa.PoolProxiedConnection | None = None
        self._is_used = self._is_over = False

    @contextmanager
    def use(self, *, needed: bool) -> Iterator[sa.PoolProxiedConnection | None]:
        self._is_used = True
        try:
            if needed and self._opened is None:
                self._opened = self._pool.connect()
            yield self._opened
        finally:
            self._is_used = False
            if self._is_over:
                self._close()

    def give_up(self) -> None:
        """Close it, or end the poll that uses it yet, which closes it then."""
        self._is_over = True
        if not self._is_used:
            self._close()
        elif self._opened is not None:
            with closing(DriverSocket(self._opened.dbapi_connection)) as wire:
                wire.shut()
        self._pool.dispose()

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.invalidate()


@contextmanager
def _thread(
    poll: Callable[[], None], every: float, patience: Callable[[], float]
) -> Iterator[None]:
    """Call ``poll`` every so many seconds beside the block; not at its beginning."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            poll()

    thread = threading.Thread(target=run, name="tidyrows: who holds the lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience())


@contextmanager
def _task(poll: Callable[[], None], every: float, patience: Callable[[], float]) -> Iterator[None]:
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
        wait_for(asyncio.wait({task}, timeout=patience()))
