"""Which test made which row, and which test touched the rows of another."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from tidyrows.keys import RowKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tidyrows.audit.observer import Observations
    from tidyrows.audit.tables import Difference, Key
    from tidyrows.keys import TableName


@dataclass(frozen=True, slots=True)
class Maker:
    """A test, or a fixture that several tests share."""

    name: str
    is_test: bool = True


BEFORE = Maker("before the first test", is_test=False)


class RowAccess(Enum):
    """What a test did to a row that it had not made."""

    CHANGES = "changes"
    DELETES = "deletes"
    READS = "reads"


@dataclass(slots=True)
class LeftRows:
    """Rows of one table."""

    keys: set[Key] = field(default_factory=set)
    more: int = 0

    def __len__(self) -> int:
        return len(self.keys) + self.more


Touched = dict[tuple[RowAccess, "TableName", Maker], set["Key"]]


class RowHistory:
    """All that is known of the run's rows."""

    def __init__(self, sees: Callable[[TableName, Key], bool]) -> None:
        self.left: dict[Maker, dict[TableName, LeftRows]]
        self.left = defaultdict(lambda: defaultdict(LeftRows))
        self.touched: dict[Maker, Touched] = defaultdict(lambda: defaultdict(set))
        self.heard: set[TableName] = set()  # tables whose rows are known from statements only
        self.reads: dict[str, set[str]] = defaultdict(set)  # the tables of each test
        self.writes: dict[str, set[str]] = defaultdict(set)
        self._sees = sees
        self._makers: dict[TableName, dict[Key, Maker]] = defaultdict(dict)

    def add(self, maker: Maker, differences: Iterable[Difference], observed: Observations) -> None:
        """Add what was different after a test or a shared fixture, and what was observed in it."""
        new: set[RowKey] = set()
        seen = list(differences)
        for difference in seen:
            self._add_difference(maker, difference, new)
        for operation, row in observed.committed:
            if not self._sees(row.table, row.key):
                self.heard.add(row.table)
                self._add_operation(maker, operation, row, new)
        for each in seen:
            if each.more:  # the operations have named some of the rows whose keys were not read
                named = sum(row.table == each.table for row in new) - len(each.appeared)
                self.left[maker][each.table].more += max(0, each.more - named)
        self._add_reads(maker, new, observed)
        for row in new:
            self.left[maker][row.table].keys.add(row.key)
            self._makers[row.table][row.key] = maker
        if maker.is_test:
            for there in observed.databases.values():
                self.reads[maker.name] |= {name for _schema, name in there.read}
                self.writes[maker.name] |= {name for _schema, name in there.written}

    def rows_of_others(self, maker: Maker, table: TableName) -> set[Key]:
        """The rows of a table that are there now and that other tests have made."""
        makers = self._makers.get(table, {})
        return {key for key, other in makers.items() if other.is_test and other != maker}

    def _add_difference(self, maker: Maker, difference: Difference, new: set[RowKey]) -> None:
        table = difference.table
        changed = (RowKey(table, key) for key in difference.changed)
        self._touch(maker, RowAccess.CHANGES, changed)
        gone = [RowKey(table, key) for key in difference.gone]
        if not difference.dropped:
            self._touch(maker, RowAccess.DELETES, gone)
        for row in gone:
            self._forget(maker, row)
        new.update(RowKey(table, key) for key in difference.appeared)

    def _add_operation(self, maker: Maker, operation: str, row: RowKey, new: set[RowKey]) -> None:
        """An operation on a row that no look shows."""
        if operation == "inserted":
            new.add(row)
        elif row not in new:
            access = RowAccess.CHANGES if operation == "updated" else RowAccess.DELETES
            self._touch(maker, access, [row])
        if operation == "deleted":
            new.discard(row)
            self._forget(maker, row)

    def _forget(self, maker: Maker, row: RowKey) -> None:
        if (
            self._makers[row.table].pop(row.key, None) == maker
        ):  # made and deleted, with a look between
            self.left[maker][row.table].keys.discard(row.key)

    def _touch(self, maker: Maker, access: RowAccess, rows: Iterable[RowKey]) -> None:
        """Remember what a test did to rows of others; a shared fixture may do that."""
        if maker.is_test:
            for row in rows:
                other = self._maker(row)
                if other != maker:
                    self.touched[maker][access, row.table, other].add(row.key)

    def _add_reads(self, maker: Maker, new: set[RowKey], observed: Observations) -> None:
        """Reads of other tests' rows; rows of shared fixtures, or from before, may be read."""
        touched = {
            RowKey(table, key)
            for (_access, table, _maker), keys in self.touched.get(maker, {}).items()
            for key in keys
        }
        for row in observed.loaded - observed.inserted - new - touched:
            other = self._maker(row)
            if other.is_test and row.table.name not in observed.unnamed_inserts:
                self._touch(maker, RowAccess.READS, [row])

    def still_there(self, maker: Maker, table: TableName) -> int:
        """How many of the rows that a maker left are there now."""
        rows = self.left[maker][table]
        there = sum(self._makers[table].get(key) == maker for key in rows.keys)
        return there + rows.more

    def _maker(self, row: RowKey) -> Maker:
        return self._makers[row.table].get(row.key, BEFORE)

    def influence(self, other: str, test: str) -> tuple[int, int, int]:
        """How much a test may have to do with another, to sort by: nothing is three zeros.

        The rows of one that the other read, changed or deleted; the tables that one wrote to and
        the other read, and those that both wrote to.
        """
        touched = self.touched.get(Maker(test), {})
        met = sum(len(keys) for (_how, _table, by), keys in touched.items() if by.name == other)
        written = self.writes.get(other, set())
        read = written & self.reads.get(test, set())
        return met, len(read), len(written & self.writes.get(test, set()))
