"""Rows that carry a tag of tidyrows in a text column: whose they are can be read off them."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows.errors import ScopeError, UnknownTableError
from tidyrows.template import ALPHABET, RUN_WIDTH, TEST_WIDTH, WORKER_WIDTH, check, fitted
from tidyrows.tracking import named_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.named_rows import Found
    from tidyrows.tracking.sessions import Sessions

TagOwner: TypeAlias = Literal["test", "worker", "run", "any"]

_KNOWN = {"test": 3, "worker": 2, "run": 1, "any": 0}
"""How many of run, worker and test are known."""
_BEGINNINGS = {RUN_WIDTH: 1, RUN_WIDTH + WORKER_WIDTH: 2, RUN_WIDTH + WORKER_WIDTH + TEST_WIDTH: 3}
"""The same, by the characters of a tag's beginning."""
_LONGER = 40  # than any tag, so that no value that begins like ours comes after it
# The first character of a counter gives its length (template.counter_codes).
_COUNTER = "(?:[0-7]|[89ab][0-9a-z]|[c-f][0-9a-z]{2}|[g-j][0-9a-z]{3}|[k-z][0-9a-z]{4})"


@dataclass(frozen=True, slots=True)
class Pattern:
    """The values of one template and one owner.

    Attributes:
        prefix: what all of them begin with.
        whole: matches a value as a whole.
    """

    prefix: str
    whole: re.Pattern[str]


def patterns(
    template: str, length: int | None, parts: Sequence[str], whose: TagOwner | str
) -> set[Pattern]:
    """What ``Scoped(template)`` and ``ScopedEmail`` make for a column of this length."""
    found = {_pattern(fitted(template, length), parts, whose)}
    with suppress(ScopeError):  # an address that does not fit, nobody made
        found.add(_pattern(fitted(template, length, keep_end=True), parts, whose))
    return found


def _pattern(template: str, parts: Sequence[str], whose: TagOwner | str) -> Pattern:
    known = _KNOWN[whose] if whose in _KNOWN else _BEGINNINGS[len(whose)]
    widths = (RUN_WIDTH, WORKER_WIDTH, TEST_WIDTH)
    pieces: list[tuple[str, str | None]] = [
        (re.escape(part), part) if number < known else (f"[0-9a-z]{{{width}}}", None)
        for number, (part, width) in enumerate(zip(parts, widths, strict=True))
    ]
    counter: tuple[str, str | None] = (_COUNTER, None)
    fields = {
        "run": [pieces[0]],
        "worker": [pieces[1]],
        "test": [pieces[2]],
        "n": [counter],
        "tag": [*pieces, counter],
    }
    made: list[tuple[str, str | None]] = []  # expressions, and the text where it is known
    for literal, field in check(template):
        made += [(re.escape(literal), literal), *(fields[field] if field else ())]
    beginning = takewhile(lambda text: text is not None, (text for _expression, text in made))
    expression = "".join(expression for expression, _text in made)
    return Pattern("".join(filter(None, beginning)), re.compile(expression))


def patterns_of_owner(tag: str, column: Any, template: str, whose: TagOwner | str) -> list[Pattern]:
    """The values of one owner in a column, checked."""
    if whose not in _KNOWN:
        if not re.fullmatch("[0-9a-z]+", str(whose)) or len(whose) not in _BEGINNINGS:
            raise ScopeError(
                f"whose={whose!r} is nobody; write 'test', 'worker', 'run' or 'any', or the first "
                f"7, 9 or 11 characters of a tag, for its run, worker or test."
            )
        tag = whose.ljust(len(tag), "0")
    model, own = _owner(column)
    named_rows.selected_model(sa.select(model))
    if not isinstance(own.type, sa.String) or isinstance(own.type, sa.Enum):
        raise ScopeError(
            f"{own} is no text column ({type(own.type).__name__}), so no tag stands in it.",
            column=str(own),
        )
    parts = (tag[:RUN_WIDTH], tag[RUN_WIDTH:-TEST_WIDTH], tag[-TEST_WIDTH:])
    wanted = sorted(patterns(template, own.type.length, parts, whose), key=str)
    if not all(pattern.prefix for pattern in wanted):
        raise ScopeError(
            f"The values of {template!r} of any run begin with nothing that is known, so every "
            f"row of {own.table} would have to be read. Begin the template with text, or ask for "
            f"whose='run'.",
            column=str(own),
        )
    return wanted


def rows_of_tag(sessions: Sessions, column: Any, wanted: Sequence[Pattern]) -> Found:
    """The committed rows whose value in a column matches a pattern."""
    model, own = _owner(column)
    found: dict[KeyedTable, list[Any]] = {}
    for pattern in wanted:
        query = sa.select(model).where(_range(sessions, own, column, pattern.prefix))

        def is_tagged(value: str, whole: re.Pattern[str] = pattern.whole) -> bool:
            # blanks at the end are what CHAR pads with
            return whole.fullmatch(value.rstrip(" ")) is not None

        rows, _count = named_rows.rows_of_query(sessions, query, where=(column, is_tagged))
        for table, keys in rows:
            found.setdefault(table, []).extend(keys)
    ours = [(table, _nobody_elses(sessions, table, keys)) for table, keys in found.items()]
    counts = [len(keys) for _table, keys in ours]
    mapper = named_rows.mapper_of(model)
    if mapper is not None and named_rows.has_concrete(mapper):  # each row is in a table of its own
        return ours, sum(counts)
    return ours, max(counts, default=0)


def _owner(column: Any) -> tuple[Any, sa.Column[Any]]:
    """The class or Table whose rows are meant, and the real column."""
    if isinstance(column, orm.InstrumentedAttribute):
        columns: Sequence[Any] = getattr(column.property, "columns", ())
        if len(columns) == 1 and isinstance(columns[0], sa.Column):
            return column.class_, columns[0]
    elif isinstance(column, sa.Column) and isinstance(column.table, sa.Table):
        return column.table, column
    raise UnknownTableError(
        f"{column!r} is no column of a mapped class or Table. Write "
        f'track_tagged(User.email, "user-{{tag}}@example.test").',
        table=column,
    )


def _range(
    sessions: Sessions, own: sa.Column[Any], column: Any, prefix: str
) -> sa.ColumnElement[bool]:
    """All values that begin like this, and by an index, in the order that the column sorts in.

    A language may sort a letter where nobody expects it (Estonian has z before t, Czech ch after
    h). The database itself says whether the range holds all; if not, it must read all values.
    """
    last = prefix + "z" * _LONGER
    sorted_as = sa.select(own).where(sa.false()).scalar_subquery()
    sure = [
        sa.and_(
            sa.func.coalesce(sorted_as, prefix + each) >= prefix,
            sa.func.coalesce(sorted_as, prefix + each + "z" * 15) <= last,
        )
        for each in ALPHABET
    ]
    with sessions.new_connection(own.table) as connection:
        holds = connection.scalar(sa.select(sa.case((sa.and_(*sure), 1), else_=0)))
    between: sa.ColumnElement[bool] = sa.and_(column >= prefix, column <= last)
    likely: sa.ColumnElement[bool] = column.startswith(prefix, autoescape=True)
    return between if holds else likely


def _nobody_elses(sessions: Sessions, table: KeyedTable, keys: list[Any]) -> list[Any]:
    """Leave out rows that another tracker of this process is going to delete."""
    taken: set[Any] = set()
    engines = sessions.engines
    for other in engines.capture(engines.by_database[table.name.database]).sinks:
        if other is not engines.sink:
            taken.update(other.held_keys(table.name, keys))
    return [key for key in dict.fromkeys(keys) if key not in taken]
