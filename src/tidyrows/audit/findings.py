"""What is wrong with a test, how bad that is, and the line that cures it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

from tidyrows.audit.row_history import BEFORE, RowAccess
from tidyrows.audit.tables import first_keys, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from tidyrows.audit.row_history import Maker, RowHistory
    from tidyrows.audit.tables import Key
    from tidyrows.keys import TableName

_MAKERS = 3


class FindingKind(IntEnum):
    """What may be wrong with a test, the worst first."""

    words: str

    ORDER = 1, "needs an order"
    TWICE = 2, "does not pass twice"
    CHANGES = 3, "changes others' rows"
    DELETES = 4, "deletes others' rows"
    READS = 5, "reads others' rows"
    LEAVES = 6, "leaves rows"
    SHARED = 7, "leaves rows (shared)"

    def __new__(cls, number: int, words: str) -> Self:
        """A kind with the words of the table."""
        kind = int.__new__(cls, number)
        kind._value_, kind.words = number, words
        return kind


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
    proof: str = ""

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "fault": self.kind.name.lower(),
            "said": self.text,
            "proof": self.proof,
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
        groups: dict[tuple[RowAccess, TableName, str], dict[Maker, set[Key]]] = defaultdict(dict)
        for (access, table, other), keys in touched.items():
            if table.database not in wording.own:
                # The rows of all tests in one line, those of each shared fixture in another.
                groups[access, table, "" if other.is_test else other.name][other] = keys
        for (access, table, _name), by_maker in groups.items():
            found = _touched(maker, access, table, by_maker, wording)
            yield replace(found, proof=_seen(history, access, table))
    for maker, left in history.left.items():
        for table, rows in left.items():
            if rows and table.database not in wording.own:
                there = history.still_there(maker, table)
                few = [] if wording.keyless(table) else first_keys(rows.keys)
                leaves = _left(maker, table, few, (len(rows), there), wording)
                if leaves is not None:
                    yield replace(leaves, proof=_seen(history, None, table))


def _seen(history: RowHistory, access: RowAccess | None, table: TableName) -> str:
    """How the audit knows it."""
    if access is RowAccess.READS:
        return "seen in what its SELECTs return"
    if table in history.heard:
        return "heard from its statements: the table is too large to be looked at"
    return "seen in the database after it"


def _touched(
    maker: Maker,
    access: RowAccess,
    table: TableName,
    by_maker: Mapping[Maker, set[Key]],
    wording: Wording,
) -> Finding:
    makers, touched = list(by_maker), set().union(*by_maker.values())
    count = len(touched)
    keys = [] if wording.keyless(table) else first_keys(touched)
    model = wording.model(table)
    preserve = f"tidy.tracker.preserve({wording.select(table)})"
    if access is RowAccess.READS:
        cure = f"make the {model} it reads in the test itself, or with tidy_worker.once(...)"
    elif makers[0].is_test:
        cure = f"make the {model} it {access.value} in the test itself"
    elif access is RowAccess.CHANGES:
        cure = f"{preserve} before the change"
    else:
        cure = f"delete a {model} made in the test, or {preserve}"
    others = [other.name for other in makers[:_MAKERS]]
    made = "before the first test" if makers == [BEFORE] else f"by {', '.join(others)}"
    if len(makers) > _MAKERS:
        made += f" and {len(makers) - _MAKERS} other test(s)"
    text = f"{access.value} {count} row(s) of {table}{listed(keys, count)}, made {made}"
    kind = FindingKind[access.name]
    return Finding(maker.name, kind, text, cure, count, str(table), keys, others)


def _left(
    maker: Maker, table: TableName, keys: list[Any], counts: tuple[int, int], wording: Wording
) -> Finding | None:
    count, there = counts
    if not maker.is_test:
        if not there:
            return None
        text = f"leaves {there} row(s) of {table}{listed(keys, there)} at the end of the run"
        cure = "make them with tidy_worker or tidy_run, which delete them at the end"
        return Finding(maker.name, FindingKind.SHARED, text, cure, there, str(table), keys)
    text = f"leaves {count} row(s) of {table}{listed(keys, count)}"
    if there != count:
        text += f", {there or 'none'} of them still there at the end of the run"
    cure = wording.tidy_cure(maker.name)
    return Finding(maker.name, FindingKind.LEAVES, text, cure, count, str(table), keys)
