"""Recover the entries of dead workers, delete their rows, and leave the rest to the next sweep.

The numbers of entries give their order within one process only. So entries are replayed process by
process, and what is left of each tracker's rows is written under new numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import sqlalchemy as sa

from tidyrows.capture.changes import Inserted, InsertedWhole
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.dialects import Fault
from tidyrows.errors import LedgerError, TidyRowsError
from tidyrows.ledger.entries import (
    EXTERNAL,
    MAKING,
    ROWS,
    EntryReader,
    unreadable_resource,
)
from tidyrows.ledger.entry_table import entry_order
from tidyrows.ledger.journal import Journal
from tidyrows.ledger.process import LedgerProcess, OwnerKind
from tidyrows.retry import RetryPolicy
from tidyrows.sweep.dead_workers import SweepArguments, find_candidates, wait_for_locks
from tidyrows.tracking.store import Store
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import TableName
    from tidyrows.ledger.table import Ledger

T = TypeVar("T")


@dataclass(slots=True)
class TrackerEntries:
    """What one tracker has entered; ``store`` holds what is left of its rows."""

    store: Store = field(default_factory=Store)
    columns: dict[str, Any] = field(default_factory=dict)  # run, worker and test, as entered
    tests: dict[str, None] = field(default_factory=dict)
    externals: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)  # of the entries about rows


def read_entries(
    ledger: Ledger, connection: sa.Connection, owner: str
) -> dict[int, TrackerEntries]:
    """What is left of an owner's rows, by the number of its tracker."""
    table = ledger.table_on(connection)
    names = "scope maker seq kind schema_name table_name body run worker test"
    rows = ledger.execute(
        connection,
        sa.select(*[table.c[name] for name in names.split()])
        .where(table.c.owner == owner, table.c.seq > 0)
        .order_by(*entry_order(table)),
    ).all()
    of_tracker: dict[int, TrackerEntries] = {}
    reader = EntryReader(connection, ledger.database)
    for scope, maker, seq, kind, schema, name, body, run, worker, test in rows:
        entries = of_tracker.setdefault(scope, TrackerEntries())
        if kind in MAKING or not entries.columns:
            entries.columns = {"run": run, "worker": worker, "test": test}
        if test:
            entries.tests[test] = None
        if kind == EXTERNAL:
            try:
                entries.externals[maker, seq] = json.loads(body)
            except ValueError as error:
                raise unreadable_resource() from error
        elif kind in ROWS:
            entries.numbers.add((maker, seq))
            change = reader.change(kind, schema, name, body)
            if isinstance(change, (Inserted, InsertedWhole)):
                entries.store.apply(change)
            elif change is not None:
                for each in of_tracker.values():
                    change = each.store.apply(change)
        else:
            raise TidyRowsError(
                f"The ledger has an entry of the unknown kind {kind!r}; nothing was deleted. Was "
                f"it written by another version of tidyrows?"
            )
    return of_tracker


class Recovery:
    """A process in the ledger, as each worker is one, that deletes the rows of dead workers."""

    def __init__(self, ledger: Ledger, retry: RetryPolicy | None = None) -> None:
        with ledger.engine.connect() as connection:
            ledger.check(connection)
        self._ledger = ledger
        self._retry = retry or RetryPolicy()
        # Not the process that the trackers share: what a sweep leaves must have no live owner.
        self._process = LedgerProcess(ledger, beat=ledger.beat)

    def recover(self, arguments: SweepArguments) -> None:
        """Make the entries of dead workers this process's own, in one transaction."""
        wait_for_locks(self._ledger, arguments, self._retry)
        self._run(lambda: self._recover(arguments))

    def delete_rows(self, **options: Any) -> CleanupReport:
        """Delete the rows; those that are still there afterwards are left to the next sweep."""
        tracker = self._run(self._tracker)
        try:
            return _SweepCleanup(tracker, **options).cleanup()
        finally:
            # What fails here is done by the next sweep.
            with suppress(sa.exc.SQLAlchemyError, LedgerError):
                self._put_aside()

    def close(self) -> None:
        """Release the liveness lock: the next sweep recovers the rows that are left."""
        self._process.close()

    def _run(self, transaction: Callable[[], T]) -> T:
        fault = self._ledger.dialect.fault
        passing = {Fault.TRANSIENT, Fault.LOST}
        return self._retry.run(transaction, is_transient=lambda error: fault(error) in passing)

    def _recover(self, arguments: SweepArguments) -> None:
        ledger = self._ledger
        with ledger.transaction(lock_timeout=5.0) as connection:
            table = ledger.table_on(connection)
            wanted: dict[str, list[int]] = defaultdict(list)
            for candidate in find_candidates(ledger, connection, arguments):
                wanted[candidate.owner].append(candidate.scope)
            for owner, scopes in sorted(wanted.items()):
                # Locked before they are read, so that no other process recovers them meanwhile.
                locked = sa.select(table.c.seq).where(table.c.owner == owner).with_for_update()
                ledger.execute(connection, locked).all()
                of_tracker = read_entries(ledger, connection, owner)
                for scope in sorted(scopes):
                    if scope in of_tracker:
                        self._rewrite(connection, owner, scope, of_tracker.pop(scope))
                if not any(each.externals or each.store.snapshot() for each in of_tracker.values()):
                    left = sa.delete(table).where(table.c.owner == owner, table.c.seq > 0)
                    ledger.execute(connection, left)

    def _rewrite(
        self,
        connection: sa.Connection,
        owner: str,
        scope: int,
        entries: TrackerEntries,
        new_owner: str | None = None,
    ) -> None:
        """Write what is left of one tracker's rows as entries of this process, or of that owner."""
        ledger, new_owner = self._ledger, new_owner or self._process.id
        table = ledger.table_on(connection)
        journal = Journal(ledger, self._process, _refuse)
        here = (table.c.owner == owner, table.c.scope == scope)
        ledger.execute(connection, sa.delete(table).where(*here, table.c.kind.in_(ROWS)))
        externals = sa.update(table).where(*here, table.c.kind == EXTERNAL)
        ledger.execute(connection, externals.values(owner=new_owner, scope=journal.scope))
        left, columns = entries.store.changes(ledger.database), entries.columns
        journal.write(connection, left, WorkerContext.current(), owner=new_owner, **columns)

    def _tracker(self) -> ResourceTracker:
        """A tracker of all rows that are this process's own."""
        ledger, journal = self._ledger, Journal(self._ledger, self._process, _refuse)
        journal.keeps_log = True
        tracker = ResourceTracker(ledger.engine, allow_production=True)
        tracker.dismiss_leak_warning()
        externals: dict[tuple[str, int], dict[str, Any]] = {}
        with ledger.engine.connect() as connection:
            for entries in read_entries(ledger, connection, self._process.id).values():
                externals |= entries.externals
                journal.committed |= entries.numbers
                for change in entries.store.changes(ledger.database):
                    tracker.store.apply(change)
            reader = EntryReader(connection, ledger.database)
            journal.externals = reader.hold_resources(tracker.external_resources, externals)
        tracker.journals.attach(journal)
        return tracker

    def _put_aside(self) -> None:
        """Give what is left to an owner that is no process, so that the next sweep recovers it."""
        left_to, own = OwnerKind.LEFT.new_id(), self._process.id
        with self._ledger.transaction(lock_timeout=5.0) as connection:
            for scope, entries in read_entries(self._ledger, connection, own).items():
                self._rewrite(connection, own, scope, entries, left_to)


def _refuse(table: TableName, reason: str) -> NoReturn:
    raise TidyRowsError(f"Rows of {table} cannot be written to the ledger again: {reason}")


class _SweepCleanup(CleanupManager):
    """A cleanup whose error says "run sweep()": no user has its tracker."""

    _swept = True
