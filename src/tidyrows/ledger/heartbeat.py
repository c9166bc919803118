"""The heart of a worker: a thread that shows again and again that the process is alive.

A worker is dead only when its lock is free *and* its heart has stopped: a connection may drop, and
a machine may be too busy to beat.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import WeakSet, ref

import sqlalchemy as sa

from tidyrows.dialects import Socket, dialect_for, in_time
from tidyrows.errors import SessionStateError
from tidyrows.execution import INTERNAL
from tidyrows.greenlets import spawn
from tidyrows.ledger.unpooled_engine import engine_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.dialects import Life

    Work = Callable[[sa.Connection], object]

EVERY = 2.0
"""Seconds between two beats."""
_START = 30.0
"""Seconds that ``start`` waits for the first sign of life."""
_BOUND = 5.0
"""Seconds that a statement of a beat may wait for a lock, or run."""
_STEP = 15.0
"""Seconds that everything together may take over an asynchronous driver, connecting included."""
_STOP = 10.0
"""Seconds that ``stop`` waits for the thread."""

_hearts: WeakSet[Heart] = WeakSet()


class Heart:
    """Holds a worker's lock and beats, in a thread of its own, until it is stopped.

    It holds the engine weakly, and stops when that is gone. A beat that fails is tried again at the
    next one. In a forked child it is not running, and the parent's goes on.

    Args:
        engine: the database; a synchronous engine, or the one under an asynchronous engine.
        life: the lock, of ``Dialect.life``, not taken yet.
        beat: writes the beat; called in a transaction of its own, which is committed, and not at
            all where the database keeps its beats in a file.
        began: as ``beat``, once, as soon as the lock is held; called on every database.
        ended: as ``beat``, once, before the lock is given back; not when the engine is gone.
        every: seconds between two beats.
        clock: what time it is, in seconds.

    Attributes:
        life: the lock.
        last_beat: when the lock was last seen held and the beat committed, by ``clock``; None
            before the first time.
        trouble: why the last beat failed; None where it did not.

    Where no other process can see the database (SQLite in memory) ``life.alone`` is true, and
    nothing is called: there would be another, empty database behind the connection.

    Example:
        >>> heart = Heart(engine, dialect_for(engine).life(engine, number), beat=write)
        >>> heart.start()
        >>> heart.stop()
    """

    def __init__(
        self,
        engine: sa.Engine,
        life: Life,
        *,
        beat: Work,
        began: Work | None = None,
        ended: Work | None = None,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = ref(engine)
        self._dialect = dialect_for(engine)
        self._is_async = bool(engine.dialect.is_async)
        self._beat, self._began, self._ended = beat, began, ended
        self._every = every
        self._clock = clock
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self.life = life
        self.last_beat: float | None = None
        self.trouble: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether it beats, in this process."""
        return (
            self._pid == os.getpid()
            and self._thread is not None
            and self._thread.is_alive()
            and self._ready.is_set()
            and not self._over.is_set()
        )

    def start(self, *, timeout: float = _START) -> None:
        """Take the lock; return once it is held and ``began`` is committed.

        Args:
            timeout: how long to wait for that, in seconds.

        Raises:
            LifeTakenError: somebody else holds the lock.
            SessionStateError: it took too long, or this heart was started before.
            Exception: what the driver or ``began`` raised; nothing is held then.
        """
        if self._thread is not None:
            raise SessionStateError(
                "This heart was started before. Make a new one, with a new number: "
                "Heart(engine, dialect.life(engine, number), beat=...)."
            )
        self._thread = threading.Thread(target=self._run, name="tidyrows: heart", daemon=True)
        _hearts.add(self)
        self._thread.start()
        if not self._ready.wait(timeout):
            self._over.set()
            raise SessionStateError(
                f"The database gave no sign within {timeout:g} s, so this worker cannot show that "
                f"it is alive. See whether it answers, and start again with a new heart."
            )
        if self._failure is not None:
            self._thread.join(_STOP)
            raise self._failure

    def stop(self, *, timeout: float = _STOP) -> None:
        """Call ``ended`` and give the lock back; may be called again, and raises nothing.

        Args:
            timeout: how long to wait for that, in seconds.
        """
        self._over.set()
        thread = self._thread
        if self._pid != os.getpid() or thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)

    def abandon(self) -> None:
        """In a forked child: let the parent's lock alone."""
        self._over.set()
        self.life.abandon()

    # ----- in the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(Exception), _caller(is_async=self._is_async) as call:
            try:
                call(self._begin)
            except BaseException as error:  # noqa: BLE001 -- it is raised where start() was called
                self._failure = error
                call(self.life.release)
                return
            finally:
                self._ready.set()
            while not self._over.wait(self._every) and self._engine() is not None:
                self._try(call, self._once)
            self._over.set()
            self._try(call, self._end)
            self._try(call, self.life.release)

    def _try(self, call: Callable[[Callable[[], None]], None], work: Callable[[], None]) -> None:
        try:
            call(work)
        except Exception as error:  # noqa: BLE001 -- a server that restarts raises anything; the next beat tries again
            self.trouble = error
        else:
            self.trouble = None

    def _begin(self) -> None:
        self.life.take()
        self._commit(self._began)
        self.last_beat = self._clock()

    def _once(self) -> None:
        failures: list[Exception] = []
        for work in (self.life.keep, self._beat_in_row):
            try:
                work()
            except Exception as error:  # noqa: BLE001 -- one sign of life is better than none
                failures.append(error)
        if failures:
            raise failures[0]
        self.last_beat = self._clock()

    def _beat_in_row(self) -> None:
        if not self._dialect.beats_in_file:
            self._commit(self._beat)

    def _end(self) -> None:
        if self._engine() is not None:
            self._commit(self._ended)

    def _commit(self, work: Work | None) -> None:
        """On a connection that is closed again, so that none idles."""
        engine = self._engine()
        if work is None or self.life.alone or engine is None:
            return
        if self._dialect.missing_file(engine) is not None:
            return  # its database is gone, and to connect would make an empty one
        # The project's own way to connect, its listeners too, but nothing of its pool.
        pool = engine.pool.recreate()
        own = engine_over(pool, engine, **{INTERNAL: True})
        try:
            connection = self._connected(own)
            try:
                driver = connection.connection.dbapi_connection
                with closing(Socket(driver)) as wire, wire.bounded(2 * _BOUND):
                    self._in_transaction(connection, work)
            finally:
                _close(connection)
        finally:
            pool.dispose()

    def _connected(self, engine: sa.Engine) -> sa.Connection:
        if self._dialect.beats_in_file:  # nothing to wait for, and its connections keep to a thread
            return engine.connect()
        return in_time(engine.connect, 2 * _BOUND, late=lambda late: late.invalidate())

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


def _close(connection: sa.Connection) -> None:
    try:
        connection.close()
    except sa.exc.DBAPIError:  # the server has closed it already
        connection.invalidate()


@contextmanager
def _caller(*, is_async: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """How to call something that talks to the database, from a thread without a loop.

    Connections of an asynchronous driver belong to one loop, which runs only while one is used.
    """
    if not is_async:
        yield lambda work: work()
        return
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
    for heart in list(_hearts):
        heart.stop()


def _abandon_all() -> None:
    for heart in list(_hearts):
        heart.abandon()
    _hearts.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
