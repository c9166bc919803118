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
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import sqlalchemy as sa

from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")


class SilentServerError(ConnectionError, TimeoutError):
    """The server did not answer in time, so the connection was given up."""


_troubled: WeakSet[sa.Pool] = WeakSet()
"""Pools of which a connection was given up: its place is counted as idle, and connects anew."""


class BoundedConnection:
    """A connection of the engine, closed at the end.

    To connect, to run the block and to close take no longer than so many seconds together, as far
    as the server is waited for.

    Raises:
        SilentServerError: they took longer; the connection is thrown away.
    """

    __slots__ = ("_connection", "_engine", "_seconds", "_wire")

    def __init__(self, engine: sa.Engine, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds

    def __enter__(self) -> sa.Connection:
        until = time.monotonic() + self._seconds
        connection = checkout_within(self._engine, self._seconds)
        self._connection = connection
        wire = self._wire = DriverSocket(connection.connection.dbapi_connection)
        _watcher.add(wire, until)
        return connection

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object, /) -> None:
        wire, connection = self._wire, self._connection
        try:
            if wire.was_shut:
                _troubled.add(self._engine.pool)
                connection.invalidate()
            try:
                connection.close()
            except sa.exc.DBAPIError:  # the server has closed it already: it must not come back
                connection.invalidate()
        except Exception as failure:
            if not wire.was_shut:
                raise
            error = error or failure
        finally:
            wire.close()
        silent = wire.was_shut and isinstance(error, Exception)
        if silent and not isinstance(error, SilentServerError):
            raise SilentServerError(
                f"the server did not answer within {self._seconds:.1f} s, and the connection was "
                f"given up"
            ) from error


def checkout_within(engine: sa.Engine, seconds: float) -> sa.Connection:
    """A connection of the engine; to connect takes no longer than so many seconds.

    Raises:
        SilentServerError: it took longer.
    """
    pool: Any = engine.pool
    # An idle connection comes at once, unless the pool asks the server first, or has lost one.
    may_connect = pool._pre_ping or pool._recycle >= 0 or pool._invalidate_time  # noqa: SLF001 -- no public names
    if getattr(pool, "checkedin", int)() and not may_connect and pool not in _troubled:
        return engine.connect()
    return connect_within(engine.connect, seconds, late=_discard)


@contextmanager
def closed_at_end(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection of the engine, closed at the end whatever state it is in."""
    connection = engine.connect()
    try:
        yield connection
    finally:
        try:
            connection.close()
        except sa.exc.DBAPIError:  # its file is gone: it must not come back
            connection.invalidate()


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


_SOCKETS = (
    "fileno",  # psycopg, psycopg2, mysqlclient
    "_sock.fileno",  # PyMySQL has no public road
    "_writer.get_extra_info",  # nor have aiomysql and asyncmy
    "_transport.get_extra_info",  # nor has asyncpg
)


class DriverSocket:
    """The socket of a driver's connection, under a descriptor of our own.

    The driver may close its own at any time, and its number is then used again. Where the driver
    does not show its socket, all methods do nothing.

    Attributes:
        at: when it is shut, by the monotonic clock.
        was_shut: whether that has happened.
    """

    def __init__(self, driver: Any) -> None:
        self.at = math.inf
        self.was_shut = False
        self._number: int | None = None
        self._copy: socket.socket | None = None
        raw = getattr(driver, "driver_connection", driver)
        for name in _SOCKETS:
            with suppress(Exception):
                found = attrgetter(name)(raw)
                found = found() if name.endswith("fileno") else found("socket").fileno()
                if found >= 0:
                    self._number = int(found)
                    break
        if self._number is not None:
            with suppress(OSError):
                # The family does not matter: nothing is ever sent.
                self._copy = socket.fromfd(self._number, socket.AF_INET, socket.SOCK_STREAM)

    def close(self) -> None:
        """Give up our own descriptor; it is shut no more."""
        _watcher.remove(self)
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
    def bounded(self, seconds: float) -> Iterator[None]:
        """Shut the socket if the block takes longer: no driver bounds an open connection itself."""
        _watcher.add(self, time.monotonic() + seconds)
        try:
            yield
        finally:
            _watcher.remove(self)


class Watcher:
    """One thread that shuts sockets in time. To add one seldom wakes it."""

    def __init__(self) -> None:
        self._sockets: set[DriverSocket] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf

    def add(self, wire: DriverSocket, at: float) -> None:
        """Shut the socket at a time of the monotonic clock, unless it is removed before."""
        with self._changed:
            wire.at = at
            self._sockets.add(wire)
            if at < self._wakes_at:
                self._wakes_at = at
                if self._thread is None:
                    self._start()
                self._changed.notify()

    def remove(self, wire: DriverSocket) -> None:
        """Leave the socket alone from now on."""
        with self._changed:
            self._sockets.discard(wire)

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
                for wire in [each for each in self._sockets if each.at <= now]:
                    self._sockets.discard(wire)
                    wire.was_shut = True
                    wire.shut()
                self._wakes_at = min((each.at for each in self._sockets), default=math.inf)
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
