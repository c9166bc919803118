"""Integers that no other process, run or host gets: the ledger reserves them in ranges."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.errors import LedgerError, ScopeError

if TYPE_CHECKING:
    from tidyrows.ledger.entry_table import EntryTable

RANGE = 1000
"""Integers that a process reserves at once."""


class IntegerRanges:
    """The integers that one process has reserved and not used."""

    def __init__(self) -> None:
        self._left: deque[int] = deque()
        self._lock = threading.Lock()

    def next(self, ledger: EntryTable) -> int:
        """The next integer, from 0 up."""
        with self._lock:
            if not self._left:
                self._reserve(ledger, lock_timeout=1.0)
            return self._left.popleft()

    def reserve_early(self, ledger: EntryTable) -> None:
        """Reserve a range early, while the caller has no open transaction, where few are left."""
        with self._lock:
            if len(self._left) < RANGE // 2:
                with suppress(ScopeError):  # the next call of next() tries again
                    self._reserve(ledger, lock_timeout=0.2)

    def _reserve(self, ledger: EntryTable, *, lock_timeout: float) -> None:
        try:
            # In its own transaction: where the caller's holds SQLite's only lock, waiting is vain.
            with ledger.transaction(lock_timeout=lock_timeout) as connection:
                table = ledger.table_on(connection)
                row = (table.c.maker == "tidyrows", table.c.seq == 1)
                select = sa.select(table.c.body).where(*row).with_for_update()
                reserved = ledger.execute(connection, select).scalar()
                if reserved is None:
                    raise LedgerError(
                        f"The ledger {table.fullname} has lost the row that hands out integers, so "
                        f"nobody knows which are taken. Sweep, drop the table, and write "
                        f"Ledger(engine).install()."
                    )
                update = sa.update(table).where(*row).values(body=str(int(reserved) + 1))
                ledger.execute(connection, update)
        except sa.exc.DBAPIError as error:
            if not ledger.dialect.is_timeout(error):
                raise
            raise ScopeError(
                f"The next {RANGE} integers that no other worker has cannot be taken from "
                f"{ledger!r} while somebody holds its lock; where only one may write, as with "
                f"SQLite, that may be this test's own open transaction. Commit first, or use "
                f"Scoped text."
            ) from error
        start = int(reserved) * RANGE
        self._left.extend(range(start, start + RANGE))
