"""Who depends on whom, as an SVG: boxes for tests, and an arrow to each from what it depends on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tidyrows.audit.findings import FindingKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidyrows.audit.findings import Finding
    from tidyrows.audit.report import AuditReport

MOST = 40
"""Arrows of the picture; the worst come first."""
_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 272, 46, 150, 66, 12
_LETTERS = 36
_COLUMNS = 5
_WORDS = {
    FindingKind.ORDER: "order",
    FindingKind.CHANGES: "changes",
    FindingKind.DELETES: "deletes",
    FindingKind.READS: "reads",
}


@dataclass(frozen=True, slots=True)
class Arrow:
    """A test depends on another, or on a fixture.

    Attributes:
        source: what it depends on.
        target: the test.
        findings: which say so, the worst first.
    """

    source: str
    target: str
    findings: Sequence[Finding]

    @property
    def kind(self) -> FindingKind:
        """The worst."""
        return self.findings[0].kind


def arrows_of(report: AuditReport) -> list[Arrow]:
    """All of them, the worst first."""
    found: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for culprit in report.culprits:
        for each in culprit.findings:
            for other in each.others if each.kind in _WORDS else ():
                found[other, culprit.test].append(each)
    arrows = [Arrow(source, target, each) for (source, target), each in found.items()]
    return sorted(arrows, key=lambda arrow: arrow.kind)


def svg(arrows: Sequence[Arrow], tests: Iterable[str]) -> str:
    """The picture; a box that is no test is drawn with a broken line."""
    places = _places(arrows)
    width = max(x for x, _y in places.values()) + _WIDTH + _MARGIN
    height = max(y for _x, y in places.values()) + _HEIGHT + _MARGIN
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    sentences = escape("; ".join(_sentence(arrow) for arrow in arrows))
    return "\n".join(
        [
            f'<svg role="img" aria-labelledby="picture-title picture-text" {size}>',
            '<title id="picture-title">Who depends on whom</title>',
            f'<desc id="picture-text">{sentences}</desc>',
            *(_line(arrow, places) for arrow in arrows),
            *(_box(name, place, is_test=name in tests) for name, place in places.items()),
            *(_label(arrow, places) for arrow in arrows),
            "</svg>",
        ]
    )


def _sentence(arrow: Arrow) -> str:
    kinds = ", ".join(dict.fromkeys(each.kind.words for each in arrow.findings))
    return f"{arrow.target}: {kinds} ({arrow.source})"


# -- places --------------------------------------------------------------------------------------


def _places(arrows: Sequence[Arrow]) -> Mapping[str, tuple[int, int]]:
    """The left upper corner of each box: what others depend on is to their left."""
    column = dict.fromkeys((name for a in arrows for name in (a.source, a.target)), 0)
    for _step in range(_COLUMNS):  # a circle ends at the last column
        for arrow in arrows:
            column[arrow.target] = min(
                max(column[arrow.target], column[arrow.source] + 1), _COLUMNS - 1
            )
    rows: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for number in range(_COLUMNS):
        names = [name for name, place in column.items() if place == number]
        names.sort(key=lambda name: _middle(name, arrows, rows))
        rows |= {name: row for row, name in enumerate(names)}
        for name in names:
            x = _MARGIN + number * (_WIDTH + _ACROSS)
            places[name] = x, _MARGIN + rows[name] * _DOWN
    return places


def _middle(name: str, arrows: Sequence[Arrow], rows: Mapping[str, int]) -> float:
    """The mean row of what it depends on, so that few arrows cross."""
    found = [rows[a.source] for a in arrows if a.target == name and a.source in rows]
    return sum(found) / len(found) if found else len(rows)


def _ends(arrow: Arrow, places: Mapping[str, tuple[int, int]]) -> tuple[int, int, int, int]:
    """From the right side of one box to the left side of the other."""
    (x, y), (to_x, to_y) = places[arrow.source], places[arrow.target]
    return x + _WIDTH, y + _HEIGHT // 2, to_x, to_y + _HEIGHT // 2


# -- drawing -------------------------------------------------------------------------------------


def _line(arrow: Arrow, places: Mapping[str, tuple[int, int]]) -> str:
    x, y, to_x, to_y = _ends(arrow, places)
    bend = max(abs(to_x - x) // 2, 50)
    said = "\n".join(
        [_sentence(arrow), *(f"{each.text} ({each.proof})" for each in arrow.findings)]
    )
    return (
        f'<g class="arrow k{int(arrow.kind)}"><title>{escape(said)}</title>'
        f'<path d="M{x} {y} C{x + bend} {y} {to_x - bend - 8} {to_y} {to_x - 8} {to_y}"/>'
        f'<polygon points="{to_x},{to_y} {to_x - 10},{to_y - 5} {to_x - 10},{to_y + 5}"/></g>'
    )


def _label(arrow: Arrow, places: Mapping[str, tuple[int, int]]) -> str:
    x, y, to_x, to_y = _ends(arrow, places)
    # nearer to the target, where the arrows of one source have parted
    at_x, at_y = x + (to_x - x) * 0.62, y + (to_y - y) * 0.76 - 5
    word = _WORDS[arrow.kind]
    return f'<text class="label k{int(arrow.kind)}" x="{at_x:.0f}" y="{at_y:.0f}">{word}</text>'


def _box(name: str, place: tuple[int, int], *, is_test: bool) -> str:
    x, y = place
    return "".join(
        [
            f'<g class="{"test" if is_test else "shared"}"><title>{escape(name)}</title>',
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>',
            *_texts(name, x + 14, y),
            "</g>",
        ]
    )


def _texts(name: str, x: int, y: int) -> Iterator[str]:
    module, colons, rest = name.partition("::")
    if not colons:
        yield f'<text x="{x}" y="{y + 28}">{escape(_cut(name))}</text>'
        return
    yield f'<text class="module" x="{x}" y="{y + 19}">{escape(_cut(module))}</text>'
    yield f'<text x="{x}" y="{y + 36}">{escape(_cut(rest))}</text>'


def _cut(text: str) -> str:
    """Its end tells more: modules of one folder begin alike."""
    return text if len(text) <= _LETTERS else "…" + text[1 - _LETTERS :]
