"""A loop of our own: what is held from test to test outlives the loops of the tests."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, TypeVar

from tidyrows.greenlets import spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

T = TypeVar("T")
_lock = threading.Lock()
_loops: list[asyncio.AbstractEventLoop] = []


def in_own_loop(engine: sa.Engine, work: Callable[[], T]) -> T:
    """Do what connects; under an asynchronous driver in the one thread that has our loop.

    It must not use connections of the caller's engine, which belong to the caller's loop.
    """
    if not engine.dialect.is_async:
        return work()
    return wait_for(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(spawn(work), _loop())))


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="tidyrows: spaces", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


def _forget() -> None:
    """In a forked child there is no such thread."""
    global _lock  # noqa: PLW0603 -- it may be held for ever
    _lock = threading.Lock()
    _inherited.extend(_loops)
    _loops.clear()


_inherited: list[asyncio.AbstractEventLoop] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
