"""What the rows that we inserted looked like, in four bytes per value.

Where a database gives a key again, a key alone does not say whose row it names. So each value of an
INSERT leaves a digest, of the value as the driver took it: a stranger's row that has the key now
shows other values. The lowest bit of a digest says that only our row can have this value.

Only values that surely come back as they went are digested. Text that reads as a number counts as
that number: the database may keep it as one, by its column's declared type.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidyrows.rows import KeyedTable

CELL = "I"
UNCOMPARED = 0
_MASK = 0x7FFFFFFF
_NULL = 0x5EED
_LOW, _HIGH = -(2**63), 2**63 - 1
_EXACT = 2**53
_STARTS = frozenset("0123456789+-. \t\n\r\f\v")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", re.ASCII)
_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
_RANDOM = frozenset("47")  # the versions of UUIDs that nobody makes twice
_HEX, _DASHED = (32, 12), (36, 14)  # how long a UUID's text is, and where its version stands


def digest(value: Any) -> int:
    """31 bits of a driver's value, the same in every process; 0 for what is not compared."""
    kind = type(value)
    if kind is str:
        if not value:
            return _NULL  # some databases keep '' as NULL
        if value[0] in _STARTS and _NUMBER.fullmatch(value):
            return digest(int(value) if _INTEGER.fullmatch(value) else float(value))
        return crc32(value.encode("utf-8", "surrogatepass")) & _MASK or 1
    if kind is int:
        return ((value ^ value >> 31) * 0x9E3779B1 + 0x7F4A7C15) & _MASK or 1
    if value is None:
        return _NULL
    if kind is float:
        if value.is_integer() and abs(value) < _EXACT:
            return digest(int(value))
        return crc32(repr(value).encode()) & _MASK or 1
    if kind is bool:
        return digest(int(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return crc32(value) & _MASK or 1
    return 0


@dataclass(slots=True)
class Prints:
    """The digests of the rows that one statement inserted.

    Attributes:
        names: the columns.
        cells: row after row, a cell per column.
    """

    names: tuple[str, ...]
    cells: array[int]


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
    """

    names: tuple[str, ...]
    places: dict[str, int] = field(default_factory=dict)
    unique: frozenset[int] = frozenset()
    uuids: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()

    @classmethod
    def of(cls, table: sa.Table, dialect: sa.Dialect) -> Layout:
        """What can be compared of a project's Table."""
        columns = [
            column
            for column in table.columns
            if not column.primary_key
            and column.computed is None
            and not column.type.dialect_impl(dialect)._has_bind_expression
        ]
        unique = _unique_columns(table)
        return cls(
            tuple(column.name for column in columns),
            {column.key: place for place, column in enumerate(columns)},
            frozenset(at for at, column in enumerate(columns) if column in unique),
            frozenset(at for at, c in enumerate(columns) if isinstance(c.type, sa.types.Uuid)),
            frozenset(at for at, column in enumerate(columns) if column.foreign_keys),
        )

    def cell(self, place: int, value: Any, tag: str) -> int:
        """The digest of a column's value, and whether only our row can have it."""
        bits = digest(value)
        if not bits:
            return UNCOMPARED
        kind = type(value)
        own = (
            (kind is str or kind is bytes)
            and place not in self.shared
            and (
                (kind is str and tag in value)
                or (place in self.unique and bool(value))
                or (place in self.uuids and _is_random(value))
            )
        )
        return bits << 1 | own


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


def _is_random(value: str | bytes) -> bool:
    if isinstance(value, bytes):
        return len(value) == 16 and value[6] >> 4 in {4, 7}  # noqa: PLR2004 -- a UUID's bytes
    return any(len(value) == size and value[at] in _RANDOM for size, at in (_HEX, _DASHED))


class Fingerprints:
    """The digests of one table's rows, by key.

    Attributes:
        names: the columns, one cell each per row.
        generated: the database made the keys of all rows.
    """

    __slots__ = ("_cells", "_keys", "_other_cells", "_others", "generated", "names")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.generated = True
        self._keys = array("q")  # ascending; the usual keys of a table
        self._cells = array(CELL)
        self._others: dict[Any, int] = {}
        self._other_cells = array(CELL)

    def record(self, keys: Sequence[Any], prints: Prints, *, generated: bool = False) -> None:
        """Note rows that were inserted; what was known under these keys is over."""
        cells = prints.cells if prints.names == self.names else self._arranged(prints)
        self.generated = self.generated and generated
        width = len(self.names)
        for number, key in enumerate(keys):
            self._put(key, cells[number * width : (number + 1) * width])

    def _put(self, key: Any, cells: array[int]) -> None:
        place = self._place(key)
        if place is not None:
            into, start = place
            into[start : start + len(cells)] = cells
        elif (
            type(key) is int and _LOW <= key <= _HIGH and not (self._keys and key < self._keys[-1])
        ):
            self._keys.append(key)
            self._cells.extend(cells)
        else:
            self._others[key] = len(self._other_cells)
            self._other_cells.extend(cells)

    def _place(self, key: Any) -> tuple[array[int], int] | None:
        if type(key) is int and self._keys and _LOW <= key <= self._keys[-1]:
            at = bisect_left(self._keys, key)
            if self._keys[at] == key:
                return self._cells, at * len(self.names)
        start = self._others.get(key)
        return None if start is None else (self._other_cells, start)

    def _arranged(self, prints: Prints) -> array[int]:
        """Cells of a Table that has the columns in another order, or has other columns."""
        width = len(prints.names)
        places = [prints.names.index(n) if n in prints.names else None for n in self.names]
        return array(
            CELL,
            (
                UNCOMPARED if place is None else prints.cells[start + place]
                for start in range(0, len(prints.cells), width)
                for place in places
            ),
        )

    def of(self, key: Any) -> array[int] | None:
        """The cells of a row; None where nothing was noted."""
        place = self._place(key)
        if place is None:
            return None
        cells, start = place
        return cells[start : start + len(self.names)]

    def change(self, key: Any, patch: Mapping[str, int]) -> None:
        """Note what an UPDATE set in one row."""
        place = self._place(key)
        if place is not None:
            cells, start = place
            for at, name in enumerate(self.names):
                if name in patch:
                    cells[start + at] = patch[name]

    def loosen(self, names: Iterable[str]) -> None:
        """Compare these columns no longer, in any row."""
        width = len(self.names)
        for name in names:
            if name in self.names:
                for cells in (self._cells, self._other_cells):
                    rows = len(cells) // width
                    cells[self.names.index(name) :: width] = array(CELL, [UNCOMPARED]) * rows

    def drop(self, key: Any) -> None:
        """Compare nothing of this row any longer."""
        place = self._place(key)
        if place is not None:
            cells, start = place
            for at in range(start, start + len(self.names)):
                cells[at] = UNCOMPARED

    def rename(self, old: Any, new: Any) -> None:
        """A row's key was changed: what it looks like goes with it."""
        cells = self.of(old)
        self.drop(old)
        self.drop(new)
        if cells is not None:
            self._put(new, cells)

    def compared(self) -> Iterator[int]:
        """The columns of which any row has a digest, as places in :attr:`names`."""
        width = len(self.names)
        for at in range(width):
            if any(any(cells[at::width]) for cells in (self._cells, self._other_cells)):
                yield at

    def __len__(self) -> int:
        return len(self._keys) + len(self._others)
