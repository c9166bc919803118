"""COMMITs that were about to be sent, until it is known what became of them.

SQLAlchemy's ``commit`` event fires *before* the real COMMIT and nothing fires after it. So the
changes of the transaction wait here for the next thing that happens on the connection, or for
somebody who asks, unless an error said otherwise in between.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.capture.transaction_log import Logged
    from tidyrows.dialects import Dialect


_SERVER_ID = "tidyrows_server_id"
"""In ``connection.info``, which lives as long as the driver's connection."""


@dataclass(slots=True)
class PendingCommit:
    """A COMMIT that was about to be sent, and the changes that it makes true.

    Attributes:
        changes: what becomes true.
        connection: a weak reference to the SQLAlchemy connection.
        driver: the driver's connection, which knows whether it is still in a transaction.
        server_id: how the server names the connection; once it is lost, the driver does not tell.
        thread: the thread that commits.
        unasked: SQLAlchemy does not know of it: a COMMIT in a string, or DDL that commits.
        prepared: the transaction has left the driver's connection, which cannot tell of it.
        sent: whether the COMMIT was sent at all; None while nobody has looked.
    """

    changes: list[Logged]
    connection: weakref.ref[sa.Connection]
    driver: Any
    server_id: int | None = None
    thread: int = field(default_factory=threading.get_ident)
    unasked: bool = False
    prepared: bool = False
    sent: bool | None = None


class PendingCommits:
    """The COMMITs of one engine that were about to be sent.

    Attributes:
        all: in their order.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.all: list[PendingCommit] = []
        self._lock = threading.RLock()

    def add(
        self,
        connection: sa.Connection,
        changes: list[Logged],
        *,
        unasked: bool = False,
        prepared: bool = False,
    ) -> None:
        """A COMMIT is about to be sent."""
        driver, info = connection.connection.dbapi_connection, connection.info
        if _SERVER_ID not in info:
            info[_SERVER_ID] = self._dialect.server_id(driver)
        pending = PendingCommit(
            changes,
            weakref.ref(connection),
            driver,
            info[_SERVER_ID],
            unasked=unasked,
            prepared=prepared,
        )
        with self._lock:
            self.all.append(pending)

    def pop_finished(
        self, connection: sa.Connection | None = None
    ) -> tuple[list[Logged], list[Logged]]:
        """Take what is over, in the order of the COMMITs: a later one may delete the row.

        Returns:
            The changes that are committed, and those of which nobody knows.
        """
        committed: list[Logged] = []
        uncertain: list[Logged] = []
        with self._lock:
            for pending in list(self.all):
                here = pending.connection() is connection is not None
                if here or self._is_over(pending):
                    self.all.remove(pending)
                    sent = self._was_sent(pending)
                    (committed if sent else uncertain).extend(pending.changes)
        return committed, uncertain

    def pop_failed(self, connection: sa.Connection) -> list[PendingCommit]:
        """Take what was announced on a connection that has raised."""
        with self._lock:
            failed = [a for a in self.all if a.connection() is connection]
            for pending in failed:
                self.all.remove(pending)
        return failed

    def returned(self, driver: Any) -> None:
        """A connection goes back to its pool: its COMMIT has been sent by now, or never will be."""
        with self._lock:
            for pending in list(self.all):
                if pending.driver is driver and pending.sent is None:
                    pending.sent = pending.prepared or not self._dialect.is_begun(driver)
                    if not pending.sent:  # the pool rolls it back now
                        self.all.remove(pending)

    def changes(self) -> list[Logged]:
        """What waits here."""
        with self._lock:
            return [change for pending in self.all for change in pending.changes]

    def _is_over(self, pending: PendingCommit) -> bool:
        connection = pending.connection()
        if pending.sent or connection is None or connection.closed or connection.invalidated:
            return True
        if pending.unasked:
            here = pending.thread == threading.get_ident()
            return here or not self._dialect.is_begun(pending.driver)
        # None once SQLAlchemy has the answer to the COMMIT; an error has been handled by then
        return connection.get_transaction() is None

    def _was_sent(self, pending: PendingCommit) -> bool:
        """Whether the COMMIT was sent: a commit listener that raises prevents it, or an interrupt.

        A transaction that is open now may as well be a new one, begun past SQLAlchemy: then too it
        is better to ask.
        """
        connection = pending.connection()
        if pending.sent or connection is None or connection.closed or connection.invalidated:
            return True
        return pending.prepared or not self._dialect.is_begun(pending.driver)


def driver_of(connection: sa.Connection) -> Any:
    """The DBAPI's connection, which knows whether it is in a transaction."""
    return connection.connection.dbapi_connection
