"""Recover the entries of dead workers, delete their rows, and leave the rest to the next sweep.

The numbers of entries give their order within one process only. So entries are replayed process by
process, and what is left of each tracker's rows is written under new numbers.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import sqlalchemy as sa

from tidyrows.capture.changes import Inserted, InsertedWhole
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.reasons import in_short
from tidyrows.cleanup.report import count_in
from tidyrows.dialects import Fault, was_dropped
from tidyrows.errors import LedgerError, TidyRowsError
from tidyrows.external import Externals
from tidyrows.ledger.entries import EXTERNAL, MAKING, ROWS, EntryReader
from tidyrows.ledger.entry_checks import bounded_body
from tidyrows.ledger.entry_table import entry_order
from tidyrows.ledger.journal import Journal
from tidyrows.ledger.process import LedgerProcess, OwnerKind
from tidyrows.retry import RetryPolicy
from tidyrows.sweep.dead_workers import SweepArguments, find_candidates, wait_for_locks
from tidyrows.sweep.owners import (
    OwnerLeftError,
    check_owner,
    forget_owners,
    leftover_of,
    refuse_lesser_writers,
)
from tidyrows.tracking.store import Store
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.cleanup.report import CleanupReport, Leftover
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.dialects import Dialect
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.table import Ledger
    from tidyrows.sweep.dead_workers import Candidate
    from tidyrows.tracking.store import TableHoldings

T = TypeVar("T")


@dataclass(slots=True)
class TrackerEntries:
    """What one tracker has entered; ``store`` holds what is left of its rows.

    ``former`` has the rows whose table has been emptied, rebuilt or made anew since, and the
    incarnation that they were inserted in: they are dead, and never targets.
    """

    store: Store = field(default_factory=Store)
    columns: dict[str, Any] = field(default_factory=dict)  # run, worker and test, as entered
    tests: dict[str, None] = field(default_factory=dict)
    externals: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)  # of the entries about rows
    former: dict[KeyedTable, dict[Any, str]] = field(default_factory=dict)


def read_entries(
    ledger: Ledger, connection: sa.Connection, owner: str
) -> dict[int, TrackerEntries]:
    """What is left of an owner's rows, by the number of its tracker.

    Raises:
        TidyRowsError: an entry cannot be read, or names what is never a target.
    """
    check_owner(ledger, connection, owner)
    table = ledger.table_on(connection)
    names = "scope maker seq kind schema_name table_name run worker test"
    rows = ledger.execute(
        connection,
        sa.select(*[table.c[name] for name in names.split()], bounded_body(table))
        .where(table.c.owner == owner, table.c.seq > 0)
        .order_by(*entry_order(table)),
    ).all()
    of_tracker: dict[int, TrackerEntries] = {}
    reader = EntryReader(connection, ledger.database)
    for scope, maker, seq, kind, schema, name, run, worker, test, body in rows:
        entries = of_tracker.setdefault(scope, TrackerEntries())
        if kind in MAKING or not entries.columns:
            entries.columns = {"run": run, "worker": worker, "test": test}
        if test:
            entries.tests[test] = None
        if kind == EXTERNAL:
            entries.externals[maker, seq] = reader.resource(body)
        else:
            entries.numbers.add((maker, seq))
            change = reader.change(kind, schema, name, body)
            if isinstance(change, (Inserted, InsertedWhole)):
                entries.store.apply(change)
            elif change is not None:
                for each in of_tracker.values():
                    change = each.store.apply(change)
    for entries in of_tracker.values():
        reader.hold_resources(Externals(), entries.externals)
    _forget_former(ledger, connection, of_tracker.values())
    return of_tracker


def read_owner(ledger: Ledger, connection: sa.Connection, owner: str) -> dict[int, TrackerEntries]:
    """As :func:`read_entries`; what keeps the entries from being read leaves that owner alone.

    Raises:
        OwnerLeftError: an entry cannot be read; the transaction may have been aborted.
    """
    try:
        return read_entries(ledger, connection, owner)
    except TidyRowsError as error:
        raise OwnerLeftError(error) from error
    except sa.exc.SQLAlchemyError as error:
        if ledger.dialect.fault(error) is not Fault.OTHER:
            raise
        text = f"Its entries cannot be read: {printable(in_short(error))}."
        raise OwnerLeftError(TidyRowsError(text)) from error


def _forget_former(
    ledger: Ledger, connection: sa.Connection, trackers: Iterable[TrackerEntries]
) -> None:
    """Forget the rows of former incarnations of their tables."""
    held = [(entries, each) for entries in trackers for each in entries.store.snapshot()]
    held = [(entries, each) for entries, each in held if each.incarnation or each.former]
    places = list(dict.fromkeys(each.table.place for _entries, each in held))
    now = ledger.dialect.incarnations(connection, places) if places else {}
    for entries, each in held:
        table, current = each.table, now.get(each.table.place)
        if current is None:
            continue
        former: dict[Any, str] = each.of_another(current)
        entries.store.forget(table, former)
        if each.incarnation not in {None, current}:
            former |= {("keyless", n): str(each.incarnation) for n in range(each.keyless_count)}
            entries.store.forget_keyless(table, each.keyless_rows)
            entries.store.forget_counted(table)
        if former:
            entries.former[table] = former


@dataclass(slots=True)
class Former:
    """How many rows of former incarnations are gone, and how many rows have the keys of others.

    Those may be ours where the table was rebuilt, and somebody else's where it was emptied.
    """

    gone: Counter[TableName] = field(default_factory=Counter)
    there: Counter[TableName] = field(default_factory=Counter)

    def add(
        self,
        connection: sa.Connection,
        dialect: Dialect,
        rows: Mapping[KeyedTable, Mapping[Any, str]],
    ) -> None:
        """Count these rows, by the incarnation that they were inserted in."""
        for table, former in rows.items():
            now = dialect.incarnations(connection, [table.place]).get(table.place, "")
            asked = [key for key, before in former.items() if not was_dropped(before, now)]
            there = dialect.existing_keys(connection, table, asked) if table.key_columns else []
            self.gone[table.name] += len(former) - len(there)
            self.there[table.name] += len(there)


class Recovery:
    """A process in the ledger, as each worker is one, that deletes the rows of dead workers."""

    def __init__(self, ledger: Ledger, retry: RetryPolicy | None = None) -> None:
        with ledger.looking() as connection:
            ledger.check(connection)
        self._ledger = ledger
        self._retry = retry or RetryPolicy()
        self._forgotten: dict[str, int] = {}
        self._left: dict[str, Leftover] = {}  # the owners whose entries stay where they are
        self._former = Former()
        # Not the process that the trackers share: what a sweep leaves must have no live owner.
        self._process = LedgerProcess(ledger, beat=ledger.beat)

    def forget(self, owners: Sequence[str]) -> None:
        """Delete the entries of these owners, in one transaction."""

        def forget() -> dict[str, int]:
            with self._ledger.transaction(lock_timeout=5.0) as connection:
                return forget_owners(self._ledger, connection, owners)

        self._forgotten = self._run(forget) if owners else {}

    def recover(self, arguments: SweepArguments) -> None:
        """Make the entries of dead workers this process's own, each owner's in one transaction."""
        wait_for_locks(self._ledger, arguments, self._retry)
        candidates = self._run(partial(self._find, arguments))
        for owner, candidate in sorted({each.owner: each for each in candidates}.items()):
            try:
                self._run(partial(self._recover, arguments, owner))
            except OwnerLeftError as why:
                self._left[owner] = leftover_of(candidate, why)
            else:
                self._left.pop(owner, None)

    def delete_rows(self, **options: Any) -> CleanupReport:
        """Delete the rows; those that are still there afterwards are left to the next sweep."""
        tracker, dead = self._run(self._tracker)
        cleanup = _SweepCleanup(tracker, **options)
        cleanup.dead = dead
        cleanup.former = self._former
        try:
            cleanup._owners = tuple(self._left.values())  # noqa: SLF001 -- the class below
            cleanup._forgotten = self._forgotten  # noqa: SLF001
            cleanup._prepared = self._prepared()  # noqa: SLF001
            return cleanup.cleanup()
        finally:
            # What fails here is done by the next sweep.
            with suppress(sa.exc.SQLAlchemyError, LedgerError, ConnectionError):
                self._put_aside()
            # An error may keep the tracker for long: what becomes of these rows is not its own.
            tracker.store.forget_database(self._ledger.database)

    def _prepared(self) -> tuple[str, ...]:
        """The prepared transactions that may have entries, which show when they are committed."""
        with self._ledger.looking() as connection, suppress(sa.exc.DBAPIError):  # it may be a right
            found = self._ledger.dialect.prepared_writers(connection, self._ledger.name)
            return tuple(sorted(found))
        return ()

    def close(self, **options: float) -> None:
        """Release the liveness lock: the next sweep recovers the rows that are left."""
        self._process.close(**options)

    def _run(self, transaction: Callable[[], T]) -> T:
        return self._retry.run(transaction, is_transient=self._ledger.dialect.is_transient)

    def _find(self, arguments: SweepArguments) -> list[Candidate]:
        with self._ledger.transaction(lock_timeout=5.0) as connection:
            found = find_candidates(self._ledger, connection, arguments)
            if found and not arguments.as_superuser:
                refuse_lesser_writers(self._ledger, connection)
            return found

    def _recover(self, arguments: SweepArguments, owner: str) -> None:
        ledger = self._ledger
        with ledger.transaction(lock_timeout=5.0) as connection:
            table = ledger.table_on(connection)
            former = Former()
            # Locked before they are read, so that no other process recovers them meanwhile.
            locked = sa.select(table.c.seq).where(table.c.owner == owner).with_for_update()
            ledger.execute(connection, locked).all()
            wanted = find_candidates(ledger, connection, arguments, owner)
            of_tracker = read_owner(ledger, connection, owner) if wanted else {}
            for scope in sorted(each.scope for each in wanted):
                if scope in of_tracker:
                    former.add(connection, ledger.dialect, of_tracker[scope].former)
                    self._rewrite(connection, owner, scope, of_tracker.pop(scope))
            left = (each.externals or each.store.snapshot() for each in of_tracker.values())
            if wanted and not any(left):
                gone = sa.delete(table).where(table.c.owner == owner, table.c.seq > 0)
                ledger.execute(connection, gone)
        self._former.gone += former.gone
        self._former.there += former.there

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
        rows = (*here, table.c.kind.in_(ROWS))
        last = ledger.execute(connection, sa.select(sa.func.max(table.c.written)).where(*rows))
        written = last.scalar()
        ledger.execute(connection, sa.delete(table).where(*rows))
        externals = sa.update(table).where(*here, table.c.kind == EXTERNAL)
        ledger.execute(connection, externals.values(owner=new_owner, scope=journal.scope))
        left, columns = list(entries.store.changes(ledger.database)), entries.columns
        columns = columns | {"owner": new_owner} | ({"written": written} if left else {})
        journal.write(connection, left, WorkerContext.current(), left, **columns)

    def _tracker(self) -> tuple[ResourceTracker, list[TableHoldings]]:
        """A tracker of all rows that are this process's own, and what each dead one held."""
        ledger, journal = self._ledger, Journal(self._ledger, self._process, _refuse)
        journal.keeps_log = True
        tracker = ResourceTracker(ledger.engine, allow_production=True)
        tracker.dismiss_leak_warning()
        externals: dict[tuple[str, int], dict[str, Any]] = {}
        dead: list[TableHoldings] = []
        with ledger.looking() as connection:
            for entries in read_entries(ledger, connection, self._process.id).values():
                externals |= entries.externals
                dead += entries.store.snapshot()
                journal.committed |= entries.numbers
                for change in entries.store.changes(ledger.database):
                    tracker.store.apply(change)
            reader = EntryReader(connection, ledger.database)
            journal.externals = reader.hold_resources(tracker.external_resources, externals)
        tracker.journals.attach(journal)
        compared = {each.table.place for each in dead if each.hashes is not None}
        return tracker, [each for each in dead if each.table.place in compared]

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
    former = Former()
    dead: Sequence[TableHoldings] = ()

    def _new_run(self) -> CleanupRun:
        run = super()._new_run()
        run.is_sweep, run.dead = True, self.dead
        for name in self.former.gone:
            count_in(run.report.already_gone, name, self.former.gone[name])
            count_in(run.report.untouched, name, self.former.there[name])
        return run
