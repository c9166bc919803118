"""Keys as PostgreSQL's arrays: their text form, and the statements that use them."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tidyrows.dialects.aliases import KEYS, ROW, keys_beside
from tidyrows.dialects.keys import RowsByKey, quoted_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable


def rows_in_arrays(dialect: sa.Dialect, table: KeyedTable, arrays: Sequence[Any]) -> RowsByKey:
    """The rows that have the keys in these arrays, one array per key column."""
    place, names = quoted_names(dialect, table)
    if len(names) == 1:
        # PostgreSQL gives the parameter the column's own type (citext, enum, CHAR(n)).
        where = f" WHERE {place}.{names[0]} = ANY(%s)"
        return RowsByKey(place + where, place + where, (place, where), tuple(arrays))
    # unnest cannot infer a type, so an array of no rows lends it the column's. This also hides the
    # length from the planner, which then walks the index in the order of the keys: three times as
    # fast as its hash join, and two cleanups cannot meet crosswise.
    alias = keys_beside(table)
    empty = f"(SELECT array_agg({ROW}.{{}}) FROM {place} AS {ROW} WHERE false)"
    typed = ", ".join(f"coalesce({empty.format(name)}, %s)" for name in names)
    listed = ", ".join(f"k{number}" for number in range(len(names)))
    equal = " AND ".join(f"{place}.{name} = {alias}.k{n}" for n, name in enumerate(names))
    keys = f"unnest({typed}) AS {alias}({listed}) WHERE {equal}"
    update = (place, f" FROM {keys}")
    return RowsByKey(f"{place}, {keys}", f"{place} USING {keys}", update, tuple(arrays))


def select_by_arrays(dialect: sa.Dialect, table: KeyedTable, arrays: Sequence[str]) -> str:
    """SQL for the driver: the keys that are there, given SQL for one array per key column."""
    place, names = quoted_names(dialect, table)
    if len(names) == 1:
        key = f"{ROW}.{names[0]}"
        return f"SELECT {key} FROM {place} AS {ROW} WHERE {key} = ANY({arrays[0]})"
    listed = ", ".join(f"{ROW}.{name}" for name in names)
    sent = ", ".join(f"k{number}" for number in range(len(names)))
    equal = " AND ".join(f"{ROW}.{name} = {KEYS}.k{number}" for number, name in enumerate(names))
    return (
        f"SELECT {listed} FROM unnest({', '.join(arrays)}) AS {KEYS}({sent}) "
        f"JOIN {place} AS {ROW} ON {equal}"
    )


def array_literal(values: Sequence[Any]) -> str | None:
    """The values as ``{1,2}`` or ``{"a","b"}``; None where one of them has no sure text form.

    Sure means: the same in every session, whatever its settings.
    """
    kinds = set(map(type, values))
    if len(kinds) != 1:
        return None
    write = _WRITERS.get(kinds.pop())
    if write is None:
        return None
    texts = list(map(write, values))
    return None if None in texts else "{" + ",".join(texts) + "}"  # type: ignore[arg-type]  # None is excluded just before


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _moment(value: datetime) -> str | None:
    # A timestamp column would ignore the offset in text, but not in a typed value.
    return _quoted(value.isoformat(" ")) if value.tzinfo is None else None


def _bytes(value: bytes) -> str:
    return f'"\\\\x{value.hex()}"'


_WRITERS: dict[type, Callable[[Any], str | None]] = {
    int: str,
    str: _quoted,
    UUID: str,
    Decimal: lambda value: str(value) if value.is_finite() else None,
    date: lambda value: value.isoformat(),
    datetime: _moment,
    bytes: _bytes,
    bool: lambda value: "t" if value else "f",
}
