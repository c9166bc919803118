"""Templates of scoped text: their fields, and how a template is cut to fit a column.

Only literal text is cut, never a character of the tag. The cut assumes the longest tag, so that all
values of one template and column have the same literal text.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, product
from string import Formatter
from typing import TYPE_CHECKING

from tidyrows.errors import ScopeError

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_WIDTH = 7
WORKER_WIDTH = 2
TEST_WIDTH = 2
COUNTER_WIDTH = 5  # at most
TAG_WIDTH = RUN_WIDTH + WORKER_WIDTH + TEST_WIDTH + COUNTER_WIDTH  # 16, at most

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_FIRST = ("01234567", "89ab", "cdef", "ghij", "klmnopqrstuvwxyz")
"""The first characters of a counter of 1, 2, ... characters."""
COUNTERS = sum(len(first) * len(ALPHABET) ** rest for rest, first in enumerate(_FIRST))

WIDTHS = {
    "tag": TAG_WIDTH,
    "run": RUN_WIDTH,
    "worker": WORKER_WIDTH,
    "test": TEST_WIDTH,
    "n": COUNTER_WIDTH,
}


@lru_cache(maxsize=1024)
def check(template: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into pairs of literal text and the field after it (None at the end)."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ScopeError(f"The template {template!r} cannot be read: {error}.") from error
    checked: list[tuple[str, str | None]] = []
    for literal, field, form, conversion in parts:
        if field is not None and field not in WIDTHS:
            raise ScopeError(
                f"The template {template!r} has an unknown field {{{field}}}. "
                f"It can have {{tag}}, or {{run}}, {{worker}}, {{test}} and {{n}}; "
                f"write {{{{ and }}}} for braces."
            )
        if form or conversion:
            raise ScopeError(
                f"The template {template!r} gives {{{field}}} a format, but the fields are text "
                f"of a fixed form. Write {{{field}}}."
            )
        checked.append((literal, field))
    fields = {field for _, field in checked}
    if "tag" not in fields and not fields >= {"run", "worker", "n"}:
        raise ScopeError(
            f"The template {template!r} could produce the value of another run or worker. "
            f"It needs {{tag}}, or all of {{run}}, {{worker}} and {{n}}."
        )
    return tuple(checked)


@lru_cache(maxsize=1024)
def fitted(
    template: str,
    max_length: int | None = None,
    column: str | None = None,
    *,
    keep_end: bool = False,
) -> str:
    """Cut a template's literal text, so that no value is longer than ``max_length``.

    Literal text after the tag is cut first, from its right, then the text before the tag.
    ``keep_end`` keeps the text after the last field; ``column`` is a name for the error.
    """
    parts = check(template)
    if max_length is None:
        return template
    literals = [literal for literal, _ in parts]
    fields = [field for _, field in parts if field is not None]
    kept = len(literals[-1]) if keep_end and parts[-1][1] is None else 0
    need = sum(WIDTHS[field] for field in fields) + kept
    if need > max_length:
        raise ScopeError(
            f"{column or 'The place'} holds {max_length} characters, but a value of {template!r} "
            f"that no other worker can have needs {need}. Make the column longer, or give the "
            f"field a shorter template.",
            column=column,
            length=max_length,
            need=need,
        )
    excess = need - kept + sum(map(len, literals)) - max_length
    for place in reversed(range(len(literals) - bool(kept))):
        if excess <= 0:
            break
        literal = literals[place]
        literals[place] = literal[: max(len(literal) - excess, 0)]
        excess -= len(literal) - len(literals[place])
    return "".join(
        escaped(literal) + (f"{{{field}}}" if field else "")
        for literal, (_, field) in zip(literals, parts, strict=True)
    )


def escaped(literal: str) -> str:
    """Literal text, written as a template."""
    return literal.replace("{", "{{").replace("}", "}}")


def base36(number: int, width: int) -> str:
    """The lowest ``width`` digits of a number, to base 36."""
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def counter_codes() -> Iterator[str]:
    """All counters in their order: ``0`` to ``7``, ``80`` to ``bz``, ``c00`` and so on.

    The first character says how many characters there are, so no counter is the beginning of
    another: a ``{tag}1`` never equals another ``{tag}``. The iterator is made of C code only, so
    two threads never get the same counter.
    """
    by_width = [
        map("".join, product(first, *[ALPHABET] * rest)) for rest, first in enumerate(_FIRST)
    ]
    return chain.from_iterable(by_width)
