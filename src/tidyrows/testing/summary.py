"""What all tests of a run created and what became of it, summed over the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidyrows.suite.summary import RowCounts, SuiteSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.suite.summary import Record

_SLOW = 1.0
"""Seconds from which on a cleanup is worth a line."""
_SHOWN = 3


@dataclass(slots=True)
class RunSummary:
    """The sum of all records.

    Attributes:
        rows: created and deleted rows of tests that use tidyrows.
        tests: how many tests created rows.
        leaked: rows that could not be deleted.
        held: rows that waited for another worker's.
        kept: rows of failed tests that were left for study.
        slowest: seconds and tests, the slowest first.
        notes: lines to print.
        failed: rows are left, and no test's own error has reported them.
        suite: what tests that do not use tidyrows would have left.
    """

    rows: RowCounts = field(default_factory=RowCounts)
    tests: int = 0
    leaked: int = 0
    held: int = 0
    kept: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
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
        """The summary; nothing where there is nothing to report.

        Args:
            tables: a line for each table.
        """
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
