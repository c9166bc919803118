"""All databases that the suite uses, and the audit's own connection to each.

An asynchronous driver's connection belongs to a loop, and SQLite's to a thread; and the suite's own
loop runs while it connects for the first time. A thread with its own loop serves them all.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import Future
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.audit.observations import DatabaseObservations
from tidyrows.audit.watch import DatabaseWatch
from tidyrows.dialects import database_name, dialect_for
from tidyrows.execution import INTERNAL
from tidyrows.greenlets import spawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.audit.observations import Observations
    from tidyrows.audit.row_history import Maker
    from tidyrows.audit.tables import Difference
    from tidyrows.audit.watch import LookConnection
    from tidyrows.keys import TableName

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that one look may take."""


class AuditThread:
    """The thread and its loop; a daemon, so that the process can end where a look hangs."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._overdue: Future[Any] | None = None
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        threading.Thread(target=self._serve, name="tidyrows audit", daemon=True).start()

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 -- it is raised where the answer is waited for
                future.set_exception(error)
        self._runner.close()

    def call(self, work: Callable[..., T], *arguments: Any, is_async: bool) -> T:
        """Do the work in the thread, in a greenlet that may await if ``is_async``.

        Raises:
            TimeoutError: it takes too long, or the work before is not done yet.
        """
        if self._overdue is not None and not self._overdue.done():
            raise TimeoutError
        future: Future[T] = Future()
        job = partial(work, *arguments)
        self._queue.put((future, partial(self._await, job) if is_async else job))
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            self._overdue = future
            raise

    def _await(self, work: Callable[[], T]) -> T:
        return self._runner.run(spawn(work))

    def close(self) -> None:
        """End the thread, without waiting for a look that hangs."""
        self._queue.put(None)


class AuditConnection:
    """A connection to the database of an engine, opened as the engine opens its own."""

    def __init__(self, engine: sa.Engine, thread: AuditThread) -> None:
        self._thread = thread
        self._is_async = engine.dialect.is_async
        self._engine = sa.Engine(
            engine.pool.recreate(),
            engine.dialect,
            engine.url,
            hide_parameters=engine.hide_parameters,
            execution_options={INTERNAL: True},
        )
        self._connection: sa.Connection | None = None

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """Do the work with the connection.

        Raises:
            TimeoutError: it takes too long.
            Exception: raised by the work, or by the connection.
        """
        done: T = self._thread.call(self._work, work, is_async=self._is_async)
        return done

    def has_ended(self, error: Exception) -> bool:
        """Another connection is opened then."""
        return False

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._thread.call(self._close, is_async=self._is_async)

    def _work(self, work: Callable[[sa.Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            done = work(self._connection)
            self._connection.rollback()
        except BaseException:
            self._close()
            raise
        return done

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            finally:
                self._engine.dispose()


class SharedConnection:
    """The suite's own connection, where the database is in its memory."""

    def __init__(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        # The connection is returned as it is: the suite's own pool resets it.
        pool = sa.StaticPool(lambda: driver, reset_on_return=None)
        options = {INTERNAL: True}
        self._engine = sa.Engine(
            pool, connection.dialect, connection.engine.url, execution_options=options
        )

    def call(self, work: Callable[[sa.Connection], T]) -> T:
        """Do the work in this thread."""
        with self._engine.connect() as connection:
            return work(connection)

    def has_ended(self, error: Exception) -> bool:
        """Whether the database has ended with its connection."""
        return self._engine.dialect.is_disconnect(error, None, None)  # type: ignore[arg-type]

    def close(self) -> None:
        """Nothing: the connection is the suite's."""


class WatchedDatabases:
    """The databases of a run."""

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        self._thread = AuditThread()
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
            self._watches[name].use_connection(shared)
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

    def look(self, maker: Maker, observed: Observations) -> list[Difference]:
        """What is different since the last look."""
        found: list[Difference] = []
        for name, watch in list(self._watches.items()):
            there = observed.databases.get(name)
            if there is not None:
                self._users.setdefault(name, set()).add(maker)
            elif watch.gone or self._is_own(name, watch):
                continue  # one test's own, which no other test uses
            found += watch.look(there or DatabaseObservations())
            if self._is_own(name, watch):
                watch.suspend()
        return found

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
        return {name for name, watch in self._watches.items() if self._is_own(name, watch)}

    def _is_own(self, name: str, watch: DatabaseWatch) -> bool:
        users = self._users.get(name, set())
        return watch.fresh and len(users) == 1 and next(iter(users)).is_test

    def _note(self, note: str) -> None:
        self.notes[note] = None
