"""Values of a data file as the column has them: dates, decimals, UUIDs, enums from text."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import decimal
import enum
import math
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.data.nodes import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

TIMES = (sa.DateTime, sa.Date, sa.Time)
"""Types whose values are texts in JSON."""

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def converted(column: sa.Column[Any], value: Any, *, from_text: bool = False) -> Any:
    """The value for a column.

    Args:
        column: where it goes. A type of the project's own (a TypeDecorator) takes every value as
            it is, but for the texts of times.
        value: a value of a file.
        from_text: numbers and booleans are given as text, as in the environment.

    Raises:
        ValueError: the column does not take it; the text is the rest of a sentence.
    """
    kind: Any = column.type
    if value is None:
        if column.nullable or column.default is not None or column.server_default is not None:
            return None
        raise ValueError(f"{column.table.name}.{column.name} is NOT NULL, and the value is null.")
    if is_own_type(kind) and isinstance(value, str) and isinstance(kind.impl_instance, TIMES):
        kind = kind.impl_instance
    for types, convert in _KINDS:
        if isinstance(kind, types):
            return convert(kind, value, from_text=from_text)
    return value


def is_own_type(kind: Any) -> bool:
    """Whether a type is a TypeDecorator of the project; SQLAlchemy's Interval is one too."""
    return isinstance(kind, sa.types.TypeDecorator) and not isinstance(kind, sa.Interval)


def is_text(column: sa.Column[Any]) -> bool:
    """Whether a column holds free text."""
    kind = getattr(column.type, "impl_instance", column.type)
    return isinstance(kind, sa.String) and not isinstance(kind, sa.Enum)


def is_unique(column: sa.Column[Any]) -> bool:
    """Whether no two rows of its table have one value of a column."""
    table = column.table
    if column.unique or (column.primary_key and len(table.primary_key.columns) == 1):
        return True
    alone = [column]
    return any(
        isinstance(each, sa.UniqueConstraint) and [*each.columns] == alone
        for each in table.constraints
    ) or any(each.unique and [*each.columns] == alone for each in table.indexes)


def base64_text(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode("ascii")


def bytes_of(text: Any) -> bytes:
    """The bytes of :func:`base64_text`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"base64 takes text in base64: {error}.") from None


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    kind = {int: "number", float: "number", str: "text"}.get(type(value), type(value).__name__)
    return f"the {kind} {value!r}" if len(repr(value)) < 60 else f"a {kind}"  # noqa: PLR2004 -- short enough to read


def _text(kind: Any, value: Any, *, from_text: bool) -> Any:
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004 -- one exception for all that a column does not take
            f"the column holds text, and this is {_said(value)}. Write it in quotes."
        )
    return value


def _enum(kind: Any, value: Any, *, from_text: bool) -> Any:
    if kind.enum_class is None:
        if value not in kind.enums:
            raise ValueError(f"the column has no value {value!r}. {nearest(value, kind.enums)}")
        return value
    if isinstance(value, str) and value in kind.enum_class.__members__:
        return kind.enum_class[value]
    members = list(kind.enum_class.__members__)
    raise ValueError(
        f"{kind.enum_class.__name__} has no member {value!r}. {nearest(value, members)}"
    )


def _boolean(kind: Any, value: Any, *, from_text: bool) -> Any:
    if from_text and isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if not isinstance(value, bool):
        raise ValueError(  # noqa: TRY004 -- as above
            f"the column takes true or false, and this is {_said(value)}."
        )
    return value


def _integer(kind: Any, value: Any, *, from_text: bool) -> Any:
    if from_text and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"the column takes a whole number, not {value!r}.") from None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(  # noqa: TRY004 -- as above
            f"the column takes a whole number, and this is {_said(value)}."
        )
    return value


def _number(kind: Any, value: Any, *, from_text: bool) -> Any:
    is_number = isinstance(value, (int, float, str, decimal.Decimal))
    if is_number and not isinstance(value, bool):
        try:
            exact = decimal.Decimal(str(value))
        except decimal.InvalidOperation:
            pass
        else:
            return exact if kind.asdecimal else float(exact)
    raise ValueError(f"the column takes a number, and this is {_said(value)}.")


def _iso(python: type[Any], name: str, example: str) -> Callable[..., Any]:
    def convert(kind: Any, value: Any, *, from_text: bool) -> Any:
        if python is dt.datetime and type(value) is dt.date:
            return dt.datetime.combine(value, dt.time())
        if type(value) is python:
            return value
        if isinstance(value, str):
            try:
                return python.fromisoformat(value)
            except ValueError:
                pass
        raise ValueError(f'the column takes a {name} as "{example}", and this is {_said(value)}.')

    return convert


def _interval(kind: Any, value: Any, *, from_text: bool) -> Any:
    if from_text and isinstance(value, str):
        value = _number(sa.Float(), value, from_text=True)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return dt.timedelta(seconds=value)
    raise ValueError(f"the column takes a number of seconds, and this is {_said(value)}.")


def _uuid(kind: Any, value: Any, *, from_text: bool) -> Any:
    try:
        found = uuid.UUID(value)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"the column takes a UUID, and this is {_said(value)}.") from None
    return found if kind.as_uuid else value


def _binary(kind: Any, value: Any, *, from_text: bool) -> Any:
    if not isinstance(value, bytes):
        raise ValueError(  # noqa: TRY004 -- as above
            f'the column holds bytes, and this is {_said(value)}. Write {{base64: "..."}}.'
        )
    return value


_KINDS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (sa.Enum, _enum),
    (sa.String, _text),
    (sa.Boolean, _boolean),
    (sa.Integer, _integer),
    (sa.Numeric, _number),
    (sa.DateTime, _iso(dt.datetime, "date and time", "2026-03-01T12:30:00")),
    (sa.Date, _iso(dt.date, "date", "2026-03-01")),
    (sa.Time, _iso(dt.time, "time", "12:30:00")),
    (sa.Interval, _interval),
    (sa.Uuid, _uuid),
    (sa.LargeBinary, _binary),
)


def plain(value: Any) -> Any:
    """A value of a column as a file has it.

    Raises:
        TypeError: nothing in a file stands for such a value.
    """
    if value is None or type(value) in {bool, int, str}:
        return value
    for types, form in _FORMS:
        if isinstance(value, types):
            return form(value)
    raise TypeError(type(value).__name__)


_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (enum.Enum, lambda value: value.name),
    ((float, int, str), lambda value: value),
    ((decimal.Decimal, uuid.UUID), str),
    ((dt.date, dt.time), lambda value: value.isoformat()),
    (dt.timedelta, dt.timedelta.total_seconds),
    ((bytes, bytearray, memoryview), lambda value: {"base64": base64_text(bytes(value))}),
    ((dict, list), lambda value: {"exact": value}),
)
