"""A value for each type that only PostgreSQL has."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _address(number: int) -> str:
    """An address of the block for private networks."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def _hardware_address(number: int, pairs: int) -> str:
    return f"02:{number.to_bytes(8, 'big')[-pairs:].hex(':')}"


def _bits(number: int, kind: Any) -> str:
    length = kind.length or 1
    return f"{number % 2**length:0{length}b}"


def _range(low: Any, high: Any, kind: Any) -> Any:
    made: postgresql.Range[Any] = postgresql.Range(low, high)
    return [made] if isinstance(kind, postgresql.ranges.AbstractMultiRange) else made


def _whole_numbers(number: int, kind: Any) -> Any:
    return _range(number, number + 10, kind)


def _decimals(number: int, kind: Any) -> Any:
    return _range(Decimal(number), Decimal(number + 10), kind)


def _days(number: int, kind: Any) -> Any:
    first = date(2000, 1, 1) + timedelta(days=number % 2_000_000)
    return _range(first, first + timedelta(days=10), kind)


def _moments(number: int, kind: Any) -> Any:
    has_zone = isinstance(kind, (postgresql.TSTZRANGE, postgresql.TSTZMULTIRANGE))
    first = datetime(2000, 1, 1, tzinfo=UTC if has_zone else None) + timedelta(minutes=number)
    return _range(first, first + timedelta(hours=1), kind)


SAMPLE_VALUES: Mapping[type, Callable[[int, Any], Any]] = {
    postgresql.INET: lambda number, _: _address(number),
    postgresql.CIDR: lambda number, _: f"{_address(number)}/32",
    postgresql.MACADDR: lambda number, _: _hardware_address(number, 5),
    postgresql.MACADDR8: lambda number, _: _hardware_address(number, 7),
    postgresql.HSTORE: lambda number, _: {"number": str(number)},
    postgresql.TSVECTOR: lambda number, _: f"'word{number}'",
    postgresql.TSQUERY: lambda number, _: f"'word{number}'",
    postgresql.JSONPATH: lambda number, _: f'$."number{number}"',
    postgresql.BIT: _bits,
    postgresql.MONEY: lambda number, _: f"{number % 10_000}.00",
    postgresql.OID: lambda number, _: number,
    postgresql.INT4RANGE: _whole_numbers,
    postgresql.INT8RANGE: _whole_numbers,
    postgresql.NUMRANGE: _decimals,
    postgresql.DATERANGE: _days,
    postgresql.TSRANGE: _moments,
    postgresql.TSTZRANGE: _moments,
    postgresql.INT4MULTIRANGE: _whole_numbers,
    postgresql.INT8MULTIRANGE: _whole_numbers,
    postgresql.NUMMULTIRANGE: _decimals,
    postgresql.DATEMULTIRANGE: _days,
    postgresql.TSMULTIRANGE: _moments,
    postgresql.TSTZMULTIRANGE: _moments,
}
"""By type: a function of a number and the column's type."""
