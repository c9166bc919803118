"""The CleanupManager: what was made in its block is gone after it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.doubt import CAUSE, settle_doubt
from tidyrows.cleanup.executor import Executor
from tidyrows.cleanup.plan import Batch, Plan, make_plan
from tidyrows.cleanup.report import CleanupReport, Leftover, describe_leftovers
from tidyrows.cleanup.verify import judge, still_there
from tidyrows.errors import CleanupError
from tidyrows.retry import RetryPolicy

if TYPE_CHECKING:
    from types import TracebackType

    from tidyrows.cleanup.executor import Outcome
    from tidyrows.rows import TableName
    from tidyrows.tracking.tracker import ResourceTracker

_UNKEYED = (
    "the table has no primary key, so its rows cannot be named; delete them yourself, or give it "
    "a primary key"
)


class CleanupManager:
    """Deletes exactly the rows that a tracker holds, in foreign-key order.

    As a context manager it starts the tracker, stops it at the end and cleans up. If the body
    raised, that very exception surfaces; what went wrong in the cleanup is attached as a note.

    Args:
        tracker: whose rows.
        retry: how often and how long transactions are run again; by default 8 attempts with
            exponential backoff and jitter, 60 seconds in all.
        verify: look again, after the COMMIT, whether the rows are gone.
        lock_timeout: the longest wait for one lock, in seconds.
        deadline: the longest time for the whole cleanup, in seconds; by default the policy's.
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
        retry: RetryPolicy | None = None,
        verify: bool = True,
        lock_timeout: float = 5.0,
        deadline: float | None = None,
        allow_foreign_keys_off: bool = False,
    ) -> None:
        if lock_timeout <= 0:
            raise ValueError(
                f"lock_timeout={lock_timeout!r} is no time to wait; give seconds, as in "
                f"CleanupManager(tracker, lock_timeout=5.0)."
            )
        self.tracker = tracker
        self.report: CleanupReport | None = None
        self._retry = retry or RetryPolicy()
        if deadline is not None:
            self._retry = replace(self._retry, deadline=deadline)
        self._verify = verify
        self._lock_timeout = lock_timeout
        self._foreign_keys_off = allow_foreign_keys_off
        self._databases: dict[str, Database] = {}

    def __enter__(self) -> Self:
        if not self.tracker.active:
            self.tracker.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.tracker.stop()
        if error is None:
            self.cleanup()
            return
        try:
            self.cleanup()
        except Exception as failure:  # noqa: BLE001 - whatever it is, the test's own failure comes first
            error.add_note(f"tidyrows: the cleanup after this failed too: {failure}")

    def plan(self) -> Plan:
        """What a cleanup would delete now, in order. Deletes nothing."""
        self.tracker.settle()
        holdings = self.tracker.snapshot()
        for held in holdings:
            self._database(held.table.name)
        return make_plan(self._databases, holdings)

    def cleanup(self) -> CleanupReport:
        """Delete what the tracker holds, look whether it is gone, and forget what is.

        Calling it again is harmless: it deletes what came since, or what was left over.

        Raises:
            CleanupError: rows are still there; the error names each and why. They stay tracked.
            SessionStateError: the tracker's session is in a transaction that began before the
                block. Nothing is deleted, everything stays tracked.
        """
        started = time.monotonic()
        report = CleanupReport()
        if not self.tracker.is_foreign:
            self.tracker.release_session()
            leftovers = self._settle_doubts()
            plan = self.plan()
            for database in {b.table.name.database for s in plan.steps for b in s.batches}:
                leftovers += self._clean(self._databases[database], plan, report)
            leftovers += self._unkeyed()
            report.leftovers = tuple(leftovers)
        report.seconds = time.monotonic() - started
        self.report = report
        if report.leftovers:
            raise CleanupError(
                describe_leftovers(report.leftovers), leftovers=report.leftovers, report=report
            )
        return report

    def _database(self, name: TableName) -> Database:
        database = self._databases.get(name.database)
        if database is None:
            database = self._databases[name.database] = Database(
                self.tracker.engine_of(name.database), lock_timeout=self._lock_timeout
            )
        return database

    def _settle_doubts(self) -> list[Leftover]:
        self.tracker.settle()
        leftovers: list[Leftover] = []
        for held in self.tracker.snapshot():
            if not held.doubtful:
                continue
            table, database = held.table, self._database(held.table.name)
            executor = Executor(database, retry=self._retry)
            ours, unsure = executor.patiently(partial(settle_doubt, database, held))
            gone = held.doubtful.keys() - set(ours) - set(unsure)
            self.tracker.forget(table, gone | set(ours))
            self.tracker.hold(table, ours)
            leftovers += [Leftover(table.name, table.row(key), CAUSE) for key in unsure]
        return leftovers

    def _clean(self, database: Database, plan: Plan, report: CleanupReport) -> list[Leftover]:
        steps = [
            step
            for step in plan.steps
            if step.batches[0].table.name.database == database.capture.database
        ]
        executor = Executor(database, retry=self._retry, foreign_keys_off=self._foreign_keys_off)
        outcome = executor.run(steps)
        report.retries += outcome.retries
        batches = [batch for step in steps for batch in step.batches]
        to_look_at = [
            batch for batch in batches if self._verify or not _all_counted(batch, outcome)
        ]
        try:
            found = executor.patiently(lambda: still_there(database, to_look_at))
        except (sa.exc.SQLAlchemyError, OSError) as error:
            found = {batch.table.name: f"nobody could look: {error}" for batch in to_look_at}
        leftovers: list[Leftover] = []
        for batch in batches:
            leftovers += self._account(batch, outcome, found.get(batch.table.name, []), report)
        return leftovers

    def _account(
        self, batch: Batch, outcome: Outcome, there: list[Any] | str, report: CleanupReport
    ) -> list[Leftover]:
        """Book one table's rows as deleted, gone or left over, and forget what is gone."""
        name, deleted = batch.table.name, outcome.deleted[batch.table.name]
        refused = outcome.refused.get(name, {})
        if isinstance(there, str):
            causes: dict[Any, str] = dict.fromkeys(batch.keys, f"cannot be looked at: {there}")
        else:
            causes = judge(batch, there, deleted, refused)
        if deleted:
            report.deleted[name] = deleted
        if not isinstance(there, str):
            if len(there) > len(causes):
                report.reappeared[name] = len(there) - len(causes)
            already_gone = len(batch.keys) - deleted - len(causes)
            if already_gone > 0:
                report.already_gone[name] = already_gone
        self.tracker.forget(batch.table, [key for key in batch.keys if key not in causes])
        return [Leftover(name, batch.table.row(key), cause) for key, cause in causes.items()]

    def _unkeyed(self) -> list[Leftover]:
        return [
            Leftover(held.table.name, None, _UNKEYED, held.unkeyed)
            for held in self.tracker.snapshot()
            if held.unkeyed
        ]


def _all_counted(batch: Batch, outcome: Outcome) -> bool:
    return outcome.deleted[batch.table.name] == len(batch.keys)
