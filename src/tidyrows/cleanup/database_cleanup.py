"""The cleanup of one database: resolve doubts, delete, verify, report, forget what is gone."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.diagnosis import SLOW, add_details, advice, is_slow
from tidyrows.cleanup.executor import Executor
from tidyrows.cleanup.identity import identity_of
from tidyrows.cleanup.in_doubt import resolve_by_ledger, resolve_doubts
from tidyrows.cleanup.keyless import KeylessDeletion
from tidyrows.cleanup.ledger_updates import LedgerUpdates
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Held, Leftover, add_rows, count_in
from tidyrows.cleanup.verify import NOTHING, existing_rows, judge, unconfirmed
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.cleanup.resources import Phase
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.cleanup.verify import Seen
    from tidyrows.keys import TableName
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
        self._ledger = LedgerUpdates.of(run.tracker, database)
        # rows of an entry that is in the journal are held by now
        self._set_held(held if self._ledger is None else run.held_in(database))
        self._executor = Executor(
            run,
            database,
            self._ledger,
            identity=None if run.options.trust_keys else identity_of(self._all),
            others=None if phase is None else phase.others(self._all),
            stay=None if phase is None else phase.kept(self._all),
        )

    def run(self) -> list[Leftover]:
        """Delete everything that can be deleted."""
        leftovers: list[Leftover] = []
        outcome = self._executor.outcome
        try:
            if self._tracker.engines.saw_ddl(self._database.capture):
                self._forget_dropped()
            if self._ledger is not None and self._ledger.journal.uncertain:
                journal = self._ledger.journal
                ask = partial(resolve_by_ledger, self._tracker, self._database, journal)
                self._run.retry(self._database, ask)
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
        finally:
            for name, rows in outcome.dependents.items():
                add_rows(self._report.dependents, rows, name)
            for name, rows in outcome.detached.items():
                add_rows(self._report.detached, rows, name)
        if outcome.seconds and max(outcome.seconds.values()) > SLOW:
            self._advise()
        return leftovers + self._unnamed() if self._keyless else leftovers

    def _set_held(self, held: list[TableHoldings]) -> None:
        self._all = held
        self._held = held if self._phase is None else self._phase.of(held)
        self._keyed: list[TableHoldings] = []
        self._in_doubt: list[TableHoldings] = []
        self._keyless: list[TableHoldings] = []
        for each in self._held:
            if len(each.keys):
                self._keyed.append(each)
            if each.doubtful:
                self._in_doubt.append(each)
            if each.whole or each.unkeyed or each.unsure:
                self._keyless.append(each)

    def _all_left(self, reason: Reason) -> list[Leftover]:
        leftovers = []
        for held in self._held:
            name = held.table.name
            keys = (*held.keys.in_order(), *held.doubtful)
            leftovers += [Leftover(name, held.table.row(key), reason) for key in keys]
            if held.whole:
                leftovers.append(Leftover(name, None, reason, len(held.whole)))
        return leftovers

    def _unnamed(self) -> list[Leftover]:
        """The rows that no DELETE can name, unless they are gone with their table."""
        leftovers: list[Leftover] = []
        self._set_held(self._run.held_in(self._database))
        for held in self._keyless:
            counts = ((LeftoverKind.UNNAMED, held.unkeyed), (LeftoverKind.UNANSWERED, held.unsure))
            name = held.table.name
            found = [Leftover(name, None, Reason(kind), count) for kind, count in counts if count]
            if found and self._database.has_table(name):
                leftovers += found
            elif found:
                self._tracker.store.forget_counted(held.table)
        return leftovers

    def _advise(self) -> None:
        """Where deletes were slow, name the index that would have helped."""
        outcome = self._executor.outcome
        for place, seconds in outcome.seconds.items():
            dependents = [r for t, r in outcome.dependents.items() if t.place == place]
            rows = outcome.deleted[place] + sum(map(len, dependents))
            if not is_slow(seconds, rows):
                continue
            # It is only advice: no error of it may surface.
            with (
                suppress(sa.exc.SQLAlchemyError, SessionStateError),
                self._database.reading() as connection,
            ):
                dialect, view = self._database.dialect, self._executor.view
                found = advice(connection, dialect, view, place, rows=rows, seconds=seconds)
                self._report.advice += tuple(found)

    def _forget_dropped(self) -> None:
        """Where tables may have been dropped, do not ask for their rows one by one."""
        for held in self._keyed:
            if not self._database.has_table(held.table.name):
                count_in(self._report.already_gone, held.table.name, len(held.keys))
                self._tracker.store.forget(held.table, held.keys)
        self._set_held(self._run.held_in(self._database))

    def _resolve_doubts(self, held: TableHoldings) -> list[Leftover]:
        table, store = held.table, self._tracker.store
        resolved = self._run.retry(self._database, partial(resolve_doubts, self._database, held))
        store.forget(table, held.doubtful.keys() - resolved.in_doubt.keys())
        store.resolve_keys(table, resolved.ours, committed=True)
        return [
            Leftover(table.name, table.row(key), reason)
            for key, reason in resolved.in_doubt.items()
        ]

    def _delete_all(self) -> list[Leftover]:
        """Delete rows with and without keys, which may reference each other."""
        if not self._keyless:
            return self._delete() if self._keyed else []
        rows = KeylessDeletion(self._run, self._database, self._ledger)
        rows.delete(self._keyless)
        self._set_held(self._run.held_in(self._database))
        leftovers = self._delete() if self._keyed else []
        return leftovers + rows.again()

    def _delete(self) -> list[Leftover]:
        if self._ledger is not None:
            self._ledger.count(self._all)
        outcome = self._executor.outcome
        try:
            batches = looked_at = self._executor.delete(self._keyed)
            if not self._run.options.verify:
                looked_at = [b for b in batches if outcome.deleted[b.table.place] < len(b.keys)]
            seen = self._look(looked_at) if looked_at else {}
        except BaseException:
            # Whatever stopped us: a key that is free again may be a stranger's by the next cleanup.
            for each in self._keyed:
                for keys in outcome.gone.get(each.table.place, ()):
                    self._tracker.store.forget(each.table, keys)
            raise
        leftovers: list[Leftover] = []
        for batch in batches:
            leftovers += self._account(batch, seen.get(batch.table.name, NOTHING))
        return leftovers

    def _look(self, batches: Sequence[Batch]) -> dict[TableName, Seen]:
        try:
            return self._run.retry(self._database, partial(existing_rows, self._database, batches))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- it becomes the reason of the rows
            return unconfirmed(batches, error)

    def _account(self, batch: Batch, seen: Seen) -> list[Leftover]:
        """Report one table's rows as deleted, gone or left over, and forget what is gone."""
        outcome, place, name = self._executor.outcome, batch.table.place, batch.table.name
        deleted = outcome.deleted[place]
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


def _place(batch: Batch) -> tuple[str, str]:
    return batch.table.place


def _log(name: TableName, reasons: dict[Any, Reason], **counts: int) -> None:
    """DEBUG of what became of a table's tracked rows: counts, never a key."""
    for what, count in counts.items():
        if count > 0:
            logger.debug("%s: %d tracked row(s) %s", name, count, what.replace("_", " "))
    for kind, count in Counter(reason.kind for reason in reasons.values()).items():
        logger.debug("%s: %d tracked row(s) stay: %s", name, count, kind.name)
