"""All databases that the suite uses, and what was different in them after each test."""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

from tidyrows.audit.connection import AuditConnection, AuditThread, SharedConnection
from tidyrows.audit.watch import DatabaseWatch
from tidyrows.dialects import database_name, dialect_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import sqlalchemy as sa

    from tidyrows.audit.observations import Observations
    from tidyrows.audit.row_history import Maker
    from tidyrows.audit.tables import Difference
    from tidyrows.keys import TableName


class WatchedDatabases:
    """The databases of a run.

    Args:
        begin: called first in the thread that looks.
        unobserved: a block in which the observer ignores the statements of this thread.

    Attributes:
        notes: what could not be looked at, and why.
    """

    def __init__(
        self, begin: Callable[[], None], unobserved: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._unobserved = unobserved
        self.notes: dict[str, None] = {}
        self._thread = AuditThread(begin)
        self._lock = threading.Lock()
        self._watches: dict[str, DatabaseWatch] = {}
        self._names: dict[Any, str] = {}
        self._users: dict[str, set[Maker]] = {}
        self._numbers = count(1)
        self._in_memory: weakref.WeakKeyDictionary[sa.Engine, tuple[Any, str]]
        self._in_memory = weakref.WeakKeyDictionary()

    def meet(self, connection: sa.Connection) -> str | None:
        """The name of a connection's database, which is looked at if it is new.

        None where it cannot be looked at.
        """
        engine = connection.engine
        dialect = dialect_for(engine)
        if dialect.is_private(engine):
            return self._meet_in_memory(connection)
        identity = dialect.identity(engine)
        place = None if identity is None else identity[0]
        with self._lock:
            name = self._names.get(place)
            if name is None:
                name = self._names[place] = database_name(engine)
            if name not in self._watches:
                try:
                    own = AuditConnection(engine, self._thread)
                except Exception as error:  # noqa: BLE001 -- a pool of the project's own
                    self._note(f"{name} was not looked at: its pool cannot be made again ({error})")
                    return None
                self._add(engine, name, own)
        return name

    def _meet_in_memory(self, connection: sa.Connection) -> str | None:
        """Each connection of the driver has a database in memory of its own."""
        if connection.dialect.is_async:
            self._note("databases in memory were not looked at where their driver is asynchronous")
            return None
        shared = SharedConnection(connection, self._unobserved)
        driver = connection.connection.dbapi_connection
        known, name = self._in_memory.get(connection.engine, (None, ""))
        if known is driver:
            self._watches[name].use_connection(shared)
            return name
        name = f"in memory {next(self._numbers)}"
        self._in_memory[connection.engine] = driver, name
        self._add(connection.engine, name, shared)
        return name

    def _add(
        self, engine: sa.Engine, name: str, connection: AuditConnection | SharedConnection
    ) -> None:
        watch = self._watches[name] = DatabaseWatch(engine, name, connection, self._note)
        watch.look()

    def sees(self, table: TableName, key: Any) -> bool:
        """Whether a look would show what became of a row."""
        watch = self._watches.get(table.database)
        return watch is not None and watch.sees(table, key)

    def is_keyless(self, table: TableName) -> bool:
        """Whether a table has no primary key."""
        watch = self._watches.get(table.database)
        return watch is not None and table in watch.keyless

    def look(self, maker: Maker, observed: Observations) -> list[Difference]:
        """What is different since the last look.

        Args:
            maker: the test, or the fixture, that ran.
            observed: what was observed meanwhile.
        """
        found: list[Difference] = []
        for name, watch in list(self._watches.items()):
            there = observed.databases.get(name)
            if there is not None:
                self._users.setdefault(name, set()).add(maker)
            elif watch.gone or self._is_own(name, watch):
                continue  # one test's own, which no other test uses
            found += watch.look(there)
            if self._is_own(name, watch):
                watch.suspend()
        return found

    def release(self) -> None:
        """Close all connections: a database may be about to be dropped."""
        for watch in list(self._watches.values()):
            watch.release()

    def close(self) -> None:
        """End the thread and the connections."""
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

    def _is_own(self, name: str, watch: DatabaseWatch) -> bool:
        users = self._users.get(name, set())
        return watch.fresh and len(users) == 1 and next(iter(users)).is_test

    def _note(self, note: str) -> None:
        self.notes[note] = None
