"""The rows that a SELECT has read: a count, an aggregate or an EXISTS returns none of their keys.

A SELECT of one whole table has read all its rows. Any other is run again after the test, on the
audit's own connection, with the key as its columns. What is not understood (a UNION, a subquery in
FROM, a placeholder among the columns) is left out: it only helps to rank suspects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tidyrows.audit.names import NAME, PART, WrittenName, written_name

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST = 10_000
"""Rows of one SELECT that are compared with those of other tests."""

_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|--[^\n]*|/\*.*?\*/|[(),]|\w+""", re.DOTALL
)
_UNKNOWN = frozenset({"INTO", "UNION", "INTERSECT", "EXCEPT"})
_RESTRICTS = frozenset({"WHERE", "HAVING", "LIMIT", "OFFSET", "FETCH"})
_GROUPED = frozenset({"GROUP", "HAVING", "WINDOW"})
_SORTED = frozenset({"ORDER", "LIMIT", "OFFSET", "FETCH"})
_LOCKS = frozenset({"FOR", "LOCK"})
_CLAUSES = frozenset({"FROM"}) | _UNKNOWN | _RESTRICTS | _GROUPED | _SORTED | _LOCKS
_JOINS = frozenset(
    {
        *("JOIN", "STRAIGHT_JOIN", "INNER", "LEFT", "RIGHT", "FULL"),
        *("OUTER", "CROSS", "NATURAL", "LATERAL"),
    }
)
_DEPTH = {"(": 1, ")": -1}
_AGGREGATE = re.compile(
    r"\b(?:COUNT|SUM|AVG|MIN|MAX|EVERY|BOOL_\w+|\w+_AGG|GROUP_CONCAT)\s*\(", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"\?|%s|[$:]\d")
"""One whose place counts; a name may be left out."""
_EXISTS = re.compile(
    r"\s*(?:NOT\s+)?EXISTS\s*\((.*)\)(?:\s+AS\s+\S+)?\s*", re.IGNORECASE | re.DOTALL
)
_DERIVED = re.compile(r"\s*\((.*)\)(?:\s+(?:AS\s+)?\S+)?\s*", re.IGNORECASE | re.DOTALL)
_ITEM = re.compile(rf"\s*{NAME}(?:\s+(?:AS\s+)?({PART}))?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TableRead:
    """One table that a SELECT reads.

    Attributes:
        table: as it is written.
        called: what its columns are qualified with.
        rest: the SELECT from FROM on; None where it reads every row.
    """

    table: WrittenName
    called: str
    rest: str | None

    def again(self, keys: list[str]) -> str:
        """The SELECT with other columns; ``keys`` are quoted."""
        columns = ", ".join(f"{self.called}.{key}" for key in keys)
        more = (
            ""
            if self.rest is None or re.search(r"\b(?:LIMIT|FETCH)\b", self.rest, re.IGNORECASE)
            else f" LIMIT {MOST}"
        )
        return f"SELECT {columns} {self.rest}{more}"


@lru_cache(maxsize=4096)
def reads_of(sql: str) -> tuple[TableRead, ...]:
    """The tables that a SELECT reads, as far as that is understood."""
    words = list(_outer_words(sql))
    if not words or words[0][0] != "SELECT":
        return ()
    places: dict[str, int] = {}
    for word, place in words[1:]:
        if word in _CLAUSES:
            places.setdefault(word, place)
    if places.keys() & _UNKNOWN:
        return ()
    begin, chosen_end = words[0][1] + len("SELECT"), min(places.values(), default=len(sql))
    if "FROM" not in places:  # SELECT EXISTS (...), or SELECT 1 WHERE EXISTS (...)
        asked = sql[places["WHERE"] + len("WHERE") :] if "WHERE" in places else sql[begin:]
        return _inner(sql, _EXISTS.fullmatch(asked))
    after = [place for word, place in places.items() if word != "FROM"]
    source = sql[places["FROM"] + len("FROM") : min(after, default=len(sql))]
    items = list(_items(source))
    restricted = bool(places.keys() & _RESTRICTS)
    if len(items) == 1 and not restricted and items[0].lstrip().startswith("("):
        return _inner(sql, _DERIVED.fullmatch(items[0]))
    chosen = sql[begin:chosen_end]
    cut = _GROUPED | _LOCKS
    if places.keys() & _GROUPED or _AGGREGATE.search(chosen):
        cut |= _SORTED
    end = min((place for word, place in places.items() if word in cut), default=len(sql))
    rest = sql[places["FROM"] : end].rstrip().rstrip(";")
    whole = len(items) == 1 and not restricted
    if not whole and (_PLACEHOLDER.search(chosen) or _PLACEHOLDER.search(sql[end:])):
        return ()
    named = [match for item in items if (match := _ITEM.fullmatch(item)) is not None]
    return tuple(
        TableRead(written_name(m[1]), m[2] or m[1], None if whole else rest) for m in named
    )


def _inner(sql: str, match: re.Match[str] | None) -> tuple[TableRead, ...]:
    """Of a SELECT that stands in brackets, where it has all placeholders."""
    if match is None or not _is_balanced(match[1]):
        return ()
    if len(_PLACEHOLDER.findall(match[1])) != len(_PLACEHOLDER.findall(sql)):
        return ()
    return reads_of(match[1])


def _outer_words(sql: str) -> Iterator[tuple[str, int]]:
    """The words and commas outside of brackets, in capitals, with their places."""
    depth = 0
    for match in _TOKEN.finditer(sql):
        found = match[0]
        depth += _DEPTH.get(found, 0)
        if depth == 0 and (found == "," or found[0].isalpha()):
            yield found.upper(), match.start()


def _is_balanced(sql: str) -> bool:
    depth = 0
    for match in _TOKEN.finditer(sql):
        depth += _DEPTH.get(match[0], 0)
        if depth < 0:
            return False
    return depth == 0


def _items(source: str) -> Iterator[str]:
    """The tables of a FROM, with their aliases and without what joins them."""
    begin: int | None = 0
    for word, place in _outer_words(source):
        if word in _JOINS or word in {",", "ON", "USING"}:
            if begin is not None and source[begin:place].strip():
                yield source[begin:place]
            begin = None if word in {"ON", "USING"} else place + len(word)
    if begin is not None:
        yield source[begin:]
