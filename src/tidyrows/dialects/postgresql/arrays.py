"""Keys as PostgreSQL's arrays: their text form, and the statements that take them."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from tidyrows.dialects.aliases import KEYS, ROW, keys_beside
from tidyrows.dialects.keys import quoted_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidyrows.keys import KeyedTable


def keys_in_arrays(table: KeyedTable, arrays: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Which rows have the keys in these arrays, one array per key column."""
    # A bind without a type: PostgreSQL gives it the column's own (citext, enum, CHAR(n)).
    binds = [sa.bindparam(None, array, type_=sa.types.NullType()) for array in arrays]
    columns = table.key_clauses
    if len(columns) == 1:
        return columns[0] == sa.func.any(binds[0])
    # unnest cannot infer a type, so an array of no rows lends it the column's. This also hides the
    # length from the planner, which then walks the index in the order of the keys: three times as
    # fast as its hash join, and two cleanups cannot meet crosswise.
    lender = table.clause.alias()
    typed = [
        sa.func.coalesce(
            sa.select(sa.func.array_agg(lender.c[column.name])).where(sa.false()).scalar_subquery(),
            bind,
        )
        for column, bind in zip(columns, binds, strict=True)
    ]
    names = [f"key_{number}" for number in range(len(columns))]
    # not table_valued(name=), which render_derived() forgets
    sent = sa.func.unnest(*typed).table_valued(*names).render_derived(name=keys_beside(table))
    equal = (column == sent.c[name] for column, name in zip(columns, names, strict=True))
    return sa.and_(*equal)


def select_by_arrays(dialect: sa.Dialect, table: KeyedTable, arrays: Sequence[str]) -> str:
    """SQL for the driver: the keys that are there, given SQL for one array per key column."""
    place, names = quoted_names(dialect, table)
    listed = ", ".join(f"{ROW}.{name}" for name in names)
    if len(names) == 1:
        return f"SELECT {listed} FROM {place} AS {ROW} WHERE {listed} = ANY({arrays[0]})"
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
    kinds = {type(value) for value in values}
    if len(kinds) != 1:
        return None
    write = _WRITERS.get(kinds.pop())
    if write is None:
        return None
    texts = [write(value) for value in values]
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
