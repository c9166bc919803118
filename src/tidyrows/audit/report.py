"""The findings of an audit by test, the worst first: as JSON and as text."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.audit.findings import Finding, FindingKind
    from tidyrows.audit.runs import AuditRun

_VERSION = 2


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
        culprits: the tests with findings, the worst first.
        runs: the first is the one that was looked at.
        notes: what the audit could not see or do.
        not_put_back: what was not as before after a run.
    """

    culprits: Sequence[Culprit]
    runs: Sequence[AuditRun]
    notes: Sequence[str] = ()
    not_put_back: Sequence[str] = ()

    @property
    def tests(self) -> int:
        """How many tests ran."""
        return len(self.runs[0].failed)

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "version": _VERSION,
            "headline": self.headline,
            "tests": self.tests,
            "culprits": [
                {"test": culprit.test, "findings": [each.as_json() for each in culprit.findings]}
                for culprit in self.culprits
            ],
            "runs": [
                {
                    "name": run.name,
                    "kind": run.kind.value,
                    "seed": run.seed,
                    "tests": len(run.failed),
                    "failed": [test for test, failed in run.failed.items() if failed],
                    "changed": list(run.changed),
                    "said": run.fault,
                }
                for run in self.runs
            ],
            "not_put_back": list(self.not_put_back),
            "notes": list(self.notes),
        }

    @property
    def counts(self) -> list[tuple[FindingKind, int]]:
        """How many culprits there are of each kind, the worst first."""
        kinds = (kind for c in self.culprits for kind in {each.kind for each in c.findings})
        return sorted(Counter(kinds).items())

    @property
    def headline(self) -> str:
        """The report in one line."""
        if not self.culprits:
            return f"{self.tests} test(s), no culprit"
        text = ", ".join(f"{count} {kind.words}" for kind, count in self.counts)
        return f"{len(self.culprits)} culprit(s), {self.tests} test(s): {text}"


def report_of(
    findings: Iterable[Finding],
    runs: Sequence[AuditRun],
    notes: Sequence[str],
    not_put_back: Sequence[str] = (),
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
    worst_first = sorted(culprits, key=lambda c: c.badness)
    return AuditReport(worst_first, runs, [*notes, *faults], not_put_back)


_MOST = 30
"""Culprits in the terminal; JSON and HTML have them all."""
_TABLES = 4
_NOTES = 10
_NARROWEST = 40


def lines(report: AuditReport, width: int = 80) -> Iterator[str]:
    """The lines of the report, none longer than the terminal."""
    yield from wrapped(report.headline, width)
    column = max((len(each.kind.words) for c in report.culprits for each in c.findings), default=0)
    for culprit in report.culprits[:_MOST]:
        yield ""
        yield from wrapped(culprit.test, width)
        for (kind, cure, proof), alike in groupby(
            culprit.findings, lambda f: (f.kind, f.cure, f.proof)
        ):
            texts = [each.text for each in alike]
            more = [f"and {len(texts) - _TABLES} more tables"] if len(texts) > _TABLES else []
            said = "; ".join([*texts[:_TABLES], *more])
            indent = " " * (column + 4)
            yield from wrapped(said, width, f"  {kind.words:<{column}}  ", indent)
            yield from wrapped(proof, width, indent, indent)
            yield from wrapped(cure, width, f"{indent}cure: ", f"{indent}      ")
    hidden = len(report.culprits) - _MOST
    if hidden > 0:
        yield ""
        yield f"and {hidden} more culprit(s): --tidy-audit-json PATH or --tidy-audit-html PATH"
    for name, notes in (("not put back", report.not_put_back), ("not seen", report.notes)):
        if notes:
            yield ""
        for note in notes[:_NOTES]:
            first, *others = note.splitlines() or [""]
            yield from wrapped(first, width, f"{name}: ")
            for line in others:
                yield from wrapped(line, width, "  ")
        if len(notes) > _NOTES:
            yield f"{name}: {len(notes) - _NOTES} more, in the JSON and HTML"


def wrapped(text: str, width: int, first: str = "", others: str = "  ") -> list[str]:
    """A text in lines that fit."""
    return textwrap.wrap(
        text,
        max(width, _NARROWEST),
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
    )
