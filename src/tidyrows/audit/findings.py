"""What is wrong with a test, how bad it is, and the line that cures it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tidyrows.audit.keys import shown
from tidyrows.audit.makers import BEFORE, Touch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from tidyrows.audit.keys import Key
    from tidyrows.audit.makers import Book, Maker
    from tidyrows.keys import TableName

_MAKERS = 3


class Fault(IntEnum):
    """What may be wrong with a test, the worst first."""

    ORDER = 1
    TWICE = 2
    CHANGES = 3
    DELETES = 4
    READS = 5
    LEAVES = 6
    SHARED = 7

    @property
    def words(self) -> str:
        """In the table."""
        return _WORDS[self]


_WORDS = {
    Fault.ORDER: "needs an order",
    Fault.TWICE: "does not pass twice",
    Fault.CHANGES: "changes others' rows",
    Fault.DELETES: "deletes others' rows",
    Fault.READS: "reads others' rows",
    Fault.LEAVES: "leaves rows",
    Fault.SHARED: "leaves rows (shared)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one test.

    Attributes:
        test: the test's id, or the name of a shared fixture.
        fault: what.
        said: in words.
        cure: the line that cures it.
        count: how many rows.
        table: which.
        keys: the first few.
        whose: who made the rows, the first few.
    """

    test: str
    fault: Fault
    said: str
    cure: str
    count: int = 0
    table: str | None = None
    keys: list[Any] = field(default_factory=list)
    whose: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "fault": self.fault.name.lower(),
            "said": self.said,
            "cure": self.cure,
            "table": self.table,
            "rows": self.count,
            "keys": self.keys,
            "whose": self.whose,
        }


@dataclass(frozen=True, slots=True)
class Known:
    """What a cure is worded with.

    Attributes:
        models: the name of the mapped class of a table.
        unittests: the ids of tests that are methods of a TestCase.
        own: the databases that one test alone made for itself.
        keyless: whether a table has no primary key.
    """

    models: dict[str, str]
    unittests: Collection[str]
    own: Collection[str]
    keyless: Callable[[TableName], bool]

    def model(self, table: TableName) -> str:
        """What to call a row of a table."""
        return self.models.get(table.name) or repr(table.name)

    def select(self, table: TableName) -> str:
        """What selects the rows of a table in Python; a Table is often called as it is named."""
        return f"select({self.models.get(table.name, table.name)})"

    def take_tidy(self, test: str) -> str:
        """How a test gets rid of its rows."""
        if test in self.unittests:
            return "derive the class from tidyrows.testing.TidyTestCase"
        return f"def {function(test)}(tidy): or, for all tests, tidy_autouse = true in the ini file"


def function(test: str) -> str:
    """The name of a test's function: ``test_it`` of ``test_a.py::TestOne::test_it[a::b]``."""
    return test.partition("::")[2].partition("[")[0].rpartition("::")[2]


def of_rows(book: Book, known: Known) -> Iterator[Finding]:
    """What is wrong by the rows that were seen."""
    for who, touched in book.touched.items():
        groups: dict[tuple[Touch, TableName, str], _Group] = defaultdict(_Group)
        for (touch, table, maker), keys in touched.items():
            if table.database not in known.own:
                # All tests' rows in one line, those of each shared fixture in another.
                groups[touch, table, "" if maker.is_test else maker.name].add(maker, keys)
        for (touch, table, _name), group in groups.items():
            yield _touched(who, touch, table, group, known)
    for who, left in book.left.items():
        for table, rows in left.items():
            if rows and table.database not in known.own:
                there = book.still_there(who, table)
                few = [] if known.keyless(table) else shown(rows.keys)
                found = _left(who, table, few, (len(rows), there), known)
                if found is not None:
                    yield found


@dataclass(slots=True)
class _Group:
    """Rows of one table that one test touched in one way, and their makers."""

    makers: list[Maker] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)

    def add(self, maker: Maker, keys: Collection[Key]) -> None:
        self.makers.append(maker)
        self.keys.update(keys)

    @property
    def made(self) -> str:
        if self.makers == [BEFORE]:
            return "made before the first test"
        named = ", ".join(maker.name for maker in self.makers[:_MAKERS])
        more = len(self.makers) - _MAKERS
        return f"made by {named}" + (f" and {more} other test(s)" if more > 0 else "")


def _touched(who: Maker, touch: Touch, table: TableName, group: _Group, known: Known) -> Finding:
    count = len(group.keys)
    keys = [] if known.keyless(table) else shown(group.keys)
    model = known.model(table)
    if touch is Touch.READ:
        fault = Fault.READS
        cure = f"make the {model} it reads in the test itself, or with tidy_worker.once(...)"
    elif group.makers[0].is_test:
        fault = Fault.CHANGES if touch is Touch.CHANGED else Fault.DELETES
        cure = f"make the {model} it {touch.value} in the test itself"
    elif touch is Touch.CHANGED:
        fault = Fault.CHANGES
        cure = f"tidy.tracker.preserve({known.select(table)}) before the change"
    else:
        fault = Fault.DELETES
        preserve = f"tidy.tracker.preserve({known.select(table)})"
        cure = f"delete a {model} made in the test, or {preserve}"
    said = f"{touch.value} {count} row(s) of {table}{_listed(keys, count)}, {group.made}"
    whose = [maker.name for maker in group.makers[:_MAKERS]]
    return Finding(who.name, fault, said, cure, count, str(table), keys, whose)


def _left(
    who: Maker, table: TableName, keys: list[Any], counts: tuple[int, int], known: Known
) -> Finding | None:
    count, there = counts
    if not who.is_test:
        if not there:
            return None
        said = f"leaves {there} row(s) of {table}{_listed(keys, there)} at the end of the run"
        cure = "make them with tidy_worker or tidy_run, which delete them at the end"
        return Finding(who.name, Fault.SHARED, said, cure, there, str(table), keys)
    said = f"leaves {count} row(s) of {table}{_listed(keys, count)}"
    if there != count:
        said += f", {there or 'none'} of them still there at the end of the run"
    cure = known.take_tidy(who.name)
    return Finding(who.name, Fault.LEAVES, said, cure, count, str(table), keys)


def _listed(keys: list[Any], count: int) -> str:
    if not keys:
        return ""
    more = ", ..." if count > len(keys) else ""
    return f" ({', '.join(map(_printable, keys))}{more})"


def _printable(key: Any) -> str:
    """A key may hold anything: a new line, or what a terminal takes for a command."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(key))
