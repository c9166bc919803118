"""All databases that the suite met, and what was different in them after each stretch of time."""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

from tidyrows.audit.reach import LookThread, Reach, SharedReach
from tidyrows.audit.watch import Watch
from tidyrows.dialects import database_name, dialect_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import sqlalchemy as sa

    from tidyrows.audit.makers import Maker
    from tidyrows.audit.observations import Heard
    from tidyrows.audit.tables import Difference
    from tidyrows.keys import TableName


class Watches:
    """The databases of a run.

    Args:
        begin: called first in the thread that looks.
        deaf: a block in which nobody listens to what this thread asks.

    Attributes:
        notes: what could not be looked at, and why.
    """

    def __init__(
        self, begin: Callable[[], None], deaf: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._deaf = deaf
        self.notes: dict[str, None] = {}
        self._thread = LookThread(begin)
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._names: dict[Any, str] = {}
        self._met: dict[str, set[Maker]] = {}
        self._numbers = count(1)
        self._private: weakref.WeakKeyDictionary[sa.Engine, tuple[Any, str]]
        self._private = weakref.WeakKeyDictionary()

    def meet(self, connection: sa.Connection) -> str | None:
        """The name of a connection's database, which is looked at first if it is new.

        None where it cannot be looked at.
        """
        engine = connection.engine
        dialect = dialect_for(engine)
        if dialect.is_private(engine):
            return self._meet_private(connection)
        identity = dialect.identity(engine)
        place = None if identity is None else identity[0]
        with self._lock:
            name = self._names.get(place)
            if name is None:
                name = database_name(engine)
                self._names[place] = name
            if name not in self._watches:
                try:
                    reach = Reach(engine, self._thread)
                except Exception as error:  # noqa: BLE001 -- a pool of the project's own
                    self._say(f"{name} was not looked at: its pool cannot be made again ({error})")
                    return None
                self._add(engine, name, reach)
        return name

    def _meet_private(self, connection: sa.Connection) -> str | None:
        """A database in memory, which is another with each connection of the driver."""
        if connection.dialect.is_async:
            self._say("databases in memory were not looked at where their driver is asynchronous")
            return None
        reach = SharedReach(connection, self._deaf)
        driver = connection.connection.dbapi_connection
        known, name = self._private.get(connection.engine, (None, ""))
        if known is driver:
            self._watches[name].go_by(reach)
            return name
        name = f"in memory {next(self._numbers)}"
        self._private[connection.engine] = driver, name
        self._add(connection.engine, name, reach)
        return name

    def _add(self, engine: sa.Engine, name: str, reach: Reach | SharedReach) -> None:
        watch = self._watches[name] = Watch(engine, name, reach, self._say)
        watch.look()

    def sees(self, table: TableName, key: Any) -> bool:
        """Whether a look would show what became of a row."""
        watch = self._watches.get(table.database)
        return watch is not None and watch.sees(table, key)

    def is_keyless(self, table: TableName) -> bool:
        """Whether a table has no primary key."""
        watch = self._watches.get(table.database)
        return watch is not None and table in watch.keyless

    def look(self, who: Maker, heard: Heard) -> list[Difference]:
        """What is different since the last look.

        Args:
            who: whose doing it is.
            heard: what was heard meanwhile.
        """
        found: list[Difference] = []
        for name, watch in list(self._watches.items()):
            there = heard.there.get(name)
            if there is not None:
                self._met.setdefault(name, set()).add(who)
            elif watch.gone or self._is_own(name, watch):
                continue  # a test's own, which no other has met
            found += watch.look(there)
            if self._is_own(name, watch):
                watch.let_go()
        return found

    def release(self) -> None:
        """Close all connections: somebody may want to drop a database."""
        for watch in list(self._watches.values()):
            watch.release()

    def close(self) -> None:
        """Look no more."""
        self.release()
        self._thread.close()

    @property
    def met(self) -> bool:
        """Whether there was any database to look at."""
        return bool(self._watches)

    @property
    def own(self) -> set[str]:
        """The databases that one test alone has made for itself."""
        return {name for name, watch in self._watches.items() if self._is_own(name, watch)}

    def _is_own(self, name: str, watch: Watch) -> bool:
        met = self._met.get(name, set())
        return watch.fresh and len(met) == 1 and next(iter(met)).is_test

    def _say(self, note: str) -> None:
        self.notes[note] = None
