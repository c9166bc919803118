"""What the parts of one cleanup share: its state, what its transactions did, and its ledger."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import sqlalchemy as sa

from tidyrows.capture.changes import Change, Deleted, DeletedWhole
from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.identity import Incarnations
from tidyrows.cleanup.reasons import LATE, LeftoverKind, Reason
from tidyrows.cleanup.report import HERE, CleanupReport, Leftover, TableRows, add_rows
from tidyrows.errors import TidyRowsError
from tidyrows.ledger.claims import claimed_by_others, claims_on_entered
from tidyrows.ledger.journal import JournalUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidyrows.cleanup.identity import Identity
    from tidyrows.cleanup.options import CleanupOptions, DependentRules
    from tidyrows.cleanup.plan import Batch, Rows
    from tidyrows.cleanup.report import ProgressListener
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.dialects import Blocker
    from tidyrows.errors import SessionStateError
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.claims import Claim
    from tidyrows.ledger.journal import Journal
    from tidyrows.schema.graph import Place
    from tidyrows.tracking.keyset import KeySet
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker


T = TypeVar("T")
logger = logging.getLogger("tidyrows")
_LAST_SECONDS = 2.0
"""Seconds before the deadline in which no further row is tried."""


@dataclass(slots=True)
class CleanupRun:
    """One cleanup."""

    tracker: ResourceTracker
    options: CleanupOptions
    report: CleanupReport
    until: float  # when its deadline ends, by the policy's clock
    progress: ProgressListener | None = None
    failure: BaseException | None = None  # the first error that kept rows from being deleted
    refusal: SessionStateError | None = None  # why nothing was deleted in one of the databases
    databases: dict[str, Database] = field(default_factory=dict)
    # rows of prepared transactions, by the transaction's id
    prepared: dict[str, list[Leftover]] = field(default_factory=dict)
    taken_over: set[str] = field(default_factory=set)  # databases in which a sweep has the rows now
    is_sweep: bool = False  # what it tracks may be another worker's by now, as the ledger tells
    dead: Sequence[TableHoldings] = ()  # in a sweep: what each tracker of dead workers held

    def remaining(self) -> float:
        """The seconds until the deadline."""
        return self.until - self.options.retry.clock()

    @property
    def is_late(self) -> bool:
        """Whether there is only the time left to commit, to look and to record."""
        return self.remaining() <= min(self.options.retry.deadline / 10, _LAST_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Remember the first failure."""
        self.failure = self.failure or error

    def refuse(self, error: SessionStateError) -> None:
        """Remember the first refusal."""
        self.refusal = self.refusal or error

    def done(self, rows: int) -> None:
        """So many rows are deleted, or given up."""
        if self.progress is not None:
            self.progress.add(rows)

    def database(self, name: str) -> Database:
        """The database of a name."""
        database = self.databases.get(name)
        if database is None:
            retry, lock_timeout = self.options.retry, self.options.lock_timeout
            database = self.databases[name] = Database(
                self.tracker.engine_of(name),
                lock_timeout=lock_timeout,
                statement_timeout=retry.deadline,
                remaining=self.remaining,
            )
            # There may be no second attempt, and only that one is watched otherwise.
            only_one = retry.deadline < 2 * lock_timeout
            database.monitor.armed = retry.attempts == 1 or only_one
        return database

    def held_in(self, database: Database) -> list[TableHoldings]:
        """What the tracker holds now in one database."""
        return [e for e in self.tracker.store.snapshot() if e.table.name.database == database.name]

    def held_by_database(self) -> list[tuple[Database, list[TableHoldings]]]:
        """What the tracker holds now, by database."""
        for capture in self.tracker.engines.resolve():
            self._look_for_prepared(self.database(capture.database))
        by_database: dict[str, list[TableHoldings]] = {}
        for held in self.tracker.store.snapshot():
            by_database.setdefault(held.table.name.database, []).append(held)
        return [(self.database(name), by_database[name]) for name in sorted(by_database)]

    def _look_for_prepared(self, database: Database) -> None:
        """Ask which transactions are prepared yet: their rows stay, those of others are in doubt.

        A prepared transaction belongs to no session: anybody may commit it, at any time.
        """
        capture = database.capture

        def ask() -> set[str]:
            with database.reading() as connection:
                return database.dialect.prepared_transactions(connection)

        error: Exception | None = None
        try:
            left = self.retry(database, ask)
        except (sa.exc.SQLAlchemyError, ConnectionError, TidyRowsError) as failure:
            error, left = failure, set(capture.prepared)
        for xid in list(capture.prepared):
            if xid not in left:
                capture.settle(xid)
            self.prepared[xid] = []
        for xid, changes in capture.prepared.items():
            unseen = None if error is None else Reason(LeftoverKind.UNCONFIRMED, error)
            reason = Reason(LeftoverKind.PREPARED, error, names=(xid,), also=unseen)
            for change, sink in changes:
                if sink is not self.tracker:
                    continue
                table, keys = change.table, change.keys
                if table.key_columns:
                    rows = [Leftover(table.name, table.row(key), reason) for key in keys]
                else:
                    rows = [Leftover(table.name, None, reason, len(keys))]
                self.prepared[xid] += rows

    def retry(
        self,
        database: Database,
        transaction: Callable[[], T],
        *,
        waits: int = sys.maxsize,
    ) -> T:
        """Run a whole transaction, again where that may help, until the cleanup's deadline."""
        dialect = database.dialect

        def is_transient(error: BaseException) -> bool:
            nonlocal waits
            waits -= dialect.is_timeout(error)
            return waits > 0 and not database.is_silent and database.is_transient(error)

        def on_retry(attempt: int, error: BaseException) -> None:
            self.report.retries += 1
            monitor = database.monitor
            log_retry(database.name, attempt, error, monitor.recent)
            if dialect.is_timeout(error):
                monitor.armed = True  # find the blockers of the next attempt

        policy = self.options.retry
        if not database.lock_timeout:
            policy = replace(policy, attempts=1)
        return policy.run(
            transaction,
            is_transient=is_transient,
            on_retry=on_retry,
            deadline=max(self.remaining(), 0.0),
        )

    def claimed(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> dict[Any, str]:
        """Of these rows, those that another tracker, here or in another process, will delete."""
        name = table.name
        claims: dict[Any, str] = {}
        for other in self.database(name.database).capture.sinks:
            if other is not self.tracker and other.holds(name):
                theirs = other.held_keys(name, keys) if table.key_columns else keys
                claims.update((key, f"{HERE}{other.context.tag}") for key in theirs)
        rest = [key for key in keys if key not in claims] if claims else keys
        return claims | self.entered_by_others(connection, table, rest)

    def entered_by_others(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        *,
        entered: bool = False,
    ) -> dict[Any, str]:
        """Of these rows, perhaps ``entered`` ones, those that another worker has entered."""
        journal = self.tracker.journals.of(table.name.database)
        if journal is None or not keys:
            return {}
        return claimed_by_others(connection, journal, table, keys, entered=entered)

    def claims_on_entered(
        self, connection: sa.Connection, database: str, rows: Rows
    ) -> dict[Place, dict[Any, Claim]]:
        """The tracked rows among these that another worker has entered, not before we did."""
        journal = self.tracker.journals.of(database)
        return {} if journal is None else claims_on_entered(connection, journal, rows)


def log_retry(
    place: str, attempt: int, error: BaseException, blockers: Sequence[Blocker] = ()
) -> None:
    """INFO of a retry: the class of the error and the blockers, never a statement or a value."""
    if logger.isEnabledFor(logging.INFO):
        pids = [f"pid {each.pid}" for each in blockers]
        logger.info(
            "%s: attempt %d failed with %s and is retried%s",
            place,
            attempt,
            type(getattr(error, "orig", None) or error).__name__,
            f"; blocked by {', '.join(pids)}" if pids else "",
        )


Kept: TypeAlias = "dict[Place, dict[Any, Reason]]"
"""Rows that stay, by place and key."""


@dataclass(slots=True)
class Outcome:
    """What came of one transaction, or of several."""

    deleted: Counter[Place] = field(default_factory=Counter)  # tracked rows deleted
    # their keys, where every row that was asked for went
    gone: dict[Place, list[Sequence[Any]]] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)  # untracked rows deleted
    detached: dict[TableName, TableRows] = field(default_factory=dict)  # untracked rows detached
    kept: Kept = field(default_factory=dict)  # rows that were not to be deleted, and why
    refused: Kept = field(default_factory=dict)  # rows that could not be deleted, and why
    # keys of tracked rows that are gone, and whose rows by now are another worker's
    overtaken: dict[Place, set[Any]] = field(default_factory=dict)
    # how long the DELETEs of each table took
    seconds: dict[Place, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.deleted.values()) or bool(self.dependents or self.detached)

    def is_late(self, batch: Batch) -> bool:
        """Whether none of these rows was tried before the deadline."""
        place = batch.table.place
        stay = self.kept.get(place) or self.refused.get(place)
        return stay is not None and all(stay.get(key) is LATE for key in batch.keys)

    def add(self, part: Outcome) -> None:
        """Add what a transaction did, now that it is committed."""
        self.deleted.update(part.deleted)
        for place, seconds in part.seconds.items():
            self.seconds[place] = self.seconds.get(place, 0.0) + seconds
        for place, keys in part.gone.items():
            self.gone.setdefault(place, []).extend(keys)
        for name, rows in part.dependents.items():
            add_rows(self.dependents, rows)
            if name in self.detached:  # by an earlier transaction, when less was known of them
                left = self.detached.pop(name).without(rows)
                self.detached.update({name: left} if left else {})
        for rows in part.detached.values():
            add_rows(self.detached, rows)
        for place, overtaken in part.overtaken.items():
            self.overtaken.setdefault(place, set()).update(overtaken)
        for place, kept in part.kept.items():
            if kept:
                self.kept.setdefault(place, {}).update(kept)


class LedgerUpdates:
    """The ledger's entries of a tracker's rows in one database, while the rows are deleted.

    A transaction that deletes all rows of a tracker deletes its entries. One that deletes some adds
    an entry, and the end of the cleanup writes what is left anew. Each raises TakenOverError if a
    sweep has taken the entries over.
    """

    def __init__(self, tracker: ResourceTracker, database: Database, journal: Journal) -> None:
        self._tracker = tracker
        self._database = database
        self.journal = journal
        # Before what is held is looked at: rows of an entry that counts are held.
        self._numbers = journal.numbers()
        self._left: int | None = None
        self._update: JournalUpdate | None = None
        self._sent: JournalUpdate | None = None

    @classmethod
    def of(cls, tracker: ResourceTracker, database: Database) -> LedgerUpdates | None:
        """None where nothing is recorded."""
        journal = tracker.journals.of(database.name)
        return None if journal is None else cls(tracker, database, journal)

    def count(self, held: Sequence[TableHoldings]) -> None:
        """How many rows are entered; unknown where there is more than rows with keys."""
        others = any(each.in_doubt or each.keyless_count for each in held)
        self._left = None if others else sum([len(each.keys) for each in held])

    def begin(self) -> None:
        """Another set of rows is tried; the ledger shows what became of the one before."""
        self._update = self._sent = None

    def record(self, connection: sa.Connection, rows: Rows, done: Outcome) -> None:
        """In the transaction that has deleted rows: write that into the ledger."""
        journal = self.journal
        sent, self._sent = self._sent, None
        if journal.unanswered and self._resolve_unanswered(connection, sent):
            self._update = JournalUpdate()  # the COMMIT that was not answered had succeeded
            return
        gone = self._gone(connection, rows, done)
        count = sum([len(change.keys) for change in gone])
        context = self._tracker.context
        if count == self._left:
            added = journal.replace(connection, self._numbers, (), context)
            self._update = JournalUpdate(frozenset(self._numbers), frozenset(added), count)
        elif gone:
            added = journal.append(connection, self._numbers, gone, context)
            self._update = JournalUpdate(added=frozenset(added), rows=count)
        else:
            self._update = JournalUpdate()

    def unanswered(self) -> None:
        """The COMMIT was sent, and its answer was lost."""
        self._sent = self._update
        if self._update is not None:
            self.journal.unanswered.append(self._update)

    def committed(self) -> None:
        """The COMMIT has succeeded."""
        update, self._update, self._sent = self._update, None, None
        if update is not None:
            self._apply(update)

    def _apply(self, update: JournalUpdate) -> None:
        self.journal.apply(update)
        self._numbers = (self._numbers - update.removed) | update.added
        if self._left is not None:
            self._left -= update.rows

    def _resolve_unanswered(
        self, connection: sa.Connection, asked: JournalUpdate | None = None
    ) -> bool:
        """Find out what became of transactions whose COMMIT was not answered; of one, if asked."""
        unanswered, self.journal.unanswered = self.journal.unanswered, []
        true = [each for each in unanswered if self.journal.has_committed(connection, each)]
        for update in true:
            self._apply(update)
        return any(update is asked for update in true)

    # -- rows without a key --------------------------------------------------------------------

    def record_unkeyed(
        self, connection: sa.Connection, table: KeyedTable, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        """As :meth:`record`, for rows of a table without a primary key."""
        self._update = None
        if rows:
            self._resolve_unanswered(connection)
            change = DeletedWhole(table, list(rows))
            context = self._tracker.context
            added = self.journal.append(connection, self._numbers, [change], context)
            self._update = JournalUpdate(added=frozenset(added))

    # -- the end -------------------------------------------------------------------------------

    def finish(self, retry: Callable[[Callable[[], JournalUpdate]], JournalUpdate]) -> None:
        """Leave in the ledgers what is left, and nothing more."""
        journal = self.journal
        numbers = journal.numbers()
        left = list(self._tracker.store.changes(self._database.name))
        if not left:
            journal.forget_waiting()
        lasting = bool(left) and (journal.keeps_log or not journal.is_log)
        if journal.uncertain or ((not numbers or lasting) and not journal.unanswered):
            return

        def rewrite() -> JournalUpdate:
            with self._database.writing() as connection:
                self._resolve_unanswered(connection)
                kept = numbers & journal.numbers()
                if not kept or lasting:
                    return JournalUpdate()
                added = journal.replace(connection, kept, left, self._tracker.context)
                return JournalUpdate(frozenset(kept), frozenset(added))

        with journal.ledger.explaining_rights():
            update = retry(rewrite)
        journal.apply(update)
        if update.removed:
            journal.is_log = False

    def _gone(self, connection: sa.Connection, rows: Rows, done: Outcome) -> list[Change]:
        gone: list[Change] = []
        for place, (table, keys) in rows.items():
            kept = done.kept.get(place)
            asked = [key for key in keys if key not in kept] if kept else list(keys)
            if sum(map(len, done.gone.get(place, ()))) < len(asked):
                there = self._database.existing_inside(connection, table, asked)
                stay = set(asked if there is None else there) - done.overtaken.get(place, set())
                asked = [key for key in asked if key not in stay]
            if asked:
                gone.append(Deleted(table, asked))
        return gone


@dataclass(slots=True)
class Scope:
    """What all transactions of a cleanup in one database share."""

    run: CleanupRun
    database: Database
    ledger: LedgerUpdates | None
    outcome: Outcome  # of all transactions so far
    # all our rows, those too that are not to be deleted now
    tracked: dict[Place, KeySet] = field(default_factory=dict)
    stay: Kept = field(default_factory=dict)  # rows that are known not to go, and why
    # those that were given, and that other workers may have given to rows of theirs
    given: dict[Place, KeySet] = field(default_factory=dict)
    # finds rows that may not be ours any more; None where no key is reused
    identity: Identity | None = None
    incarnations: Incarnations = field(default_factory=Incarnations)
    view: SchemaView = field(init=False)
    rules: DependentRules = field(init=False)
