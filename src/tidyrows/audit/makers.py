"""Who made which row, and who touched whose."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from tidyrows.keys import RowKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tidyrows.audit.keys import Key
    from tidyrows.audit.observations import Deed, Heard
    from tidyrows.audit.tables import Difference
    from tidyrows.keys import TableName


@dataclass(frozen=True, slots=True)
class Maker:
    """A test, or a fixture that several tests share.

    Attributes:
        name: the test's id, or ``fixture org (session)``.
        is_test: whether it is a test.
    """

    name: str
    is_test: bool = True


BEFORE = Maker("before the first test", is_test=False)


class Touch(Enum):
    """What a test did to a row that it had not made."""

    CHANGED = "changes"
    DELETED = "deletes"
    READ = "reads"


@dataclass(slots=True)
class Rows:
    """Rows of one table.

    Attributes:
        keys: theirs.
        more: how many more there are, whose keys are not known.
    """

    keys: set[Key] = field(default_factory=set)
    more: int = 0

    def __len__(self) -> int:
        return len(self.keys) + self.more


Touched = dict[tuple[Touch, "TableName", Maker], set["Key"]]


class Book:
    """All that is known of the run's rows.

    Args:
        sees: whether a look shows what became of a row; what is not, is believed as it was heard.

    Attributes:
        left: by who left them, the rows that were there after it.
        touched: by test, the rows of others that it touched.
        looked_at: by test, the tables that it read from or wrote to.
    """

    def __init__(self, sees: Callable[[TableName, Key], bool]) -> None:
        self.left: dict[Maker, dict[TableName, Rows]] = defaultdict(lambda: defaultdict(Rows))
        self.touched: dict[Maker, Touched] = defaultdict(lambda: defaultdict(set))
        self.looked_at: dict[str, set[str]] = defaultdict(set)
        self._sees = sees
        self._makers: dict[RowKey, Maker] = {}

    def enter(self, who: Maker, differences: Iterable[Difference], heard: Heard) -> None:
        """What was different after a test or a shared fixture, and what was heard meanwhile."""
        new: set[RowKey] = set()
        seen = list(differences)
        for difference in seen:
            self._seen(who, difference, new)
        for deed, row in heard.committed:
            if not self._sees(row.table, row.key):
                self._believe(who, deed, row, new)
        for each in seen:
            if each.more:  # some of those whose keys were not read were heard of
                told = sum(row.table == each.table for row in new) - len(each.appeared)
                self.left[who][each.table].more += max(0, each.more - told)
        self._read(who, new, heard)
        for row in new:
            self.left[who][row.table].keys.add(row.key)
            self._makers[row] = who
        if who.is_test:
            for there in heard.there.values():
                self.looked_at[who.name] |= {name for _schema, name in there.read | there.written}

    def _seen(self, who: Maker, difference: Difference, new: set[RowKey]) -> None:
        """What a look has shown of one table."""
        table = difference.table
        self._touch(who, Touch.CHANGED, (RowKey(table, key) for key in difference.changed))
        gone = [RowKey(table, key) for key in difference.gone]
        if not difference.dropped:
            self._touch(who, Touch.DELETED, gone)
        for row in gone:
            self._forget(who, row)
        new.update(RowKey(table, key) for key in difference.appeared)

    def _believe(self, who: Maker, deed: Deed, row: RowKey, new: set[RowKey]) -> None:
        """What was heard of a row that no look shows."""
        if deed == "inserted":
            new.add(row)
        elif row not in new:
            self._touch(who, Touch.CHANGED if deed == "updated" else Touch.DELETED, [row])
        if deed == "deleted":
            new.discard(row)
            self._forget(who, row)

    def _forget(self, who: Maker, row: RowKey) -> None:
        if self._makers.pop(row, None) == who:  # made and deleted, with a look between
            self.left[who][row.table].keys.discard(row.key)

    def _touch(self, who: Maker, touch: Touch, rows: Iterable[RowKey]) -> None:
        """Remember what a test did; what shared fixtures do to rows is their business."""
        if not who.is_test:
            return
        for row in rows:
            maker = self._makers.get(row, BEFORE)
            if maker != who:
                self.touched[who][touch, row.table, maker].add(row.key)

    def _read(self, who: Maker, new: set[RowKey], heard: Heard) -> None:
        """Rows of other tests; those of shared fixtures, or from before, are there to be read."""
        written = {(key[1], row) for key, rows in self.touched.get(who, {}).items() for row in rows}
        unclear = {name for there in heard.there.values() for _schema, name in there.inserts}
        for row in heard.loaded - heard.inserted:
            maker = self._makers.get(row)
            if maker is None or not maker.is_test or row in new or row.table.name in unclear:
                continue
            if (row.table, row.key) not in written:
                self._touch(who, Touch.READ, [row])

    def still_there(self, who: Maker, table: TableName) -> int:
        """How many of the rows that somebody left are there now."""
        rows = self.left[who][table]
        there = sum(self._makers.get(RowKey(table, key)) == who for key in rows.keys)
        return there + rows.more

    def leavers(self, tables: Iterable[str]) -> Counter[str]:
        """The tests that left rows in tables of these names, and how many."""
        wanted = set(tables)
        found: Counter[str] = Counter()
        for who, left in self.left.items():
            count = sum(len(rows) for table, rows in left.items() if table.name in wanted)
            if who.is_test and count:
                found[who.name] += count
        return found
