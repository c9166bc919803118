"""Something that is done again and again beside a block, until the block ends.

In a thread; inside SQLAlchemy's greenlet in a task of the running loop, since the connections of an
asynchronous driver work nowhere else.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE = 2.0
"""Seconds that a look under way is waited for at the end; its own time limits are shorter."""


@contextmanager
def beside(look: Callable[[], None], *, every: float) -> Iterator[None]:
    """Call ``look`` every so many seconds, beside the block; not at its beginning."""
    if in_greenlet():
        with _task(look, every):
            yield
    else:
        with _thread(look, every):
            yield


@contextmanager
def _thread(look: Callable[[], None], every: float) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            look()

    thread = threading.Thread(target=run, name="tidyrows: who blocks the cleanup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_PATIENCE)


@contextmanager
def _task(look: Callable[[], None], every: float) -> Iterator[None]:
    over = asyncio.Event()

    async def run() -> None:
        while True:
            try:
                await asyncio.wait_for(over.wait(), every)
            except TimeoutError:
                await spawn(look)
            else:
                return

    task = asyncio.get_running_loop().create_task(run())
    try:
        yield
    finally:
        over.set()
        wait_for(asyncio.wait({task}, timeout=_PATIENCE))
