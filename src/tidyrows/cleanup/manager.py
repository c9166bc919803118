"""The CleanupManager: what was made in its block is gone after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from tidyrows.cleanup.cleaning import Cleaning
from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.executor import Executor
from tidyrows.cleanup.identity import identity_of
from tidyrows.cleanup.keep import keep
from tidyrows.cleanup.ledger_updates import Bookkeeping
from tidyrows.cleanup.options import Dependents, Rules
from tidyrows.cleanup.plan import Plan, steps_for
from tidyrows.cleanup.progress import Steps
from tidyrows.cleanup.report import HERE, CleanupReport, describe_leftovers
from tidyrows.cleanup.resources import Part, Phases
from tidyrows.cleanup.restore import Restoring
from tidyrows.cleanup.schema_view import graph_of
from tidyrows.cleanup.table_arguments import named_tables, places_of, written_names
from tidyrows.cleanup.verify import in_short
from tidyrows.errors import (
    CleanupError,
    NotBoundError,
    SessionStateError,
    TakenOverError,
    TidyRowsError,
)
from tidyrows.greenlets import spawn
from tidyrows.keys import TableName
from tidyrows.ledger.claims import claimed_by_others
from tidyrows.retry import RetryPolicy
from tidyrows.tracking.tracker import ResourceTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from tidyrows.cleanup.progress import Progress
    from tidyrows.cleanup.report import Leftover
    from tidyrows.keys import KeyedTable
    from tidyrows.schema import ForeignKey
    from tidyrows.tracking.store import TableHoldings


class CleanupManager:
    """Deletes exactly the rows that a tracker holds, in foreign-key order.

    As a context manager it starts the tracker, stops it at the end and cleans up: ``with``, or
    ``async with`` where the tracker is bound to something asynchronous. If the body raised, that
    very exception surfaces; what went wrong in the cleanup is attached as a note.

    Args:
        tracker: whose rows.
        dependents: what becomes of untracked rows that reference tracked ones.
        own: tables (mapped classes, Tables, or names like ``"audit_log"``) whose rows that
            reference tracked ones are deleted, whatever the schema says.
        protect: tables whose rows are never touched; a tracked row that they need stays and is
            reported.
        retry: how often and how long transactions are run again; by default 20 attempts with
            exponential backoff and jitter, 60 seconds in all.
        verify: look again, after the COMMIT, whether the rows are gone.
        lock_timeout: the longest wait for one lock, in seconds.
        deadline: the longest time for the whole cleanup, in seconds; by default the policy's.
        rows_per_transaction: the most rows that one transaction deletes, so that no lock is held
            for long; a circle of rows, or one row with all that reference it, may be more.
        on_progress: told a :class:`Progress` after each transaction; ``progress_bar()`` makes one.
            What it raises does not stop the cleanup, and surfaces at its end.
        trust_keys: delete by key alone. Otherwise, where the database gives keys again (SQLite), a
            row that no longer looks as it was inserted stays, since it may be somebody else's.
        keep_on_failure: where the body raises, leave the rows for study. A note on the error says
            which they are and what deletes them; with a ledger only a sweep that is asked to does.
        allow_foreign_keys_off: on the MySQL family only, delete circles of NOT NULL foreign keys
            with ``FOREIGN_KEY_CHECKS=0``, on a connection that is thrown away afterwards.

    Attributes:
        tracker: whose rows.
        report: what the cleanup did; None before the first.

    Example:
        >>> with CleanupManager(ResourceTracker(engine)) as cleanup:
        ...     UserFactory.create_batch(3)
        >>> print(cleanup.report)
        main.users 3 deleted (0.004 s)
    """

    def __init__(
        self,
        tracker: ResourceTracker,
        *,
        dependents: Dependents = Dependents.FOLLOW_SCHEMA,
        own: Iterable[Any] = (),
        protect: Iterable[Any] = (),
        retry: RetryPolicy | None = None,
        verify: bool = True,
        lock_timeout: float = 5.0,
        deadline: float | None = None,
        rows_per_transaction: int = 25_000,
        on_progress: Callable[[Progress], None] | None = None,
        trust_keys: bool = False,
        keep_on_failure: bool = False,
        allow_foreign_keys_off: bool = False,
    ) -> None:
        if not isinstance(tracker, ResourceTracker):
            raise NotBoundError(
                f"CleanupManager cleans up after a tracker, and a {type(tracker).__name__} is "
                f"none. Write CleanupManager(ResourceTracker(engine))."
            )
        if lock_timeout <= 0:
            raise ValueError(
                f"lock_timeout={lock_timeout!r} is no time to wait; give seconds, as in "
                f"CleanupManager(tracker, lock_timeout=5.0)."
            )
        if rows_per_transaction < 1:
            raise ValueError(
                f"rows_per_transaction={rows_per_transaction!r} deletes nothing; give a number of "
                f"rows, as in CleanupManager(tracker, rows_per_transaction=25_000)."
            )
        if not isinstance(dependents, Dependents):
            raise TypeError(
                f"dependents={dependents!r} is no way to treat dependents; write "
                f"Dependents.FOLLOW_SCHEMA, Dependents.DELETE or Dependents.ERROR."
            )
        self._dependents = dependents
        self._own, self._protect = named_tables("own", own), named_tables("protect", protect)
        for schema, name in sorted(self._own & self._protect, key=str):
            raise ValueError(
                f"{f'{schema}.' if schema else ''}{name} is in own= and in protect=; take it out "
                f"of one of them."
            )
        self.tracker = tracker
        self.report: CleanupReport | None = None
        self._retry = retry or RetryPolicy()
        if deadline is not None:
            self._retry = replace(self._retry, deadline=deadline)
        self._verify = verify
        self._lock_timeout = lock_timeout
        self._limit = rows_per_transaction
        self._on_progress = on_progress
        self._trust_keys = trust_keys
        self._keep_on_failure = keep_on_failure
        self._foreign_keys_off = allow_foreign_keys_off
        self._databases: dict[str, Database] = {}
        self._refusal: SessionStateError | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        self.tracker.refuse_blocking("async with CleanupManager(tracker): ...")
        if not self.tracker.active:
            self.tracker.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            self.tracker.stop()
            if error is not None and self._keep_on_failure:
                error.add_note(self.keep())
            else:
                self.cleanup()
        except Exception as failure:
            if error is None:
                raise
            # Whatever it is, the test's own failure comes first.
            error.add_note(f"tidyrows: the cleanup after this failed too: {_told(failure)}")

    async def __aenter__(self) -> Self:
        if not self.tracker.active:
            self.tracker.start()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            try:
                async with self.tracker.turn():  # what a task is creating yet, is seen
                    self.tracker.stop()
            finally:
                self.tracker.stop()
            if error is not None and self._keep_on_failure:
                async with self.tracker.turn():
                    error.add_note(await spawn(self.keep))
            else:
                await self.cleanup_async()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"tidyrows: the cleanup after this failed too: {_told(failure)}")

    def plan(self) -> Plan:
        """The tracked rows that a cleanup would delete now, in order. Deletes nothing.

        Rows that only reference them are looked for in the transaction that deletes.

        Raises:
            sqlalchemy.exc.SQLAlchemyError, TidyRowsError: a query that was to be asked late failed.
        """
        self.tracker.refuse_blocking("await tracker.run_sync(lambda _tracker: manager.plan())")
        for failure in self.tracker.resolve_late(self._retry):
            raise failure
        return Plan(
            tuple(
                step
                for database, holdings in self._held_by_database()
                for step in steps_for(database, holdings)
            )
        )

    def cleanup(self) -> CleanupReport:
        """Delete what the tracker holds, look whether it is gone, and forget what is.

        Calling it again is harmless: it deletes what came since, or what was left over. What
        fails in one database does not keep another one from being cleaned.

        Raises:
            CleanupError: rows are still there; the error names each and why. They stay tracked.
            SessionStateError: the tracker's session is in a transaction that began before the
                block, or somebody is in one on the only connection that there is. Nothing is
                deleted there, everything stays tracked.
        """
        self.tracker.refuse_blocking("await manager.cleanup_async()")
        clock = self._retry.clock
        started = clock()
        self.report = report = CleanupReport()
        until = started + self._retry.deadline
        self._refusal = self._failure = None
        self._taken: set[str] = set()
        self._databases.clear()  # what was learned of waits and foreign keys was another time's
        leftovers: list[Leftover] = []
        failures: list[Exception] = []
        if not self.tracker.is_foreign:
            self.tracker.release_session()
            failures = self.tracker.resolve_late(self._retry)
            steps = Steps(self._on_progress, sum(map(len, self.tracker.snapshot())))
            restoring = Restoring(self.tracker, report, self._database, self._retry, until)
            restoring.before_deletes()
            clean = partial(self._clean, report, until, steps)
            if self.tracker.externals():
                phases = Phases(self.tracker, report, clean, self._retry, until)
                leftovers = phases.run(self._references())
                self._failure = self._failure or phases.failure
            else:
                leftovers = clean(None)
            leftovers += restoring.after_deletes()
            failures += self._finish_books()
            self._failure = self._failure or restoring.failure
            self._refusal = self._refusal or restoring.refusal
            failures += steps.finish()
        report.leftovers = tuple(leftovers)
        report.blockers = tuple(
            blocker for each in self._databases.values() for blocker in each.waiting.blockers
        )
        report.seconds = clock() - started
        if leftovers or report.held or self._refusal is not None:
            self.tracker.dismiss_leak_warning()
        if self._refusal is not None:
            if leftovers:
                self._refusal.add_note(self._described(leftovers))
            raise self._refusal
        if leftovers:
            told = self._described(leftovers)
            error = CleanupError(told, leftovers=leftovers, report=report)
            for failure in failures:
                error.add_note(f"and besides: {failure!r}")
            raise error from self._failure
        for failure in failures:
            raise failure
        return report

    def _described(self, leftovers: Sequence[Leftover]) -> str:
        return describe_leftovers(leftovers)

    def keep(self) -> str:
        """Leave the rows for study, as ``keep_on_failure`` does.

        Returns:
            Which they are, and what deletes them.
        """
        wishes = {"own": written_names(self._own), "protect": written_names(self._protect)}
        return keep(self.tracker, wishes)

    async def cleanup_async(self) -> CleanupReport:
        """As :meth:`cleanup`, for a tracker that is bound to something asynchronous.

        A task that is cancelled in it leaves tracked what was not deleted: call it again. Under a
        tracker that is not asynchronous it does the same, and the loop waits.
        """
        if not self.tracker.is_async:
            return self.cleanup()
        async with self.tracker.turn():  # a task may be creating yet, in the tracker's session
            return await spawn(self.cleanup)

    def _clean(
        self, report: CleanupReport, until: float, steps: Steps, part: Part | None
    ) -> list[Leftover]:
        """Delete the rows of a part, or all; what is left over of them."""
        leftovers: list[Leftover] = []
        for database, holdings in self._held_by_database():
            books = Bookkeeping(self.tracker, database)
            executor = Executor(
                database,
                books=books,
                retry=self._retry,
                until=until,
                limit=self._limit,
                progress=steps.add,
                rules=partial(self._rules, database),
                claimed=partial(self._claimed, database),
                identity=None if self._trust_keys else identity_of(holdings),
                others=None if part is None else part.others(holdings),
                stay=None if part is None else part.kept(holdings),
                foreign_keys_off=self._foreign_keys_off,
            )
            cleaning = Cleaning(
                self.tracker,
                database,
                executor,
                report,
                verify=self._verify,
                books=books,
                part=part,
            )
            try:
                leftovers += cleaning.run()
            except TakenOverError as error:
                self._refusal = self._refusal or error
                self._taken.add(database.capture.database)
            except SessionStateError as error:
                self._refusal = self._refusal or error
            self._failure = self._failure or cleaning.failure
        return leftovers

    def _finish_books(self) -> list[Exception]:
        """Leave in the ledgers what is left; what went wrong is returned."""
        failures: list[Exception] = []
        for name in self.tracker.journals.databases:
            database = self._database(name)
            retry = partial(self._retry.run, is_transient=database.passes)
            try:
                if name not in self._taken:
                    Bookkeeping(self.tracker, database).finish(retry)
            except TakenOverError as error:
                self._refusal = self._refusal or error
                self._taken.add(name)
            except (sa.exc.SQLAlchemyError, TidyRowsError) as error:
                failures.append(error)
            if name in self._taken:
                self.tracker.journals.release(name)
        return failures

    def _references(self) -> list[tuple[TableName, TableName]]:
        """Which table references which, child first, in every database that rows are held of."""
        found: dict[tuple[TableName, TableName], None] = {}
        for database, holdings in self._held_by_database():
            name = database.capture.database
            for key in self._foreign_keys(database, [held.table for held in holdings]):
                found[TableName(name, *key.child), TableName(name, *key.parent)] = None
        return list(found)

    def _foreign_keys(
        self, database: Database, tables: Sequence[KeyedTable]
    ) -> tuple[ForeignKey, ...]:
        try:
            graph = self._retry.run(
                lambda: graph_of(database, tables), is_transient=database.passes
            )
        except (SessionStateError, sa.exc.SQLAlchemyError):
            return ()  # nor can its rows be deleted, and that is said then
        return graph.foreign_keys

    def _rules(self, database: Database, tables: Sequence[KeyedTable]) -> Rules:
        default = database.engine.dialect.default_schema_name or ""
        return Rules(
            self._dependents,
            own=places_of(self._own, tables, default),
            protect=places_of(self._protect, tables, default),
        )

    def _claimed(
        self,
        database: Database,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
    ) -> dict[Any, str]:
        """Of these rows, those that another tracker, here or in another process, will delete."""
        name = table.name
        claims: dict[Any, str] = {}
        for other in database.capture.sinks:
            if other is not self.tracker and other.holds(name):
                mine = other.context.tag
                theirs = other.held_keys(name, keys) if table.key_columns else keys
                claims.update((key, f"{HERE}{mine}") for key in theirs)
        book = self.tracker.journals.of(name.database)
        rest = [key for key in keys if key not in claims]
        if book is not None and rest:
            claims.update(claimed_by_others(connection, book, table, rest))
        return claims

    def _held_by_database(self) -> list[tuple[Database, list[TableHoldings]]]:
        self.tracker.settle()
        by_database: dict[str, list[TableHoldings]] = {}
        for held in self.tracker.snapshot():
            by_database.setdefault(held.table.name.database, []).append(held)
        return [(self._database(name), by_database[name]) for name in sorted(by_database)]

    def _database(self, name: str) -> Database:
        database = self._databases.get(name)
        if database is None:
            database = self._databases[name] = Database(
                self.tracker.engine_of(name),
                lock_timeout=self._lock_timeout,
                statement_timeout=self._retry.deadline,
            )
            # There may be no second attempt, which alone is watched otherwise.
            only_one = self._retry.deadline < 2 * self._lock_timeout
            database.waiting.armed = self._retry.attempts == 1 or only_one
        return database


def _told(failure: Exception) -> str:
    """A failure without SQL and parameters, which may hold secrets."""
    return str(failure) if isinstance(failure, TidyRowsError) else in_short(failure)
