"""Tasks or threads that use one connection: one statement after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from tidyrows.greenlets import in_greenlet, wait_for

LONGEST = 60.0
"""Seconds for which one task or thread waits for the statement of another."""


class Turns:
    """Who may send now: one task or thread, from before its statement until its answer.

    Attributes:
        sql: the statement that runs, or ran last.
    """

    def __init__(self, *, in_tasks: bool) -> None:
        self.sql = ""
        self._in_tasks = in_tasks
        self._holder: Any = None
        self._freed: asyncio.Event | None = None
        self._lock = threading.Lock()

    def take(self, sql: str) -> bool:
        """Wait until nobody else has it; whether it came in time. It need not be given twice."""
        me = self._me()
        if self._holder is not me:
            if not (
                self._take_in_task() if self._in_tasks else self._lock.acquire(timeout=LONGEST)
            ):
                return False
            self._holder = me
        self.sql = sql
        return True

    def _take_in_task(self) -> bool:
        until = time.monotonic() + LONGEST
        while self._holder is not None and in_greenlet():
            self._freed = self._freed or asyncio.Event()
            left = until - time.monotonic()
            try:
                wait_for(asyncio.wait_for(self._freed.wait(), left))
            except TimeoutError:
                return False
        return True

    def give(self) -> None:
        """Let others go on, where this task or thread has it."""
        if self._holder is None or self._holder is not self._me():
            return
        self._holder = None
        if not self._in_tasks:
            self._lock.release()
        elif self._freed is not None:
            self._freed.set()
            self._freed = None

    @property
    def is_mine(self) -> bool:
        """Whether this task or thread has it."""
        return self._holder is not None and self._holder is self._me()

    @property
    def is_others(self) -> bool:
        """Whether another task or thread has it."""
        return self._holder is not None and self._holder is not self._me()

    def _me(self) -> Any:
        return asyncio.current_task() if self._in_tasks else threading.current_thread()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
