"""All that an audit found, the worst first; and its form in JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.audit.findings import Fault, Finding
    from tidyrows.audit.runs import Run

VERSION = 1


@dataclass(frozen=True, slots=True)
class Culprit:
    """A test with all that is wrong with it, the worst first."""

    test: str
    findings: Sequence[Finding]

    @property
    def badness(self) -> tuple[int, int, str]:
        """To sort by: the worst fault, then how many rows."""
        worst = self.findings[0].fault
        rows = sum(each.count for each in self.findings if each.fault is worst)
        return int(worst), -rows, self.test


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found.

    Attributes:
        tests: how many ran.
        culprits: the worst first.
        runs: the first and those in other orders.
        notes: what could not be looked at.
    """

    tests: int
    culprits: Sequence[Culprit]
    runs: Sequence[Run] = ()
    notes: Sequence[str] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "version": VERSION,
            "tests": self.tests,
            "culprits": [
                {"test": culprit.test, "findings": [each.as_json() for each in culprit.findings]}
                for culprit in self.culprits
            ],
            "runs": [
                {
                    "name": run.name,
                    "seed": run.seed,
                    "tests": len(run.failed),
                    "failed": [test for test, failed in run.failed.items() if failed],
                    "said": run.said,
                }
                for run in self.runs
            ],
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """In one line."""
        if not self.culprits:
            return f"{self.tests} test(s), no culprit"
        counts: dict[Fault, int] = {}
        for culprit in self.culprits:
            for fault in {each.fault for each in culprit.findings}:
                counts[fault] = counts.get(fault, 0) + 1
        told = ", ".join(f"{count} {fault.words}" for fault, count in sorted(counts.items()))
        return f"{len(self.culprits)} culprit(s), {self.tests} test(s): {told}"


def reported(
    findings: Iterable[Finding], tests: int, runs: Sequence[Run], notes: Sequence[str]
) -> Report:
    """The report of all that was found."""
    by_test: dict[str, list[Finding]] = {}
    for each in findings:
        by_test.setdefault(each.test, []).append(each)
    culprits = [
        Culprit(test, sorted(found, key=lambda each: (each.fault, -each.count, each.table or "")))
        for test, found in by_test.items()
    ]
    faults = [f"the run {run.name!r}: {run.said}" for run in runs if run.said]
    return Report(tests, sorted(culprits, key=lambda c: c.badness), runs, [*notes, *faults])
