"""The report as one HTML file, without other files."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.audit.report import AuditReport

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
