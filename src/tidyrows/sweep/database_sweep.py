"""The sweep of one database: recover the entries of dead workers, delete the rows, report."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.report import describe_leftovers
from tidyrows.dialects import Fault
from tidyrows.errors import LedgerError
from tidyrows.ledger.journal import Journal
from tidyrows.ledger.process import LedgerProcess, left_id
from tidyrows.retry import RetryPolicy
from tidyrows.sweep.dead_workers import find_candidates, wait_for_locks
from tidyrows.sweep.recovery import load, put_aside, recover, refuse_unwritable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidyrows.cleanup.report import CleanupReport, Leftover
    from tidyrows.ledger.table import Ledger
    from tidyrows.sweep.sweep_arguments import SweepArguments
    from tidyrows.tracking.tracker import ResourceTracker

T = TypeVar("T")


class DatabaseSweep:
    """A process in the ledger, as each worker is one, that deletes the rows of dead workers."""

    def __init__(self, ledger: Ledger, retry: RetryPolicy | None = None) -> None:
        with ledger.engine.connect() as connection:
            ledger.check(connection)
        self._ledger = ledger
        self._retry = retry or RetryPolicy()
        # Not the process that the trackers share: what a sweep leaves has no owner afterwards.
        self._process = LedgerProcess(ledger, beat=ledger.beat)

    def recover(self, arguments: SweepArguments) -> None:
        """Make the entries of dead workers this sweep's own, in one transaction."""
        wait_for_locks(self._ledger, arguments, self._retry)

        def transaction() -> None:
            with self._ledger.alone(lock_timeout=5.0) as connection:
                found = find_candidates(self._ledger, connection, arguments)
                wanted = [(candidate.owner, candidate.scope) for candidate in found]
                recover(self._journal(), connection, wanted)

        self._run(transaction)

    def delete_rows(self, **options: Any) -> CleanupReport:
        """Delete the rows; those that are still there afterwards are left to the next sweep."""
        journal = self._journal()

        def tracker_of_all() -> ResourceTracker:
            with self._ledger.engine.connect() as connection:
                return load(journal, connection)

        tracker = self._run(tracker_of_all)
        try:
            return _SweepCleanup(tracker, **options).cleanup()
        finally:
            # What fails here is done by the next sweep.
            with suppress(sa.exc.SQLAlchemyError, LedgerError):
                put_aside(journal, left_id())

    def close(self) -> None:
        """Release the liveness lock: the next sweep recovers the rows that are left."""
        self._process.close()

    def _journal(self) -> Journal:
        journal = Journal(self._ledger, self._process, refuse_unwritable)
        journal.keeps_log = True
        return journal

    def _run(self, transaction: Callable[[], T]) -> T:
        dialect = self._ledger.dialect

        def is_transient(error: BaseException) -> bool:
            return dialect.fault(error) in {Fault.TRANSIENT, Fault.LOST}

        return self._retry.run(transaction, is_transient=is_transient)


class _SweepCleanup(CleanupManager):
    """A cleanup whose error says "run sweep()": no user has its tracker."""

    def _described(self, leftovers: Sequence[Leftover]) -> str:
        return describe_leftovers(leftovers, swept=True)
