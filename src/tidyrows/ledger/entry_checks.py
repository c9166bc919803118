"""What an entry must look like to be read: whoever may INSERT into the ledger may have written it.

An entry names rows that a sweep deletes with its own rights. So its size, its form and its table
are checked before anything is made of it; the text of each ValueError is the reason that is shown.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect

MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What reading raises for a body that tidyrows did not write."""
LONGEST = 16_000_000
"""The most characters of a body; longer ones are not fetched. No server takes more in a packet."""
MOST_ENTRIES, MOST_CHARACTERS, MOST_ROWS = 1_000_000, 256_000_000, 20_000_000
"""Of one owner: its entries, the characters of all bodies, and the rows that these name."""
INCARNATION = re.compile(r"[\w.]*/[\w.]+", re.ASCII)
"""An incarnation of a table: it becomes part of SQL."""
_MOST_KEYS = 5_000  # as many as one entry is written with
LOW, HIGH = -(2**63), 2**64 - 1
"""Of integers: the MySQL family has unsigned ones."""
_LEDGER = frozenset({"maker", "seq", "owner", "scope", "kind", "schema_name", "body", "written"})


def bounded_body(table: sa.Table) -> sa.ColumnElement[Any]:
    """The body of an entry; NULL for one that is too long to be fetched."""
    return sa.case((sa.func.length(table.c.body) <= LONGEST, table.c.body))


def parsed(body: str | dict[str, Any] | None) -> dict[str, Any]:
    """The JSON object of a body; None stands for one that is too long."""
    if body is None:
        raise ValueError(f"its body has more than {LONGEST} characters")
    try:
        read = json.loads(body) if isinstance(body, str) else body
    except RecursionError:
        raise ValueError("its JSON is too deep") from None
    except ValueError:
        raise ValueError("its body is no JSON") from None
    if not isinstance(read, dict):
        raise ValueError("its body is no JSON object")  # noqa: TRY004 -- a reason, as the others
    return read


def check_keys(body: Mapping[str, Any], types: Mapping[str, sa.types.TypeEngine[Any]]) -> None:
    """Raise ValueError for too many keys, keys of another length, and keys of another type."""
    columns = body["columns"]
    if "ranges" in body:
        ends = body["ranges"]
        if not all(type(end) is int and LOW <= end <= HIGH for end in ends):
            raise ValueError("its ranges are no integers")
        sizes = [last - first + 1 for first, last in zip(ends[::2], ends[1::2], strict=True)]
        if min(sizes, default=1) < 1 or sum(sizes) > _MOST_KEYS:
            raise ValueError(f"its ranges name more than {_MOST_KEYS} rows, or none")
        keys: list[Any] = [[0]] if ends else []
    else:
        both = (*body.get("keys", ()), *body.get("old", ()), *body.get("new", ()))
        keys = [key for key in both if key is not None]
    if any(len(key) != len(columns) for key in keys):
        raise ValueError("its keys have another length than the primary key")
    for column, values in zip(columns, zip(*keys, strict=True), strict=False):
        kinds = set(map(type, values)) - {bool}
        is_text, is_number = (isinstance(types.get(column), t) for t in (sa.String, sa.Integer))
        # a server compares 5 and '5abc' as equal, or 'abc' and 0
        if (is_text and kinds & {int, float}) or (is_number and str in kinds):
            raise ValueError(f"the column {column} has another type by now")
        # a driver, or the server, takes no such number at all
        if is_number and any(type(v) is int and not LOW <= v <= HIGH for v in values):
            raise ValueError(f"the column {column} holds no such number")


def check_table(
    dialect: Dialect, place: tuple[str, str], columns: Iterable[str] | None = None
) -> None:
    """Raise ValueError for a table that no sweep may change; by its columns once they are known."""
    if dialect.is_system_table(*place):
        raise ValueError("the table is one of the database's own, which is never a target")
    if columns is not None and set(columns) >= _LEDGER:
        raise ValueError("the table is a ledger, which is never a target")


def check_primary_key(entered: Sequence[str], now: Sequence[str], columns: Iterable[str]) -> None:
    """Raise ValueError where the primary key has other columns by now than an entry has."""
    missing = [name for name in entered if name not in columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]} any more")
    if set(entered) != set(now):
        raise ValueError(f"the primary key is ({', '.join(now)}) by now, not {', '.join(entered)}")
