"""Deletes entries of the ledger in the transaction that deletes their rows.

A transaction that deletes all rows of a tracker deletes its entries. One that deletes some adds an
entry, and the end of the cleanup writes what is left anew. Each raises TakenOverError if a sweep
has taken the entries over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Change, Deleted, DeletedWhole
from tidyrows.ledger.journal import JournalUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Rows
    from tidyrows.cleanup.run import Outcome
    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Journal
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker


class LedgerUpdates:
    """The entries of a tracker's rows in one database, while they are deleted."""

    def __init__(self, tracker: ResourceTracker, database: Database, journal: Journal) -> None:
        self._tracker = tracker
        self._database = database
        self.journal = journal
        # Before what is held is looked at: rows of an entry that counts are held.
        self._numbers = journal.numbers()
        self._left: int | None = None
        self._update: JournalUpdate | None = None
        self._sent: JournalUpdate | None = None

    @classmethod
    def of(cls, tracker: ResourceTracker, database: Database) -> LedgerUpdates | None:
        """None where nothing is recorded."""
        journal = tracker.journals.of(database.name)
        return None if journal is None else cls(tracker, database, journal)

    def count(self, held: Sequence[TableHoldings]) -> None:
        """How many rows are entered; unknown where there is more than rows with keys."""
        others = any(each.in_doubt or each.keyless_count for each in held)
        self._left = None if others else sum([len(each.keys) for each in held])

    def begin(self) -> None:
        """Another set of rows is tried; the ledger shows what became of the one before."""
        self._update = self._sent = None

    def record(self, connection: sa.Connection, rows: Rows, done: Outcome) -> None:
        """In the transaction that has deleted rows: write that into the ledger."""
        journal = self.journal
        sent, self._sent = self._sent, None
        if journal.unanswered and self._resolve_unanswered(connection, sent):
            self._update = JournalUpdate()  # the COMMIT that was not answered had succeeded
            return
        gone = self._gone(connection, rows, done)
        count = sum([len(change.keys) for change in gone])
        context = self._tracker.context
        if count == self._left:
            added = journal.replace(connection, self._numbers, (), context)
            self._update = JournalUpdate(frozenset(self._numbers), frozenset(added), count)
        elif gone:
            added = journal.append(connection, self._numbers, gone, context)
            self._update = JournalUpdate(added=frozenset(added), rows=count)
        else:
            self._update = JournalUpdate()

    def unanswered(self) -> None:
        """The COMMIT was sent, and its answer was lost."""
        self._sent = self._update
        if self._update is not None:
            self.journal.unanswered.append(self._update)

    def committed(self) -> None:
        """The COMMIT has succeeded."""
        update, self._update, self._sent = self._update, None, None
        if update is not None:
            self._apply(update)

    def _apply(self, update: JournalUpdate) -> None:
        self.journal.apply(update)
        self._numbers = (self._numbers - update.removed) | update.added
        if self._left is not None:
            self._left -= update.rows

    def _resolve_unanswered(
        self, connection: sa.Connection, asked: JournalUpdate | None = None
    ) -> bool:
        """Find out what became of transactions whose COMMIT was not answered; of one, if asked."""
        unanswered, self.journal.unanswered = self.journal.unanswered, []
        true = [each for each in unanswered if self.journal.has_committed(connection, each)]
        for update in true:
            self._apply(update)
        return any(update is asked for update in true)

    # -- rows without a key --------------------------------------------------------------------

    def record_unkeyed(
        self, connection: sa.Connection, table: KeyedTable, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        """As :meth:`record`, for rows of a table without a primary key."""
        self._update = None
        if rows:
            self._resolve_unanswered(connection)
            change = DeletedWhole(table, list(rows))
            context = self._tracker.context
            added = self.journal.append(connection, self._numbers, [change], context)
            self._update = JournalUpdate(added=frozenset(added))

    # -- the end -------------------------------------------------------------------------------

    def finish(self, retry: Callable[[Callable[[], JournalUpdate]], JournalUpdate]) -> None:
        """Leave in the ledgers what is left, and nothing more."""
        journal = self.journal
        numbers = journal.numbers()
        left = list(self._tracker.store.changes(self._database.name))
        if not left:
            journal.forget_waiting()
        lasting = bool(left) and (journal.keeps_log or not journal.is_log)
        if journal.uncertain or ((not numbers or lasting) and not journal.unanswered):
            return

        def rewrite() -> JournalUpdate:
            with self._database.writing() as connection:
                self._resolve_unanswered(connection)
                kept = numbers & journal.numbers()
                if not kept or lasting:
                    return JournalUpdate()
                added = journal.replace(connection, kept, left, self._tracker.context)
                return JournalUpdate(frozenset(kept), frozenset(added))

        with journal.ledger.explaining_rights():
            update = retry(rewrite)
        journal.apply(update)
        if update.removed:
            journal.is_log = False

    def _gone(self, connection: sa.Connection, rows: Rows, done: Outcome) -> list[Change]:
        gone: list[Change] = []
        for place, (table, keys) in rows.items():
            kept = done.kept.get(place)
            asked = [key for key in keys if key not in kept] if kept else list(keys)
            if sum(map(len, done.gone.get(place, ()))) < len(asked):
                there = self._database.existing_inside(connection, table, asked)
                stay = set(asked if there is None else there)
                asked = [key for key in asked if key not in stay]
            if asked:
                gone.append(Deleted(table, asked))
        return gone
