"""The cleanup's own connection; no setting that an earlier user left on it is relied on."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import INTERNAL
from tidyrows.capture.connections import driver_of
from tidyrows.capture.engine import capture_for
from tidyrows.capture.unseen import ignore_driver
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.dialects import DriverSocket, Fault, SilentServerError
from tidyrows.errors import SessionStateError, TakenOverError, TidyRowsError
from tidyrows.greenlets import in_greenlet, spawn, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tidyrows.capture.engine import Capture
    from tidyrows.dialects import Blocker
    from tidyrows.keys import KeyedTable, TableName

_AT_LEAST = 0.2
"""The shortest statement timeout in seconds, also after the deadline: less would end nothing."""
_MARGIN = 0.3
"""Seconds that the server gets to end a statement itself, before its connection is given up."""
_GRACE = 0.4
"""Seconds after the deadline in which a transaction may begin yet: to look, and to record."""
_UNWATCHED: AbstractContextManager[None] = nullcontext()
SPOILED = "tidyrows.spoiled"
"""In ``connection.info``: the connection must not be used again, so the pool drops it."""


class DeadlineError(TidyRowsError):
    """The cleanup's time was over; what was not committed is rolled back."""


class Database:
    """One database that rows are to be deleted from."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        lock_timeout: float,
        statement_timeout: float,
        remaining: Callable[[], float] | None = None,
    ) -> None:
        self.engine = engine
        self.capture = capture_for(engine)
        self.name = self.capture.database
        self.dialect = self.capture.dialect
        self.lock_timeout = lock_timeout
        # the seconds that are left for one more transaction
        self._remaining = remaining or (lambda: statement_timeout)
        self.is_silent = False  # it gave no answer until the deadline: it is asked nothing more
        self.monitor = LockMonitor(engine, self.capture)
        # False once the database cannot check foreign keys: SQLite accepts a foreign key to columns
        # that are not unique, and then refuses every statement that has to check it.
        self.enforced = True

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed another time."""
        return self.dialect.is_transient(error)

    def reason(self, error: BaseException) -> Reason:
        """Why the rows of a transaction that failed with this error stay."""
        fault = self.dialect.fault(error)
        if fault not in {Fault.TRANSIENT, Fault.LOST}:
            return Reason(LeftoverKind.REFUSED, error)
        kind = LeftoverKind.LOCKED if fault is Fault.TRANSIENT else LeftoverKind.DISCONNECTED
        monitor = self.monitor
        return Reason(kind, error, blockers=monitor.recent, trouble=monitor.trouble)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """In the block no transaction waits for a lock, and none is tried again."""
        usual, self.lock_timeout = self.lock_timeout, 0.0
        try:
            yield
        finally:
            self.lock_timeout = usual

    def writing(
        self, *, committed: Callable[[], None] | None = None
    ) -> AbstractContextManager[sa.Connection]:
        """A transaction to delete in: committed at the end, rolled back if anything is raised."""
        begin = partial(self.dialect.begin_cleanup, foreign_keys=self.enforced)
        return self._transaction(begin, committed)

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A transaction to look in; takes no write lock, and waits no longer than the other."""
        return self._transaction(self.dialect.begin_reading, None)

    @contextmanager
    def _transaction(
        self, begin: Callable[..., None], committed: Callable[[], None] | None
    ) -> Iterator[sa.Connection]:
        if isinstance(self.engine.pool, sa.StaticPool):
            self._refuse_shared_transaction(self.engine.pool)
        remaining = self._remaining()
        if self.is_silent or remaining < -_GRACE:
            raise DeadlineError("the cleanup's deadline had passed, so the database was not asked")
        left = max(remaining, _AT_LEAST)
        lock_timeout = min(self.lock_timeout, left)
        try:
            with self.dialect.connect(self.engine, left + _MARGIN) as connection:
                connection.execution_options(**{INTERNAL: True})
                ignore_driver(connection)
                yield from self._inside(connection, begin, committed, lock_timeout, left)
        except SilentServerError:
            self.is_silent = True
            raise

    def _inside(
        self,
        connection: sa.Connection,
        begin: Callable[..., None],
        committed: Callable[[], None] | None,
        lock_timeout: float,
        statement_timeout: float,
    ) -> Iterator[sa.Connection]:
        monitor = self.monitor
        try:
            watching = _UNWATCHED
            if monitor.armed:
                watching = monitor.watching(connection, lock_timeout, self._remaining)
            with watching:
                try:
                    begin(
                        connection, lock_timeout=lock_timeout, statement_timeout=statement_timeout
                    )
                    yield connection
                    # Not ROLLBACK even after reading: that makes psycopg forget every statement
                    # that it has prepared.
                    connection.commit()
                    if committed is not None:
                        committed()
                except BaseException as error:
                    foreign = isinstance(error, SessionStateError)
                    if not foreign or isinstance(error, TakenOverError):
                        self._give_up(connection)  # else another user of it began a transaction
                    raise
                finally:
                    self.dialect.end_cleanup(connection)
        finally:
            if not connection.invalidated and connection.info.get(SPOILED):
                connection.invalidate()

    def existing_inside(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any] | None:
        """Which of these rows exist, inside a transaction that deletes; None if that fails."""
        found: list[Any] | None = None
        # It may have to switch off what hides rows, or fail: neither must outlast the look.
        with suppress(sa.exc.DBAPIError), connection.begin_nested() as look:
            found = self.dialect.existing_keys(connection, table, keys)
            look.rollback()
        return found

    def has_table(self, name: TableName) -> bool:
        """Whether the table still exists; True if that cannot be found out."""
        try:
            with self.reading() as connection:
                return bool(sa.inspect(connection).has_table(name.name, schema=name.schema))
        except (sa.exc.SQLAlchemyError, ConnectionError, DeadlineError):
            return True

    def _refuse_shared_transaction(self, pool: sa.StaticPool) -> None:
        """A StaticPool has one connection for all: giving it back would roll back what they do."""
        if self.dialect.is_begun(pool.connection.dbapi_connection):
            raise SessionStateError(
                f"All users of {self.name} share one connection (StaticPool), and a transaction is "
                f"open on it, which is not tidyrows' to end. Commit or roll back the session or "
                f"connection that began it, then call cleanup() again; all rows stay tracked."
            )

    def _give_up(self, connection: sa.Connection) -> None:
        """Roll back, whatever state a failure has left."""
        try:
            connection.rollback()
            # A COMMIT that failed leaves SQLite's transaction open, which SQLAlchemy does not see;
            # the next user of the pool would commit it.
            if not connection.invalidated:
                connection.connection.rollback()
        except (sa.exc.DBAPIError, self.engine.dialect.loaded_dbapi.Error):
            connection.invalidate()


# -- the transactions that block a cleanup ---------------------------------------------------------

_OFTEN, _SELDOM = 0.05, 1.0
_PATIENCE = 2.0
"""Seconds that a poll under way is waited for at the end; its own time limits are shorter."""


class LockMonitor:
    """Finds the transactions that block a cleanup, on a connection of its own.

    It polls while the cleanup waits: a lock that is released leaves no trace.
    """

    def __init__(self, engine: sa.Engine, capture: Capture) -> None:
        self._engine = engine
        self._capture = capture
        self._found: dict[tuple[int, str | None], Blocker] = {}
        self._recent: dict[tuple[int, str | None], Blocker] = {}
        self.armed = False  # the first attempt does not pay for polls
        self.trouble: Exception | None = None  # why the last poll failed

    @property
    def blockers(self) -> tuple[Blocker, ...]:
        """All blockers of the cleanup."""
        return tuple(self._found.values())

    @property
    def recent(self) -> tuple[Blocker, ...]:
        """The blockers since :meth:`begin`."""
        return tuple(self._recent.values())

    def begin(self) -> None:
        """Other rows are tried now, with other blockers."""
        self._recent = {}
        self.trouble = None

    @contextmanager
    def watching(
        self, connection: sa.Connection, lock_timeout: float, remaining: Callable[[], float]
    ) -> Iterator[None]:
        """In the block, poll for the transactions that block this connection.

        At the end a poll under way is waited for, for as long as remains.
        """
        waiting = self._capture.dialect.waiter(connection)
        if waiting is None:
            yield
            return
        driver = driver_of(connection)
        spare = _SpareConnection(self._engine.pool.recreate())

        def poll() -> None:
            try:
                with spare.use(needed=self._capture.dialect.blockers_need_cursor) as opened:
                    found = self._blockers(driver, waiting, opened)
            except Exception as error:  # noqa: BLE001 -- a listener of the user's may raise anything; it is reported with the blockers
                self.trouble = error
                return
            seen = {(each.pid, None if each.pid else each.state): each for each in found}
            for known in (self._recent, self._found):
                # What was certain once stays so: a later poll may come when the wait is over.
                known.update(
                    {key: each for key, each in seen.items() if each.certain or key not in known}
                )

        every = min(max(lock_timeout / 4, _OFTEN), _SELDOM)
        # In SQLAlchemy's greenlet a task of the running loop, since the connections of an
        # asynchronous driver work nowhere else.
        repeating = _task if in_greenlet() else _thread
        try:
            with repeating(poll, every, lambda: min(max(remaining(), _AT_LEAST), _PATIENCE)):
                yield
        finally:
            spare.give_up()

    def _blockers(
        self, driver: Any, waiting: Any, opened: sa.PoolProxiedConnection | None = None
    ) -> list[Blocker]:
        dialect = self._capture.dialect
        if opened is not None:
            with closing(opened.cursor()) as cursor:
                found = dialect.blockers(cursor, waiting)
            opened.rollback()
        else:
            found = dialect.blockers(None, waiting)
            # asked last: a lock that was found may be the cleanup's own by now
            if dialect.in_transaction(driver):
                return []
        own = self._capture.opened.by_id(driver) if found else {}
        if opened is None:  # whatever else locks its files from here
            own.setdefault(os.getpid(), "another connection")
        return [replace(each, own=own.get(each.pid)) for each in found]


class _SpareConnection:
    """A connection besides the cleanup's, opened at the first poll; its pool may be exhausted."""

    def __init__(self, pool: sa.Pool) -> None:
        self._pool = pool
        self._opened: sa.PoolProxiedConnection | None = None
        self._is_used = self._is_over = False

    @contextmanager
    def use(self, *, needed: bool) -> Iterator[sa.PoolProxiedConnection | None]:
        self._is_used = True
        try:
            if needed and self._opened is None:
                self._opened = self._pool.connect()
            yield self._opened
        finally:
            self._is_used = False
            if self._is_over:
                self._close()

    def give_up(self) -> None:
        """Close it, or end the poll that uses it yet, which closes it then."""
        self._is_over = True
        if not self._is_used:
            self._close()
        elif self._opened is not None:
            with closing(DriverSocket(self._opened.dbapi_connection)) as wire:
                wire.shut()
        self._pool.dispose()

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.invalidate()


@contextmanager
def _thread(
    poll: Callable[[], None], every: float, patience: Callable[[], float]
) -> Iterator[None]:
    """Call ``poll`` every so many seconds beside the block; not at its beginning."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            poll()

    thread = threading.Thread(target=run, name="tidyrows: who blocks the cleanup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience())


@contextmanager
def _task(poll: Callable[[], None], every: float, patience: Callable[[], float]) -> Iterator[None]:
    over = asyncio.Event()

    async def run() -> None:
        while True:
            try:
                await asyncio.wait_for(over.wait(), every)
            except TimeoutError:
                await spawn(poll)
            else:
                return

    task = asyncio.get_running_loop().create_task(run())
    try:
        yield
    finally:
        over.set()
        wait_for(asyncio.wait({task}, timeout=patience()))
