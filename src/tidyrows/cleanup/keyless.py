"""Rows of tables without a primary key: by all their columns, and as many as were inserted.

Equal rows cannot be told apart, so a transaction that may have been committed is never run again:
it could delete an equal row of somebody else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Leftover, count_in
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.ledger_updates import LedgerUpdates
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings

_Values = list[tuple[Any, ...]]


class _UnansweredError(Exception):
    """Nobody knows whether the COMMIT succeeded."""


class KeylessDeletion:
    """The rows without a key that a cleanup of one database deletes."""

    def __init__(self, run: CleanupRun, database: Database, ledger: LedgerUpdates | None) -> None:
        self._run = run
        self._database = database
        self._ledger = ledger
        self._pending: list[tuple[KeyedTable, _Values]] = []
        self._refused: list[Leftover] = []

    def delete(self, holdings: Iterable[TableHoldings]) -> None:
        """Delete what can go before the rows with keys, which such rows may reference."""
        for held in holdings:
            if held.whole and self._tried(held.table, held.whole) is not None:
                self._pending.append((held.table, held.whole))

    def again(self) -> list[Leftover]:
        """Try once more what failed: rows with keys that referenced it are gone now."""
        pending, self._pending = self._pending, []
        for table, rows in pending:
            if self._tried(table, rows) is None:
                continue
            for equal in _equal(rows):  # one that must stay keeps no other
                reason = self._tried(table, equal)
                if reason is not None:
                    self._refused.append(Leftover(table.name, None, reason, len(equal)))
        return self._refused

    def _tried(self, table: KeyedTable, rows: _Values) -> Reason | None:
        """Delete rows of one table in one transaction; the reason where that failed."""
        transaction = partial(self._delete, table, rows)
        try:
            deleted, ignored = self._run.retry(self._database, transaction)
        except SessionStateError:
            raise
        except _UnansweredError:
            return None  # they are reported as in doubt from now on
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
                stay = {id(row) for row in ignored}
                gone = [row for row in rows if id(row) not in stay]
                if self._ledger is not None:
                    self._ledger.record_unkeyed(connection, table, gone)
                sent = True
        except BaseException as error:
            if not sent or dialect.fault(error) in {Fault.TRANSIENT, Fault.CONSTRAINT}:
                raise
            if self._ledger is not None:
                self._ledger.unkeyed_unanswered()
            tracker.store.forget_whole(table, rows, certain=False)
            if not isinstance(error, Exception) or isinstance(error, SessionStateError):
                raise
            raise _UnansweredError from error
        if self._ledger is not None:
            self._ledger.committed()
        tracker.store.forget_whole(table, gone)
        return deleted, ignored


def _is_comparable(connection: sa.Connection, table: KeyedTable) -> bool:
    """Whether the table is there yet: a row that is gone with it need not be deleted."""
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


def _refuse_more(count: int, equal: _Values) -> None:
    if count > len(equal):
        raise RuntimeError(f"a DELETE of {len(equal)} rows took {count}; it was rolled back")


def _equal(rows: Sequence[tuple[Any, ...]]) -> list[_Values]:
    """The rows in groups of equal ones."""
    groups: dict[str, _Values] = {}
    for row in rows:
        groups.setdefault(repr(row), []).append(row)
    return list(groups.values())
