"""Hashes of inserted rows, for databases that may give a key to another row (SQLite).

A hash is of the values as the driver sends and reads them, and it is the same in every process.
SQLite stores the text '5' as a number in a column of numbers, and the number 5 as a text in a
column of texts: so numbers, and texts that read as numbers, are hashed in one common form.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import repeat
from marshal import dumps
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HASH = "Q"
"""The array type of hashes: 64 bits."""
NEVER = 2**64 - 1
"""A hash that stands for values that are not known: no row is compared as equal."""
VALUES = 2**32 - 1
"""The bits of a hash that are of the values; the others are of the nullable references."""
_AFTER_NUMBERS = ":"  # sorts after all texts that SQLite may read as numbers
_INTEGERS = 2**63
_FORMAT = 0  # of marshal: the only one that depends on the values alone


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns that are compared, by the database's names.

    Nullable references are hashed apart: one that is NULL now went with the row that it referenced.
    """

    values: tuple[str, ...]
    references: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns."""
        return self.values + self.references


@dataclass(frozen=True, slots=True, eq=False)
class Hashes:
    """The hashes of rows of one shape, in the order of their keys."""

    shape: Shape
    values: array[int]


def row_hashes(shape: Shape, columns: Sequence[Sequence[Any]]) -> array[int]:
    """The hashes of rows, given as one sequence of values per column of the shape."""
    forms = [common_form(values) for values in columns]
    if None in forms:
        return array(HASH, [NEVER]) * len(columns[0])
    return hash_rows(shape, forms)


def hash_rows(shape: Shape, forms: Sequence[Any]) -> array[int]:
    """As :func:`row_hashes`, of values in their common form."""
    count = len(shape.values)
    values = _hashed(zip(*forms[:count], strict=True)) if count else [0] * len(forms[0])
    if shape.references:
        values = _joined(values, _hashed(zip(*forms[count:], strict=True)))
    return array(HASH, values)


def hashes_as_read(shape: Shape, rows: Sequence[tuple[Any, ...]], start: int) -> list[int]:
    """As :func:`row_hashes`, of rows whose values, from this place on, are taken for common forms.

    Other values have another hash here: only an equal hash tells something.
    """
    end = start + len(shape.values)
    values = _hashed(map(itemgetter(slice(start, end)), rows)) if shape.values else [0] * len(rows)
    if shape.references:
        values = _joined(values, _hashed(map(itemgetter(slice(end, None)), rows)))
    return values


def _hashed(rows: Iterable[tuple[Any, ...]]) -> list[int]:
    return list(map(crc32, map(dumps, rows, repeat(_FORMAT))))


def _joined(values: list[int], references: list[int]) -> list[int]:
    return [a | b << 32 for a, b in zip(values, references, strict=True)]


def common_form(values: Sequence[Any]) -> Sequence[Any] | None:
    """Values in the form in which they are hashed; None where one may be stored as another."""
    kinds = set(map(type, values))
    if kinds == {int} or (kinds == {str} and min(values) >= _AFTER_NUMBERS):
        return values
    if not kinds <= _KINDS:
        return None
    return list(map(_form, values))


_KINDS = {int, bool, float, str, bytes, bytearray, memoryview, type(None)}


def _form(value: Any) -> Any:
    if isinstance(value, str):
        return value if value >= _AFTER_NUMBERS else _number(value)
    if isinstance(value, float):
        if value.is_integer() and -_INTEGERS <= value < _INTEGERS:
            return int(value)
        return None if value != value else f"{value:.15g}"  # noqa: PLR0124 -- SQLite keeps NaN as NULL
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return int(value) if isinstance(value, bool) else value


def _number(text: str) -> Any:
    """A text as the number that a column of numbers makes of it; other texts as they are."""
    try:
        number = int(text)
    except ValueError:
        number = _INTEGERS
    if -_INTEGERS <= number < _INTEGERS:
        return number
    try:
        return _form(float(text))
    except ValueError:
        return text
