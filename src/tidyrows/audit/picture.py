"""Who depends on whom, as an SVG.

The tests that depend on something stand in a column, beside the column of what they depend on; a
test that does both stands in both, so that circles need no other form.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tidyrows.audit.findings import FindingKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from tidyrows.audit.findings import Finding
    from tidyrows.audit.report import AuditReport

MOST = 40
"""Arrows of the picture; the worst come first."""
_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 400, 48, 300, 16, 4
_ARROW = 22
"""How far the ends of two arrows are apart."""
_LETTERS = 46
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


def svg(arrows: Sequence[Arrow], tests: Collection[str]) -> str:
    """The picture; a box that is no test is drawn with a broken line."""
    left, right = _columns(arrows)
    sorted_arrows = sorted(arrows, key=lambda arrow: left.index(arrow.source))
    by_target = {name: [a for a in sorted_arrows if a.target == name] for name in right}
    heights = [max(_HEIGHT, len(by_target[name]) * _ARROW + 14) for name in right]
    height = max(sum(heights), len(left) * _HEIGHT) + _DOWN * (max(len(left), len(right)) - 1)
    lefts = dict(zip(left, _stacked([_HEIGHT] * len(left), height), strict=True))
    rights = dict(zip(right, _stacked(heights, height), strict=True))
    lines: list[str] = []
    for name, size in zip(right, heights, strict=True):
        for number, arrow in enumerate(by_target[name]):
            end = rights[name] + size / 2 + (number - (len(by_target[name]) - 1) / 2) * _ARROW
            lines.append(_line(arrow, lefts[arrow.source] + _HEIGHT / 2, end))
    place = f"0 0 {2 * _WIDTH + _ACROSS + 2 * _MARGIN} {height + 2 * _MARGIN:.0f}"
    sentences = escape("; ".join(_sentence(arrow) for arrow in arrows))
    return "\n".join(
        [
            f'<svg role="img" aria-labelledby="picture-title picture-text" viewBox="{place}">',
            '<title id="picture-title">Who depends on whom</title>',
            f'<desc id="picture-text">{sentences}</desc>',
            *lines,
            *(_box(name, 0, y, _HEIGHT, is_test=name in tests) for name, y in lefts.items()),
            *(
                _box(name, _WIDTH + _ACROSS, y, size, is_test=name in tests)
                for (name, y), size in zip(rights.items(), heights, strict=True)
            ),
            "</svg>",
        ]
    )


def _sentence(arrow: Arrow) -> str:
    kinds = ", ".join(dict.fromkeys(each.kind.words for each in arrow.findings))
    return f"{arrow.target}: {kinds} ({arrow.source})"


def _columns(arrows: Sequence[Arrow]) -> tuple[list[str], list[str]]:
    """What others depend on, and what depends on them, so that few arrows cross."""
    left = list(dict.fromkeys(arrow.source for arrow in arrows))
    left.sort(key=lambda name: -sum(arrow.source == name for arrow in arrows))

    def middle(name: str) -> float:
        rows = [left.index(arrow.source) for arrow in arrows if arrow.target == name]
        return sum(rows) / len(rows)

    return left, sorted(dict.fromkeys(arrow.target for arrow in arrows), key=middle)


def _stacked(heights: Sequence[float], height: float) -> Iterator[float]:
    """The upper edges of boxes that fill the height, with equal distances."""
    distance = (height - sum(heights)) / len(heights)
    y = _MARGIN + distance / 2
    for each in heights:
        yield y
        y += each + distance


def _line(arrow: Arrow, y: float, to_y: float) -> str:
    x, to_x = _MARGIN + _WIDTH, _MARGIN + _WIDTH + _ACROSS
    bend, straight = _ACROSS * 0.4, to_x - 66  # the word stands on the straight part
    reasons = (f"{each.text} ({each.proof})" for each in arrow.findings)
    said = "\n".join([_sentence(arrow), *reasons])
    return (
        f'<g class="arrow k{int(arrow.kind)}"><title>{escape(said)}</title>'
        f'<path d="M{x} {y:.0f} C{x + bend:.0f} {y:.0f} {straight - bend:.0f} {to_y:.0f} '
        f'{straight} {to_y:.0f} H{to_x - 8}"/>'
        f'<polygon points="{to_x},{to_y:.0f} {to_x - 10},{to_y - 5:.0f} '
        f'{to_x - 10},{to_y + 5:.0f}"/>'
        f'<text class="label" x="{to_x - 14}" y="{to_y - 5:.0f}">{_WORDS[arrow.kind]}</text></g>'
    )


def _box(name: str, x: float, y: float, height: float, *, is_test: bool) -> str:
    x += _MARGIN
    return "".join(
        [
            f'<g class="{"test" if is_test else "shared"}"><title>{escape(name)}</title>',
            f'<rect x="{x}" y="{y:.0f}" width="{_WIDTH}" height="{height:.0f}" rx="8"/>',
            *_texts(name, x + 14, y + height / 2),
            "</g>",
        ]
    )


def _texts(name: str, x: float, middle: float) -> Iterator[str]:
    module, colons, rest = name.partition("::")
    if not colons:
        yield f'<text x="{x}" y="{middle + 5:.0f}">{escape(_cut(name))}</text>'
        return
    yield f'<text class="module" x="{x}" y="{middle - 5:.0f}">{escape(_cut(module))}</text>'
    yield f'<text x="{x}" y="{middle + 13:.0f}">{escape(_cut(rest))}</text>'


def _cut(text: str) -> str:
    """Its end tells more: modules of one folder begin alike."""
    return text if len(text) <= _LETTERS else "…" + text[1 - _LETTERS :]
