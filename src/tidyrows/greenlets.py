"""Synchronous code over asynchronous drivers, by SQLAlchemy's greenlet, an optional package.

All code of tidyrows is synchronous. In a task it runs inside of SQLAlchemy's greenlet, which awaits
the driver. The classes below are synchronous forms of SQLAlchemy's asynchronous session makers.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy import Engine
from sqlalchemy.util import await_only, concurrency, greenlet_spawn

from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

P = ParamSpec("P")
T = TypeVar("T")
_MODULE = "sqlalchemy.ext.asyncio"


def in_greenlet() -> bool:
    """Whether :func:`wait_for` can be called here."""
    # Without the package SQLAlchemy raises an error instead.
    return sys.modules.get("greenlet") is not None and bool(concurrency.in_greenlet())


def wait_for(awaitable: Awaitable[T]) -> T:
    """Await, in synchronous code inside a greenlet."""
    result: T = await_only(awaitable)
    return result


def outer_frame() -> FrameType | None:
    """The frame that waits for the greenlet of this code; None outside of one."""
    module: Any = sys.modules.get("greenlet")
    parent = module and module.getcurrent().parent
    frame: FrameType | None = parent.gr_frame if parent else None
    return frame


def sleep(seconds: float) -> None:
    """Wait; the other tasks of the event loop run meanwhile."""
    if in_greenlet():
        wait_for(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


async def spawn(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run synchronous code in a greenlet, where it can call :func:`wait_for`."""
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
    """Whether the class of an object, or a base class, is one of ``sqlalchemy.ext.asyncio``."""
    # By the module's name: importing it needs the greenlet package.
    return any(kind.__module__.startswith(_MODULE) for kind in type(bind).__mro__)


def is_engine(bind: Any) -> bool:
    """Whether an object is an Engine or an AsyncEngine."""
    if not is_async(bind):
        return isinstance(bind, Engine)
    return hasattr(bind, "sync_engine") and not hasattr(bind, "sync_connection")


def asynchronous_engine(engine: Engine) -> AsyncEngine:
    """An AsyncEngine over an engine with an asynchronous driver."""
    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 -- needs the greenlet package

    return AsyncEngine(engine)


def synchronous(bind: Any) -> Any:
    """The Engine, Connection or Session under an asynchronous one, or a maker of such sessions."""
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


def asynchronous_session(session: orm.Session) -> AsyncSession:
    """The asynchronous session of a synchronous one: the one it belongs to, or a new one."""
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 -- needs the greenlet package

    known = AsyncSession._retrieve_proxy_for_target(session, regenerate=False)  # noqa: SLF001 -- as async_object_session() does
    made: Any = AsyncSession
    result: AsyncSession = known or made(sync_session_class=lambda **_options: session)
    return result


class AsyncMaker:
    """An ``async_sessionmaker``, as a maker of the sessions under its sessions."""

    def __init__(self, maker: Any) -> None:
        self._maker = maker

    def __repr__(self) -> str:
        return repr(self._maker)

    @property
    def kw(self) -> dict[str, Any]:
        """The arguments of its sessions; a bind is an Engine here."""
        given = dict(self._maker.kw)
        given["bind"] = getattr(given.get("bind"), "sync_engine", given.get("bind"))
        return given

    @property
    def class_(self) -> type[orm.Session]:
        """The class of the sessions."""
        kind: type[orm.Session] = self._maker.kw.get(
            "sync_session_class", self._maker.class_.sync_session_class
        )
        return kind

    def __call__(self) -> orm.Session:
        """A new session."""
        session: orm.Session = self._maker().sync_session
        return session

    def with_own_class(self) -> tuple[type[orm.Session], Callable[[], None]]:
        """Give its sessions a class of their own, for event listeners; also how to undo that."""
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
        """The registry, which knows whether this task has a session yet."""
        return self._registry.registry

    @property
    def maker(self) -> AsyncMaker:
        """The maker of its sessions."""
        return AsyncMaker(self._registry.session_factory)

    def __call__(self) -> orm.Session:
        """This task's session."""
        session: orm.Session = self._registry().sync_session
        return session
