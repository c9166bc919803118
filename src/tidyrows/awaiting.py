"""Synchronous code over asynchronous drivers: SQLAlchemy's greenlet, which is an extra.

Everything in tidyrows is written once, synchronously. Where a task runs it, it runs inside of
SQLAlchemy's greenlet, and whatever waits there awaits.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sqlalchemy.util import await_only, concurrency, greenlet_spawn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

P = ParamSpec("P")
T = TypeVar("T")


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
