"""What is wrong with a test, how bad that is, and the line that cures it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tidyrows.audit.row_history import BEFORE, RowAccess

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from tidyrows.audit.row_history import Maker, RowHistory
    from tidyrows.audit.tables import Key
    from tidyrows.keys import TableName

_MAKERS = 3
_KEYS = 5
_LONGEST = 60
"""Characters of a key."""


class FindingKind(IntEnum):
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
        """The words of the table."""
        return _WORDS[self]


_WORDS = {
    FindingKind.ORDER: "needs an order",
    FindingKind.TWICE: "does not pass twice",
    FindingKind.CHANGES: "changes others' rows",
    FindingKind.DELETES: "deletes others' rows",
    FindingKind.READS: "reads others' rows",
    FindingKind.LEAVES: "leaves rows",
    FindingKind.SHARED: "leaves rows (shared)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with one test."""

    test: str
    kind: FindingKind
    text: str
    cure: str
    count: int = 0
    table: str | None = None
    keys: list[Any] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "fault": self.kind.name.lower(),
            "said": self.text,
            "cure": self.cure,
            "table": self.table,
            "rows": self.count,
            "keys": self.keys,
            "whose": self.others,
        }


@dataclass(frozen=True, slots=True)
class Wording:
    """The facts that the words of a finding depend on."""

    models: dict[str, str]  # the mapped class, by the name of its table
    unittests: Collection[str]  # tests that are methods of a TestCase
    own: Collection[str]  # databases that one test alone made for itself
    keyless: Callable[[TableName], bool]

    def model(self, table: TableName) -> str:
        """The name of a row of a table."""
        return self.models.get(table.name) or repr(table.name)

    def select(self, table: TableName) -> str:
        """Python code that selects the rows; a variable often has the name of its Table."""
        return f"select({self.models.get(table.name, table.name)})"

    def tidy_cure(self, test: str) -> str:
        """How a test deletes its rows."""
        if test in self.unittests:
            return "derive the class from tidyrows.testing.TidyTestCase"
        return f"def {function(test)}(tidy): or, for all tests, tidy_autouse = true in the ini file"


def function(test: str) -> str:
    """The name of a test's function: ``test_it`` of ``test_a.py::TestOne::test_it[a::b]``."""
    return test.partition("::")[2].partition("[")[0].rpartition("::")[2]


def row_findings(history: RowHistory, wording: Wording) -> Iterator[Finding]:
    """What is wrong by the rows that were seen."""
    for maker, touched in history.touched.items():
        groups: dict[tuple[RowAccess, TableName, str], _Group] = defaultdict(_Group)
        for (access, table, other), keys in touched.items():
            if table.database not in wording.own:
                # The rows of all tests in one line, those of each shared fixture in another.
                groups[access, table, "" if other.is_test else other.name].add(other, keys)
        for (access, table, _name), group in groups.items():
            yield _touched(maker, access, table, group, wording)
    for maker, left in history.left.items():
        for table, rows in left.items():
            if rows and table.database not in wording.own:
                there = history.still_there(maker, table)
                few = [] if wording.keyless(table) else _first_keys(rows.keys)
                found = _left(maker, table, few, (len(rows), there), wording)
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


_KINDS = {
    RowAccess.READ: FindingKind.READS,
    RowAccess.CHANGED: FindingKind.CHANGES,
    RowAccess.DELETED: FindingKind.DELETES,
}


def _touched(
    maker: Maker, access: RowAccess, table: TableName, group: _Group, wording: Wording
) -> Finding:
    count = len(group.keys)
    keys = [] if wording.keyless(table) else _first_keys(group.keys)
    model = wording.model(table)
    preserve = f"tidy.tracker.preserve({wording.select(table)})"
    if access is RowAccess.READ:
        cure = f"make the {model} it reads in the test itself, or with tidy_worker.once(...)"
    elif group.makers[0].is_test:
        cure = f"make the {model} it {access.value} in the test itself"
    elif access is RowAccess.CHANGED:
        cure = f"{preserve} before the change"
    else:
        cure = f"delete a {model} made in the test, or {preserve}"
    text = f"{access.value} {count} row(s) of {table}{_listed(keys, count)}, {group.made}"
    others = [other.name for other in group.makers[:_MAKERS]]
    return Finding(maker.name, _KINDS[access], text, cure, count, str(table), keys, others)


def _left(
    maker: Maker, table: TableName, keys: list[Any], counts: tuple[int, int], wording: Wording
) -> Finding | None:
    count, there = counts
    if not maker.is_test:
        if not there:
            return None
        text = f"leaves {there} row(s) of {table}{_listed(keys, there)} at the end of the run"
        cure = "make them with tidy_worker or tidy_run, which delete them at the end"
        return Finding(maker.name, FindingKind.SHARED, text, cure, there, str(table), keys)
    text = f"leaves {count} row(s) of {table}{_listed(keys, count)}"
    if there != count:
        text += f", {there or 'none'} of them still there at the end of the run"
    cure = wording.tidy_cure(maker.name)
    return Finding(maker.name, FindingKind.LEAVES, text, cure, count, str(table), keys)


def _first_keys(keys: Iterable[Key]) -> list[Any]:
    """The first few, for people and for JSON: bare where the key is one column."""
    few = sorted(keys, key=lambda key: tuple((isinstance(part, str), part) for part in key))[:_KEYS]
    cut = [tuple(part[:_LONGEST] if isinstance(part, str) else part for part in key) for key in few]
    return [key[0] if len(key) == 1 else list(key) for key in cut]


def _listed(keys: list[Any], count: int) -> str:
    if not keys:
        return ""
    more = ", ..." if count > len(keys) else ""
    return f" ({', '.join(map(_printable, keys))}{more})"


def _printable(key: Any) -> str:
    """A key may contain anything: a new line, or a command for the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(key))
