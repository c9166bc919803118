"""Who keeps a cleanup waiting: looked for on a connection of its own, while it waits.

Afterwards nobody can tell: a lock that is given back, or waited for no more, leaves no trace.
"""

from __future__ import annotations

from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.companion import beside
from tidyrows.cleanup.verify import in_short

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

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
        self._found: dict[int, Blocker] = {}
        self.armed = False
        self.trouble: str | None = None

    @property
    def blockers(self) -> tuple[Blocker, ...]:
        """Everybody who was seen in the way."""
        return tuple(self._found.values())

    def over(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """In the block, look who blocks this connection."""
        return self._watched(connection) if self.armed else nullcontext()

    def told(self) -> str:
        """Who was in the way, to be added to the cause of a failure; empty where nobody knows."""
        if self._found:
            return f"; blocked by {'; and by '.join(map(str, self._found.values()))}"
        return f"; who blocks it cannot be seen: {self.trouble}" if self.trouble else ""

    @contextmanager
    def _watched(self, connection: sa.Connection) -> Iterator[None]:
        dialect = self._database.dialect
        waiting = dialect.waits_as(connection)
        if waiting is None:
            yield
            return
        look = _Look(self._database, connection, waiting)

        def again() -> None:
            try:
                found = look.blockers()
            except (sa.exc.SQLAlchemyError, *look.errors) as error:
                self.trouble = in_short(error)
                return
            if found:
                self._found = {each.pid: each for each in found}

        every = min(max(self._database.lock_timeout / 4, _OFTEN), _SELDOM)
        with closing(look), beside(again, every=every):
            yield


class _Look:
    """A connection besides the cleanup's, opened at the first look.

    It does not come out of the pool: there may be none left.
    """

    def __init__(self, database: Database, connection: sa.Connection, waiting: Any) -> None:
        self._database = database
        self._connection = connection
        self._waiting = waiting
        self._pool: sa.Pool | None = None
        self._opened: Any = None
        self.errors = (database.engine.dialect.loaded_dbapi.Error, OSError)

    def blockers(self) -> list[Blocker]:
        """Who blocks the connection now."""
        dialect = self._database.dialect
        if not dialect.asks_for_blockers:
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
        own = self._database.capture.opened.by_id(self._connection)
        return [replace(each, own=own.get(each.pid)) for each in found]

    def close(self) -> None:
        """Give the connection back."""
        if self._opened is not None:
            self._opened.invalidate()
        if self._pool is not None:
            self._pool.dispose()
