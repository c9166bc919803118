"""What all tests of a run created and what became of it, added up over its workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.suite.summary import Found

if TYPE_CHECKING:
    from collections.abc import Iterator


_SLOW = 1.0
"""Seconds from which on a cleanup is worth a line."""
_SHOWN = 3
_ALL_SAY = ("test", "seconds")


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
