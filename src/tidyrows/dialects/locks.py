"""Role *locks*: which session blocks another one, and which workers are alive."""

from __future__ import annotations

from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import ref

from tidyrows.dialects.bounds import DriverSocket, connect_within
from tidyrows.dialects.driver import DriverAccess
from tidyrows.errors import LivenessLockError, SessionStateError
from tidyrows.greenlets import sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa


PATIENCE = 1.0
"""Seconds to wait for a lock that is held: the server may still have a connection just lost."""
PAUSE = 0.05
_BOUND = 5.0
"""Seconds that the server may take to answer, before the connection counts as lost."""
# What a child inherited and must never use. It must not be collected either: a driver may then end
# the parent's session on the server.
_inherited: list[Any] = []


class LivenessLock:
    """Shows other processes that a worker is alive; this base class shows nothing.

    All methods are called in one and the same thread, inside SQLAlchemy's greenlet where the
    engine is asynchronous; only ``abandon`` is called in a forked child, by any thread.

    Attributes:
        alone: whether no other process can see the database, so that none can ask either; known
            once ``acquire`` has returned.
    """

    alone: bool = False

    def __init__(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> None:
        self._engine = ref(engine)
        self._where = repr(engine.url)
        self._number = number
        self._patience = patience

    def acquire(self) -> None:
        """Acquire the lock.

        Raises:
            LivenessLockError: somebody else has the lock, after a short wait.
            Exception: the driver's own; no connection is left.
        """

    def renew(self) -> None:
        """Prove that the lock is still held, else acquire it again; bounded in time.

        Raises:
            Exception: as ``acquire``; the next call tries again.
        """

    def release(self) -> None:
        """Release it; may be called again, and raises nothing for a connection that died."""

    def abandon(self) -> None:
        """In a forked child: forget everything, and leave the parent's lock as it is."""

    def _try_within_patience(self, attempt: Callable[[], bool]) -> None:
        for _try in range(1 + round(self._patience / PAUSE)):
            if attempt():
                return
            sleep(PAUSE)
        raise LivenessLockError(self._number, self._where)

    def _living_engine(self) -> sa.Engine:
        engine = self._engine()
        if engine is None:
            raise SessionStateError(
                f"The engine for {self._where} is gone, so this worker can no longer show that it "
                f"is alive. Keep a reference to the engine for as long as its rows are tracked."
            )
        return engine


@dataclass(frozen=True, slots=True, kw_only=True)
class LockStatements:
    """How one kind of server holds a lock for the length of a connection.

    Attributes:
        isolation: of the connection that holds the lock.
        begin: sent first on a new connection; its answer does not matter.
        acquire: a SELECT that is true where the lock is ours now; it never waits.
        is_held: a SELECT on the same connection, true where the lock is still ours.
        is_alive: a SELECT on any connection, true where anybody holds the lock.
        release: where a rollback would not release it.
    """

    isolation: Literal["READ COMMITTED", "AUTOCOMMIT"]
    begin: str | None = None
    acquire: str
    is_held: str
    is_alive: str
    release: str | None = None


class ConnectionLock(LivenessLock):
    """A lock on a connection that comes out of no pool and goes into none; times in seconds."""

    def __init__(
        self,
        engine: sa.Engine,
        number: int,
        statements: LockStatements,
        *,
        patience: float = PATIENCE,
        bound: float = _BOUND,
    ) -> None:
        super().__init__(engine, number, patience=patience)
        self._statements = statements
        self._bound = bound
        self._driver: Any = None
        self._socket = DriverSocket(None)

    def acquire(self) -> None:
        """On a new connection, unless there is one."""
        if self._driver is None:
            self._connect()
        with self._dropped_on_error():
            self._try_within_patience(lambda: self._ask(self._statements.acquire))

    def renew(self) -> None:
        """By a SELECT on the connection that holds it."""
        if self._driver is not None:
            # Whatever it is, a new connection is the answer.
            with suppress(Exception), self._dropped_on_error():
                if self._ask(self._statements.is_held):
                    return
            self._drop()
        self.acquire()

    def release(self) -> None:
        """At once: when this returns, the server knows."""
        if self._driver is None:
            return
        # A connection that is dead holds no lock.
        with suppress(Exception), self._dropped_on_error(), self._socket.bounded(self._bound):
            if self._statements.release is not None:
                self._run(self._statements.release)
            self._driver.rollback()
        driver, self._driver = self._driver, None
        if driver is not None:
            with closing(self._socket), suppress(Exception), self._socket.bounded(self._bound):
                driver.close()

    def abandon(self) -> None:
        """Put nothing in the place of the socket, so that the parent's end is its end."""
        driver, self._driver = self._driver, None
        if driver is None:
            return
        _inherited.append(driver)
        self._socket.redirect_to_null()

    def _connect(self) -> None:
        engine = self._living_engine()
        # The pool's listeners prepare the connection like the project's own. Detached, it holds
        # neither the pool nor the engine.
        pool = engine.pool.recreate()
        proxied = connect_within(pool.connect, self._bound, late=lambda late: late.invalidate())
        self._driver = proxied.dbapi_connection
        self._socket = DriverSocket(self._driver)
        with self._dropped_on_error():
            proxied.detach()
            with self._socket.bounded(self._bound):
                self._driver.rollback()
                engine.dialect.set_isolation_level(self._driver, self._statements.isolation)
                if self._statements.begin is not None:
                    self._run(self._statements.begin)

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _ask(self, question: str) -> bool:
        with self._socket.bounded(self._bound):
            return bool(self._run(question)[0][0])

    def _run(self, sql: str) -> list[Any]:
        with closing(self._driver.cursor()) as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def _drop(self) -> None:
        """Give up a connection of which nothing is known."""
        driver, self._driver = self._driver, None
        if driver is None:
            return
        # First, so that closing does not wait, and a server that was only slow frees the lock.
        self._socket.shut()
        with closing(self._socket), suppress(Exception):
            getattr(driver, "terminate", driver.close)()


_SHOWN = 120
"""How many characters of a statement are shown."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that holds a lock which another one waits for.

    Attributes:
        pid: the server's process or connection id; on SQLite the id of the process.
        user: the database's user.
        application: the connection's own name (PostgreSQL's ``application_name``), or on SQLite
            the command line.
        host: the client's host.
        state: what the session does now, in the database's words.
        seconds: the age of its transaction.
        statement: its current or last statement.
        own: what it is, if it is a session or connection of this very process.
        certain: False where the database does not know, and this is one of the candidates.
    """

    pid: int
    user: str | None = None
    application: str | None = None
    host: str | None = None
    state: str | None = None
    seconds: float | None = None
    statement: str | None = None
    own: str | None = None
    certain: bool = True

    def __str__(self) -> str:
        application = self.application and repr(self.application)
        facts = {"user": self.user, "application": application, "from": self.host}
        parts = [f"pid {self.pid}", *(f"{word} {fact}" for word, fact in facts.items() if fact)]
        state = self.state or ""
        if self.seconds is not None:
            state = f"{state or 'transaction open'} for {self.seconds:.1f} s"
        if state:
            parts.append(state)
        text = ", ".join(parts)
        if self.statement:
            line = " ".join(self.statement.split())
            text += f": {line if len(line) <= _SHOWN else line[: _SHOWN - 3] + '...'}"
        if self.own:
            text = f"{self.own} of this very process ({text}); commit, roll back or close it first"
        return text if self.certain else f"perhaps {text}"


class Locks(DriverAccess):
    """Blockers, and the lock by which other processes see that a worker is alive."""

    has_row_locks: ClassVar[bool] = True
    """Whether a lock on one row leaves other rows free."""
    blockers_need_cursor: ClassVar[bool] = True
    """Whether :meth:`blockers` needs a cursor."""
    heartbeat_in_file: ClassVar[bool] = False
    """Whether a worker's last heartbeat is :meth:`heartbeat_file_age`, not a row of the ledger."""

    # ----- blockers

    def waiter(self, connection: sa.Connection) -> Any:
        """What :meth:`blockers` must know of a connection that may wait; None for nothing to see.

        Asked before the wait, in the connection's own thread.
        """
        return self.server_id(connection.connection.dbapi_connection)

    def blockers(self, cursor: Any, waiter: Any) -> list[Blocker]:
        """The sessions whose locks a connection waits for now.

        Args:
            cursor: of another connection, where ``blockers_need_cursor``.
            waiter: the answer of :meth:`waiter` for the connection that waits.
        """
        return []

    def cancel(self, connection: sa.Connection, waiter: int) -> None:
        """End the statement that a connection of this user waits in; it fails as by a timeout.

        Args:
            connection: another connection.
            waiter: as for :meth:`blockers`.
        """

    # ----- liveness

    def lock_statements(self, number: int) -> LockStatements | None:
        """SQL for a lock that a server holds for the length of a connection; None if it has none.

        It makes :meth:`liveness_lock` and :meth:`is_alive`.
        """
        return None

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """The lock that shows that a worker is alive, not acquired yet; the default shows nothing.

        Args:
            engine: how to connect, held weakly; none of its pool's connections is used.
            number: the worker's own, random, from 1 to 2**63 - 1.
            patience: how long to wait for the lock where it is not free, in seconds.
        """
        statements = self.lock_statements(number)
        if statements is None:
            return LivenessLock(engine, number)
        return ConnectionLock(engine, number, statements, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool | None:
        """Whether anybody holds this worker's lock now; None where the database does not know.

        The lock is not touched. A lost connection is no death: look at the heartbeats too.
        """
        statements = self.lock_statements(number)
        return (
            None if statements is None else bool(self._query(connection, statements.is_alive)[0][0])
        )

    def heartbeat_file_age(self, connection: sa.Connection, number: int) -> float | None:
        """How many seconds ago this worker's file was touched; None where there is no file.

        Only where :attr:`heartbeat_in_file` is true.
        """
        return None

    def remove_liveness_files(self, connection: sa.Connection) -> None:
        """Delete the lock files of all dead workers, where there are such files."""
