"""Who keeps a cleanup waiting: looked for on a connection of its own, while it waits.

Afterwards nobody can tell: a lock that is given back, or waited for no more, leaves no trace.
"""

from __future__ import annotations

import os
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.pending_commits import driver_of
from tidyrows.cleanup.background_poll import beside
from tidyrows.cleanup.verify import in_short

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.dialects import Blocker

_OFTEN, _SELDOM = 0.05, 1.0


class Waiting:
    """Looks who blocks a cleanup's transactions, once it is worth it.

    Args:
        database: where they run.

    Attributes:
        armed: whether the next transaction is looked at. One that waits for nobody should not pay.
        trouble: why nobody could look, if so.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[tuple[int, str | None], Blocker] = {}
        self._recent: dict[tuple[int, str | None], Blocker] = {}
        self.armed = False
        self.trouble: str | None = None

    @property
    def blockers(self) -> tuple[Blocker, ...]:
        """Everybody who was seen in the way."""
        return tuple(self._found.values())

    def over(self, connection: sa.Connection, lock_timeout: float) -> AbstractContextManager[None]:
        """In the block, look who blocks this connection.

        Args:
            connection: it may wait.
            lock_timeout: how long for one lock, in seconds.
        """
        return self._watched(connection, lock_timeout) if self.armed else nullcontext()

    def begin(self) -> None:
        """Other rows are about to be tried: who was in the way before is no cause of theirs."""
        self._recent = {}
        self.trouble = None

    def told(self) -> str:
        """Who was in the way, to be added to the cause of a failure; empty where nobody knows."""
        if self._recent:
            return f"; blocked by {'; and by '.join(map(str, self._recent.values()))}"
        return f"; who blocks it cannot be seen: {self.trouble}" if self.trouble else ""

    @contextmanager
    def _watched(self, connection: sa.Connection, lock_timeout: float) -> Iterator[None]:
        dialect = self._database.dialect
        waiting = dialect.waiter(connection)
        if waiting is None:
            yield
            return
        look = _Look(self._database, connection, waiting)

        def again() -> None:
            try:
                found = look.blockers()
            except Exception as error:  # noqa: BLE001 -- a listener of the user's may raise anything; it is told with the cause
                self.trouble = in_short(error)
                return
            seen = {(each.pid, None if each.pid else each.state): each for each in found}
            for known in (self._recent, self._found):
                # What was certain once stays so: a later look may come when the wait is over.
                known.update(
                    {key: each for key, each in seen.items() if each.certain or key not in known}
                )

        every = min(max(lock_timeout / 4, _OFTEN), _SELDOM)
        with closing(look), beside(again, every=every):
            yield


class _Look:
    """A connection besides the cleanup's, opened at the first look.

    It does not come out of the pool: there may be none left.
    """

    def __init__(self, database: Database, connection: sa.Connection, waiting: Any) -> None:
        self._database = database
        self._driver = driver_of(connection)
        self._waiting = waiting
        self._pool: sa.Pool | None = None
        self._opened: Any = None

    def blockers(self) -> list[Blocker]:
        """Who blocks the connection now."""
        dialect = self._database.dialect
        if not dialect.blockers_need_cursor:
            if dialect.in_transaction(self._driver):
                return []  # it has got what it waited for
            found = dialect.blockers(None, self._waiting)
        else:
            if self._opened is None:
                self._pool = self._database.engine.pool.recreate()
                self._opened = self._pool.connect()
            with closing(self._opened.cursor()) as cursor:
                found = dialect.blockers(cursor, self._waiting)
            self._opened.rollback()
        if not found:
            return found
        own = self._database.capture.opened.by_id(self._driver)
        if not dialect.blockers_need_cursor:  # whatever else locks its files from here
            own.setdefault(os.getpid(), "another connection")
        return [replace(each, own=own.get(each.pid)) for each in found]

    def close(self) -> None:
        """Give the connection back."""
        if self._opened is not None:
            self._opened.invalidate()
        if self._pool is not None:
            self._pool.dispose()
