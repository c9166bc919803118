"""The transactions of one engine: what they changed, and when it becomes true."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture import raw_sql
from tidyrows.capture.changes import Change, Deleted, Inserted, Touched
from tidyrows.capture.pending_commits import PendingCommits, driver_of
from tidyrows.capture.raw_sql import Move
from tidyrows.capture.sink import tell_watcher
from tidyrows.capture.transaction_log import TransactionLog
from tidyrows.dialects import CommitOutcome, Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from tidyrows.capture.sink import Sink
    from tidyrows.capture.transaction_log import Logged
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


class Transactions:
    """The open transactions of one engine's connections."""

    def __init__(self, dialect: Dialect) -> None:
        # weak, and replaced as a whole: other threads read it without a lock
        self._sinks: tuple[weakref.ref[Sink], ...] = ()
        self.idle = True  # nobody needs to know; so in a forked child, which owns nothing
        self.unresolved = False  # something on a connection may be over, and has to be looked at
        self._dialect = dialect
        self._logs: weakref.WeakKeyDictionary[sa.Connection, TransactionLog] = (
            weakref.WeakKeyDictionary()
        )
        self._pending = PendingCommits(dialect)
        self._prepared: dict[Any, list[Logged]] = {}
        self._has_fallback = False
        self.unanswered: set[int] = set()  # a COMMIT may go on though its client is gone
        self._lock = threading.RLock()

    def set_fallback(self, *, exists: bool) -> None:
        """A sink owns what no other sink does, or does no longer."""
        self._has_fallback = exists
        self.forget_sink(None)

    def forget_sink(self, dead: weakref.ref[Sink] | None) -> None:
        """A sink is garbage."""
        self._sinks = tuple(ref for ref in self._sinks if ref is not dead)
        self.idle = not (self._sinks or self._has_fallback)

    @property
    def sinks(self) -> list[Sink]:
        """The sinks that may hold rows of this engine, active or not."""
        return [sink for ref in self._sinks if (sink := ref()) is not None]

    def add_sink(self, sink: Sink) -> None:
        """From now on this sink may hold rows of this engine."""
        with self._lock:
            others = [ref for ref in self._sinks if ref() not in (None, sink)]
            self._sinks = (*others, weakref.ref(sink, _forgetter(self)))
            self.idle = False

    def forget_parent(self) -> None:
        """In a forked child, drop what was pending: it is the parent's."""
        self.idle, self.unresolved = True, False
        self._lock = threading.RLock()
        self._logs = weakref.WeakKeyDictionary()
        self._pending = PendingCommits(self._dialect)
        self._prepared = {}
        self._sinks = ()

    def log(self, connection: sa.Connection) -> TransactionLog:
        """The log of a connection's transaction."""
        log = self._logs.get(connection)
        if log is None:
            with self._lock:
                log = self._logs[connection] = TransactionLog()
        return log

    def add(
        self,
        connection: sa.Connection,
        log: TransactionLog,
        change: Change,
        sink: Sink | None = None,
    ) -> None:
        """Log a change of one sink, or of all; under autocommit it is committed already."""
        driver = connection.connection.dbapi_connection
        if not log.changed and self._dialect.in_transaction(driver) is False:
            try:
                self._before_commit(connection, [(change, sink)])
            finally:  # the row is there, whatever a sink could write of it
                self._apply([(change, sink)])
        else:
            log.add(change, sink)

    def before_commit(self, connection: sa.Connection) -> None:
        """A COMMIT of whatever kind is about to be sent."""
        log = self._logs.get(connection)
        if log is not None and log.changed and not self._dialect.commit_is_void(connection):
            self._before_commit(connection, log.all())

    def _before_commit(self, connection: sa.Connection, changes: list[Logged]) -> None:
        for sink, own in self._by_sink(changes):
            sink.before_commit(connection, own)

    def _by_sink(self, changes: list[Logged]) -> list[tuple[Sink, list[Change]]]:
        """The changes that concern each sink."""
        parts: list[tuple[Sink, list[Change]]] = []
        for ref in self._sinks:
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
        if not self.idle:
            if self.unresolved:
                self.resolve_on(connection)
            log = self._logs.get(connection)
            if log is None:
                return
            if log.changed and self._dialect.in_transaction(driver_of(connection)):
                return  # a COMMIT failed and left its transaction open: SQLAlchemy does not know
            with self._lock:
                self._logs.pop(connection, None)
            if log.rewritten:
                # the INSERT that begins this transaction was rewritten before it began
                self.log(connection).rewritten = log.rewritten

    begin_twophase = begin

    def commit(self, connection: sa.Connection) -> None:
        """A COMMIT is about to be sent."""
        if self.idle:
            return
        if self.unresolved:
            self.resolve_on(connection)
        log = self._logs.get(connection)
        if log is None or not log.changed:
            return
        if self._dialect.commit_is_void(connection):
            log.clear()  # nothing will be persisted, and no error will say so
            return
        # Warned of before the COMMIT, in the caller's own call: later nobody may ask. Where
        # warnings are errors it is not sent, and the rows can be rolled back.
        changes = log.all()
        warned = set()
        for change, sink in changes:
            if sink is None or sink.active or isinstance(change, Touched):
                continue
            if (sink, change.table) not in warned:
                warned.add((sink, change.table))
                sink.warn_late(change.table)
        self._before_commit(connection, changes)
        self._pending.add(connection, log.clear())
        with self._lock:  # as _mark_unresolved()
            self.unresolved = True

    def commit_unasked(self, connection: sa.Connection) -> None:
        """A statement commits, and SQLAlchemy does not know: COMMIT in a string, or DDL."""
        self.resolve_on(connection)
        log = self._logs.get(connection)
        if log is not None and log.changed:
            self._pending.add(connection, log.clear(), unasked=True)
            self._mark_unresolved()

    def rollback(self, connection: sa.Connection) -> None:
        """A ROLLBACK is about to be sent."""
        if self.idle:
            return
        self.resolve_on(connection)
        log = self._logs.get(connection)
        if log is None or not log.changed:
            return
        changes = log.clear()
        if connection.invalidated or connection.closed:
            return  # the connection is gone, and its transaction with it
        if self._dialect.in_transaction(driver_of(connection)) is False:
            self._apply(changes, certain=False)  # it was ended behind SQLAlchemy's back

    def savepoint(self, connection: sa.Connection, name: str | None) -> None:
        """A savepoint is about to be set."""
        if self.idle:
            return
        self.resolve_on(connection)
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
        if self._dialect.release_commits and (log.outermost == name or not log.has_savepoint(name)):
            self.before_commit(connection)
        log.release(name)
        log.release_unsure = True
        self._mark_unresolved()

    def release_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        """A savepoint is about to be released."""
        if self.idle:
            return
        self.resolve_on(connection)
        self._release(connection, name)

    def rollback_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        """A savepoint is about to be rolled back."""
        if self.idle:
            return
        self.resolve_on(connection)
        self.log(connection).rollback_to(name)

    def move(self, connection: sa.Connection, move: Move, name: str) -> None:
        """A raw statement moves the transaction; it is about to be sent."""
        log = self.log(connection)
        log.targets.clear()  # SET LOCAL ends with what it was set in
        if move in _MAY_COMMIT or (move is Move.BEGIN and self._dialect.ddl_commits):
            self.before_commit(connection)
        if move is Move.COMMIT or (move is Move.BEGIN and self._dialect.ddl_commits):
            self.commit_unasked(connection)
        elif move is Move.SAVEPOINT:
            self._savepoint(connection, name)
        elif move is Move.RELEASE:
            self._release(connection, name)
        elif move is Move.ROLLBACK_TO:
            log.rollback_to(name)
        elif move is Move.ROLLBACK:
            log.clear()  # if it fails, the connection is lost, and the transaction with it
        elif move is Move.UNCLEAR:
            self._apply(log.clear(), certain=False)  # it may have been a COMMIT

    def empty(self, connection: sa.Connection, execution: Any, sql: str) -> None:
        """A raw statement is about to delete all rows of tables: tracked ones are tracked no more.

        What is inserted under their keys afterwards may be somebody else's.
        """
        names, with_kin = raw_sql.emptied_tables(sql)
        if not names:
            return
        log = self.log(connection)
        rows = [(c.table, c.keys) for c, _sink in log.all() if isinstance(c, Inserted)]
        for sink in self.sinks:
            rows += sink.keys_by_table()
        gone = raw_sql.emptied_of([table for table, _keys in rows], names, with_kin=with_kin)
        changes: list[Change] = [
            Deleted(table, list(keys))
            for table, keys in rows
            if keys and table.key_columns and table.name in gone
        ]
        log.emptied = execution, changes
        self._mark_unresolved()

    def prepare_twophase(self, connection: sa.Connection, xid: Any) -> None:
        """The first phase: nothing is true yet, and another connection may commit it."""
        if not self.idle:
            self.before_commit(connection)
            log = self._logs.get(connection)
            if log is not None and log.changed:
                self._prepared[xid] = log.clear()

    def commit_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:
        """The second phase is about to be sent."""
        if self.idle:
            return
        log = self._logs.get(connection)
        changes = self._prepared.pop(xid, [])
        if log is not None and log.changed:
            self.before_commit(connection)
            void = self._dialect.commit_is_void(connection)
            changes += [] if void else log.clear()
        if changes:
            self._pending.add(connection, changes, prepared=True)
            self._mark_unresolved()

    def rollback_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:
        """A two-phase transaction is about to be rolled back."""
        if self.idle:
            return
        self._prepared.pop(xid, None)
        log = self._logs.get(connection)
        if log is not None and log.changed:
            log.clear()

    def handle_error(self, context: Any) -> None:
        """A statement or a COMMIT has failed."""
        connection = context.connection
        if connection is None or self.idle:
            return
        error = context.sqlalchemy_exception or context.original_exception
        lost = context.is_disconnect
        failed = self._pending.pop_failed(connection)
        for pending in failed:
            # of a COMMIT in a string nobody knows whether it is this very statement that failed
            unknown = lost or pending.unasked
            outcome = (
                CommitOutcome.DOUBT if unknown else self._dialect.commit_outcome(error, connection)
            )
            if outcome is CommitOutcome.OPEN:
                self.log(connection).restore(pending.changes)
            elif outcome is CommitOutcome.DOUBT:
                if pending.server_id is not None:
                    self.unanswered.add(pending.server_id)
                self._apply(pending.changes, certain=False)
        log = self.log(connection)
        log.failed(context.execution_context)
        if failed or not log.changed:
            return
        driver = None if connection.invalidated else driver_of(connection)
        loss = Loss.EVERYTHING if lost else self._dialect.loss(error, driver)
        if loss is Loss.EVERYTHING:
            log.clear()
        elif loss is Loss.DOUBT:
            log.mark_uncertain()

    # -- what has become true ------------------------------------------------------------------

    def resolve_on(self, connection: sa.Connection) -> None:
        """Something happens on this connection, so a COMMIT that was pending on it is over."""
        if not self.unresolved:
            return
        if self._pending.all:
            self._resolve_pending(connection)
        log = self._logs.get(connection)
        if log is not None and log.emptied is not None:
            (_execution, changes), log.emptied = log.emptied, None
            for change in changes:
                self.add(connection, log, change)
        if log is not None and log.release_unsure:
            self._resolve_release(connection, log)
        self._look_for_unresolved()

    def _mark_unresolved(self) -> None:
        with self._lock:  # or another thread's look, under way, would undo it
            self.unresolved = True

    def _look_for_unresolved(self) -> None:
        with self._lock:
            self.unresolved = bool(self._pending.all) or any(
                log.release_unsure or log.emptied is not None for log in self._logs.values()
            )

    def _resolve_pending(self, connection: sa.Connection | None = None) -> None:
        committed, uncertain = self._pending.pop_finished(connection)
        self._apply(uncertain, certain=False)
        self._apply(committed)

    def reset(self, driver: Any, _record: Any, _state: Any) -> None:
        """A connection goes back to its pool."""
        if self._pending.all:
            self._pending.returned(driver)

    def _resolve_release(self, connection: sa.Connection, log: TransactionLog) -> None:
        """On SQLite the release of the outermost savepoint commits where no BEGIN came before."""
        if connection.closed or connection.invalidated:
            log.release_unsure = False
        elif self._dialect.in_transaction(driver_of(connection)) is False:
            log.release_unsure = False
            self._apply(log.clear())

    def resolve(self) -> None:
        """Apply the changes of every COMMIT that is over, whoever sent it."""
        if not self.unresolved:
            return
        with self._lock:
            logs = list(self._logs.items())
        for connection, log in logs:
            if log.release_unsure:
                self._resolve_release(connection, log)
        if self._pending.all:
            self._resolve_pending()
        self._look_for_unresolved()

    def _apply(self, changes: list[Logged], *, certain: bool = True) -> None:
        """Let the sinks hear of changes that are committed, or of which that is not known."""
        if not changes:
            return
        sinks = self.sinks
        for change, owner in changes:
            if isinstance(change, Touched):
                if certain and owner is not None:  # of what may not have happened nobody is told
                    tell_watcher(owner, change, sinks)
                continue
            rest = change
            for sink in sinks if owner is None else (owner,):
                rest = sink.apply(rest) if certain else sink.mark_uncertain(rest)
        warning: Warning | None = None
        for sink, own in self._by_sink(changes):
            try:
                sink.after_commit(own, certain=certain)
            except Warning as error:  # where warnings are errors, every sink is told all the same
                warning = warning or error
        if warning is not None:
            raise warning

    def pending(self, sink: Sink) -> Iterator[Change]:
        """What has been inserted for a sink and is not committed."""
        with self._lock:
            logs = list(self._logs.values())
        for log in logs:
            yield from (each for each, owner in log.all() if owner is sink and _is_insert(each))
        waiting = self._pending.changes()
        yield from (each for each, owner in waiting if owner is sink and _is_insert(each))


_MAY_COMMIT = frozenset({Move.COMMIT, Move.UNCLEAR})


def _is_insert(change: Change) -> bool:
    return not isinstance(change, Touched)


def _forgetter(transactions: Transactions) -> Callable[[weakref.ref[Sink]], None]:
    """Called when a sink is garbage; it does not keep the transactions alive."""
    this = weakref.ref(transactions)

    def forget(dead: weakref.ref[Sink]) -> None:
        living = this()
        if living is not None:
            living.forget_sink(dead)

    return forget
