"""One database cleaned: doubts settled, the plan run, rows looked for, what is gone forgotten."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.blockers import blocking_tables
from tidyrows.cleanup.causes import name_what_keeps
from tidyrows.cleanup.deletion import add_rows
from tidyrows.cleanup.in_doubt import ask_ledger, settle_doubt
from tidyrows.cleanup.index_advice import is_slow
from tidyrows.cleanup.keyless import UNSURE, Keyless
from tidyrows.cleanup.plan import Batch, place_of
from tidyrows.cleanup.report import Held, Leftover
from tidyrows.cleanup.verify import SILENT, Seen, in_short, judge, still_there
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.executor import Executor
    from tidyrows.cleanup.ledger_updates import Bookkeeping
    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.cleanup.resources import Part
    from tidyrows.keys import TableName
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

_UNKEYED = (
    "the table has no primary key, so its rows cannot be named; delete them yourself, or give it "
    "a primary key"
)


class Cleaning:
    """The cleanup of what a tracker holds in one database.

    Args:
        tracker: whose rows; it forgets those that are gone.
        database: where they are.
        executor: what deletes them.
        report: where it is written down.
        verify: look whether rows are gone even if all were counted as deleted.
        books: lets the ledger say what is deleted.
        part: which of the rows; all of them where it is None.

    Attributes:
        failure: what kept the whole database from being cleaned, or None.
    """

    def __init__(
        self,
        tracker: ResourceTracker,
        database: Database,
        executor: Executor,
        report: CleanupReport,
        *,
        verify: bool,
        books: Bookkeeping,
        part: Part | None = None,
    ) -> None:
        self._books = books
        self._tracker = tracker
        self._database = database
        self._executor = executor
        self._report = report
        self._verify = verify
        self._part = part
        self.failure: Exception | None = None

    def run(self) -> list[Leftover]:
        """Delete everything that can be deleted.

        Returns:
            What is left over, with its cause.

        Raises:
            SessionStateError: somebody's transaction is open on the only connection.
        """
        keyless = Keyless(self._tracker, self._database, self._executor, self._report, self._books)
        try:
            self._forget_dropped()
            leftovers = self._settle_doubts()
            keyless.run(self._held())
            leftovers += self._delete()
            leftovers += keyless.again()
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- other databases are still to be cleaned; it is every row's cause, and the manager raises from it
            self.failure = error
            leftovers = [
                Leftover(held.table.name, held.table.row(key), in_short(error))
                for held in self._held()
                for key in (*held.keys.in_order(), *held.doubtful)
            ]
            leftovers += keyless.stuck(self._held(), in_short(error))
        finally:
            outcome = self._executor.outcome
            self._report.retries += outcome.retries
            for into, found in (
                (self._report.dependents, outcome.dependents),
                (self._report.detached, outcome.detached),
            ):
                for name, rows in found.items():
                    add_rows(into, rows, name)
        self._advise()
        return leftovers + self._unnamed()

    def _unnamed(self) -> list[Leftover]:
        """The rows that no DELETE can name, unless they are gone with their table."""
        leftovers: list[Leftover] = []
        for held in self._held():
            counts = ((_UNKEYED, held.unkeyed), (UNSURE, held.unsure))
            found = [Leftover(held.table.name, None, why, count) for why, count in counts if count]
            if found and self._database.has_table(held.table.name):
                leftovers += found
            elif found:
                self._tracker.store.forget_counted(held.table)
        return leftovers

    def _advise(self) -> None:
        """Where deletes were slow, say which index would have helped."""
        outcome = self._executor.outcome
        for name, seconds in outcome.seconds.items():
            rows = outcome.deleted[name] + len(outcome.dependents.get(name, ()))
            if is_slow(seconds, rows):
                # It is advice: where nobody can look, there is none.
                with suppress(sa.exc.SQLAlchemyError, SessionStateError):
                    found = self._executor.advice(place_of(name), rows=rows, seconds=seconds)
                    self._report.advice += tuple(found)

    def _held(self) -> list[TableHoldings]:
        held = [
            held
            for held in self._tracker.snapshot()
            if held.table.name.database == self._database.capture.database
        ]
        return held if self._part is None else self._part.of(held)

    def _forget_dropped(self) -> None:
        """Where tables may have been dropped, do not ask for their rows one by one."""
        if not self._tracker.saw_ddl(self._database.capture):
            return
        for held in self._held():
            name = held.table.name
            if len(held.keys) and not self._database.has_table(name):
                _add(self._report.already_gone, name, len(held.keys))
                self._tracker.store.forget(held.table, held.keys)

    def _settle_doubts(self) -> list[Leftover]:
        leftovers: list[Leftover] = []
        self._ask_ledger()
        for held in self._held():
            if not held.doubtful:
                continue
            table = held.table
            settled = self._executor.patiently(partial(settle_doubt, self._database, held))
            self._tracker.store.forget(table, held.doubtful.keys() - settled.unsure.keys())
            self._tracker.store.resolve_keys(table, settled.ours, committed=True)
            leftovers += [
                Leftover(table.name, table.row(key), cause) for key, cause in settled.unsure.items()
            ]
        return leftovers

    def _ask_ledger(self) -> None:
        book = self._books.book
        if book is not None and book.uncertain:
            self._executor.patiently(partial(ask_ledger, self._tracker, self._database, book))

    def _delete(self) -> list[Leftover]:
        held = [held for held in self._held() if len(held.keys)]
        if not held:
            return []
        try:
            batches = self._executor.run([Batch(each.table, each.keys.in_order()) for each in held])
            seen = self._look(
                [
                    batch
                    for batch in batches
                    if self._verify or not self._is_counted(batch.table.name, len(batch.keys))
                ]
            )
        except BaseException:
            # Whatever stopped us: a key that is free again may be a stranger's by the next cleanup.
            for each in held:
                gone = self._executor.outcome.gone.get(each.table.name)
                if gone:
                    self._tracker.store.forget(each.table, gone)
            raise
        leftovers: list[Leftover] = []
        for batch in batches:
            leftovers += self._account(batch, seen.get(batch.table.name, Seen()))
        return leftovers

    def _look(self, batches: Sequence[Batch]) -> dict[TableName, Seen]:
        try:
            return self._executor.patiently(lambda: still_there(self._database, batches))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- it becomes the cause of what nobody could see
            text = f"nobody could look whether it is gone: {in_short(error)}"
            return {
                batch.table.name: Seen(unseen=dict.fromkeys(batch.keys, text)) for batch in batches
            }

    def _account(self, batch: Batch, seen: Seen) -> list[Leftover]:
        """Book one table's rows as deleted, gone or left over, and forget what is gone."""
        outcome, name = self._executor.outcome, batch.table.name
        deleted, refused = outcome.deleted[name], outcome.refused.get(name, {})
        kept = outcome.kept.get(name, {})
        told = {key: reason.cause for key, reason in kept.items()}
        causes, reappeared = judge(batch, seen, deleted, {**told, **refused})
        name_what_keeps(self._database, batch.table, seen, causes, SILENT)
        if deleted:
            _add(self._report.deleted, name, deleted)
        if reappeared:
            _add(self._report.reappeared, name, reappeared)
        already_gone = len(batch.keys) - deleted - len(causes)
        if already_gone > 0:
            _add(self._report.already_gone, name, already_gone)
        gone = [key for key in batch.keys if key not in causes] if causes else batch.keys
        self._tracker.store.forget(batch.table, gone)
        for key, tables in self._blockers(batch, seen, refused).items():
            causes[key] += f"; referenced by rows of {', '.join(tables)}"
        by = {key: reason.by for key, reason in kept.items() if reason.by and key not in refused}
        self._report.held += tuple(
            Held(batch.table.row(key), owner)
            for key, owner in by.items()
            if owner is not None and key in causes
        )
        return [
            Leftover(name, batch.table.row(key), cause)
            for key, cause in causes.items()
            if key not in by
        ]

    def _blockers(self, batch: Batch, seen: Seen, refused: dict[Any, str]) -> dict[Any, list[str]]:
        """What references the rows that were refused: the database's own words often do not say."""
        held = [key for key in seen.there if key in refused]
        if not held:
            return {}
        try:
            found = blocking_tables(self._database, batch, held)
        except sa.exc.SQLAlchemyError:
            return {}  # the cause is told all the same, in the database's words
        return {key: tables for key, tables in found.items() if key in refused}

    def _is_counted(self, name: TableName, rows: int) -> bool:
        return self._executor.outcome.deleted[name] >= rows


def _add(into: dict[TableName, int], name: TableName, count: int) -> None:
    into[name] = into.get(name, 0) + count
