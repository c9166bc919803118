"""What all tests of a run created and what became of it, added up over its workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.testing.found import Found

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tidyrows.cleanup import CleanupReport
    from tidyrows.rows import TableName
    from tidyrows.tracking import ResourceTracker

_SLOW = 1.0
"""Seconds from which on a cleanup is worth a line."""
_SHOWN = 3
_ALL_SAY = ("test", "seconds")


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


@dataclass(slots=True)
class Totals:
    """The sum of what was said.

    Attributes:
        created: rows, by table.
        deleted: rows, by table; with those of the application.
        others: how many of these nobody had tracked.
        tests: how many created rows.
        leaked: rows that could not be deleted.
        held: rows that waited for another worker's.
        kept: rows of failed tests that were left for study.
        retries: transactions that were run again.
        slowest: seconds and tests, the slowest first.
        notes: what else there is to say.
        failed: rows are left that no test's own error has told of.
        suite: what tests that do not use tidyrows would have left.
    """

    created: Counter[str] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    others: int = 0
    tests: int = 0
    leaked: int = 0
    held: int = 0
    kept: int = 0
    retries: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    suite: Found = field(default_factory=Found)

    def add(self, said: dict[str, Any]) -> None:
        """Add what was said of one cleanup."""
        if "suite" in said:
            self.suite.add(said)
            self.failed = self.failed or bool(said.get("unpaid"))
            said = {name: said[name] for name in _ALL_SAY if name in said}
        self.created.update(said.get("created", {}))
        self.deleted.update(said.get("deleted", {}))
        self.tests += bool(said.get("created"))
        for name in ("others", "leaked", "held", "kept", "retries"):
            setattr(self, name, getattr(self, name) + said.get(name, 0))
        if "seconds" in said:
            slowest = [*self.slowest, (float(said["seconds"]), str(said["test"]))]
            self.slowest = sorted(slowest, reverse=True)[:_SHOWN]

    def lines(self, *, tables: bool) -> Iterator[str]:
        """The summary; nothing where there is nothing to say.

        Args:
            tables: a line for each table.
        """
        if self.created or self.deleted or self.leaked:
            text = (
                f"{self.created.total()} row(s) created in {self.tests} test(s), "
                f"{self.deleted.total()} deleted"
            )
            if self.others:
                text += f" ({self.others} of them made by the application)"
            counts = {"leaked": self.leaked, "held": self.held, "kept": self.kept}
            text += "".join(f", {count} {word}" for word, count in counts.items() if count)
            if self.retries:
                text += f"; {self.retries} transaction(s) run again"
            yield text
        if tables:
            for table in sorted(self.created | self.deleted):
                yield f"  {table}: {self.created[table]} created, {self.deleted[table]} deleted"
        for seconds, test in self.slowest:
            if tables or seconds >= _SLOW:
                yield f"  cleanup took {seconds:.2f} s: {test}"
        yield from self.suite.lines(everything=tables)
        yield from self.notes
