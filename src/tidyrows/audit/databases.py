"""The databases of a run: those that the suite's engines lead to."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from tidyrows.audit.connections import AuditConnection, AuditThread, SharedConnection
from tidyrows.audit.observer import DatabaseObservations
from tidyrows.audit.watch import DatabaseWatch
from tidyrows.dialects import database_name, dialect_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from tidyrows.audit.baseline import DatabaseChange
    from tidyrows.audit.connections import LookConnection
    from tidyrows.audit.observer import Observations
    from tidyrows.audit.row_history import Maker, RowHistory
    from tidyrows.audit.tables import Difference, Key
    from tidyrows.keys import RowKey, TableName


class WatchedDatabases:
    """The databases of a run."""

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        self._thread = AuditThread()
        self._lock = threading.Lock()
        self._watches: dict[str, DatabaseWatch] = {}
        self._names: dict[Any, str] = {}
        self._numbers = count(1)
        self._in_memory: weakref.WeakKeyDictionary[sa.Engine, tuple[Any, str]]
        self._in_memory = weakref.WeakKeyDictionary()

    def meet(self, connection: sa.Connection) -> str | None:
        """The name of a connection's database; None where it cannot be looked at."""
        engine = connection.engine
        dialect = dialect_for(engine)
        if dialect.is_private(engine):
            return self._meet_in_memory(connection)
        identity = dialect.identity(engine) or (None,)
        with self._lock:
            name = self._names.setdefault(identity[0], database_name(engine))
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
        shared = SharedConnection(connection)
        driver = connection.connection.dbapi_connection
        known, name = self._in_memory.get(connection.engine, (None, ""))
        if known is driver:
            self._watches[name].connection = shared
            return name
        name = f"in memory {next(self._numbers)}"
        self._in_memory[connection.engine] = driver, name
        self._add(connection.engine, name, shared)
        return name

    def _add(self, engine: sa.Engine, name: str, connection: LookConnection) -> None:
        watch = self._watches[name] = DatabaseWatch(engine, name, connection, self._note)
        watch.look(DatabaseObservations())

    def sees(self, table: TableName, key: Any) -> bool:
        """Whether a look would show what became of a row."""
        watch = self._watches.get(table.database)
        return watch is not None and watch.sees(table, key)

    def is_keyless(self, table: TableName) -> bool:
        """Whether a table has no primary key."""
        watch = self._watches.get(table.database)
        return watch is not None and table in watch.keyless

    def add_look(self, history: RowHistory, maker: Maker, observed: Observations) -> None:
        """Look, and add what a test or a shared fixture has done to the history."""
        differences = self.look(maker, observed)
        if maker.is_test:
            of_others = partial(history.rows_of_others, maker)
            observed.loaded |= self.rows_read(observed, of_others)
        history.add(maker, differences, observed)

    def look(self, maker: Maker, observed: Observations) -> list[Difference]:
        """What is different since the last look."""
        found: list[Difference] = []
        for name, watch in list(self._watches.items()):
            there = observed.databases.get(name)
            if there is not None:
                watch.users.add(maker)
            elif watch.gone or watch.is_own:
                continue  # one test's own, which no other test uses
            watch.looks_for = maker
            found += watch.look(there or DatabaseObservations())
            if watch.is_own:
                watch.suspend()
        return found

    def rows_read(
        self, observed: Observations, of_others: Callable[[TableName], set[Key]]
    ) -> set[RowKey]:
        """The rows of others that the SELECTs have read."""
        selects: dict[str, list[tuple[str, Any]]] = {}
        for name, sql, parameters in observed.selects.values():
            selects.setdefault(name, []).append((sql, parameters))
        found = (self._watches[name].rows_read(each, of_others) for name, each in selects.items())
        return set().union(*found)

    def changes(self) -> list[DatabaseChange]:
        """What is different from the databases that the audit has met."""
        return list(chain.from_iterable(watch.changes() for watch in self._watches.values()))

    def release(self) -> None:
        """Close all connections: a database may be about to be dropped."""
        for watch in list(self._watches.values()):
            watch.release()

    def close(self) -> None:
        """End the thread and the connections."""
        if not self._watches:
            self._note("no database was met: nobody used SQLAlchemy in this process")
        self.release()
        self._thread.close()

    @property
    def own(self) -> set[str]:
        """The databases that one test alone has made for itself."""
        return {name for name, watch in self._watches.items() if watch.is_own}

    def _note(self, note: str) -> None:
        self.notes[note] = None
