"""Role *locks*: which session blocks another one, and which workers are alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tidyrows.dialects.driver import DriverAccess
from tidyrows.dialects.liveness_lock import PATIENCE, LivenessLock

if TYPE_CHECKING:
    import sqlalchemy as sa

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
        certain: False where the database does not tell, and this is one of the candidates.
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
        parts = [f"pid {self.pid}"]
        if self.user:
            parts.append(f"user {self.user}")
        if self.application:
            parts.append(f"application {self.application!r}")
        if self.host:
            parts.append(f"from {self.host}")
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

    # ----- liveness

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """The lock that shows that a worker is alive, not acquired yet; the default shows nothing.

        Args:
            engine: how to connect, held weakly; none of its pool's connections is used.
            number: the worker's own, random, from 1 to 2**63 - 1.
            patience: how long to wait for the lock where it is not free, in seconds.
        """
        return LivenessLock()

    def is_alive(self, connection: sa.Connection, number: int) -> bool | None:
        """Whether anybody holds this worker's lock now; None where the database cannot tell.

        The lock is not touched. A lost connection is no death: look at the heartbeats too.
        """
        return None

    def heartbeat_file_age(self, connection: sa.Connection, number: int) -> float | None:
        """How many seconds ago this worker's file was touched; None where there is no file.

        Only where :attr:`heartbeat_in_file` is true.
        """
        return None

    def remove_liveness_files(self, connection: sa.Connection) -> None:
        """Delete the lock files of all dead workers, where there are such files."""
