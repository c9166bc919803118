"""Two who do something at once: waits on conditions, and what happens at a certain statement."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

PATIENCE = 20.0
"""Seconds after which a condition that has not come is a failure."""

_BLOCKED = {
    "postgresql": """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
    """,
    "mysql": """
        SELECT count(*) FROM information_schema.innodb_trx t
        JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id
        WHERE t.trx_state = 'LOCK WAIT' AND p.db = database()
    """,
}
# InnoDB shows the same picture again to who asks within a tenth of a second.
_BETWEEN = {"postgresql": 0.01, "mysql": 0.15}


class Doing:
    """Something done in a thread of its own.

    Attributes:
        result: what it returned.
        error: what it raised, if it did.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 -- shown by whoever waits for it
            self.error = error

    @property
    def over(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    def outcome(self) -> Any:
        """Wait for its end: what it returned, or raise what it raised."""
        self._thread.join(PATIENCE)
        assert self.over, "it has not come to an end"
        if self.error is not None:
            raise self.error
        return self.result

    def settle(self, engine: sa.Engine) -> None:
        """Wait until it has ended or waits for a lock in this database."""
        backend = engine.dialect.name.replace("mariadb", "mysql")
        ends = time.monotonic() + PATIENCE
        while not self.over:
            if _blocked(engine, backend):
                return
            assert time.monotonic() < ends, "it neither ended nor waited for a lock"
            self._thread.join(_BETWEEN[backend])


async def cancelled_while_it_waits(work: Coroutine[Any, Any, Any], engine: sa.Engine) -> None:
    """Run it in a task, which is cancelled once it waits for a lock in this database."""
    task = asyncio.create_task(work)
    backend = engine.dialect.name.replace("mariadb", "mysql")
    async with asyncio.timeout(PATIENCE):
        while not _blocked(engine, backend):
            assert not task.done(), "it did not wait for a lock"
            await asyncio.sleep(_BETWEEN[backend])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _blocked(engine: sa.Engine, backend: str) -> bool:
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql(_BLOCKED[backend]).scalar())


def at_statement(engine: sa.Engine, pattern: str, action: Callable[[], None]) -> Callable[[], bool]:
    """Do something once, just before a statement that matches runs on this engine.

    Returns:
        Whether it was done.
    """
    done: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not done and re.search(pattern, statement, re.DOTALL):
            done.append(statement)
            action()

    return lambda: bool(done)


class CancelledAt:
    """Awaits work in the task that awaits this, which is cancelled at one of the work's waits.

    Args:
        work: the coroutine.
        wait: the number of that wait, from 1; 0 for none.
        answered: cancel when what is waited for has come, instead of before.

    Attributes:
        waits: how many waits there were so far.
    """

    def __init__(
        self, work: Coroutine[Any, Any, Any], wait: int = 0, *, answered: bool = False
    ) -> None:
        self._work, self._wait, self._answered = work, wait, answered
        self.waits = 0

    def __await__(self) -> Iterator[Any]:
        task = asyncio.current_task()
        assert task is not None
        step, value = self._work.send, None
        while True:
            try:
                waited = step(value)
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self._wait:
                if self._answered and asyncio.isfuture(waited):
                    waited.add_done_callback(lambda _done: task.cancel())
                else:
                    task.cancel()
            try:
                value = yield waited
                step = self._work.send
            except BaseException as error:  # noqa: BLE001 -- it is the work's to handle
                step, value = self._work.throw, error
