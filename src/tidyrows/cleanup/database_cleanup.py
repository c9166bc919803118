"""The cleanup of one database: resolve doubts, delete, verify, report, forget what is gone."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.connection import DeadlineError
from tidyrows.cleanup.deletion import NewIncarnationError
from tidyrows.cleanup.diagnosis import SLOW, add_details, advice
from tidyrows.cleanup.executor import Executor
from tidyrows.cleanup.identity import identity_of
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Held, Leftover, count_in
from tidyrows.cleanup.run import LedgerUpdates, Outcome, Scope
from tidyrows.cleanup.verify import (
    NOTHING,
    Seen,
    altered_keys,
    assumed,
    existing_rows,
    judge,
    resolve_by_ledger,
    resolve_doubts,
    unconfirmed,
)
from tidyrows.dialects import Fault, was_dropped
from tidyrows.errors import SessionStateError
from tidyrows.keys import TableName
from tidyrows.schema.reflect import without_reflection_warnings
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.cleanup.resources import Phase
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings

logger = logging.getLogger("tidyrows")


class DatabaseCleanup:
    """The cleanup of what a tracker holds in one database; with a phase, of these rows alone."""

    def __init__(
        self,
        run: CleanupRun,
        database: Database,
        held: list[TableHoldings],
        phase: Phase | None = None,
    ) -> None:
        self._run = run
        self._tracker = run.tracker
        self._report = run.report
        self._database = database
        self._phase = phase
        self._altered: dict[TableName, dict[Any, Reason]] = {}
        self._ledger = LedgerUpdates.of(run.tracker, database)
        # rows of an entry that is in the journal are held by now
        self._set_held(held if self._ledger is None else run.held_in(database))
        self._outcome = Outcome(dependents=self._report.dependents, detached=self._report.detached)
        self._scope = Scope(run, database, self._ledger, self._outcome)
        if not run.options.trust_keys:
            self._scope.identity = identity_of(self._all, is_sweep=run.is_sweep, dead=run.dead)
        if phase is not None:
            self._scope.tracked = phase.others(self._all)
            self._scope.stay = phase.kept(self._all)

    def run(self) -> list[Leftover]:
        """Delete everything that can be deleted."""
        leftovers: list[Leftover] = []
        try:
            if self._tracker.engines.saw_ddl(self._database.capture):
                self._forget_dropped()
            if self._ledger is not None and self._ledger.journal.uncertain:
                journal = self._ledger.journal
                ask = partial(resolve_by_ledger, self._tracker, self._database, journal)
                self._run.retry(self._database, ask)
                self._set_held(self._run.held_in(self._database))
            for held in self._sent:
                leftovers += self._look_for_sent(held)
            if self._sent:
                self._set_held(self._run.held_in(self._database))
            for held in self._in_doubt:
                leftovers += self._resolve_doubts(held)
            if self._in_doubt:
                self._set_held(self._run.held_in(self._database))
            leftovers += self._delete_all()
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- other databases are still to be cleaned; it is every row's reason, and the manager raises from it
            self._run.fail(error)
            self._set_held(self._run.held_in(self._database))
            leftovers = self._all_left(self._database.reason(error))
        outcome = self._outcome
        if outcome.seconds and max(outcome.seconds.values()) > SLOW:
            self._advise()
        return leftovers + self._unnamed() if self._keyless else leftovers

    def _set_held(self, held: list[TableHoldings]) -> None:
        self._all = held
        self._held = held if self._phase is None else self._phase.of(held)
        self._keyed: list[TableHoldings] = []
        self._in_doubt: list[TableHoldings] = []
        self._keyless: list[TableHoldings] = []
        self._sent: list[TableHoldings] = []
        for each in self._held:
            if each.sent:
                self._sent.append(each)
                altered = self._altered.get(each.table.name, ())
                keys = KeySet(key for key in each.keys if key not in altered)
                doubts = {k: made for k, made in each.in_doubt.items() if k not in altered}
                each = replace(each, keys=keys, in_doubt=doubts)  # noqa: PLW2901 -- for this cleanup
            if len(each.keys):
                self._keyed.append(each)
            if each.in_doubt:
                self._in_doubt.append(each)
            if each.keyless_count:
                self._keyless.append(each)

    def _all_left(self, reason: Reason) -> list[Leftover]:
        leftovers = []
        for held in self._held:
            name = held.table.name
            keys = (*held.keys.in_order(), *held.in_doubt)
            leftovers += [Leftover(name, held.table.row(key), reason) for key in keys]
            if held.keyless_rows:
                leftovers.append(Leftover(name, None, reason, len(held.keyless_rows)))
        return leftovers

    def _unnamed(self) -> list[Leftover]:
        """The rows that no DELETE can name, unless they are gone with their table."""
        leftovers: list[Leftover] = []
        self._set_held(self._run.held_in(self._database))
        for held in self._keyless:
            counts = (
                (LeftoverKind.UNNAMED, held.keyless_unknown),
                (LeftoverKind.UNANSWERED, held.keyless_in_doubt),
            )
            name = held.table.name
            found = [Leftover(name, None, Reason(kind), count) for kind, count in counts if count]
            if found and self._database.has_table(name):
                leftovers += found
            elif found:
                self._tracker.store.forget_counted(held.table)
        return leftovers

    def _advise(self) -> None:
        """Where deletes were slow, name the index that would have helped."""
        outcome = self._outcome
        for place, seconds in outcome.seconds.items():
            dependents = outcome.dependents.get(TableName(self._database.name, *place), ())
            rows = outcome.deleted[place] + len(dependents)
            found = advice(self._database, self._scope.view, place, rows=rows, seconds=seconds)
            self._report.advice += tuple(found)

    def _forget_dropped(self) -> None:
        """Where tables may have been dropped, do not ask for their rows one by one."""
        for held in self._keyed:
            if not self._database.has_table(held.table.name):
                count_in(self._report.already_gone, held.table.name, len(held.keys))
                self._tracker.store.forget(held.table, held.keys)
        self._set_held(self._run.held_in(self._database))

    def _look_for_sent(self, held: TableHoldings) -> list[Leftover]:
        """Look for the keys that nobody has seen: some name no row of ours, and stay."""
        name = held.table.name
        seen, altered = self._run.retry(self._database, partial(altered_keys, self._database, held))
        self._tracker.store.see(held.table, seen)
        self._altered[name] = altered
        return [Leftover(name, held.table.row(key), why) for key, why in altered.items()]

    def _resolve_doubts(self, held: TableHoldings) -> list[Leftover]:
        table, store = held.table, self._tracker.store
        ask = partial(resolve_doubts, self._database, held)
        ours, in_doubt = self._run.retry(self._database, ask)
        store.forget(table, held.in_doubt.keys() - in_doubt.keys())
        store.resolve_keys(table, ours, committed=True)
        return [Leftover(table.name, table.row(key), in_doubt[key]) for key in in_doubt]

    def _delete_all(self) -> list[Leftover]:
        """Delete rows with and without keys, which may reference each other."""
        if not self._keyless:
            return self._delete() if self._keyed else []
        rows = KeylessDeletion(self._run, self._database, self._ledger)
        rows.delete(self._keyless)
        self._set_held(self._run.held_in(self._database))
        leftovers = self._delete() if self._keyed else []
        return leftovers + rows.delete_refused()

    def _delete(self) -> list[Leftover]:
        if self._ledger is not None:
            self._ledger.count(self._all)
        outcome = self._outcome
        try:
            batches = looked_at = Executor(self._scope).delete(self._keyed)
            if not self._run.options.verify:
                looked_at = [b for b in batches if outcome.deleted[b.table.place] < len(b.keys)]
            seen = self._look(looked_at) if looked_at else {}
        except BaseException:
            # Whatever was raised: another row may get a free key before the next cleanup.
            for each in self._keyed:
                for keys in outcome.gone.get(each.table.place, ()):
                    self._tracker.store.forget(each.table, keys)
            raise
        leftovers: list[Leftover] = []
        for batch in batches:
            leftovers += self._account(batch, seen.get(batch.table.name, NOTHING))
        return leftovers

    def _look(self, batches: Sequence[Batch]) -> dict[TableName, Seen]:
        outcome, database = self._outcome, self._database
        if self._run.remaining() <= 0 or database.is_silent:
            late = DeadlineError("the cleanup's deadline had passed before it was looked for")
            return assumed(batches, outcome, late)
        asked, untried = batches, []
        if outcome.kept or outcome.refused:
            untried = [batch for batch in batches if outcome.is_late(batch)]
            asked = [batch for batch in batches if batch not in untried]
        try:
            seen = self._run.retry(database, partial(existing_rows, database, asked))
        except SessionStateError:
            raise
        except Exception as failure:  # noqa: BLE001 -- it becomes the reason of the rows
            if database.is_silent or isinstance(failure, DeadlineError):
                return assumed(batches, outcome, failure)
            seen = unconfirmed(asked, failure)
        return seen | assumed(untried, outcome) if untried else seen

    def _account(self, batch: Batch, seen: Seen) -> list[Leftover]:
        """Report one table's rows as deleted, gone or left over, and forget what is gone."""
        outcome, place, name = self._outcome, batch.table.place, batch.table.name
        deleted = outcome.deleted[place]
        lost = self._scope.incarnations.dropped.get(place, set())
        lost = lost | outcome.overtaken.get(place, set())
        if lost:
            unconfirmed = {k: why for k, why in seen.unconfirmed.items() if k not in lost}
            seen = Seen([key for key in seen.there if key not in lost], unconfirmed)
        refused, kept = outcome.refused.get(place, {}), outcome.kept.get(place, {})
        reasons: dict[Any, Reason] = {}
        if seen.there or seen.unconfirmed:
            reasons, reappeared = judge(batch, seen, deleted, {**kept, **refused})
            add_details(self._database, batch, seen, reasons)
            count_in(self._report.reappeared, name, reappeared)
        already_gone = len(batch.keys) - deleted - len(reasons)
        count_in(self._report.deleted, name, deleted)
        if already_gone:
            count_in(self._report.already_gone, name, already_gone)
        gone = [key for key in batch.keys if key not in reasons] if reasons else batch.keys
        self._tracker.store.forget(batch.table, gone)
        if logger.isEnabledFor(logging.DEBUG):
            _log(name, reasons, deleted=deleted, already_gone=already_gone)
        leftovers = []
        for key, reason in reasons.items():
            holder = kept[key].holder if key in kept and key not in refused else None
            if holder is None:
                leftovers.append(Leftover(name, batch.table.row(key), reason))
            else:
                self._report.held += (Held(batch.table.row(key), holder),)
        return leftovers


def _log(name: TableName, reasons: dict[Any, Reason], **counts: int) -> None:
    """DEBUG of what became of a table's tracked rows: counts, never a key."""
    for what, count in counts.items():
        if count > 0:
            logger.debug("%s: %d tracked row(s) %s", name, count, what.replace("_", " "))
    for kind, count in Counter(reason.kind for reason in reasons.values()).items():
        logger.debug("%s: %d tracked row(s) stay: %s", name, count, kind.name)


# -- rows of tables without a primary key: by all their columns, and as many as were inserted ------
#
# Equal rows cannot be told apart, so a transaction that may have been committed is never run again:
# it could delete an equal row of somebody else.

_Values = list[tuple[Any, ...]]


class _UnansweredError(Exception):
    """The answer to a COMMIT was lost."""


class KeylessDeletion:
    """The rows without a key that a cleanup of one database deletes."""

    def __init__(self, run: CleanupRun, database: Database, ledger: LedgerUpdates | None) -> None:
        self._run = run
        self._database = database
        self._ledger = ledger
        self._pending: list[tuple[KeyedTable, _Values]] = []
        self._incarnations: dict[TableName, str | None] = {}
        self._refused: list[Leftover] = []

    def delete(self, holdings: Iterable[TableHoldings]) -> None:
        """Delete what can go before the rows with keys, which such rows may reference."""
        for held in holdings:
            if not self._run.options.trust_keys:
                self._incarnations[held.table.name] = held.incarnation
            if (
                held.keyless_rows
                and self._delete_or_reason(held.table, held.keyless_rows) is not None
            ):
                self._pending.append((held.table, held.keyless_rows))

    def delete_refused(self) -> list[Leftover]:
        """Try once more what failed: rows with keys that referenced it are gone now."""
        pending, self._pending = self._pending, []
        for table, rows in pending:
            if self._delete_or_reason(table, rows) is None:
                continue
            for equal in _equal(rows):  # one that must stay keeps no other
                reason = self._delete_or_reason(table, equal)
                if reason is not None:
                    self._refused.append(Leftover(table.name, None, reason, len(equal)))
        return self._refused

    def _delete_or_reason(self, table: KeyedTable, rows: _Values) -> Reason | None:
        """Delete rows of one table in one transaction; returns the reason if that failed."""
        transaction = partial(self._delete, table, rows)
        try:
            deleted, ignored = self._run.retry(self._database, transaction)
        except SessionStateError:
            raise
        except _UnansweredError:
            return None  # they are reported as in doubt from now on
        except NewIncarnationError as error:
            if not was_dropped(*error.args):
                return Reason(LeftoverKind.UNCERTAIN, names=(str(table.name),))
            self._run.tracker.store.forget_keyless(table, rows)
            count_in(self._run.report.already_gone, table.name, len(rows))
            return None
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything; it is the rows' reason
            return self._database.reason(error)
        count_in(self._run.report.deleted, table.name, deleted)
        count_in(self._run.report.already_gone, table.name, len(rows) - len(ignored) - deleted)
        if ignored:
            reason = Reason(LeftoverKind.IGNORED)
            self._refused.append(Leftover(table.name, None, reason, len(ignored)))
        return None

    def _delete(self, table: KeyedTable, rows: _Values) -> tuple[int, _Values]:
        """One transaction: how many rows it deleted, and which are there yet, without an error."""
        sent = False
        ignored: _Values = []
        gone: _Values = []
        deleted = 0
        dialect, tracker = self._database.dialect, self._run.tracker
        try:
            with self._database.writing() as connection:
                for equal in _equal(rows) if _is_comparable(connection, table) else ():
                    count = dialect.delete_equal_rows(connection, table, equal[0], len(equal))
                    _refuse_more(count, equal)
                    deleted += count
                    if count < len(equal):
                        there = dialect.count_equal_rows(connection, table, equal[0])
                        ignored += equal[: min(there, len(equal) - count)]
                if deleted:
                    self._refuse_former(connection, table)
                stay = {id(row) for row in ignored}
                gone = [row for row in rows if id(row) not in stay]
                if self._ledger is not None:
                    self._ledger.record_unkeyed(connection, table, gone)
                sent = True
        except BaseException as error:
            if not sent or dialect.fault(error) in {Fault.TRANSIENT, Fault.CONSTRAINT}:
                raise
            if self._ledger is not None:
                self._ledger.unanswered()
                self._ledger.begin()  # it is not tried again
            tracker.store.forget_keyless(table, rows, certain=False)
            if not isinstance(error, Exception) or isinstance(error, SessionStateError):
                raise
            raise _UnansweredError from error
        if self._ledger is not None:
            self._ledger.committed()
        tracker.store.forget_keyless(table, gone)
        return deleted, ignored

    def _refuse_former(self, connection: sa.Connection, table: KeyedTable) -> None:
        """Roll back where the table was emptied or made anew; it is locked by the DELETE."""
        before = self._incarnations.get(table.name)
        if before:
            found = self._database.dialect.incarnations(connection, [table.place])
            now = found.get(table.place, "")
            if now != before:
                raise NewIncarnationError(before, now)


def _is_comparable(connection: sa.Connection, table: KeyedTable) -> bool:
    """Whether the table still exists; raises LookupError if its Table lacks a column."""
    try:
        with without_reflection_warnings():
            found = sa.inspect(connection).get_columns(table.table.name, schema=table.name.schema)
    except sa.exc.NoSuchTableError:
        return False
    known = {column.name.lower() for column in table.table.columns}
    unseen = [each["name"] for each in found if each["name"].lower() not in known]
    if unseen:
        raise LookupError(
            f"the Table of {table.name} lacks the column {unseen[0]!r}, so its rows cannot be "
            f"told from others; add the column, or give the table a primary key"
        )
    return True


def _refuse_more(count: int, equal: _Values) -> None:
    if count > len(equal):
        raise RuntimeError(f"a DELETE of {len(equal)} rows took {count}; it was rolled back")


def _equal(rows: Sequence[tuple[Any, ...]]) -> list[_Values]:
    """The rows in groups of equal ones."""
    groups: dict[str, _Values] = {}
    for row in rows:
        groups.setdefault(repr(row), []).append(row)
    return list(groups.values())
