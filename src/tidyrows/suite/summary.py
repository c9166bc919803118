"""What a suite would have left behind, summed over its tests and workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

    Record = dict[str, Any]

_SHOWN = 10


@dataclass(slots=True)
class RowCounts:
    """Rows of several cleanups.

    Attributes:
        created: rows, by table.
        deleted: rows, by table; with those of the application.
        dependents: how many deleted rows nobody had tracked.
        retries: transactions that were run again.
    """

    created: Counter[str] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    dependents: int = 0
    retries: int = 0

    def add(self, record: Record, created: Mapping[str, int]) -> None:
        """Add the record of one cleanup."""
        self.created.update(created)
        self.deleted.update(record.get("deleted", {}))
        self.dependents += record.get("dependents", 0)
        self.retries += record.get("retries", 0)

    def text(self, begin: str, more: str = "") -> str:
        """One sentence: what was created, how many were deleted, and how many times it took."""
        text = f"{begin}{self.deleted.total()} deleted"
        if self.dependents:
            text += f" ({self.dependents} of them made by the application)"
        text += more
        if self.retries:
            text += f"; {self.retries} transaction(s) run again"
        return text


@dataclass(slots=True)
class SuiteSummary:
    """The sum over tests that do not use tidyrows themselves.

    Attributes:
        rows: those that tests had left when they ended, and those that were deleted.
        tests: rows left, by test.
        stays: rows that no test created, by table.
        touched: which tests changed rows that they had not created: by table, keys and verb.
        untracked: what could not be tracked, and the test where that was first seen.
        undeleted: what could not be deleted, and why.
    """

    rows: RowCounts = field(default_factory=RowCounts)
    tests: Counter[str] = field(default_factory=Counter)
    stays: Counter[str] = field(default_factory=Counter)
    touched: dict[tuple[str, str, str], dict[str, None]] = field(default_factory=dict)
    untracked: dict[str, str] = field(default_factory=dict)
    undeleted: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Add the record of one test, or of the rows that no test created."""
        test = str(record["test"])
        created: Counter[str] = Counter(record.get("created", {})) - Counter(record.get("gone", {}))
        self.rows.add(record, created)
        if created:
            self.tests[test] += created.total()
        self.stays.update(record.get("stays", {}))
        for table, verb, rows in record.get("touched", ()):
            self.touched.setdefault((table, rows, verb), {})[test] = None
        for text in record.get("untracked", ()):
            self.untracked.setdefault(text, test)
        self.undeleted += record.get("undeleted", ())

    def lines(self, *, everything: bool) -> Iterator[str]:
        """The summary; nothing where there is nothing to report.

        Args:
            everything: every test and row, not only the first few.
        """
        most = None if everything else _SHOWN
        left = self.rows.created
        if left:
            yield self.rows.text(
                f"without tidyrows {left.total()} row(s) of {len(self.tests)} test(s) would have "
                f"stayed; "
            )
            yield from (f"  {table}: {count}" for table, count in left.most_common(most))
            worst = [f"{count} by {test}" for test, count in self.tests.most_common()]
            yield from _listed("most of them", worst, most)
        if self.stays:
            stays = ", ".join(f"{table} {count}" for table, count in sorted(self.stays.items()))
            yield f"rows that stay, made before the first test or by session fixtures: {stays}"
        touched = [
            f"{table} {rows} {verb} by {_tests(tests, everything=everything)}"
            for (table, rows, verb), tests in sorted(self.touched.items())
        ]
        yield from _listed("rows that tests changed though they had not made them", touched, most)
        untracked = [f"{text} ({test})" for text, test in self.untracked.items()]
        yield from _listed("not tracked", untracked, most)
        yield from _listed("still there", self.undeleted, most)


def _listed(title: str, lines: list[str], most: int | None) -> Iterator[str]:
    if lines:
        yield f"{title}:"
        yield from (f"  {line}" for line in lines[:most])
        if most is not None and len(lines) > most:
            yield f"  ... and {len(lines) - most} more (--tidy-report shows all)"


def _tests(tests: dict[str, None], *, everything: bool) -> str:
    names = list(tests)
    if everything or len(names) == 1:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} other test(s)"


def created_by(tracker: ResourceTracker) -> dict[str, int]:
    """How many rows a tracker holds, by table."""
    return _summed((held.table.name, len(held.keys) + held.nameless) for held in tracker.snapshot())


def _summed(counts: Iterable[tuple[TableName, int]]) -> dict[str, int]:
    """By table; tables of one name in several databases count together."""
    total: Counter[str] = Counter()
    for table, count in counts:
        total[str(table)] += count
    return dict(+total)


def record_of(test: str, created: dict[str, int], report: CleanupReport | None) -> Record:
    """The counts of one cleanup, in JSON's types."""
    record: Record = {"test": test, "created": created}
    if report is not None:
        deleted = Counter(_summed(report.deleted.items()))
        others = Counter(_summed((table, len(rows)) for table, rows in report.dependents.items()))
        record |= {
            "deleted": dict(deleted + others),
            "gone": _summed(report.already_gone.items()),
            "dependents": others.total(),
            "leaked": sum(leftover.count for leftover in report.leftovers),
            "held": len(report.held),
            "retries": report.retries,
            "seconds": report.seconds,
        }
    return record
