"""PostgreSQL's text form of an array, with values whose text is the same in every session."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def array_literal(values: Sequence[Any]) -> str | None:
    """The values as ``{1,2}`` or ``{"a","b"}``; None where one of them has no sure text form."""
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
