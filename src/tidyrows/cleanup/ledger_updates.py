"""The ledger's part in a cleanup: entries go in the transaction that deletes their rows.

A transaction that deletes all that a tracker holds deletes its entries. One that deletes some adds
an entry that says so, and the end of the cleanup writes what is left anew. Each looks first whether
the entries are still the tracker's: a sweep that took the worker for dead has taken them over.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Change, Deleted, DeletedWhole
from tidyrows.ledger.journal import JournalUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.deletion import Done, Rows
    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Journal
    from tidyrows.tracking.tracker import ResourceTracker


class Bookkeeping:
    """The entries of a tracker's rows in one database, while they are deleted.

    Args:
        tracker: whose.
        database: where.
    """

    def __init__(self, tracker: ResourceTracker, database: Database) -> None:
        self._tracker = tracker
        self._database = database
        self._book = tracker.journals.of(database.capture.database)
        # Before what is held is looked at: rows of an entry that counts are held.
        self._numbers = set() if self._book is None else self._book.numbers()
        self._left: int | None = None
        self._page: JournalUpdate | None = None
        self._sent: JournalUpdate | None = None

    @property
    def book(self) -> Journal | None:
        """The book; None where nothing is entered."""
        return self._book

    def settle(self, connection: sa.Connection, rows: Rows, done: Done) -> None:
        """In the transaction that has deleted rows: let the ledger say so.

        Args:
            connection: in the transaction.
            rows: what was to be deleted.
            done: what was.

        Raises:
            TakenOverError: the rows are a sweep's by now.
        """
        book = self._book
        if book is None:
            return
        sent, self._sent = self._sent, None
        if self._clear_up(connection, book, sent):
            self._page = JournalUpdate()  # the COMMIT that was not answered had succeeded
            return
        gone = self._gone(connection, rows, done)
        count = sum(len(change.keys) for change in gone)
        context = self._tracker.context
        if count == self._rows_left():
            added = book.replace(connection, self._numbers, (), context)
            self._page = JournalUpdate(frozenset(self._numbers), frozenset(added), count)
        elif gone:
            added = book.append(connection, self._numbers, gone, context)
            self._page = JournalUpdate(added=frozenset(added), rows=count)
        else:
            self._page = JournalUpdate()

    def begin(self) -> None:
        """Another set of rows is tried; of what was sent before the ledger will tell."""
        self._page = self._sent = None

    def unanswered(self) -> None:
        """The COMMIT was sent and nobody knows what became of it."""
        self._sent = self._page
        if self._page is not None and self._book is not None:
            self._book.unanswered.append(self._page)

    def committed(self) -> None:
        """The COMMIT has succeeded."""
        page, self._page, self._sent = self._page, None, None
        if page is not None and self._book is not None:
            self._turn(self._book, page)

    def _turn(self, book: Journal, page: JournalUpdate) -> None:
        book.apply(page)
        self._numbers = (self._numbers - page.removed) | page.added
        if self._left is not None and self._left >= 0:
            self._left -= page.rows

    def _clear_up(
        self, connection: sa.Connection, book: Journal, asked: JournalUpdate | None = None
    ) -> bool:
        """Find out what became of transactions whose COMMIT was not answered; of one, if asked."""
        unclear, book.unanswered = book.unanswered, []
        true = [page for page in unclear if book.has_committed(connection, page)]
        for page in true:
            self._turn(book, page)
        return any(page is asked for page in true)

    # -- rows without a key --------------------------------------------------------------------

    def settle_whole(
        self, connection: sa.Connection, table: KeyedTable, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        """The same for rows of a table without a primary key."""
        self._page = None
        if self._book is not None and rows:
            self._clear_up(connection, self._book)
            change = DeletedWhole(table, list(rows))
            context = self._tracker.context
            added = self._book.append(connection, self._numbers, [change], context)
            self._page = JournalUpdate(added=frozenset(added))

    def doubt_whole(self) -> None:
        """Its COMMIT was not answered; it is not tried again."""
        self.unanswered()
        self.begin()

    # -- the end -------------------------------------------------------------------------------

    def finish(self, patiently: Callable[[Callable[[], JournalUpdate]], JournalUpdate]) -> None:
        """Leave in the ledger what is left, and nothing more.

        Args:
            patiently: runs a whole transaction, again where that may help.
        """
        book = self._book
        if book is None:
            return
        self.begin()
        numbers = book.numbers()
        left = list(self._tracker.store.changes(self._database.capture.database))
        if not left:
            book.forget_waiting()
        lasting = bool(left) and (book.keeps_log or not book.is_log)
        if book.uncertain or ((not numbers or lasting) and not book.unanswered):
            return

        def rewrite() -> JournalUpdate:
            with self._database.writing() as connection:
                self._clear_up(connection, book)
                kept = numbers & book.numbers()
                if not kept or lasting:
                    return JournalUpdate()
                added = book.replace(connection, kept, left, self._tracker.context)
                return JournalUpdate(frozenset(kept), frozenset(added))

        with book.ledger.naming_rights():
            page = patiently(rewrite)
        book.apply(page)
        if page.removed:
            book.is_log = False

    def _rows_left(self) -> int:
        """How many rows are entered; -1 where there is more than rows with keys."""
        if self._left is None:
            held = [
                each
                for each in self._tracker.snapshot()
                if each.table.name.database == self._database.capture.database
            ]
            others = any(each.doubtful or each.nameless for each in held)
            self._left = -1 if others else sum(len(each.keys) for each in held)
        return self._left

    def _gone(self, connection: sa.Connection, rows: Rows, done: Done) -> list[Change]:
        gone: list[Change] = []
        for place, (table, keys) in rows.items():
            kept = done.kept.get(place)
            asked = [key for key in keys if key not in kept] if kept else list(keys)
            if len(done.gone.get(table.name, ())) < len(asked):
                there = asked
                # It may have to switch off what hides rows, or fail: neither must outlast the look.
                with suppress(sa.exc.DBAPIError), connection.begin_nested() as look:
                    there = self._database.dialect.existing_keys(connection, table, asked)
                    look.rollback()
                stay = set(there)
                asked = [key for key in asked if key not in stay]
            if asked:
                gone.append(Deleted(table, asked))
        return gone
