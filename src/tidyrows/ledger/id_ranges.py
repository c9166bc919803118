"""Integers that no other process, run or host has had, handed out by the ledger in ranges."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.errors import LedgerError, ScopeError

if TYPE_CHECKING:
    from tidyrows.ledger.table import Ledger

RANGE = 1000
"""Integers that a process takes at once."""


class Integers:
    """What one process has taken and not given out."""

    def __init__(self) -> None:
        self._left: deque[int] = deque()
        self._lock = threading.Lock()

    def next(self, ledger: Ledger) -> int:
        """The next one, from 0 up.

        Raises:
            ScopeError: another range is needed, and somebody holds the lock that it takes.
        """
        with self._lock:
            if not self._left:
                self._take(ledger, lock_timeout=1.0)
            return self._left.popleft()

    def stock(self, ledger: Ledger) -> None:
        """Where few are left, take a range while no transaction of the caller's is in the way."""
        with self._lock:
            if len(self._left) < RANGE // 2:
                with suppress(ScopeError):  # then it is tried again with the next need
                    self._take(ledger, lock_timeout=0.2)

    def _take(self, ledger: Ledger, *, lock_timeout: float) -> None:
        first = self._taken(ledger, lock_timeout) * RANGE
        self._left.extend(range(first, first + RANGE))

    def _taken(self, ledger: Ledger, lock_timeout: float) -> int:
        try:
            # Its own transaction: where the caller's holds SQLite's only lock, waiting is in vain.
            with ledger.alone(lock_timeout=lock_timeout) as connection:
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
