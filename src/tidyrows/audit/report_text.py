"""The report as text for a terminal."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.audit.report import AuditReport

MOST = 30
"""Culprits in the terminal; JSON and HTML have them all."""
_TABLES = 4
_NOTES = 10


def lines(report: AuditReport) -> Iterator[str]:
    """The lines of the report."""
    yield report.headline
    width = max((len(each.kind.words) for c in report.culprits for each in c.findings), default=0)
    for culprit in report.culprits[:MOST]:
        yield ""
        yield culprit.test
        for (kind, cure), alike in groupby(culprit.findings, lambda f: (f.kind, f.cure)):
            texts = [each.text for each in alike]
            more = [f"and {len(texts) - _TABLES} more tables"] if len(texts) > _TABLES else []
            yield f"  {kind.words:<{width}}  {'; '.join([*texts[:_TABLES], *more])}"
            yield f"  {'':<{width}}  cure: {cure}"
    hidden = len(report.culprits) - MOST
    if hidden > 0:
        yield ""
        yield f"and {hidden} more culprit(s): --tidy-audit-json PATH or --tidy-audit-html PATH"
    if report.notes:
        yield ""
    for note in report.notes[:_NOTES]:
        yield f"not seen: {note}"
    if len(report.notes) > _NOTES:
        yield f"not seen: {len(report.notes) - _NOTES} more, in the JSON and HTML"
