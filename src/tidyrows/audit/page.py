"""The report as one page of HTML, without scripts and without the network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tidyrows.audit.picture import MOST, arrows_of, svg

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.audit.report import AuditReport, Culprit

_STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --line: #d5dae1; --text: #1b222c; --quiet: #55606e;
  --k1: #b3261e; --k2: #8a2a9b; --k3: #985000; --k4: #985000; --k5: #1659ad; --k6: #35692a;
  --k7: #35692a; --code: #eef1f5 }
@media (prefers-color-scheme: dark) { :root {
  --page: #11151b; --card: #1a2028; --line: #374150; --text: #e7ebf1; --quiet: #a7b1bf;
  --k1: #ff8f85; --k2: #e3a6f2; --k3: #ffb46b; --k4: #ffb46b; --k5: #8cbaff; --k6: #97d287;
  --k7: #97d287; --code: #242c37 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; letter-spacing: -.01em }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem }
h3 { font: 600 .95rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; margin: 0 0 .7rem;
  overflow-wrap: anywhere }
p { margin: .3rem 0 } .quiet { color: var(--quiet) }
code { font: .875em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--code);
  border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere }
.counts { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; margin: 1.4rem 0 0;
  padding: 0 }
.counts li { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .55rem 1rem; border-top: 3px solid currentColor }
.counts b { font-size: 1.45rem; line-height: 1.2; display: block }
.counts span { color: var(--text); font-size: .9rem }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.3rem; margin: 0 0 .9rem }
figure { overflow-x: auto } figcaption { color: var(--quiet); font-size: .9rem; margin-top: .8rem }
dl { margin: 0; display: grid; grid-template-columns: 11.5rem 1fr; gap: .9rem 1.2rem }
dt { font-weight: 600; font-size: .92rem } dd { margin: 0; overflow-wrap: anywhere }
dd p:first-child { margin-top: 0 }
.k1 { color: var(--k1) } .k2 { color: var(--k2) } .k3 { color: var(--k3) } .k4 { color: var(--k4) }
.k5 { color: var(--k5) } .k6 { color: var(--k6) } .k7 { color: var(--k7) }
dd p + p { margin-top: .15rem }
table { border-collapse: collapse; width: 100%; font-size: .94rem }
th, td { text-align: left; vertical-align: top; padding: .5rem .9rem .5rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
tr:last-child td { border-bottom: 0 } th { color: var(--quiet); font-weight: 600 }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.notes { margin: 0; padding-left: 1.2rem }
.notes li { white-space: pre-wrap; overflow-wrap: anywhere }
svg { display: block; width: 100%; min-width: 54rem }
svg text { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; fill: var(--text) }
svg .module { fill: var(--quiet); font-size: 11px }
svg rect { fill: var(--page); stroke: var(--quiet); stroke-width: 1.2 }
svg .shared rect { stroke-dasharray: 5 4 }
svg path { fill: none; stroke: currentColor; stroke-width: 2 } svg polygon { fill: currentColor }
svg .k5 path { stroke-dasharray: 7 4 }
svg .label { font: 600 12px system-ui, "DejaVu Sans", sans-serif; fill: currentColor;
  text-anchor: end; paint-order: stroke; stroke: var(--card); stroke-width: 5px }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: .2rem } dd { margin-bottom: .8rem } }
"""


def html(report: AuditReport) -> str:
    """The page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>tidyrows audit</title><style>{_STYLE}</style></head><body><main>",
            *_head(report),
            *_picture(report),
            *_culprits(report.culprits),
            *_runs(report),
            *_notes("Not put back", report.not_put_back),
            *_notes("Not seen", report.notes),
            "</main></body></html>",
            "",
        ]
    )


def _head(report: AuditReport) -> Iterator[str]:
    yield f'<h1>tidyrows audit</h1><p class="quiet">{escape(report.headline)}</p>'
    yield '<ul class="counts">'
    yield f"<li><b>{report.tests}</b><span>tests</span></li>"
    for kind, count in report.counts:
        yield f'<li class="k{int(kind)}"><b>{count}</b><span>{escape(kind.words)}</span></li>'
    yield "</ul>"


def _picture(report: AuditReport) -> Iterator[str]:
    arrows = arrows_of(report)
    if not arrows:
        return
    more = f" The {MOST} worst of {len(arrows)} arrows." if len(arrows) > MOST else ""
    yield "<h2>Who depends on whom</h2><figure>"
    yield svg(arrows[:MOST], report.runs[0].failed.keys())
    yield (
        "<figcaption>An arrow leads from what a test depends on to the test. "
        f"A broken frame is no test: a shared fixture, or rows that were there before.{more}"
        "</figcaption></figure>"
    )


def _culprits(culprits: Sequence[Culprit]) -> Iterator[str]:
    if culprits:
        yield "<h2>Culprits</h2>"
    for culprit in culprits:
        yield f'<section class="card"><h3>{escape(culprit.test)}</h3><dl>'
        for each in culprit.findings:
            yield (
                f'<dt class="k{int(each.kind)}">{escape(each.kind.words)}</dt>'
                f'<dd><p>{escape(each.text)}</p><p class="quiet">{escape(each.proof)}</p>'
                f"<p>Cure: <code>{escape(each.cure)}</code></p></dd>"
            )
        yield "</dl></section>"


def _runs(report: AuditReport) -> Iterator[str]:
    if len(report.runs) < 2:  # noqa: PLR2004 -- only the one that was looked at
        return
    columns = ("run", "tests", "failed", "began with the database")
    heads = "".join(f'<th scope="col">{each}</th>' for each in columns)
    yield f'<h2>Runs</h2><div class="card"><table><thead><tr>{heads}</tr></thead><tbody>'
    for run in report.runs:
        failed = [f"<code>{escape(test)}</code>" for test, fails in run.failed.items() if fails]
        state = "changed: " + "; ".join(run.changed) if run.changed else "as it was"
        yield (
            f'<tr><td>{escape(run.name)}</td><td class="number">{len(run.failed)}</td>'
            f"<td>{'<br>'.join(failed) or 'none'}</td><td>{escape(state)}</td></tr>"
        )
    yield "</tbody></table></div>"


def _notes(name: str, notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield f'<h2>{name}</h2><div class="card"><ul class="notes">'
        yield from (f"<li>{escape(note)}</li>" for note in notes)
        yield "</ul></div>"
