"""What becomes true when: the transactions of one engine, and the changes in them."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture import emptied, raw_sql
from tidyrows.capture.changes import Change, Kind, TransactionLog
from tidyrows.capture.pending_commits import Announced, driver_of
from tidyrows.capture.raw_sql import Move
from tidyrows.dialects import CommitOutcome, Loss
from tidyrows.ledger import journal
from tidyrows.tracking.believing import believe, doubt

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from tidyrows.dialects import Dialect
    from tidyrows.tracking.tracker import ResourceTracker

EVENTS = (
    "begin",
    "commit",
    "rollback",
    "savepoint",
    "release_savepoint",
    "rollback_savepoint",
    "begin_twophase",
    "prepare_twophase",
    "commit_twophase",
    "rollback_twophase",
    "handle_error",
    "reset",
)
"""SQLAlchemy's events that move a transaction; each is a method of :class:`Transactions`."""


class Transactions:
    """The open transactions of one engine's connections.

    Args:
        dialect: what its database does at COMMIT and after an error.
    """

    def __init__(self, dialect: Dialect) -> None:
        # weak, and replaced as a whole: other threads read it without a lock
        self._holders: tuple[weakref.ref[ResourceTracker], ...] = ()
        self._dialect = dialect
        self._logs: weakref.WeakKeyDictionary[sa.Connection, TransactionLog] = (
            weakref.WeakKeyDictionary()
        )
        self._announced = Announced(dialect)
        self._prepared: dict[Any, list[Change]] = {}
        self.attended = False  # somebody will take what no tracker listens for
        self.unanswered: set[int] = set()  # a COMMIT may go on though its client is gone
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def idle(self) -> bool:
        """Whether nobody needs to know; so in a forked child, which owns nothing."""
        if self._pid == os.getpid():
            if self.attended:
                return False
            for ref in self._holders:  # a loop, since every statement asks
                if ref() is not None:
                    return False
        return True

    @property
    def holders(self) -> list[ResourceTracker]:
        """The trackers that may hold rows of this engine, active or not."""
        return [tracker for ref in self._holders if (tracker := ref()) is not None]

    def add_holder(self, tracker: ResourceTracker) -> None:
        """From now on this tracker may hold rows of this engine."""
        with self._lock:
            others = [ref for ref in self._holders if ref() not in (None, tracker)]
            self._holders = (*others, weakref.ref(tracker))

    def forget_parent(self) -> bool:
        """After a fork, drop what was pending: it is the parent's. Whether this was the case."""
        if self._pid == os.getpid():
            return False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._logs = weakref.WeakKeyDictionary()
        self._announced = Announced(self._dialect)
        self._prepared = {}
        self._holders = ()
        return True

    def log(self, connection: sa.Connection) -> TransactionLog:
        """The log of a connection's transaction."""
        log = self._logs.get(connection)
        if log is None:
            with self._lock:
                log = self._logs[connection] = TransactionLog()
        return log

    def add(self, connection: sa.Connection, log: TransactionLog, change: Change) -> None:
        """Note a change; under autocommit it is true already."""
        if not log and self._dialect.in_transaction(driver_of(connection)) is False:
            try:
                journal.enter(connection, [change], self.holders)
            finally:  # the row is there, entered or not
                self._believe([change])
        else:
            log.add(change)

    def enter(self, connection: sa.Connection) -> None:
        """Before a COMMIT, of whatever kind: what the transaction did goes into the ledgers."""
        log = self._logs.get(connection)
        if log and not self._dialect.commit_is_void(connection):
            journal.enter(connection, list(log), self.holders)

    # -- transactions --------------------------------------------------------------------------

    def begin(self, connection: sa.Connection) -> None:
        """A transaction begins: whatever was announced on this connection is over."""
        if not self.idle:
            self.settle_on(connection)
            log = self._logs.get(connection)
            if log and self._dialect.in_transaction(driver_of(connection)):
                return  # a COMMIT failed and left its transaction open: SQLAlchemy does not know
            with self._lock:
                self._logs.pop(connection, None)
            if log is not None and log.rewritten:
                # the INSERT that begins this transaction was rewritten before it began
                self.log(connection).rewritten = log.rewritten

    def begin_twophase(self, connection: sa.Connection, _xid: Any) -> None:
        """A two-phase transaction begins."""
        self.begin(connection)

    def commit(self, connection: sa.Connection) -> None:
        """A COMMIT is about to be sent."""
        if self.idle:
            return
        self.settle_on(connection)
        log = self._logs.get(connection)
        if not log:
            return
        if self._dialect.commit_is_void(connection):
            log.take()  # nothing will be persisted, and no error will say so
            return
        # Said before the COMMIT, in the caller's own call: later nobody may ask. Where warnings are
        # errors it is not sent, and the rows can be rolled back.
        for owner, table in {
            (change.owner, change.table)
            for change in log
            if change.owner is not None and not change.owner.active
        }:
            owner.say_late(table)
        self.enter(connection)
        self._announced.add(connection, log.take())

    def commit_unasked(self, connection: sa.Connection) -> None:
        """A statement commits, and SQLAlchemy does not know: COMMIT in a string, or DDL."""
        self.settle_on(connection)
        log = self._logs.get(connection)
        if log:
            self._announced.add(connection, log.take(), unasked=True)

    def rollback(self, connection: sa.Connection) -> None:
        """A ROLLBACK is about to be sent."""
        if self.idle:
            return
        self.settle_on(connection)
        log = self._logs.get(connection)
        if not log:
            return
        changes = log.take()
        if connection.invalidated or connection.closed:
            return  # the connection is gone, and its transaction with it
        if self._dialect.in_transaction(driver_of(connection)) is False:
            self._doubt(changes)  # somebody ended the transaction behind SQLAlchemy's back

    def savepoint(self, connection: sa.Connection, name: str | None) -> None:
        """A savepoint is about to be set."""
        if self.idle:
            return
        self.settle_on(connection)
        if name is None:  # SQLAlchemy names it right after this event, by this counter
            name = f"sa_savepoint_{connection._Connection__savepoint_seq + 1}"  # type: ignore[attr-defined]  # noqa: SLF001 -- the event does not tell the name
        self._savepoint(connection, name)

    def _savepoint(self, connection: sa.Connection, name: str) -> None:
        begun = self._dialect.in_transaction(driver_of(connection)) is not False
        log = self.log(connection)
        if self._dialect.release_commits and not begun:
            log.outermost = name
        log.savepoint(name)

    def _release(self, connection: sa.Connection, name: str) -> None:
        """A RELEASE is about to be sent; on SQLite it may be a COMMIT."""
        log = self.log(connection)
        if self._dialect.release_commits and (log.outermost == name or not log.knows(name)):
            self.enter(connection)
        log.release(name)
        log.release_unsure = True

    def release_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        """A savepoint is about to be released."""
        if self.idle:
            return
        self.settle_on(connection)
        self._release(connection, name)

    def rollback_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        """A savepoint is about to be rolled back."""
        if self.idle:
            return
        self.settle_on(connection)
        self.log(connection).rollback_to(name)

    def move(self, connection: sa.Connection, move: Move, name: str) -> None:
        """A raw statement moves the transaction; it is about to be sent."""
        log = self.log(connection)
        log.targets.clear()  # SET LOCAL ends with what it was set in
        if move in _MAY_COMMIT or (move is Move.BEGIN and self._dialect.ddl_commits):
            self.enter(connection)
        if move is Move.COMMIT or (move is Move.BEGIN and self._dialect.ddl_commits):
            self.commit_unasked(connection)
        elif move is Move.SAVEPOINT:
            self._savepoint(connection, name)
        elif move is Move.RELEASE:
            self._release(connection, name)
        elif move is Move.ROLLBACK_TO:
            log.rollback_to(name)
        elif move is Move.ROLLBACK:
            log.take()  # if it fails, the connection is lost, and the transaction with it
        elif move is Move.UNCLEAR:
            self._doubt(log.take())  # it may have been a COMMIT, whatever SQLAlchemy does next

    def empty(self, connection: sa.Connection, execution: Any, sql: str) -> None:
        """A raw statement is about to delete all rows of tables: tracked ones are tracked no more.

        What is inserted under their keys afterwards may be somebody else's.
        """
        names, with_kin = raw_sql.emptied_tables(sql)
        if not names:
            return
        log = self.log(connection)
        rows = [(change.table, change.keys) for change in log if change.kind is Kind.INSERTED]
        for holder in self.holders:
            rows += [(held.table, held.keys.in_order()) for held in holder.snapshot()]
        gone = emptied.emptied_of([table for table, _keys in rows], names, with_kin=with_kin)
        changes = [
            Change(Kind.DELETED, table, list(keys))
            for table, keys in rows
            if keys and table.key_columns and table.name in gone
        ]
        log.emptied = execution, changes

    def prepare_twophase(self, connection: sa.Connection, xid: Any) -> None:
        """The first phase: nothing is true yet, and another connection may commit it."""
        if not self.idle:
            self.enter(connection)
            log = self._logs.get(connection)
            if log:
                self._prepared[xid] = log.take()

    def commit_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:
        """The second phase is about to be sent."""
        if self.idle:
            return
        log = self._logs.get(connection)
        changes = self._prepared.pop(xid, [])
        if log:
            self.enter(connection)
            void = self._dialect.commit_is_void(connection)
            changes += [] if void else log.take()
        if changes:
            self._announced.add(connection, changes, prepared=True)

    def rollback_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:
        """A two-phase transaction is about to be rolled back."""
        if self.idle:
            return
        self._prepared.pop(xid, None)
        log = self._logs.get(connection)
        if log:
            log.take()

    def handle_error(self, context: Any) -> None:
        """A statement or a COMMIT has failed."""
        connection = context.connection
        if connection is None or self.idle:
            return
        error = context.sqlalchemy_exception or context.original_exception
        lost = context.is_disconnect
        announced = self._announced.take_failed(connection)
        for announcement in announced:
            # of a COMMIT in a string nobody knows whether it is this very statement that failed
            unknown = lost or announcement.unasked
            outcome = (
                CommitOutcome.DOUBT if unknown else self._dialect.commit_outcome(error, connection)
            )
            if outcome is CommitOutcome.OPEN:
                self.log(connection).restore(announcement.changes)
            elif outcome is CommitOutcome.DOUBT:
                if announcement.server_id is not None:
                    self.unanswered.add(announcement.server_id)
                self._doubt(announcement.changes)
        log = self.log(connection)
        log.failed(context.execution_context)
        if announced or not log:
            return
        driver = None if connection.invalidated else driver_of(connection)
        loss = Loss.EVERYTHING if lost else self._dialect.loss(error, driver)
        if loss is Loss.EVERYTHING:
            log.take()
        elif loss is Loss.DOUBT:
            for change in log:
                change.certain = False

    # -- believing -----------------------------------------------------------------------------

    def settle_on(self, connection: sa.Connection) -> None:
        """Something happens on this connection, so what was announced on it is over."""
        if self._announced:
            self._settle_announced(connection)
        log = self._logs.get(connection)
        if log is not None and log.emptied is not None:
            (_execution, changes), log.emptied = log.emptied, None
            for change in changes:
                self.add(connection, log, change)
        if log is not None and log.release_unsure:
            self._settle_release(connection, log)

    def _settle_announced(self, connection: sa.Connection | None = None) -> None:
        committed, unsure = self._announced.take_over(connection)
        self._doubt(unsure)
        self._believe(committed)

    def reset(self, driver: Any, _record: Any, _state: Any) -> None:
        """A connection goes back to its pool."""
        if self._announced and self._pid == os.getpid():
            self._announced.returned(driver)

    def _settle_release(self, connection: sa.Connection, log: TransactionLog) -> None:
        """On SQLite the release of the outermost savepoint commits where no BEGIN came before."""
        if connection.closed or connection.invalidated:
            log.release_unsure = False
        elif self._dialect.in_transaction(driver_of(connection)) is False:
            log.release_unsure = False
            self._believe(log.take())

    def settle(self) -> None:
        """Believe every announced COMMIT that is over, whoever sent it."""
        if self._pid != os.getpid():
            return
        with self._lock:
            logs = list(self._logs.items())
        for connection, log in logs:
            if log.release_unsure:
                self._settle_release(connection, log)
        if self._announced:
            self._settle_announced()

    def _believe(self, changes: list[Change]) -> None:
        believe(changes, self.holders)
        for each in _books_of(changes):  # afterwards: an entry that counts has its rows held
            each.confirm(changes)

    def _doubt(self, changes: list[Change]) -> None:
        for each in _books_of(changes):
            each.doubt(changes)
        doubt(changes, self.holders)

    def pending(self, owner: ResourceTracker) -> Iterator[Change]:
        """What this tracker's transactions have inserted and not committed."""
        with self._lock:
            logs = list(self._logs.values())
        for log in logs:
            yield from (change for change in log if change.owner is owner)
        yield from (change for change in self._announced.changes() if change.owner is owner)


_MAY_COMMIT = frozenset({Move.COMMIT, Move.UNCLEAR})


def _books_of(changes: list[Change]) -> set[journal.Book]:
    return {each for change in changes for each, _seq in change.entries}
