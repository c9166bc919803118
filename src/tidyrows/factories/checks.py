"""What the CHECK constraints of a table say about one column each, as far as they are simple.

Read are comparisons of a column with a constant, BETWEEN, IN, the length of a text, and their
combinations by AND. Of ``x IS NULL OR ...`` the second part is read. What is not understood is left
to the database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterator

Constant = str | Decimal


@dataclass(frozen=True)
class Bounds:
    """The values that the CHECK constraints allow in one column.

    Attributes:
        low: the least number, or None.
        high: the greatest number, or None.
        is_low_allowed: whether ``low`` itself is allowed.
        is_high_allowed: whether ``high`` itself is allowed.
        choices: all values that are allowed, or None.
        excluded: values that are not allowed.
        shortest: the least length of a text.
        longest: the greatest length of a text, or None.
    """

    low: Decimal | None = None
    high: Decimal | None = None
    is_low_allowed: bool = True
    is_high_allowed: bool = True
    choices: tuple[Constant, ...] | None = None
    excluded: frozenset[Constant] = field(default_factory=frozenset)
    shortest: int = 0
    longest: int | None = None


ANYTHING = Bounds()


def bounds_of(table: sa.FromClause) -> dict[str, Bounds]:
    """The bounds of the columns of a table, by the name of the column."""
    found: dict[str, Bounds] = {}
    for constraint in checks_of(table):
        for column, test in _Reader(text_of_check(constraint)).tests():
            found[column] = _narrowed(found.get(column, ANYTHING), test)
    names = {column.name.lower(): column.name for column in table.columns}
    return {names[name]: bounds for name, bounds in found.items() if name in names}


def checks_of(table: sa.FromClause) -> Iterator[sa.CheckConstraint]:
    """The CHECK constraints of a table and of its columns."""
    for owner in (table, *table.columns):
        for constraint in getattr(owner, "constraints", ()):
            if isinstance(constraint, sa.CheckConstraint):
                yield constraint


def text_of_check(constraint: sa.CheckConstraint) -> str:
    """The SQL of a CHECK constraint, with its values."""
    try:
        return str(constraint.sqltext.compile(compile_kwargs={"literal_binds": True}))
    except sa.exc.CompileError:  # an expression of one database, or a value without a literal
        return str(constraint.sqltext)


# -- reading ---------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*')
      | (?P<number>\d+(?:\.\d+)?|\.\d+)
      | (?P<name>"[^"]+"|`[^`]+`|\[[^\]]+\]|[A-Za-z_]\w*)
      | (?P<sign><>|!=|>=|<=|::|[-+*/%=<>(),.\[\]~|&!^?:])
    )""",
    re.VERBOSE,
)
_LENGTHS = {"length", "char_length", "character_length", "len"}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "<>": "<>"}

Test = tuple[str, Any]
"""What one column must meet: the operator, and the constant."""


class _NotSimpleError(Exception):
    """A part of the text is not understood."""


class _Reader:
    """Reads the text of one CHECK constraint."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                self._tokens = []
                return
            self._tokens.append((match.lastgroup or "", match[match.lastgroup or 0]))
            at = match.end()

    def tests(self) -> Iterator[tuple[str, Test]]:
        """The columns and what each must meet."""
        yield from _of_condition(self._tokens)


def _of_condition(tokens: list[tuple[str, str]]) -> Iterator[tuple[str, Test]]:
    tokens = _without_parentheses(tokens)
    branches = _split(tokens, "or")
    if len(branches) > 1:
        readable = [each for each in branches if not _asks_for_null(each)]
        if len(readable) == 1:
            yield from _of_condition(readable[0])
        return
    for part in _split(tokens, "and"):
        part = _without_parentheses(part)  # noqa: PLW2901 -- the same part, bare
        if len(_split(part, "and")) > 1 or len(_split(part, "or")) > 1:
            if part != tokens:
                yield from _of_condition(part)
            continue
        try:
            yield _of_comparison(part)
        except (_NotSimpleError, IndexError):
            continue


def _asks_for_null(tokens: list[tuple[str, str]]) -> bool:
    words = [text.lower() for _, text in _without_parentheses(tokens)]
    return words[-2:] == ["is", "null"]


def _of_comparison(tokens: list[tuple[str, str]]) -> tuple[str, Test]:
    words = [text.lower() if kind == "name" else text for kind, text in tokens]
    if "between" in words and words[-1] != "between":
        at = words.index("between")
        middle = words.index("and", at)
        column, measure = _subject(tokens[:at])
        low, high = _constant(tokens[at + 1 : middle]), _constant(tokens[middle + 1 :])
        return column, (measure + "between", (low, high))
    if "in" in words:
        at = words.index("in")
        column, measure = _subject(tokens[:at])
        if measure or words[at - 1] == "not":
            raise _NotSimpleError
        items = _split(_without_parentheses(tokens[at + 1 :]), ",")
        return column, ("in", tuple(_constant(each) for each in items))
    signs = [at for at, (kind, text) in enumerate(tokens) if text in {*_MIRRORED, "!="}]
    if len(signs) != 1:
        raise _NotSimpleError
    at = signs[0]
    sign = tokens[at][1].replace("!=", "<>")
    left, right = tokens[:at], tokens[at + 1 :]
    try:
        column, measure = _subject(left)
        return column, (measure + sign, _constant(right))
    except _NotSimpleError:
        column, measure = _subject(right)
        return column, (measure + _MIRRORED[sign], _constant(left))


def _subject(tokens: list[tuple[str, str]]) -> tuple[str, str]:
    """The column of ``x``, ``t.x``, ``x::text`` or ``length(x)``, and ``length`` for the last."""
    tokens = _bare(tokens)
    if tokens and tokens[0][1].lower() in _LENGTHS and tokens[1:2] == [("sign", "(")]:
        column, measure = _subject(tokens[1:])
        if measure:
            raise _NotSimpleError
        return column, "length"
    if len(tokens) == 3 and tokens[1][1] == ".":  # noqa: PLR2004 -- table, dot, column
        tokens = tokens[2:]
    if len(tokens) != 1 or tokens[0][0] != "name":
        raise _NotSimpleError
    return tokens[0][1].strip('"`[]').lower(), ""


def _constant(tokens: list[tuple[str, str]]) -> Constant:
    tokens = _bare(tokens)
    sign = 1
    if tokens and tokens[0][1] in {"-", "+"}:
        sign = -1 if tokens[0][1] == "-" else 1
        tokens = _bare(tokens[1:])
    if len(tokens) != 1:
        raise _NotSimpleError
    kind, text = tokens[0]
    if kind == "number":
        return sign * Decimal(text)
    if kind == "text":
        return text[1:-1].replace("''", "'")
    raise _NotSimpleError


def _bare(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The tokens without outer parentheses and casts."""
    bare = _without_parentheses(_without_cast(tokens))
    return bare if bare == tokens else _bare(bare)


def _without_cast(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The tokens before ``::type``."""
    depth = 0
    for at, (_, text) in enumerate(tokens):
        depth += (text == "(") - (text == ")")
        if text == "::" and depth == 0:
            return tokens[:at]
    return tokens


def _without_parentheses(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
    while len(tokens) > 1 and tokens[0][1] == "(" and _closing(tokens) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def _closing(tokens: list[tuple[str, str]]) -> int:
    depth = 0
    for at, (kind, text) in enumerate(tokens):
        depth += (kind == "sign") * ((text == "(") - (text == ")"))
        if depth == 0:
            return at
    return -1


def _split(tokens: list[tuple[str, str]], word: str) -> list[list[tuple[str, str]]]:
    """Split at a word outside of parentheses; the AND of a BETWEEN does not count."""
    parts: list[list[tuple[str, str]]] = [[]]
    depth, between = 0, False
    for kind, text in tokens:
        depth += (kind == "sign") * ((text == "(") - (text == ")"))
        is_word = kind in {"name", "sign"} and depth == 0
        between |= is_word and text.lower() == "between"
        if is_word and text.lower() == word and not (between and word == "and"):
            parts.append([])
            continue
        between &= not (is_word and text.lower() == "and")
        parts[-1].append((kind, text))
    return parts


# -- combining -------------------------------------------------------------------------------------


def _narrowed(bounds: Bounds, test: Test) -> Bounds:
    """The bounds that meet a further test."""
    operator, value = test
    if operator.startswith("length"):
        return _of_length(bounds, operator.removeprefix("length"), value)
    if operator in {"in", "="}:
        values = value if operator == "in" else (value,)
        kept = [each for each in values if bounds.choices is None or each in bounds.choices]
        return replace(bounds, choices=tuple(kept))
    if operator == "<>":
        least = max(bounds.shortest, int(value == ""))
        return replace(bounds, shortest=least, excluded=bounds.excluded | {value})
    if operator == "between":
        return _narrowed(_narrowed(bounds, (">=", value[0])), ("<=", value[1]))
    return _of_order(bounds, operator, value)


def _of_order(bounds: Bounds, operator: str, value: Any) -> Bounds:
    """For a comparison with a number; other constants are left to the database."""
    if not isinstance(value, Decimal):
        return bounds
    is_allowed = operator.endswith("=")
    if operator.startswith(">"):
        if bounds.low is None or value >= bounds.low:
            return replace(bounds, low=value, is_low_allowed=is_allowed)
    elif bounds.high is None or value <= bounds.high:
        return replace(bounds, high=value, is_high_allowed=is_allowed)
    return bounds


def _of_length(bounds: Bounds, operator: str, value: Any) -> Bounds:
    if operator == "between":
        return _of_length(_of_length(bounds, ">=", value[0]), "<=", value[1])
    if not isinstance(value, Decimal):
        return bounds
    length = int(value)
    least = {">": length + 1, ">=": length, "=": length}.get(operator, 0)
    if operator == "<>" and length == 0:
        least = 1
    most = {"<": length - 1, "<=": length, "=": length}.get(operator)
    if most is not None and bounds.longest is not None:
        most = min(most, bounds.longest)
    return replace(
        bounds,
        shortest=max(bounds.shortest, least),
        longest=bounds.longest if most is None else most,
    )
