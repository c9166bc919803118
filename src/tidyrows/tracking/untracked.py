"""Counts the rows that were inserted while a tracker was active, and that nobody can name."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.capture.changes import Untracked
    from tidyrows.keys import TableName


class UntrackedRows:
    """How many rows of each table were inserted by raw SQL and the like: so many at most.

    Attributes:
        known: the numbers, also those of which the user has named all rows.
    """

    def __init__(self) -> None:
        self.known: dict[TableName, int | None] = {}  # None: any number
        self._lock = threading.Lock()

    def add(self, untracked: Untracked) -> None:
        """Rows have been committed, or perhaps."""
        name, more = untracked.table.name, untracked.count
        with self._lock:
            before = self.known.get(name, 0)
            self.known[name] = None if more is None or before is None else before + more

    def take(self, table: TableName, count: int) -> None:
        """The user has named rows of a table that were not tracked before."""
        with self._lock:
            for name, untracked in list(self.known.items()):
                if count and untracked and _may_be(name, table):
                    self.known[name] = untracked - min(count, untracked)
                    count -= min(count, untracked)

    def counts(self) -> dict[TableName, int | None]:
        """The number by table; a name without a schema is as the statement has it."""
        with self._lock:
            return {name: count for name, count in self.known.items() if count != 0}

    def count_of(self, table: TableName) -> int:
        """How many rows of a table at most."""
        counts = [count for name, count in self.counts().items() if _may_be(name, table)]
        return sum(sys.maxsize if count is None else count for count in counts)

    def clear(self) -> None:
        """Begin anew."""
        self.known = {}


def _may_be(written: TableName, table: TableName) -> bool:
    return (
        written.database == table.database
        and written.name.casefold() == table.name.casefold()
        and written.schema.casefold() in {"", table.schema.casefold()}
    )
