"""The CleanupManager: what was made in its block is gone after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from tidyrows.arguments import checked
from tidyrows.cleanup.configuration import with_configured
from tidyrows.cleanup.database_cleanup import DatabaseCleanup
from tidyrows.cleanup.options import (
    KINDS,
    CleanupOptions,
    Dependents,
    is_table_of_models,
    named_tables,
    unknown_table_error,
    unknown_tables,
    written_names,
)
from tidyrows.cleanup.plan import Plan, steps_for
from tidyrows.cleanup.reasons import in_full
from tidyrows.cleanup.report import CleanupReport, ProgressListener, describe_leftovers
from tidyrows.cleanup.resources import ResourceCleanup
from tidyrows.cleanup.restore import PreservedRows
from tidyrows.cleanup.run import CleanupRun, LedgerUpdates
from tidyrows.cleanup.schema_view import schema_of
from tidyrows.errors import (
    CleanupError,
    NotBoundError,
    SessionStateError,
    TakenOverError,
    TidyRowsError,
    add_note,
    text_of,
)
from tidyrows.greenlets import spawn
from tidyrows.keys import TableName
from tidyrows.ledger.process import OwnerKind
from tidyrows.ledger.table import NAME
from tidyrows.retry import RetryPolicy
from tidyrows.tracking.tracker import ResourceTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from tidyrows.cleanup.options import NamedTable
    from tidyrows.cleanup.report import Leftover, Progress
    from tidyrows.cleanup.resources import Phase
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings

_SHOWN = 20
_SOON = 2.0
"""Seconds in which the database must tell, when a manager is made, which tables it has."""


class CleanupManager:
    """Deletes exactly the rows that a tracker holds, in foreign-key order.

    As a context manager it starts the tracker, stops it at the end and cleans up: ``with``, or
    ``async with`` where the tracker is bound to something asynchronous. If the body raised, that
    very exception surfaces; what went wrong in the cleanup is attached as a note.

    Args:
        tracker: the tracker that holds the rows.
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
        on_progress: called with a :class:`Progress` after each transaction; ``progress_bar()``
            makes one. What it raises does not stop the cleanup, and surfaces at its end.
        trust_keys: delete by key alone. Otherwise, where a key may have been given again (one that
            was given to the row; on SQLite any), a row that no longer looks as it was inserted
            stays, since it may be somebody else's.
        keep_on_failure: where the body raises, leave the rows for study. A note on the error says
            which they are and what deletes them; with a ledger only a sweep that is asked to does.
        allow_foreign_keys_off: on the MySQL family only, delete circles of NOT NULL foreign keys
            with ``FOREIGN_KEY_CHECKS=0``, on a connection that is thrown away afterwards.

    Attributes:
        tracker: as given.
        options: the other arguments.
        last_report: as ``report``; None before the first cleanup.
        kept: the rows that :meth:`keep` has left.

    Example:
        >>> with CleanupManager(ResourceTracker(engine)) as cleanup:
        ...     UserFactory.create_batch(3)
        >>> print(cleanup.report)
        main.users 3 deleted (0.004 s)
    """

    _swept = False
    _owners: Sequence[Leftover] = ()
    """Of a sweep: owners in the ledger whose entries it leaves."""
    _forgotten: Mapping[str, int] = MappingProxyType({})
    """Of a sweep: how many entries it forgot, by owner."""
    _prepared: tuple[str, ...] = ()
    """Of a sweep: prepared transactions that may have entries."""

    @with_configured
    @checked(**KINDS)
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
        retry = retry or RetryPolicy()
        self.tracker = tracker
        self.last_report: CleanupReport | None = None
        self.kept: Sequence[TableHoldings] = ()
        self.options = CleanupOptions(
            dependents=dependents,
            own=named_tables("own", own),
            protect=named_tables("protect", protect),
            retry=retry if deadline is None else replace(retry, deadline=deadline),
            verify=verify,
            lock_timeout=lock_timeout,
            rows_per_transaction=rows_per_transaction,
            on_progress=on_progress,
            trust_keys=trust_keys,
            keep_on_failure=keep_on_failure,
            allow_foreign_keys_off=allow_foreign_keys_off,
        )
        self._texts = self.options.texts
        if self._texts and not (
            tracker.is_async or tracker.in_transaction or tracker.binding.translates_schemas
        ):
            # Where the database cannot be asked now, the cleanup asks it before it deletes.
            soon = replace(self.options, retry=RetryPolicy(attempts=1, deadline=_SOON))
            until = soon.retry.clock() + _SOON
            run = CleanupRun(tracker, soon, CleanupReport(), until)
            self._refuse_unknown_tables(run, [(name, None) for name in tracker.engines.by_database])

    def __enter__(self) -> Self:
        self.tracker.sessions.refuse_blocking("async with CleanupManager(tracker): ...")
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
            if error is not None and self.options.keep_on_failure:
                add_note(error, self.keep())
            else:
                self.cleanup()
        except Exception as failure:
            if error is None:
                raise
            # Whatever it is, the test's own failure comes first.
            add_note(error, f"tidyrows: the cleanup after this failed too: {in_full(failure)}")

    async def __aenter__(self) -> Self:
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
                async with (
                    self.tracker.sessions.exclusive()
                ):  # what a task is creating yet, is seen
                    self.tracker.stop()
            finally:
                self.tracker.stop()
            if error is not None and self.options.keep_on_failure:
                async with self.tracker.sessions.exclusive():
                    add_note(error, await spawn(self.keep))
            else:
                await self.cleanup_async()
        except Exception as failure:
            if error is None:
                raise
            add_note(error, f"tidyrows: the cleanup after this failed too: {in_full(failure)}")

    @property
    def report(self) -> CleanupReport:
        """What the last cleanup did.

        Raises:
            SessionStateError: there was no cleanup yet.
        """
        if self.last_report is None:
            raise SessionStateError(
                "There is no report yet: this CleanupManager has not cleaned up. Read it after the "
                "with block, or call cleanup(), which returns it; plan() shows what is tracked now."
            )
        return self.last_report

    def plan(self) -> Plan:
        """The tracked rows that a cleanup would delete now, in order. Deletes nothing.

        Rows that only reference them are looked for in the transaction that deletes.

        Raises:
            sqlalchemy.exc.SQLAlchemyError, TidyRowsError: a query that was to be asked late failed.
        """
        self.tracker.sessions.refuse_blocking(
            "await tracker.run_sync(lambda _tracker: manager.plan())"
        )
        for failure in self.tracker.run_late_queries(self.options.retry):
            raise failure
        return Plan(
            tuple(
                step
                for database, held in self._new_run().held_by_database()
                for step in steps_for(database, held)
            )
        )

    def cleanup(self) -> CleanupReport:
        """Delete what the tracker holds, look whether it is gone, and forget what is.

        Rows that are committed meanwhile, by another thread or task, are deleted too, once more.
        Calling it again is harmless: it deletes what came since, or what was left over. What
        fails in one database does not keep another one from being cleaned.

        Raises:
            CleanupError: rows are still there; the error names each and why. They stay tracked.
            SessionStateError: the tracker's session is in a transaction that began before the
                block, or somebody is in one on the only connection that there is. Nothing is
                deleted there, everything stays tracked.
        """
        self.tracker.sessions.refuse_blocking("await manager.cleanup_async()")
        self.tracker.late = {}
        try:
            return self._cleanup(self._new_run())
        finally:
            if self.tracker.untracked.known and self.last_report is not None:
                self.last_report.untracked = self.tracker.untracked.counts()
            late, self.tracker.late = self.tracker.late, None
            if late:
                self.tracker.warn_of_late_rows(late)

    def _cleanup(self, run: CleanupRun) -> CleanupReport:
        self.last_report = report = run.report
        started = run.until - self.options.retry.deadline
        leftovers: list[Leftover] = []
        failures: list[Exception] = []
        if not self.tracker.is_foreign:
            self.tracker.sessions.release()
            failures = self.tracker.run_late_queries(self.options.retry)
            if self.options.on_progress is not None:
                total = sum(map(len, self.tracker.store.snapshot()))
                run.progress = ProgressListener(self.options.on_progress, total)
            if self._texts:
                held = [
                    (database.name, [each.table for each in held])
                    for database, held in run.held_by_database()
                ]
                self._refuse_unknown_tables(run, held)
            preserved = PreservedRows(run) if self.tracker.preserved else None
            if preserved is not None:
                preserved.before_deletes()
            if self.tracker.externals():
                delete = partial(self._delete, run)
                leftovers = ResourceCleanup(run, delete).run(self._references(run))
            else:
                leftovers = self._delete(run, None)
                if self.tracker.late and not leftovers and run.refusal is None:
                    report.held = ()
                    leftovers = self._delete(run, None)
            if preserved is not None:
                leftovers += preserved.after_deletes()
            failures += self._finish_ledgers(run)
            if run.progress is not None:
                run.progress.finish()
                failures += run.progress.failures
        report.forgotten = dict(self._forgotten)
        report.prepared = self._prepared
        for prepared in run.prepared.values():
            leftovers += prepared
        report.leftovers = (*leftovers, *self._owners)
        report.blockers = tuple(
            [blocker for each in run.databases.values() for blocker in each.monitor.blockers]
        )
        report.seconds = self.options.retry.clock() - started
        self._raise(run, failures)
        return report

    def _refuse_unknown_tables(
        self, run: CleanupRun, places: Iterable[tuple[str, Sequence[KeyedTable] | None]]
    ) -> None:
        """Raise for a name in own= or protect= that none of these databases has.

        Where one of them cannot be asked, nothing is known, and nothing is raised.
        """
        unknown: dict[NamedTable, set[str]] | None = None
        for name, tables in places:
            database = run.database(name)
            try:
                ask = partial(unknown_tables, database, self._texts, tables)
                found = run.retry(database, ask)
            except (TidyRowsError, ConnectionError, sa.exc.SQLAlchemyError):
                return
            both = found.keys() if unknown is None else found.keys() & unknown.keys()
            unknown = {each: found[each] | (unknown or found)[each] for each in both}
        for each in sorted(unknown or (), key=str):
            if self.tracker.bound_engine is None and is_table_of_models(each):
                continue  # in another database of the session, which this cleanup does not need
            argument = "own" if each in self.options.own else "protect"
            raise unknown_table_error(argument, each, (unknown or {})[each])

    def _new_run(self) -> CleanupRun:
        retry = self.options.retry
        until = retry.clock() + retry.deadline
        return CleanupRun(self.tracker, self.options, CleanupReport(), until)

    def _raise(self, run: CleanupRun, failures: Sequence[Exception]) -> None:
        leftovers = run.report.leftovers
        text = describe_leftovers(leftovers, swept=self._swept) if leftovers else ""
        if leftovers or run.report.held or run.refusal is not None:
            self.tracker.dismiss_leak_warning()
        if run.refusal is not None:
            if leftovers:
                add_note(run.refusal, text)
            raise run.refusal
        if leftovers:
            error = CleanupError(text, leftovers=leftovers, report=run.report)
            for failure in failures:
                add_note(error, f"and besides: {text_of(failure, repr)}")
            errors = (each.error for each in leftovers if each.error is not None)
            raise error from run.failure or next(errors, None)
        for failure in failures:
            raise failure

    def keep(self) -> str:
        """Leave the rows for study, as ``keep_on_failure`` does.

        Returns:
            Which they are, and what deletes them.
        """
        tracker = self.tracker
        tracker.sessions.release()
        tracker.engines.resolve()
        held = tracker.store.snapshot()
        things = [
            str(each.table.row(key))
            for each in held
            for key in (*each.keys.in_order(), *each.in_doubt)
        ]
        resources = [str(resource) for resource in tracker.externals()]
        count = len(things) + sum(each.keyless_count for each in held) + len(resources)
        things += [
            f"{each.keyless_count} of {each.table.name}" for each in held if each.keyless_count
        ]
        things += resources
        if not count:
            return "tidyrows: there are no rows to keep."
        self.kept = held
        tracker.dismiss_leak_warning()
        name, journals = OwnerKind.KEPT.new_id(), tracker.journals
        aside = [each for each in journals.databases if journals.put_aside(each, name)]
        lines = [f"tidyrows: {count} row(s) and resources are kept for study:"]
        lines += [f"  {each}" for each in things[:_SHOWN]]
        if len(things) > _SHOWN:
            lines.append(f"  ... and {len(things) - _SHOWN} more")
        tables = {"own": self.options.own, "protect": self.options.protect}
        arguments = [f", {key}={written_names(each)}" for key, each in tables.items() if each]
        found = [journal for each in aside if (journal := journals.of(each)) is not None]
        for ledger, schema in dict.fromkeys(journal.ledger.place for journal in found):
            where = "" if ledger == NAME else f", ledger={ledger!r}"
            where += f", schema={schema!r}" if schema else ""
            lines.append(
                f'They are deleted by: python -c "import os, tidyrows; print(tidyrows.sweep('
                f"os.environ['DATABASE_URL'], kept='{name}'{where}{''.join(arguments)}))\""
            )
        if not aside:
            lines.append(
                "They are deleted by manager.cleanup() in this process. With "
                "ResourceTracker(..., ledger=Ledger(engine)) another process can delete them too."
            )
        return "\n".join(lines)

    async def cleanup_async(self) -> CleanupReport:
        """As :meth:`cleanup`, for a tracker that is bound to something asynchronous.

        A task that is cancelled in it leaves tracked what was not deleted: call it again. Under a
        tracker that is not asynchronous it does the same, and the loop waits.
        """
        if not self.tracker.is_async:
            return self.cleanup()
        async with (
            self.tracker.sessions.exclusive()
        ):  # a task may be creating yet, in the tracker's session
            return await spawn(self.cleanup)

    def _delete(self, run: CleanupRun, phase: Phase | None) -> list[Leftover]:
        """Delete the rows of a phase, or all; what is left over of them."""
        leftovers: list[Leftover] = []
        for number, (database, held) in enumerate(run.held_by_database()):
            try:
                now = run.held_in(database) if number else held  # cleaning the others took time
                leftovers += DatabaseCleanup(run, database, now, phase).run()
            except TakenOverError as error:
                run.refuse(error)
                run.taken_over.add(database.name)
            except SessionStateError as error:
                run.refuse(error)
        return leftovers

    def _finish_ledgers(self, run: CleanupRun) -> list[Exception]:
        """Leave in the ledgers what is left; what went wrong is returned."""
        failures: list[Exception] = []
        for name in self.tracker.journals.databases:
            database = run.database(name)
            ledger = LedgerUpdates.of(self.tracker, database)
            retry = partial(run.retry, database)
            try:
                if ledger is not None and name not in run.taken_over:
                    ledger.finish(retry)
            except TakenOverError as error:
                run.refuse(error)
                run.taken_over.add(name)
            except (sa.exc.SQLAlchemyError, TidyRowsError, ConnectionError) as error:
                failures.append(error)
            if name in run.taken_over:
                self.tracker.journals.release(name)
        return failures

    def _references(self, run: CleanupRun) -> list[tuple[TableName, TableName]]:
        """Which table references which, child first, in every database that rows are held of."""
        found: dict[tuple[TableName, TableName], None] = {}
        for database, holdings in run.held_by_database():
            tables = [held.table for held in holdings]
            try:
                graph = run.retry(database, partial(schema_of, database, tables)).graph
            except (TidyRowsError, ConnectionError, sa.exc.SQLAlchemyError):
                continue  # nor can its rows be deleted, and that is reported then
            for key in graph.foreign_keys:
                child, parent = (TableName(database.name, *p) for p in (key.child, key.parent))
                found[child, parent] = None
        return list(found)
