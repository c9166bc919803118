"""The findings of an audit by test, the worst first; and their form in JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.audit.findings import Finding, FindingKind
    from tidyrows.audit.runs import AuditRun

VERSION = 1


@dataclass(frozen=True, slots=True)
class Culprit:
    """A test and its findings, the worst first."""

    test: str
    findings: Sequence[Finding]

    @property
    def badness(self) -> tuple[int, int, str]:
        """To sort by: the worst finding, then the number of rows."""
        worst = self.findings[0].kind
        rows = sum(each.count for each in self.findings if each.kind is worst)
        return int(worst), -rows, self.test


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    Attributes:
        tests: how many ran.
        culprits: the worst first.
        runs: the first and those in other orders.
        notes: what could not be looked at.
    """

    tests: int
    culprits: Sequence[Culprit]
    runs: Sequence[AuditRun] = ()
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
                    "said": run.fault,
                }
                for run in self.runs
            ],
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """The report in one line."""
        if not self.culprits:
            return f"{self.tests} test(s), no culprit"
        counts: dict[FindingKind, int] = {}
        for culprit in self.culprits:
            for kind in {each.kind for each in culprit.findings}:
                counts[kind] = counts.get(kind, 0) + 1
        text = ", ".join(f"{count} {kind.words}" for kind, count in sorted(counts.items()))
        return f"{len(self.culprits)} culprit(s), {self.tests} test(s): {text}"


def report_of(
    findings: Iterable[Finding], tests: int, runs: Sequence[AuditRun], notes: Sequence[str]
) -> AuditReport:
    """The report of all that was found."""
    by_test: dict[str, list[Finding]] = {}
    for each in findings:
        by_test.setdefault(each.test, []).append(each)
    culprits = [
        Culprit(test, sorted(found, key=lambda each: (each.kind, -each.count, each.table or "")))
        for test, found in by_test.items()
    ]
    faults = [f"the run {run.name!r}: {run.fault}" for run in runs if run.fault]
    return AuditReport(tests, sorted(culprits, key=lambda c: c.badness), runs, [*notes, *faults])
