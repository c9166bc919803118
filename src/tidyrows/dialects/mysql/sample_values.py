"""A value for each type that only MySQL and MariaDB have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _member(number: int, kind: Any) -> set[str]:
    """One member of a SET."""
    return {kind.values[number % len(kind.values)]}


def _address(number: int) -> str:
    """An address of the block for private networks."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


SAMPLE_VALUES: Mapping[type, Callable[[int, Any], Any]] = {
    mysql.YEAR: lambda number, _: 1950 + number % 150,
    mysql.SET: _member,
    mysql.BIT: lambda number, kind: number % 2 ** (kind.length or 1),
    mysql.INET4: lambda number, _: _address(number),
    mysql.INET6: lambda number, _: f"2001:db8::{number >> 16 & 65535:x}:{number & 65535:x}",
}
"""By type: a function of a number and the column's type."""
