"""Changes until they are committed: of an open transaction, then of a COMMIT under way.

SQLAlchemy's ``commit`` event fires *before* the real COMMIT and nothing fires after it. So the
changes of the transaction wait here for the next thing that happens on the connection, or for
somebody who asks, unless an error said otherwise in between.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.capture.changes import Change, Sink
    from tidyrows.dialects import Dialect

Logged: TypeAlias = "tuple[Change, Sink | None]"
"""A change, and the one sink that it concerns; None where it concerns all."""


class TransactionLog:
    """The changes of the transaction that is open on one connection, by savepoint.

    Attributes:
        changed: whether there are changes.
        targets: real tables resolved in this transaction.
        rewritten: statements under way that were changed, by the id of the statement.
        outermost: the savepoint with which the transaction began, whose RELEASE is its COMMIT.
        mark: of the dialect, since a statement was sent that may have ended the transaction.
    """

    __slots__ = ("_savepoints", "changed", "mark", "outermost", "rewritten", "targets")

    def __init__(self) -> None:
        # names with the changes since; the first is the transaction itself
        self._savepoints: list[tuple[str, list[Logged]]] = [("", [])]
        self.changed = False
        self.targets: dict[Any, Any] = {}
        self.rewritten: dict[int, Any] = {}
        self.outermost: str | None = None
        self.mark: Any | None = None

    def all(self) -> list[Logged]:
        """All changes, in order."""
        changes: list[Logged] = []
        for _name, since in self._savepoints:
            changes += since
        return changes

    def add(self, change: Change, sink: Sink | None) -> None:
        """Add the effect of the newest statement."""
        self._savepoints[-1][1].append((change, sink))
        self.changed = True

    def is_undoable(self) -> bool:
        """Whether a change is to a table that has transactions."""
        return any(change.table.transactional for change, _sink in self.all())

    def restore(self, changes: list[Logged]) -> None:
        """Put back the changes of a COMMIT that failed and left its transaction open."""
        self._savepoints[0][1][:0] = changes
        self.changed = True

    def mark_uncertain(self) -> None:
        """It is not known which of the changes are still part of the transaction."""
        for _name, since in self._savepoints:
            since[:] = [(replace(change, certain=False), sink) for change, sink in since]

    def savepoint(self, name: str) -> None:
        """A savepoint was set."""
        self._savepoints.append((name, []))

    def release(self, name: str) -> None:
        """A savepoint was released: its changes are its parent's now."""
        place = self.find(name)
        if place is not None:
            for _name, since in self._savepoints[place:]:
                self._savepoints[place - 1][1].extend(since)
            del self._savepoints[place:]

    def rollback_to(self, name: str) -> None:
        """A savepoint was rolled back, and every savepoint in it.

        Of a savepoint that was set before capture began it is not known which changes it holds, so
        all changes around it become uncertain.
        """
        place = self.find(name)
        self.targets.clear()  # what SET LOCAL has set since is undone as well
        if place is None:
            place = 1
            self.mark_uncertain()
            self._savepoints[0] = ("", self.all())
        for _name, since in self._savepoints[place:]:
            self._savepoints[place - 1][1].extend(not_undone(since))
        del self._savepoints[place:]

    def clear(self) -> list[Logged]:
        """Remove and return all changes, in order."""
        changes: list[Logged] = []
        for _name, since in self._savepoints:
            changes += since
        self._savepoints = [("", [])]
        self.changed = False
        self.targets.clear()
        self.rewritten.clear()
        self.outermost = None
        self.mark = None
        return changes

    @property
    def in_savepoint(self) -> bool:
        """Whether a savepoint is set."""
        return len(self._savepoints) > 1

    def find(self, name: str) -> int | None:
        """How deep a savepoint is; None where its setting was not seen."""
        for place in range(len(self._savepoints) - 1, 0, -1):
            if self._savepoints[place][0] == name:
                return place
        return None


def not_undone(changes: list[Logged]) -> list[Logged]:
    """Of changes that are rolled back, those that stay: their tables have no transactions."""
    return [logged for logged in changes if not logged[0].table.transactional]


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
        unasked: SQLAlchemy does not know of it: a COMMIT in a string, or DDL that commits.
        prepared: the transaction has left the driver's connection, which cannot tell of it.
        xid: of a prepared transaction, which stays prepared if its COMMIT fails.
        sent: the COMMIT was sent, as the pool saw when the connection came back.
    """

    changes: list[Logged]
    connection: weakref.ref[sa.Connection]
    driver: Any
    server_id: int | None
    unasked: bool = False
    prepared: bool = False
    xid: str | None = None
    sent: bool = False


class PendingCommits:
    """The COMMITs of one engine that were about to be sent, in their order."""

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
        xid: str | None = None,
    ) -> None:
        """A COMMIT is about to be sent."""
        driver, info = connection.connection.dbapi_connection, connection.info
        if _SERVER_ID not in info:
            info[_SERVER_ID] = self._dialect.server_id(driver)
        where = weakref.ref(connection), driver, info[_SERVER_ID]
        with self._lock:
            self.all.append(
                PendingCommit(changes, *where, unasked=unasked, prepared=prepared, xid=xid)
            )

    def pop_finished(
        self, connection: sa.Connection | None = None
    ) -> tuple[list[Logged], list[Logged]]:
        """Take the changes that are committed, and those of which nobody knows, in their order.

        Where something else happens on ``connection``, its COMMIT is over.
        """
        committed: list[Logged] = []
        uncertain: list[Logged] = []
        with self._lock:
            for pending in list(self.all):
                own = pending.connection()
                gone = pending.sent or own is None or own.closed or own.invalidated
                # SQLAlchemy has no transaction once it has the answer to the COMMIT; an error has
                # been handled by then. While its transaction is active, it still tells listeners.
                running: Any = None if gone else own.get_transaction()  # type: ignore[union-attr]
                unheard = pending.unasked or pending.prepared
                if running is None or (own is connection and (unheard or not running.is_active)):
                    self.all.remove(pending)
                    # A commit listener that raises prevents the COMMIT, or an interrupt. An open
                    # transaction may as well be a new one, begun past SQLAlchemy: it is asked then.
                    sent = gone or pending.prepared or not self._dialect.is_begun(pending.driver)
                    (committed if sent else uncertain).extend(pending.changes)
        return committed, uncertain

    def announced(self, connection: sa.Connection) -> PendingCommit | None:
        """The COMMIT that SQLAlchemy still tells its listeners of, before it sends it."""
        running: Any = connection.get_transaction()
        for pending in self.all if running is not None and running.is_active else ():
            if pending.connection() is connection and not (pending.unasked or pending.prepared):
                return pending
        return None

    def pop_failed(self, connection: sa.Connection) -> list[PendingCommit]:
        """Take what was announced on a connection that has raised."""
        with self._lock:
            failed = [pending for pending in self.all if pending.connection() is connection]
            for pending in failed:
                self.all.remove(pending)
        return failed

    def returned(self, driver: Any) -> None:
        """A connection goes back to its pool: its COMMIT has been sent by now, or never will be."""
        with self._lock:
            for pending in list(self.all):
                if pending.driver is driver and not pending.sent:
                    pending.sent = pending.prepared or not self._dialect.is_begun(driver)
                    if not pending.sent:  # the pool rolls it back now
                        self.all.remove(pending)

    def changes(self) -> list[Logged]:
        """What waits here."""
        with self._lock:
            return [change for pending in self.all for change in pending.changes]
