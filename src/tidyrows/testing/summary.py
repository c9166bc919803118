"""What all tests of a run created and what became of it, summed over the workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidyrows.suite.cleanups import Record

_SLOW = 1.0
"""Seconds from which on a cleanup is worth a line."""
_SHOWN = 3
_MOST = 10


@dataclass(slots=True)
class RowCounts:
    """Rows of several cleanups."""

    created: Counter[str] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    dependents: int = 0  # deleted rows that nobody had tracked
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
    """The sum over tests that do not use tidyrows themselves."""

    rows: RowCounts = field(default_factory=RowCounts)
    tests: Counter[str] = field(default_factory=Counter)  # rows left
    stays: Counter[str] = field(default_factory=Counter)  # rows that no test created
    # the tests that changed rows of others, by table, keys and verb
    touched: dict[tuple[str, str, str], dict[str, None]] = field(default_factory=dict)
    untracked: dict[str, str] = field(default_factory=dict)  # text: the first test
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
        """The summary; nothing where there is nothing to report."""
        most = None if everything else _MOST
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


@dataclass(slots=True)
class RunSummary:
    """The sum of all records."""

    rows: RowCounts = field(default_factory=RowCounts)
    tests: int = 0  # with rows
    leaked: int = 0
    held: int = 0
    kept: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False  # rows are left, and no test's own error has reported them
    suite: SuiteSummary = field(default_factory=SuiteSummary)

    def add(self, record: Record) -> None:
        """Add the record of one cleanup, or a line to print."""
        if "note" in record:
            self.notes.append(record["note"])
            return
        if "seconds" in record:
            slowest = [*self.slowest, (float(record["seconds"]), str(record["test"]))]
            self.slowest = sorted(slowest, reverse=True)[:_SHOWN]
        if record.get("whole_suite"):
            self.suite.add(record)
            self.failed = self.failed or bool(record.get("undeleted"))
            return
        created = record.get("created", {})
        self.rows.add(record, created)
        self.tests += bool(created)
        self.leaked += record.get("leaked", 0)
        self.held += record.get("held", 0)
        self.kept += record.get("kept", 0)

    def fail(self, note: str) -> None:
        """Rows are left: print this line, and let the run fail."""
        self.notes.append(note)
        self.failed = True

    def lines(self, *, tables: bool) -> Iterator[str]:
        """The summary; nothing where there is nothing to report."""
        created, deleted = self.rows.created, self.rows.deleted
        if created or deleted or self.leaked:
            counts = {"leaked": self.leaked, "held": self.held, "kept": self.kept}
            yield self.rows.text(
                f"{created.total()} row(s) created in {self.tests} test(s), ",
                "".join(f", {count} {word}" for word, count in counts.items() if count),
            )
        if tables:
            for table in sorted(created | deleted):
                yield f"  {table}: {created[table]} created, {deleted[table]} deleted"
        for seconds, test in self.slowest:
            if tables or seconds >= _SLOW:
                yield f"  cleanup took {seconds:.2f} s: {test}"
        yield from self.suite.lines(everything=tables)
        yield from self.notes
