"""Bounds on the client's side: a network that goes silent gives no driver an error."""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")


class SilentServerError(ConnectionError, TimeoutError):
    """The server did not answer in time, so the connection was given up."""


@contextmanager
def bounded_connection(engine: sa.Engine, seconds: float) -> Iterator[sa.Connection]:
    """A connection of the engine, closed at the end.

    To connect, to run the block and to close take no longer than so many seconds together, as far
    as the server is waited for.

    Raises:
        SilentServerError: they took longer; the connection is thrown away.
    """
    until = time.monotonic() + seconds
    connection = _connected(engine, seconds)
    driver = connection.connection.dbapi_connection
    with (
        closing(DriverSocket(driver)) as wire,
        wire.bounded(max(until - time.monotonic(), 0.0)) as watch,
    ):
        try:
            try:
                yield connection
            finally:
                if watch.has_struck:
                    connection.invalidate()
                _close(connection)
        except Exception as error:
            if not watch.has_struck or isinstance(error, SilentServerError):
                raise
            raise SilentServerError(
                f"the server did not answer within {seconds:.1f} s, and the connection was given up"
            ) from error


@contextmanager
def closed_at_end(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection of the engine, closed at the end whatever state it is in."""
    connection = engine.connect()
    try:
        yield connection
    finally:
        _close(connection)


def _close(connection: sa.Connection) -> None:
    try:
        connection.close()
    except sa.exc.DBAPIError:  # the server has closed it already: it must not come back
        connection.invalidate()


def _connected(engine: sa.Engine, seconds: float) -> sa.Connection:
    pool: Any = engine.pool
    # An idle connection comes at once, unless the pool asks the server first.
    if hasattr(pool, "checkedin") and pool.checkedin() > 0:
        asks_nobody = not pool._pre_ping and pool._recycle < 0  # noqa: SLF001 -- no public names
        if asks_nobody:
            return engine.connect()
    return connect_within(engine.connect, seconds, late=_discard)


def _discard(connection: sa.Connection) -> None:
    connection.invalidate()
    connection.close()


def connect_within(make: Callable[[], T], seconds: float, *, late: Callable[[T], object]) -> T:
    """Connect beside the caller, or raise SilentServerError: drivers may wait for minutes.

    In a greenlet that is a task of the running loop, else a thread. ``late`` is called with a
    connection that comes too late.
    """
    if in_greenlet():
        return wait_for(_connect_in_task(make, seconds, late))
    made: Future[T] = Future()

    def connect() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 -- it is raised where the connection is waited for
            made.set_exception(error)

    run = partial(contextvars.copy_context().run, connect)
    try:
        threading.Thread(target=run, name="tidyrows: connect", daemon=True).start()
    except RuntimeError:  # at the interpreter's end Python 3.12 and later start no more threads
        return make()
    try:
        return made.result(seconds)
    except TimeoutError:
        # It calls at once where the connection is there by now.
        made.add_done_callback(lambda done: None if done.exception() else late(done.result()))
        if made.done() and isinstance(made.exception(), TimeoutError):
            raise
        raise _no_connection(seconds) from None


async def _connect_in_task(make: Callable[[], T], seconds: float, late: Callable[[T], object]) -> T:
    task = asyncio.ensure_future(spawn(make))
    done = False
    try:
        done = bool((await asyncio.wait({task}, timeout=seconds))[0])
    finally:
        if not done:  # too late, or the caller was cancelled
            task.add_done_callback(
                lambda over: None if over.cancelled() or over.exception() else late(over.result())
            )
            task.cancel()
    if not done:
        raise _no_connection(seconds)
    return task.result()


def _no_connection(seconds: float) -> SilentServerError:
    return SilentServerError(f"the database took no connection within {seconds:.3g} s")


class DriverSocket:
    """The socket of a driver's connection, under a descriptor of our own.

    The driver may close its own at any time, and its number is then used again. Where the driver
    does not show its socket, all methods do nothing.
    """

    def __init__(self, driver: Any) -> None:
        self._number = _descriptor_of(driver)
        self._copy: socket.socket | None = None
        if self._number is not None:
            with suppress(OSError):
                # The family does not matter: nothing is ever sent.
                self._copy = socket.fromfd(self._number, socket.AF_INET, socket.SOCK_STREAM)

    def close(self) -> None:
        """Give up our own descriptor."""
        if self._copy is not None:
            self._copy.close()

    def shut(self) -> None:
        """End the connection, so that whatever waits for it fails."""
        if self._copy is not None:
            with suppress(OSError):
                self._copy.shutdown(socket.SHUT_RDWR)

    def redirect_to_null(self) -> None:
        """In a forked child: put the null device in the place of the socket."""
        if self._copy is None or self._number is None:
            return
        with suppress(OSError), closing(self._copy):
            if os.path.samestat(os.fstat(self._number), os.fstat(self._copy.fileno())):
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, self._number, inheritable=False)
                os.close(null)

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[Watch]:
        """Shut the socket if the block takes longer: no driver bounds an open connection itself."""
        watch = Watch(self, time.monotonic() + seconds)
        watcher = _watcher
        watcher.add(watch)
        try:
            yield watch
        finally:
            watcher.remove(watch)


class Watch:
    """A socket that is shut at a time of the monotonic clock, unless it is removed before."""

    __slots__ = ("at", "has_struck", "wire")

    def __init__(self, wire: DriverSocket, at: float) -> None:
        self.wire = wire
        self.at = at
        self.has_struck = False


class Watcher:
    """One thread that shuts sockets in time. To add a watch seldom wakes it."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf

    def add(self, watch: Watch) -> None:
        """Shut the socket in time."""
        with self._changed:
            self._watches.add(watch)
            if watch.at < self._wakes_at:
                self._wakes_at = watch.at
                if self._thread is None:
                    self._start()
                self._changed.notify()

    def remove(self, watch: Watch) -> None:
        """Leave the socket alone from now on."""
        with self._changed:
            self._watches.discard(watch)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="tidyrows: bounds", daemon=True)
        # At the interpreter's end Python 3.12 and later start no more threads.
        with suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for watch in [each for each in self._watches if each.at <= now]:
                    self._watches.discard(watch)
                    watch.has_struck = True
                    watch.wire.shut()
                self._wakes_at = min((each.at for each in self._watches), default=math.inf)
                idle = math.isinf(self._wakes_at)
                self._changed.wait(None if idle else min(self._wakes_at - now, _LONGEST))


_LONGEST = 3600.0
"""Seconds; a lock takes no wait of any length."""
_watcher = Watcher()


def _begin_anew() -> None:
    """In a forked child: the thread is the parent's."""
    global _watcher  # noqa: PLW0603 -- its lock may be held for ever
    _watcher = Watcher()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _descriptor_of(driver: Any) -> int | None:
    raw = getattr(driver, "driver_connection", driver)
    roads: tuple[Callable[[], Any], ...] = (
        lambda: raw,  # psycopg, psycopg2, mysqlclient
        lambda: raw._sock,  # noqa: SLF001 -- PyMySQL has no public road
        lambda: raw._writer.get_extra_info("socket"),  # noqa: SLF001 -- nor have aiomysql and asyncmy
        lambda: raw._transport.get_extra_info("socket"),  # noqa: SLF001 -- nor has asyncpg
    )
    for road in roads:
        with suppress(Exception):
            found = int(road().fileno())
            if found >= 0:
                return found
    return None
