"""The findings of an audit by test, the worst first: as JSON, as text, as one HTML file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.audit.findings import Finding
    from tidyrows.audit.runs import AuditRun

_VERSION = 1


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
    """What an audit found."""

    tests: int
    culprits: Sequence[Culprit]
    runs: Sequence[AuditRun] = ()
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "version": _VERSION,
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
        counts = Counter(
            kind for culprit in self.culprits for kind in {each.kind for each in culprit.findings}
        )
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


_MOST = 30
"""Culprits in the terminal; JSON and HTML have them all."""
_TABLES = 4
_NOTES = 10


def lines(report: AuditReport) -> Iterator[str]:
    """The lines of the report."""
    yield report.headline
    width = max((len(each.kind.words) for c in report.culprits for each in c.findings), default=0)
    for culprit in report.culprits[:_MOST]:
        yield ""
        yield culprit.test
        for (kind, cure), alike in groupby(culprit.findings, lambda f: (f.kind, f.cure)):
            texts = [each.text for each in alike]
            more = [f"and {len(texts) - _TABLES} more tables"] if len(texts) > _TABLES else []
            yield f"  {kind.words:<{width}}  {'; '.join([*texts[:_TABLES], *more])}"
            yield f"  {'':<{width}}  cure: {cure}"
    hidden = len(report.culprits) - _MOST
    if hidden > 0:
        yield ""
        yield f"and {hidden} more culprit(s): --tidy-audit-json PATH or --tidy-audit-html PATH"
    if report.notes:
        yield ""
    for note in report.notes[:_NOTES]:
        yield f"not seen: {note}"
    if len(report.notes) > _NOTES:
        yield f"not seen: {len(report.notes) - _NOTES} more, in the JSON and HTML"


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tidyrows audit</title><style>
body { font: 15px/1.4 sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .4em .8em; border-bottom: 1px solid #ddd }
code, pre { font: 13px/1.4 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.f1, .f2 { background: #fbd5d5 } .f3, .f4 { background: #fde8cf } .f5 { background: #fdf6cf }
</style></head><body>"""


def html(report: AuditReport) -> str:
    """The page."""
    return "\n".join([_HEAD, *_body(report), "</body></html>", ""])


def _body(report: AuditReport) -> Iterator[str]:
    yield f"<h1>tidyrows audit</h1><p>{escape(report.headline)}</p>"
    if report.culprits:
        yield "<table><tr><th>test</th><th>fault</th><th>what</th><th>cure</th></tr>"
        for culprit in report.culprits:
            name = f"<code>{escape(culprit.test)}</code>"
            for each in culprit.findings:
                yield (
                    f'<tr class="f{int(each.kind)}"><td>{name}</td>'
                    f"<td>{escape(each.kind.words)}</td><td>{escape(each.text)}</td>"
                    f"<td><code>{escape(each.cure)}</code></td></tr>"
                )
                name = ""
        yield "</table>"
    if len(report.runs) > 1:
        yield "<h2>Runs</h2><table><tr><th>run</th><th>tests</th><th>failed</th></tr>"
        for run in report.runs:
            failed = [escape(test) for test, fails in run.failed.items() if fails]
            named = "<br>".join(f"<code>{test}</code>" for test in failed) or "none"
            yield f"<tr><td>{escape(run.name)}</td><td>{len(run.failed)}</td><td>{named}</td></tr>"
        yield "</table>"
    if report.notes:
        yield "<h2>Not seen</h2>"
        for note in report.notes:
            yield f"<pre>{escape(note)}</pre>"
