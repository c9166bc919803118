"""Synchronous code over asynchronous drivers: SQLAlchemy's greenlet, which is an extra.

Everything in tidyrows is written once, synchronously. In a task that code runs inside of
SQLAlchemy's greenlet, and each wait of a driver is awaited there. The classes below give
SQLAlchemy's asynchronous engines, sessions and session makers their synchronous form.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy.util import await_only, concurrency, greenlet_spawn

from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import orm

P = ParamSpec("P")
T = TypeVar("T")
_MODULE = "sqlalchemy.ext.asyncio"


def in_greenlet() -> bool:
    """Whether what is called here may await."""
    # Without the package SQLAlchemy raises instead of answering.
    return sys.modules.get("greenlet") is not None and bool(concurrency.in_greenlet())


def wait_for(awaitable: Awaitable[T]) -> T:
    """Await, in synchronous code inside a greenlet."""
    result: T = await_only(awaitable)
    return result


def sleep(seconds: float) -> None:
    """Wait, and let the other tasks of the loop run meanwhile."""
    if in_greenlet():
        wait_for(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


async def spawn(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run synchronous code so that what waits in it awaits.

    Raises:
        ModuleNotFoundError: the greenlet package is not there; the message says how to get it.
    """
    try:
        import_module("greenlet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Asynchronous engines need the greenlet package, which is not installed: "
            'pip install "tidyrows[postgresql-async]", or mysql-async, or sqlite-async.',
            name=error.name,
        ) from error
    result: T = await greenlet_spawn(partial(fn, *args, **kwargs))
    return result


def is_async(bind: Any) -> bool:
    """Whether it is one of ``sqlalchemy.ext.asyncio``, or of a class made of one.

    Asked by the module's name: to import it takes the greenlet package.
    """
    return any(kind.__module__.startswith(_MODULE) for kind in type(bind).__mro__)


def synchronous(bind: Any) -> Any:
    """The Engine, Connection or Session under it, or what makes such sessions.

    Raises:
        SessionStateError: a connection that was not opened yet.
    """
    if hasattr(bind, "registry"):
        return AsyncRegistry(bind)
    if hasattr(bind, "class_"):
        return AsyncMaker(bind)
    if hasattr(bind, "sync_connection"):
        if bind.sync_connection is None:
            raise SessionStateError(
                f"The {type(bind).__name__} is not open yet. Write async with engine.connect() as "
                f"connection: ... around the block, or bind the tracker to the engine: "
                f"ResourceTracker(engine)."
            )
        return bind.sync_connection
    return getattr(bind, "sync_session", getattr(bind, "sync_engine", bind))


class AsyncMaker:
    """An ``async_sessionmaker``, as a maker of the sessions under its sessions.

    Attributes:
        kw: what its sessions are made with; a bind is an Engine here.
    """

    def __init__(self, maker: Any) -> None:
        self._maker = maker

    def __repr__(self) -> str:
        return repr(self._maker)

    @property
    def kw(self) -> dict[str, Any]:
        """What its sessions are made with."""
        given = dict(self._maker.kw)
        given["bind"] = getattr(given.get("bind"), "sync_engine", given.get("bind"))
        return given

    @property
    def class_(self) -> type[orm.Session]:
        """The class of the sessions under its sessions."""
        kind: type[orm.Session] = self._maker.kw.get(
            "sync_session_class", self._maker.class_.sync_session_class
        )
        return kind

    def __call__(self) -> orm.Session:
        """A new session."""
        session: orm.Session = self._maker().sync_session
        return session

    def with_own_class(self) -> tuple[type[orm.Session], Callable[[], None]]:
        """Have it make sessions of a class that no other maker has, as a ``sessionmaker`` does.

        Returns:
            The class, which can be listened to, and what undoes it.
        """
        before = self._maker.kw.get("sync_session_class")
        own = type(self.class_.__name__, (self.class_,), {})
        self._maker.configure(sync_session_class=own)

        def undo() -> None:
            if before is None:
                self._maker.kw.pop("sync_session_class", None)
            else:
                self._maker.configure(sync_session_class=before)

        return own, undo


class AsyncRegistry:
    """An ``async_scoped_session``, as a registry of the sessions under its sessions."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def __repr__(self) -> str:
        return repr(self._registry)

    @property
    def registry(self) -> Any:
        """What knows whether this task has a session yet."""
        return self._registry.registry

    @property
    def maker(self) -> AsyncMaker:
        """What makes its sessions."""
        return AsyncMaker(self._registry.session_factory)

    def __call__(self) -> orm.Session:
        """This task's session."""
        session: orm.Session = self._registry().sync_session
        return session
