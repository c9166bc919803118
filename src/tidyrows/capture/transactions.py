"""The transactions of one engine: what they changed, and when it becomes true."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Change, Deleted, Inserted, Noted, Touched, Untracked
from tidyrows.capture.connections import driver_of
from tidyrows.capture.transaction_log import PendingCommits, TransactionLog, not_undone
from tidyrows.capture.unseen import UnseenInserts
from tidyrows.dialects import CommitOutcome, Loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Sink
    from tidyrows.capture.ownership import EngineSinks
    from tidyrows.capture.transaction_log import Logged, PendingCommit
    from tidyrows.dialects import Dialect

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
"""SQLAlchemy's events of a transaction; each is a method of :class:`Transactions`."""

LOG = "_tidyrows_log"
"""The attribute of a SQLAlchemy connection that has the log of its transaction."""


class Transactions:
    """The open transactions of one engine's connections."""

    def __init__(self, dialect: Dialect, sinks: EngineSinks) -> None:
        self._sinks = sinks
        self._dialect = dialect
        self.logs: weakref.WeakKeyDictionary[sa.Connection, TransactionLog] = (
            weakref.WeakKeyDictionary()
        )
        self.pending = PendingCommits(dialect)
        self.prepared: dict[str, list[Logged]] = {}  # by the transaction's id
        self.unseen = UnseenInserts(dialect, sinks, self.changes_of)
        self.unanswered: set[int] = set()  # a COMMIT may go on though its client is gone
        self._lock = threading.RLock()

    def forget_parent(self) -> None:
        """In a forked child, drop what was pending: it is the parent's."""
        self._lock = threading.RLock()
        for connection in list(self.logs):
            setattr(connection, LOG, None)
        self.logs.clear()
        self.pending = PendingCommits(self._dialect)
        self.prepared.clear()
        self.unseen.uses.clear()

    def log(self, connection: sa.Connection) -> TransactionLog:
        """The log of a connection's transaction."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is None:
            with self._lock:
                log = self.logs[connection] = TransactionLog()
            setattr(connection, LOG, log)
        return log

    def add(
        self,
        connection: sa.Connection,
        log: TransactionLog,
        change: Change,
        sink: Sink | None = None,
    ) -> None:
        """Log a change of one sink, or of all; under autocommit it is committed already."""
        announced = self.pending.announced(connection) if self.pending.all else None
        if announced is not None:  # by a commit listener that comes after this one
            if log.in_savepoint:  # its rollback would come too late
                change = replace(change, certain=False)
            announced.changes.append((change, sink))
            self._unlogged(connection, change)
            self._before_commit(connection, [(change, sink)])
            return
        if (
            not log.changed
            and change.table.transactional
            and self._dialect.in_transaction(connection.connection.dbapi_connection) is False
        ):
            self._unlogged(connection, change)
            try:
                self._before_commit(connection, [(change, sink)])
            finally:  # the row is there, whatever a sink could write of it
                self._apply([(change, sink)])
        else:
            log.add(change, sink)

    def _clear(self, connection: sa.Connection, log: TransactionLog) -> list[Logged]:
        """Empty the log of a transaction that has ended, or ends now."""
        changes = log.clear()
        if self.unseen.uses and not (connection.invalidated or connection.closed):
            self._unlogged(connection, *[change for change, _sink in changes])
        return changes

    def _unlogged(self, connection: sa.Connection, *changes: Change) -> None:
        """Changes that capture has seen are not in the log, or no longer."""
        if self.unseen.uses:
            self.unseen.unlogged(connection, changes)

    def before_commit(self, connection: sa.Connection) -> None:
        """A COMMIT of whatever kind is about to be sent."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        written = log is not None and log.changed and not self._dialect.commit_is_void(connection)
        if self.unseen.uses:  # its question may begin a transaction
            self.unseen.before_commit(connection)
        if log is not None and written:
            self._before_commit(connection, log.all())

    def _before_commit(self, connection: sa.Connection, changes: list[Logged]) -> None:
        for sink, own in self._by_sink(changes):
            sink.before_commit(connection, own)

    def _by_sink(self, changes: list[Logged]) -> list[tuple[Sink, list[Change]]]:
        """The changes that concern each sink."""
        parts: list[tuple[Sink, list[Change]]] = []
        for ref in self._sinks.references:
            sink = ref()
            if sink is not None:
                own = []
                for change, owner in changes:
                    if owner is None or owner is sink:
                        own.append(change)
                if own:
                    parts.append((sink, own))
        return parts

    # -- transactions --------------------------------------------------------------------------

    def begin(self, connection: sa.Connection, _xid: Any = None) -> None:
        """A transaction begins: the COMMIT before it on this connection is over."""
        if not self._sinks.idle:
            if self.pending.all:
                self.resolve(connection)
            if self.unseen.uses:
                self.unseen.begun(connection)
            log: TransactionLog | None = getattr(connection, LOG, None)
            if log is None:
                return
            if log.changed and self._dialect.in_transaction(driver_of(connection)):
                return  # a COMMIT failed and left its transaction open: SQLAlchemy does not know
            # the INSERT that begins this transaction was rewritten before it began
            rewritten, log.rewritten = log.rewritten, {}
            log.clear()
            log.rewritten = rewritten

    begin_twophase = begin

    def commit(self, connection: sa.Connection) -> None:
        """A COMMIT is about to be sent."""
        if self._sinks.idle:
            return
        if self.pending.all:
            self.resolve(connection)
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is not None and log.changed:
            if log.mark is not None:
                self.look(connection)
            void = self._dialect.commit_is_void(connection)
            if void is not False and (void or log.is_undoable()):  # and no error will say so
                outcome = CommitOutcome.GONE if void else CommitOutcome.UNKNOWN
                self._ended(connection, log, outcome)
        if self.unseen.uses:  # its question may begin a transaction
            self.unseen.before_commit(connection)
        if log is None or not log.changed:
            return
        changes = log.all()
        for _change, sink in changes:
            if sink is not None and not sink.active:
                self._warn_late(changes)
                break
        self._before_commit(connection, changes)
        self.pending.add(connection, self._clear(connection, log))

    def _warn_late(self, changes: list[Logged]) -> None:
        """Warn before the COMMIT, in the caller's own call: later nobody may ask."""
        warned = set()
        for change, sink in changes:
            if sink is None or sink.active or isinstance(change, Noted):
                continue
            if (sink, change.table) not in warned:
                warned.add((sink, change.table))
                sink.warn_late(change.table)

    def commit_unasked(self, connection: sa.Connection) -> None:
        """A COMMIT in a string, of which SQLAlchemy does not know."""
        self.resolve(connection)
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is not None and log.changed:
            self.pending.add(connection, self._clear(connection, log), unasked=True)

    def rollback(self, connection: sa.Connection) -> None:
        """A ROLLBACK is about to be sent."""
        self.look(connection)
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is not None and log.changed:
            self._apply(not_undone(self._clear(connection, log)))
        if self.unseen.uses:
            self.unseen.begun(connection)

    # -- what ends a transaction past SQLAlchemy -----------------------------------------------

    def mark(self, connection: sa.Connection) -> None:
        """A statement that may end the transaction is about to be sent; :meth:`look` asks then."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is None or not log.changed or self._dialect.commit_is_void(connection):
            return
        self._before_commit(connection, log.all())
        log.mark = self._dialect.mark_transaction(connection)
        if log.mark is None:
            self._apply(self._clear(connection, log), certain=False)

    def look(self, connection: sa.Connection) -> None:
        """Notice where a transaction was ended by a statement, or past SQLAlchemy."""
        if self.pending.all or self.unseen.late:
            self.resolve(connection)
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is None or not log.changed:
            return
        is_gone = connection.invalidated or connection.closed
        driver = None if is_gone else driver_of(connection)
        if log.mark is not None:
            mark, log.mark = log.mark, None
            outcome = CommitOutcome.UNKNOWN
            if driver is not None:
                outcome = self._dialect.marked_outcome(connection, mark)
            self._ended(connection, log, outcome)
        elif driver is None:
            return
        elif self._dialect.in_transaction(driver) is False and log.is_undoable():
            self._ended(connection, log, CommitOutcome.UNKNOWN)

    def _ended(
        self, connection: sa.Connection, log: TransactionLog, outcome: CommitOutcome
    ) -> None:
        if outcome is CommitOutcome.OPEN:
            return
        changes = self._clear(connection, log)
        if outcome is not CommitOutcome.COMMITTED:
            kept = not_undone(changes)
            if outcome is CommitOutcome.UNKNOWN:
                undoable = [each for each in changes if each[0].table.transactional]
                self._apply(undoable, certain=False)
            changes = kept
        self._apply(changes)

    # -- savepoints, and transactions in two phases --------------------------------------------

    def savepoint(self, connection: sa.Connection, name: str | None) -> None:
        """A savepoint is about to be set."""
        if self._sinks.idle:
            return
        self.look(connection)
        if name is None:  # SQLAlchemy names it right after this event, by this counter
            name = f"sa_savepoint_{connection._Connection__savepoint_seq + 1}"  # type: ignore[attr-defined]  # noqa: SLF001 -- the event does not tell the name
        begun = self._dialect.in_transaction(driver_of(connection)) is not False
        log = self.log(connection)
        if self.unseen.uses:
            self.unseen.savepoint(connection)
        if self._dialect.release_commits and not begun:
            log.outermost = name
        log.savepoint(name)

    def release_savepoint(
        self, connection: sa.Connection, name: str, _context: None = None
    ) -> None:
        """A RELEASE is about to be sent; on SQLite it may be a COMMIT."""
        if self._sinks.idle:
            return
        self.look(connection)
        log = self.log(connection)
        if self._dialect.release_commits and (log.outermost == name or log.find(name) is None):
            self.before_commit(connection)
        log.release(name)

    def released(self, connection: sa.Connection) -> None:
        """On SQLite the release of the outermost savepoint commits where no BEGIN came before."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is not None and self._dialect.in_transaction(driver_of(connection)) is False:
            self._apply(self._clear(connection, log))

    def rollback_savepoint(
        self, connection: sa.Connection, name: str, _context: None = None
    ) -> None:
        """A savepoint is about to be rolled back."""
        if self.unseen.uses:
            self.unseen.rollback_savepoint(connection)
        self.look(connection)
        self.log(connection).rollback_to(name)

    def prepare_twophase(self, connection: sa.Connection, xid: Any) -> None:
        """The first phase: nothing is true yet, and another connection may commit it."""
        self.before_commit(connection)
        self.keep_prepared(connection, xid)

    def keep_prepared(self, connection: sa.Connection, xid: Any) -> None:
        """As ``prepare_twophase``, where no statement can be sent any more."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        if log is not None and log.changed:
            self.prepared[str(xid)] = self._clear(connection, log)

    def commit_twophase(self, connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
        """The second phase is about to be sent."""
        log: TransactionLog | None = getattr(connection, LOG, None)
        changes = self.prepared.pop(str(xid), [])
        if log is not None and log.changed:
            self.before_commit(connection)
            void = self._dialect.commit_is_void(connection)
            changes += [] if void else self._clear(connection, log)
        if changes:
            self._warn_late(changes)
            kept = str(xid) if is_prepared else None
            self.pending.add(connection, changes, prepared=True, xid=kept)

    def rollback_twophase(self, connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
        """A two-phase transaction is about to be rolled back."""
        if is_prepared and (connection.invalidated or connection.closed):
            return  # nothing is sent, and it outlives its connection
        changes = self.prepared.pop(str(xid), [])
        changes += self._clear(connection, self.log(connection))
        self._apply(not_undone(changes))

    def settle(self, xid: str) -> None:
        """A prepared transaction was committed or rolled back elsewhere: nobody knows which."""
        self._apply(self.prepared.pop(xid, []), certain=False)

    def handle_error(self, context: Any) -> None:
        """A statement, a COMMIT or an attempt to connect has failed."""
        error = context.sqlalchemy_exception or context.original_exception
        if context.connection is None:
            self._dialect.explain_first_connection(error, context.engine)
        elif not self._sinks.idle:
            self._failed(context.connection, error, lost=context.is_disconnect)

    def _failed(self, connection: sa.Connection, error: Any, *, lost: bool) -> None:
        failed = self.pending.pop_failed(connection)
        for pending in failed:
            if pending.xid is not None:  # it is prepared yet, or it is not: the server knows
                self.prepared[pending.xid] = pending.changes
            else:
                self._commit_failed(connection, pending, None if lost else error)
        if self.unseen.uses and not connection.invalidated:
            self.unseen.failed(connection)
        log = self.log(connection)
        if log.mark is not None:  # what failed may have ended the transaction before
            self.look(connection)
        if failed or not log.changed:
            return
        driver = None if connection.invalidated else driver_of(connection)
        loss = Loss.EVERYTHING if lost else self._dialect.loss(error, driver)
        if loss is Loss.EVERYTHING:
            self._apply(not_undone(self._clear(connection, log)))
        elif loss is Loss.UNKNOWN:
            log.mark_uncertain()

    def _commit_failed(
        self, connection: sa.Connection, pending: PendingCommit, error: BaseException | None
    ) -> None:
        """A COMMIT has failed; without an error its answer was lost."""
        outcome = CommitOutcome.UNKNOWN
        if error is not None and not pending.unasked:  # a string may have committed before
            outcome = self._dialect.commit_outcome(error, connection)
        if outcome is CommitOutcome.OPEN:
            self.log(connection).restore(pending.changes)
            self.unseen.rollback_savepoint(connection)  # compare from the next statement on
        elif outcome is CommitOutcome.UNKNOWN:
            if pending.server_id is not None:
                self.unanswered.add(pending.server_id)
            self._apply(pending.changes, certain=False)

    # -- what has become true ------------------------------------------------------------------

    def resolve(self, connection: sa.Connection | None = None) -> None:
        """Apply the changes of every COMMIT that is over: on ``connection``, whatever was sent."""
        if self.pending.all:
            committed, uncertain = self.pending.pop_finished(connection)
            if uncertain:
                self._apply(uncertain, certain=False)
            self._apply(committed)
        if self.unseen.late:
            self.unseen.warn_late()

    def reset(self, driver: Any, record: Any, _state: Any) -> None:
        """A connection goes back to its pool."""
        if self.pending.all:
            self.pending.returned(driver)
        if self.unseen.uses:
            self.unseen.returned(driver, record)

    def _apply(self, changes: list[Logged], *, certain: bool = True) -> None:
        """Let the sinks hear of changes that are committed, or of which that is not known."""
        if not changes:
            return
        sinks = list(self._sinks)
        for change, owner in changes:
            if isinstance(change, Noted):
                self._note(owner, change, sinks, certain=certain)
                continue
            rest = change
            for sink in sinks if owner is None else (owner,):
                rest = sink.apply(rest) if certain else sink.mark_uncertain(rest)
            if certain and len(sinks) > 1 and owner is not None and type(change) is Inserted:
                may_come_again = self._dialect.reuses_keys or not change.generated
                for other in sinks if may_come_again else ():
                    if other is not owner and other.holds(change.table.name):
                        # Its row was deleted unseen: no key is free before that.
                        former = other.held_keys(change.table.name, change.keys)
                        other.apply(Deleted(change.table, former))
        for sink, own in self._by_sink(changes):
            sink.after_commit(own, certain=certain)

    def _note(
        self, owner: Sink | None, change: Noted, sinks: Sequence[Sink], *, certain: bool
    ) -> None:
        if isinstance(change, Untracked) and owner is not None:
            owner.note_untracked(change)
        elif isinstance(change, Touched) and owner is not None and certain:
            # of what may not have happened nobody is told
            for watcher in dict.fromkeys((owner, *self._sinks.observers)):
                _tell_watcher(watcher, change, sinks)

    def changes_of(self, record: Any) -> Iterator[Change]:
        """What is not committed on the connection of an entry of the pool."""
        with self._lock:
            logs = list(self.logs.items())
        for connection, log in logs:
            if not (connection.closed or connection.invalidated):
                fairy: Any = connection.connection
                if fairy._connection_record is record:  # noqa: SLF001 -- no public name
                    yield from (change for change, _sink in log.all())

    def uncommitted(self, sink: Sink) -> Iterator[Change]:
        """What has been done for a sink and is not committed."""
        with self._lock:
            logs = list(self.logs.values())
        for changes in (*(log.all() for log in logs), self.pending.changes()):
            for change, owner in changes:
                if owner is sink and not isinstance(change, Noted):
                    yield change


def _tell_watcher(watcher: Sink, touched: Touched, sinks: Sequence[Sink]) -> None:
    """Tell a sink that watches of the rows that are not its own, nor those of a block within its.

    What wider fixtures do to each other's rows, and when they are torn down, is their own affair.
    """
    name = touched.table.name
    own = [sink for sink in sinks if sink is watcher or watcher.is_shared or not sink.is_shared]
    keys = set(touched.keys)
    for sink in own:
        keys.difference_update(sink.held_keys(name, touched.keys))
    if touched.keys:  # its own are there, so they are the first that were touched
        count = min(touched.count - len(set(touched.keys)) + len(keys), len(keys))
    else:  # the statement does not say which: as many as cannot be its own
        count = touched.count - sum(sink.count_of(name) for sink in own)
    if count > 0:
        watcher.apply(replace(touched, keys=sorted(keys, key=repr), count=count))
