"""What a suite would have left behind, added up over its tests and workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

_SHOWN = 10


@dataclass(slots=True)
class Found:
    """The sum of what was said of tests that do not use tidyrows themselves.

    Attributes:
        left: rows that tests had left when they ended, by table.
        tests: the same, by test.
        deleted: rows that were deleted.
        others: how many of these nobody had seen being made.
        retries: transactions that were run again.
        stays: rows that are not a test's, by table.
        touched: which tests changed rows that they had not made: by table, keys and verb.
        unheard: what could not be told, and where first.
        unpaid: what could not be deleted, and why.
    """

    left: Counter[str] = field(default_factory=Counter)
    tests: Counter[str] = field(default_factory=Counter)
    deleted: int = 0
    others: int = 0
    retries: int = 0
    stays: Counter[str] = field(default_factory=Counter)
    touched: dict[tuple[str, str, str], dict[str, None]] = field(default_factory=dict)
    unheard: dict[str, str] = field(default_factory=dict)
    unpaid: list[str] = field(default_factory=list)

    def add(self, said: dict[str, Any]) -> None:
        """Add what was said of one test, or of what is no test's."""
        test = str(said["test"])
        created = Counter(said.get("created", {})) - Counter(said.get("gone", {}))
        self.left.update(created)
        if created:
            self.tests[test] += created.total()
        self.deleted += sum(said.get("deleted", {}).values())
        self.others += said.get("others", 0)
        self.retries += said.get("retries", 0)
        self.stays.update(said.get("stays", {}))
        for table, verb, rows in said.get("touched", ()):
            self.touched.setdefault((table, rows, verb), {})[test] = None
        for text in said.get("unheard", ()):
            self.unheard.setdefault(text, test)
        self.unpaid += said.get("unpaid", ())

    def lines(self, *, everything: bool) -> Iterator[str]:
        """The summary; nothing where there is nothing to say.

        Args:
            everything: every test and row, not only the first few.
        """
        most = None if everything else _SHOWN
        if self.left:
            text = (
                f"without tidyrows {self.left.total()} row(s) of {len(self.tests)} test(s) would "
                f"have stayed; {self.deleted} deleted"
            )
            if self.others:
                text += f" ({self.others} of them made by the application)"
            if self.retries:
                text += f"; {self.retries} transaction(s) run again"
            yield text
            yield from (f"  {table}: {count}" for table, count in self.left.most_common(most))
            worst = [f"{count} by {test}" for test, count in self.tests.most_common(most)]
            yield from _some("most of them", worst, len(self.tests))
        if self.stays:
            told = [f"{table} {count}" for table, count in sorted(self.stays.items())]
            yield (
                f"rows that stay, made before the first test or by session fixtures: "
                f"{', '.join(told)}"
            )
        if self.touched:
            told = [
                f"{table} {rows} {verb} by {_tests(tests, everything=everything)}"
                for (table, rows, verb), tests in sorted(self.touched.items())
            ]
            yield from _some(
                "rows that tests changed though they had not made them", told[:most], len(told)
            )
        if self.unheard:
            told = [f"{text} ({test})" for text, test in self.unheard.items()]
            yield from _some("not tracked", told[:most], len(told))
        if self.unpaid:
            yield from _some("still there", self.unpaid[:most], len(self.unpaid))


def _some(title: str, lines: list[str], count: int) -> Iterator[str]:
    yield f"{title}:"
    yield from (f"  {line}" for line in lines)
    if count > len(lines):
        yield f"  ... and {count - len(lines)} more (--tidy-report shows all)"


def _tests(tests: dict[str, None], *, everything: bool) -> str:
    names = list(tests)
    if everything or len(names) == 1:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} other test(s)"


def created_by(tracker: ResourceTracker) -> dict[str, int]:
    """How many rows a tracker holds, by table."""
    return _summed((held.table.name, len(held.keys) + held.nameless) for held in tracker.snapshot())


def _summed(counts: Iterable[tuple[TableName, int]]) -> dict[str, int]:
    """By table; those of one name in several databases count together."""
    total: Counter[str] = Counter()
    for table, count in counts:
        total[str(table)] += count
    return dict(+total)


def said_of(test: str, created: dict[str, int], report: CleanupReport | None) -> dict[str, Any]:
    """What is told of one cleanup, in JSON's types."""
    said: dict[str, Any] = {"test": test, "created": created}
    if report is not None:
        deleted = Counter(_summed(report.deleted.items()))
        others = Counter(_summed((table, len(rows)) for table, rows in report.dependents.items()))
        said |= {
            "deleted": dict(deleted + others),
            "gone": _summed(report.already_gone.items()),
            "others": others.total(),
            "leaked": sum(leftover.count for leftover in report.leftovers),
            "held": len(report.held),
            "retries": report.retries,
            "seconds": report.seconds,
        }
    return said
