"""Digests of the values that an INSERT gave: four bytes each.

A digest is of the value as the driver took it, and the same in every process. Beside the digests of
a row stands which of the values only our row can have.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CELL = "I"
UNCOMPARED = 0
_MASK = 0xFFFFFFFF
_NULL = 0x5EED
_FACTOR, _TERM, _HIGHER = 0x9E3779B1, 0x7F4A7C15, 0x85EBCA6B
_SMALL, _EXACT = 2**32, 2**53
LATE = 50
"""Up to how many rows the values are kept until somebody asks for their digests."""
_OWNED = 32
"""How many columns of a table can be told to be our own."""
_BULKY = (sa.LargeBinary, sa.PickleType, sa.JSON)
_RANDOM = frozenset("47")  # the versions of UUIDs that nobody makes twice
_HEX, _DASHED = (32, 12), (36, 14)  # how long a UUID's text is, and where its version stands


def digest(value: Any) -> int:
    """32 bits of a driver's value; 0 for what is not compared."""
    kind = type(value)
    if value is None or (kind is str and not value):
        bits = _NULL  # some databases keep '' as NULL
    elif kind is str:
        bits = crc32(value.encode("utf-8", "surrogatepass"))
    elif kind is int or kind is bool or (kind is float and _is_exact(value)):
        number = int(value)
        bits = ((number + (number >> 32) * _HIGHER) * _FACTOR + _TERM) & _MASK
    elif kind is float:
        bits = crc32(repr(value).encode())
    elif isinstance(value, (bytes, bytearray, memoryview)):
        bits = crc32(value)
    else:
        return UNCOMPARED
    return bits or 1


def digests(values: Sequence[Any]) -> list[int]:
    """The digests of a column's values."""
    kinds = set(map(type, values))
    if kinds == {str} and all(values):
        try:
            return [crc32(value.encode()) or 1 for value in values]
        except UnicodeEncodeError:
            pass
    elif kinds == {int} and min(values) >= 0 and max(values) < _SMALL:
        return [(value * _FACTOR + _TERM) & _MASK or 1 for value in values]
    return list(map(digest, values))


def is_same(then: int, value: Any) -> bool:
    """Whether a value is the one of this digest, maybe in the form that its column's type gave it.

    SQLite keeps text that reads as a number as one, and the other way about.
    """
    return any(then == digest(form) for form in _forms(value))


def _forms(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (int, float)):
        yield str(value)
        yield repr(float(value))
    elif isinstance(value, str):
        for number in (int, float):
            try:
                yield number(value)
            except (ValueError, OverflowError):
                continue


def _is_exact(value: float) -> bool:
    return value.is_integer() and abs(value) < _EXACT


Plan = list[tuple[Any, int]]
"""Where in a row of parameters a value stands, and the place of its column in a layout."""
Patch = dict[str, int]
"""New digests of one row, by column."""


@dataclass(slots=True)
class Layout:
    """What of a table is compared.

    Attributes:
        names: the columns, as the database calls them.
        places: by the parameter's name, where in ``names`` its column stands.
        unique: columns of which no two rows have the same value.
        uuids: columns of UUIDs.
        shared: columns whose value other rows may well have, even if it carries a tag.
        bulky: values may be too large to be kept for a while.
    """

    names: tuple[str, ...]
    places: dict[str, int] = field(default_factory=dict)
    unique: frozenset[int] = frozenset()
    uuids: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()
    bulky: bool = False

    @classmethod
    def of(cls, table: sa.Table, dialect: sa.Dialect) -> Layout:
        """What can be compared of a project's Table."""
        columns = [
            column
            for column in table.columns
            if not column.primary_key
            and column.computed is None
            and not _is_wrapped(column, dialect)
        ]
        unique = _unique_columns(table)
        return cls(
            tuple(column.name for column in columns),
            {column.key: place for place, column in enumerate(columns)},
            frozenset(at for at, column in enumerate(columns) if column in unique),
            frozenset(at for at, c in enumerate(columns) if isinstance(c.type, sa.types.Uuid)),
            frozenset(at for at, column in enumerate(columns) if column.foreign_keys),
            any(isinstance(column.type.dialect_impl(dialect), _BULKY) for column in columns),
        )

    def own(self, place: int, values: Sequence[Any], tag: str) -> list[bool] | None:
        """Which of a column's values only our row can have; None where no value can."""
        if place in self.shared or place >= _OWNED:
            return None
        is_own: Callable[[Any], bool]
        if place in self.unique:
            is_own = _is_filled
        elif place in self.uuids:
            is_own = _is_random
        else:
            return [type(value) is str and tag in value for value in values]
        return [is_own(value) for value in values]


def _is_filled(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and bool(value)


def _is_random(value: Any) -> bool:
    if isinstance(value, bytes):
        return len(value) == 16 and value[6] >> 4 in {4, 7}  # noqa: PLR2004 -- a UUID's bytes
    return isinstance(value, str) and any(
        len(value) == size and value[at] in _RANDOM for size, at in (_HEX, _DASHED)
    )


def _is_wrapped(column: sa.Column[Any], dialect: sa.Dialect) -> bool:
    """Whether SQL around each value makes another of it."""
    sent = column.type.dialect_impl(dialect)
    return any(
        each.bind_expression(sa.bindparam("x", type_=each)) is not None
        for each in (column.type, sent)
    )


def _unique_columns(table: sa.Table) -> set[sa.Column[Any]]:
    unique: list[Any] = [
        each for each in table.constraints if isinstance(each, sa.UniqueConstraint)
    ]
    unique += [index for index in table.indexes if index.unique]
    return {
        next(iter(each.columns))
        for each in unique
        if len(each.columns) == 1 and len(getattr(each, "expressions", each.columns)) == 1
    }


class Prints:
    """The digests of the rows that one statement inserted.

    They are taken late: a test makes few rows at a time, and waits for each flush.

    Args:
        layout: what of their table is compared.
        rows: where the values stand, and the values, row by row.
        tag: what makes a text our own.
    """

    __slots__ = ("_cells", "_rows", "_tag", "layout")

    def __init__(self, layout: Layout, rows: Sequence[tuple[Plan, Any]], tag: str) -> None:
        self.layout = layout
        self._rows = rows
        self._tag = tag
        self._cells: array[int] | None = None
        if len(rows) > LATE or layout.bulky:
            self.cells()

    @classmethod
    def of_digests(cls, names: tuple[str, ...], cells: array[int]) -> Prints:
        """Digests that were taken elsewhere."""
        prints = cls(Layout(names), (), "")
        prints._cells = cells
        return prints

    def cells(self) -> array[int]:
        """Row after row, a cell per column, and which of them are our own, as bits."""
        if self._cells is None:
            rows, width = self._rows, len(self.layout.names) + 1
            cells = array(CELL, [UNCOMPARED]) * (width * len(rows))
            same = bool(rows) and all(plan is rows[0][0] for plan, _row in rows)
            if same:
                self._fill(cells, 0, rows)
            else:  # several VALUES: each row has parameters of its own
                for number, row in enumerate(rows):
                    self._fill(cells, number * width, [row])
            self._cells, self._rows = cells, ()
        return self._cells

    def _fill(self, cells: array[int], first: int, rows: Sequence[tuple[Plan, Any]]) -> None:
        """The cells of rows with one plan, column by column."""
        width = len(self.layout.names) + 1
        end = first + width * len(rows)
        owned: list[int] = [0] * len(rows)
        for position, place in rows[0][0]:
            values = [row[position] for _plan, row in rows]
            cells[first + place : end : width] = array(CELL, digests(values))
            own = self.layout.own(place, values, self._tag)
            if own is not None and any(own):
                owned = [bits | is_own << place for bits, is_own in zip(owned, own, strict=True)]
        cells[first + width - 1 : end : width] = array(CELL, owned)
