"""Rows of tables without a primary key: by all their columns, and as many as were inserted.

Of equal rows nobody can say which is whose, so a transaction that may have been committed is never
run again: it could take somebody else's row for one that is gone already.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.report import Leftover
from tidyrows.cleanup.verify import SILENT, in_short
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.executor import Executor
    from tidyrows.cleanup.ledger_updates import Bookkeeping
    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

UNSURE = (
    "the table has no primary key, and a COMMIT was never answered: the rows may be gone, and a "
    "row that equals them may be somebody else's. Look yourself, or give the table a primary key"
)

Rows = list[tuple[Any, ...]]


class _UnansweredError(Exception):
    """Nobody knows whether the COMMIT succeeded."""


class Keyless:
    """The rows without a key that a cleanup of one database deletes.

    Args:
        tracker: whose; it forgets those that are gone.
        database: where they are.
        executor: what runs a transaction patiently.
        report: where it is written down.
        books: lets the ledger say what is deleted.
    """

    def __init__(
        self,
        tracker: ResourceTracker,
        database: Database,
        executor: Executor,
        report: CleanupReport,
        books: Bookkeeping,
    ) -> None:
        self._books = books
        self._tracker = tracker
        self._database = database
        self._executor = executor
        self._report = report
        self._pending: list[tuple[KeyedTable, Rows]] = []
        self._refused: list[Leftover] = []

    def run(self, holdings: Iterable[TableHoldings]) -> None:
        """Delete what can go before the rows with keys, which such rows may reference."""
        for held in holdings:
            if held.whole and self._tried(held.table, held.whole) is not None:
                self._pending.append((held.table, held.whole))

    def again(self) -> list[Leftover]:
        """Try once more what failed: rows with keys that referenced it are gone now.

        Returns:
            What is left over, with its cause.
        """
        pending, self._pending = self._pending, []
        for table, rows in pending:
            if self._tried(table, rows) is None:
                continue
            for equal in _equal(rows):  # one that must stay keeps no other
                cause = self._tried(table, equal)
                if cause is not None:
                    self._refused.append(Leftover(table.name, None, cause, len(equal)))
        return self._refused

    def stuck(self, holdings: Iterable[TableHoldings], cause: str) -> list[Leftover]:
        """Everything that is there yet, where the cleanup as a whole has failed."""
        return [
            Leftover(held.table.name, None, cause, len(held.whole))
            for held in holdings
            if held.whole
        ]

    def _tried(self, table: KeyedTable, rows: Rows) -> str | None:
        """Delete rows of one table in one transaction; the cause where that failed."""
        try:
            deleted, silent = self._executor.patiently(partial(self._delete, table, rows))
        except SessionStateError:
            raise
        except _UnansweredError:
            return None  # they are reported as unsure from now on
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything; it is the rows' cause
            return in_short(error)
        name = table.name
        stay = {id(row) for row in silent}
        gone = [row for row in rows if id(row) not in stay]
        if deleted:
            self._report.deleted[name] = self._report.deleted.get(name, 0) + deleted
        if len(gone) > deleted:
            already = self._report.already_gone
            already[name] = already.get(name, 0) + len(gone) - deleted
        if silent:
            self._refused.append(Leftover(name, None, SILENT, len(silent)))
        return None

    def _delete(self, table: KeyedTable, rows: Rows) -> tuple[int, Rows]:
        """One transaction: how many rows it deleted, and which are there yet, without an error."""
        sent = False
        silent: Rows = []
        gone: Rows = []
        deleted = 0
        dialect = self._database.dialect
        try:
            with self._database.writing() as connection:
                for equal in _equal(rows) if self._is_told_apart(connection, table) else ():
                    count = dialect.delete_equal_rows(connection, table, equal[0], len(equal))
                    _refuse_more(count, equal)
                    deleted += count
                    if count < len(equal):
                        there = dialect.count_equal_rows(connection, table, equal[0])
                        silent += equal[: min(there, len(equal) - count)]
                stay = {id(row) for row in silent}
                gone = [row for row in rows if id(row) not in stay]
                self._books.settle_whole(connection, table, gone)
                sent = True
        except BaseException as error:
            if not sent or dialect.fault(error) in {Fault.TRANSIENT, Fault.CONSTRAINT}:
                raise
            self._books.doubt_whole()
            self._tracker.store.forget_whole(table, rows, certain=False)
            if not isinstance(error, Exception) or isinstance(error, SessionStateError):
                raise
            raise _UnansweredError from error
        self._books.committed()
        self._tracker.store.forget_whole(table, gone)
        return deleted, silent

    def _is_told_apart(self, connection: sa.Connection, table: KeyedTable) -> bool:
        """Whether the table is there yet: a row that is gone with it need not be deleted.

        Raises:
            LookupError: rows that differ in a column which the Table does not have look equal.
        """
        try:
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


def _refuse_more(count: int, equal: Rows) -> None:
    if count > len(equal):
        raise RuntimeError(f"a DELETE of {len(equal)} rows took {count}; it was rolled back")


def _equal(rows: Sequence[tuple[Any, ...]]) -> list[Rows]:
    """The rows in groups of equal ones."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(repr(row), []).append(row)
    return list(groups.values())
