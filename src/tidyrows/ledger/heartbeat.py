"""A heartbeat: a thread that shows again and again that its process is alive."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet, ref

import sqlalchemy as sa

from tidyrows.capture.changes import INTERNAL
from tidyrows.dialects import DriverSocket, connect_within, dialect_for
from tidyrows.errors import SessionStateError
from tidyrows.greenlets import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.dialects import LivenessLock

    Work = Callable[[sa.Connection], object]

logger = logging.getLogger("tidyrows")

INTERVAL = 2.0
"""Seconds between two beats."""
_GUARD = 1.0
"""Seconds between two calls of ``guard``."""
_START = 30.0
"""Seconds that ``start`` waits for the lock and the first entry."""
_BOUND = 5.0
"""Seconds that a statement of a beat may wait for a lock, or run."""
_STEP = 15.0
"""Seconds that a beat over an asynchronous driver may take, connecting included."""
STOP = 10.0
"""Seconds that ``stop`` waits for the thread."""

_running: WeakSet[Heartbeat] = WeakSet()


class Heartbeat:
    """Holds a liveness lock and beats, in a thread of its own, until it is stopped.

    It stops when the engine is gone. A forked child has none, and its parent's goes on. Where the
    database keeps its beats in a file, ``beat`` is not called. Between the beats ``guard`` is asked
    for other work to do.
    """

    def __init__(
        self,
        engine: sa.Engine,
        lock: LivenessLock,
        *,
        beat: Work,
        begin: Work | None = None,
        end: Work | None = None,
        guard: Callable[[], Work | None] = lambda: None,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = ref(engine)
        self._dialect = dialect_for(engine)
        self._is_async = bool(engine.dialect.is_async)
        self._begin, self._beat, self._end = begin, beat, end
        self._guard = guard
        self._interval = interval
        self._clock = clock
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._ready, self._stopped = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self.lock = lock
        self.last_beat: float | None = None
        self.last_error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether it beats, and in this process."""
        return (
            self._pid == os.getpid()
            and self._thread is not None
            and self._thread.is_alive()
            and self._ready.is_set()
            and not self._stopped.is_set()
        )

    def start(self, *, timeout: float = _START) -> None:
        """Acquire the lock and commit ``begin``; raises what went wrong, and then holds nothing."""
        if self._thread is not None:
            raise SessionStateError(
                "This heartbeat was started before. Make a new one, with a new number: "
                "Heartbeat(engine, dialect.liveness_lock(engine, number), beat=...)."
            )
        self._thread = threading.Thread(target=self._run, name="tidyrows: heartbeat", daemon=True)
        _running.add(self)
        self._thread.start()
        if not self._ready.wait(timeout):
            self._stopped.set()
            raise SessionStateError(
                f"The database gave no sign within {timeout:g} s, so this worker cannot show that "
                f"it is alive. See whether it answers, and start again with a new heartbeat."
            )
        if self._failure is not None:
            self._thread.join(STOP)
            raise self._failure

    def stop(self, *, timeout: float = STOP) -> None:
        """Call ``end`` and release the lock, within so many seconds; raises nothing."""
        self._stopped.set()
        thread = self._thread
        if self._pid != os.getpid() or thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)

    def abandon(self) -> None:
        """In a forked child: leave the parent's lock alone."""
        self._stopped.set()
        self.lock.abandon()

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(Exception), _caller(is_async=self._is_async) as call:
            try:
                call(self._first)
            except BaseException as error:  # noqa: BLE001 -- it is raised where start() was called
                self._failure = error
                call(self.lock.release)
                return
            finally:
                self._ready.set()
            pause = min(self._interval, _GUARD)
            pauses = 0.0
            while not self._stopped.wait(pause) and self._engine() is not None:
                work = self._guard()
                if work is not None:
                    self._try(call, partial(self._commit, work))
                pauses += pause
                if pauses >= self._interval:
                    self._try(call, self._next)
                    pauses = 0.0
            self._stopped.set()
            self._try(call, lambda: self._commit(self._end))
            self._try(call, self.lock.release)

    def _try(self, call: Callable[[Callable[[], None]], None], work: Callable[[], None]) -> None:
        try:
            call(work)
        except Exception as error:  # noqa: BLE001 -- a server that restarts raises anything; the next beat tries again
            self.last_error = error
            logger.debug("A heartbeat failed: %s", type(error).__name__)
        else:
            self.last_error = None

    def _first(self) -> None:
        self.lock.acquire()
        self._commit(self._begin)
        self.last_beat = self._clock()

    def _next(self) -> None:
        failures: list[Exception] = []
        beat = None if self._dialect.heartbeat_in_file else self._beat
        for work in (self.lock.renew, lambda: self._commit(beat)):
            try:
                work()
            except Exception as error:  # noqa: BLE001 -- a lock without a beat, or a beat without a lock, still shows life
                failures.append(error)
        if failures:
            raise failures[0]
        self.last_beat = self._clock()

    def _commit(self, work: Work | None) -> None:
        """On a connection that is closed at once, so that none is idle between beats."""
        engine = self._engine()
        # alone: in memory, where another connection would open another, empty database
        if work is None or self.lock.alone or engine is None:
            return
        if self._dialect.missing_file(engine) is not None:
            return  # the database is gone, and connecting would create an empty one
        # The project's own way to connect, its listeners too, but nothing of its pool.
        pool = engine.pool.recreate()
        own = engine_over(pool, engine, **{INTERNAL: True})
        try:
            if self._dialect.heartbeat_in_file:  # its connections stay in one thread
                connection = own.connect()
            else:
                connection = connect_within(
                    own.connect, 2 * _BOUND, late=lambda late: late.invalidate()
                )
            try:
                driver = connection.connection.dbapi_connection
                with closing(DriverSocket(driver)) as wire, wire.bounded(2 * _BOUND):
                    self._in_transaction(connection, work)
            finally:
                try:
                    connection.close()
                except sa.exc.DBAPIError:  # the server has closed it already
                    connection.invalidate()
        finally:
            pool.dispose()

    def _in_transaction(self, connection: sa.Connection, work: Work) -> None:
        try:
            self._dialect.begin_cleanup(connection, lock_timeout=_BOUND, statement_timeout=_BOUND)
            work(connection)
            connection.commit()
        except BaseException:
            connection.invalidate()
            raise
        finally:
            self._dialect.end_cleanup(connection)


def engine_over(pool: sa.Pool, engine: sa.Engine, **options: object) -> sa.Engine:
    """An engine to the same database over another pool, with more execution options."""
    return sa.Engine(
        pool,
        engine.dialect,
        engine.url,
        hide_parameters=engine.hide_parameters,
        execution_options={**engine.get_execution_options(), **options},
    )


@contextmanager
def _caller(*, is_async: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that calls work on the database, from a thread without an event loop."""
    if not is_async:
        yield lambda work: work()
        return
    # Connections of an asynchronous driver belong to one loop, which runs only during a call.
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(_within(work))


async def _within(work: Callable[[], None]) -> None:
    task = asyncio.ensure_future(spawn(work))
    done, _late = await asyncio.wait({task}, timeout=_STEP)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=_BOUND)
        raise TimeoutError(f"the database did not answer within {_STEP:g} s")
    await task


def _stop_all() -> None:
    for heartbeat in list(_running):
        heartbeat.stop()


def _abandon_all() -> None:
    for heartbeat in list(_running):
        heartbeat.abandon()
    _running.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
