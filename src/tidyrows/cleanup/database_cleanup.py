"""One database cleaned: doubts resolved, rows deleted and looked for, what is gone forgotten."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.diagnosis import add_details
from tidyrows.cleanup.executor import Executor
from tidyrows.cleanup.identity import identity_of
from tidyrows.cleanup.in_doubt import resolve_by_ledger, resolve_doubts
from tidyrows.cleanup.index_advice import advice, is_slow
from tidyrows.cleanup.keyless import KeylessRows
from tidyrows.cleanup.ledger_updates import LedgerUpdates
from tidyrows.cleanup.plan import place_of
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Held, Leftover, add_rows, count_in
from tidyrows.cleanup.verify import NOTHING, existing_rows, judge, unconfirmed
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.cleanup.resources import Part
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.cleanup.verify import Seen
    from tidyrows.keys import TableName
    from tidyrows.tracking.store import TableHoldings

logger = logging.getLogger("tidyrows")


class DatabaseCleanup:
    """The cleanup of what a tracker holds in one database; with a part, of these rows alone."""

    def __init__(
        self,
        run: CleanupRun,
        database: Database,
        held: list[TableHoldings],
        part: Part | None = None,
    ) -> None:
        self._run = run
        self._tracker = run.tracker
        self._report = run.report
        self._database = database
        self._part = part
        self._ledger = LedgerUpdates(run.tracker, database)
        if self._ledger.journal is None:
            self._all = held
            self._held = held if part is None else part.of(held)
        else:  # rows of an entry that is counted there are held by now
            self._look_again()
        held = self._all
        self._executor = Executor(
            run,
            database,
            self._ledger,
            identity=None if run.options.trust_keys else identity_of(held),
            others=None if part is None else part.others(held),
            stay=None if part is None else part.kept(held),
        )

    def run(self) -> list[Leftover]:
        """Delete everything that can be deleted.

        Returns:
            What is left over.

        Raises:
            SessionStateError: somebody's transaction is open on the only connection.
        """
        keyless = KeylessRows(self._run, self._database, self._ledger)
        try:
            self._forget_dropped()
            leftovers = self._resolve_doubts()
            if any(held.whole for held in self._held):
                keyless.delete(self._held)
                self._look_again()
            leftovers += self._delete()
            leftovers += keyless.again()
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- other databases are still to be cleaned; it is every row's reason, and the manager raises from it
            self._run.fail(error)
            self._look_again()
            leftovers = self._all_left(self._database.reason(error))
        finally:
            outcome = self._executor.outcome
            for name, rows in outcome.dependents.items():
                add_rows(self._report.dependents, rows, name)
            for name, rows in outcome.detached.items():
                add_rows(self._report.detached, rows, name)
        self._advise()
        return leftovers + self._unnamed()

    def _look_again(self) -> None:
        """Take a new snapshot of what the tracker holds."""
        name = self._database.name
        self._all = [e for e in self._tracker.snapshot() if e.table.name.database == name]
        self._held = self._all if self._part is None else self._part.of(self._all)

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
        if not any(held.nameless for held in self._held):
            return leftovers
        self._look_again()
        for held in self._held:
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
            dependents = [r for t, r in outcome.dependents.items() if place_of(t) == place]
            rows = outcome.deleted[place] + sum(map(len, dependents))
            if not is_slow(seconds, rows):
                continue
            # It is advice: where nobody can look, there is none.
            with (
                suppress(sa.exc.SQLAlchemyError, SessionStateError),
                self._database.reading() as connection,
            ):
                dialect, view = self._database.dialect, self._executor.view
                found = advice(connection, dialect, view, place, rows=rows, seconds=seconds)
                self._report.advice += tuple(found)

    def _forget_dropped(self) -> None:
        """Where tables may have been dropped, do not ask for their rows one by one."""
        if not self._tracker.saw_ddl(self._database.capture):
            return
        for held in self._held:
            if len(held.keys) and not self._database.has_table(held.table.name):
                count_in(self._report.already_gone, held.table.name, len(held.keys))
                self._tracker.store.forget(held.table, held.keys)
        self._look_again()

    def _resolve_doubts(self) -> list[Leftover]:
        leftovers: list[Leftover] = []
        journal = self._ledger.journal
        if journal is not None and journal.uncertain:
            ask = partial(resolve_by_ledger, self._tracker, self._database, journal)
            self._run.retry(self._database, ask)
            self._look_again()
        doubtful = [held for held in self._held if held.doubtful]
        for held in doubtful:
            table = held.table
            ask_rows = partial(resolve_doubts, self._database, held)
            resolved = self._run.retry(self._database, ask_rows)
            self._tracker.store.forget(table, held.doubtful.keys() - resolved.in_doubt.keys())
            self._tracker.store.resolve_keys(table, resolved.ours, committed=True)
            leftovers += [
                Leftover(table.name, table.row(key), reason)
                for key, reason in resolved.in_doubt.items()
            ]
        if doubtful:
            self._look_again()
        return leftovers

    def _delete(self) -> list[Leftover]:
        held = [held for held in self._held if len(held.keys)]
        if not held:
            return []
        self._ledger.count(self._all)
        outcome = self._executor.outcome
        try:
            batches = self._executor.delete(held)
            if not self._run.options.verify:
                looked_at = [b for b in batches if outcome.deleted[_place(b)] < len(b.keys)]
            else:
                looked_at = batches
            seen = self._look(looked_at)
        except BaseException:
            # Whatever stopped us: a key that is free again may be a stranger's by the next cleanup.
            for each in held:
                for keys in outcome.gone.get(place_of(each.table.name), ()):
                    self._tracker.store.forget(each.table, keys)
            raise
        leftovers: list[Leftover] = []
        for batch in batches:
            leftovers += self._account(batch, seen.get(batch.table.name, NOTHING))
        return leftovers

    def _look(self, batches: Sequence[Batch]) -> dict[TableName, Seen]:
        if not batches:
            return {}
        try:
            return self._run.retry(self._database, partial(existing_rows, self._database, batches))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- it becomes the reason of rows that nobody could look for
            return unconfirmed(batches, error)

    def _account(self, batch: Batch, seen: Seen) -> list[Leftover]:
        """Report one table's rows as deleted, gone or left over, and forget what is gone."""
        outcome, place, name = self._executor.outcome, _place(batch), batch.table.name
        deleted = outcome.deleted[place]
        refused, kept = outcome.refused.get(place, {}), outcome.kept.get(place, {})
        reasons, reappeared = judge(batch, seen, deleted, {**kept, **refused})
        if reasons:
            add_details(self._database, batch, seen, reasons)
        already_gone = len(batch.keys) - deleted - len(reasons)
        count_in(self._report.deleted, name, deleted)
        count_in(self._report.reappeared, name, reappeared)
        count_in(self._report.already_gone, name, already_gone)
        gone = [key for key in batch.keys if key not in reasons] if reasons else batch.keys
        self._tracker.store.forget(batch.table, gone)
        if logger.isEnabledFor(logging.DEBUG):
            _log(name, reasons, deleted=deleted, already_gone=already_gone, reappeared=reappeared)
        leftovers = []
        for key, reason in reasons.items():
            holder = kept[key].holder if key in kept and key not in refused else None
            if holder is None:
                leftovers.append(Leftover(name, batch.table.row(key), reason))
            else:
                self._report.held += (Held(batch.table.row(key), holder),)
        return leftovers


def _place(batch: Batch) -> tuple[str, str]:
    return place_of(batch.table.name)


def _log(name: TableName, reasons: dict[Any, Reason], **counts: int) -> None:
    """DEBUG of what became of a table's tracked rows: counts, never a key."""
    for what, count in counts.items():
        if count > 0:
            logger.debug("%s: %d tracked row(s) %s", name, count, what.replace("_", " "))
    for kind, count in Counter(reason.kind for reason in reasons.values()).items():
        logger.debug("%s: %d tracked row(s) stay: %s", name, count, kind.name)
