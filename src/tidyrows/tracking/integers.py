"""Integers that no other process, run or host has had, handed out by the ledger in ranges."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.errors import LedgerError, ScopeError

if TYPE_CHECKING:
    from tidyrows.tracking.ledger import Ledger

RANGE = 1000
"""Integers that a process takes at once."""


class Integers:
    """What one process has taken and not given out."""

    def __init__(self) -> None:
        self._next = self._end = 0
        self._lock = threading.Lock()

    def next(self, ledger: Ledger) -> int:
        """The next one, from 0 up.

        Raises:
            ScopeError: another range is needed, and somebody holds the lock that it takes.
        """
        with self._lock:
            if self._next == self._end:
                self._next = self._taken(ledger) * RANGE
                self._end = self._next + RANGE
            self._next += 1
            return self._next - 1

    def _taken(self, ledger: Ledger) -> int:
        try:
            # Its own transaction: where the caller's holds SQLite's only lock, waiting is in vain.
            with ledger.alone(lock_timeout=1.0) as connection:
                table = ledger.table_on(connection)
                row = (table.c.maker == "tidyrows", table.c.seq == 1)
                asked = sa.select(table.c.body).where(*row).with_for_update()
                found = ledger.run(connection, asked).scalar()
                if found is None:
                    raise LedgerError(
                        f"The ledger {table.fullname} has lost the row that hands out integers, so "
                        f"nobody knows which are taken. Sweep, drop the table, and write "
                        f"Ledger(engine).install()."
                    )
                taken = sa.update(table).where(*row).values(body=str(int(found) + 1))
                ledger.run(connection, taken)
                return int(found)
        except sa.exc.DBAPIError as error:
            if not ledger.dialect.waited(error):
                raise
            raise ScopeError(
                f"The next {RANGE} integers that no other worker has cannot be taken from "
                f"{ledger!r} while somebody holds its lock; where only one may write, as with "
                f"SQLite, that may be this test's own open transaction. Commit first, or use "
                f"Scoped text."
            ) from error
