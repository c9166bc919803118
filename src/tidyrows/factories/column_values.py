"""A declaration for a column, by its type."""

from __future__ import annotations

import enum
import math
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import factory.random
import sqlalchemy as sa
from factory.declarations import BaseDeclaration, LazyFunction
from sqlalchemy.engine.default import DefaultDialect

from tidyrows.arguments import Kind, checked
from tidyrows.dialects.sample_values import sample_of
from tidyrows.factories.checks import ANYTHING, Bounds
from tidyrows.factories.declarations import Scoped, ScopedEmail, ScopedInteger
from tidyrows.factories.text_by_name import text_declaration
from tidyrows.template import TAG_WIDTH

if TYPE_CHECKING:
    from factory.builder import BuildStep, Resolver
    from sqlalchemy.types import TypeEngine

Maker = Callable[["sa.Column[Any]"], Any]
M = TypeVar("M", bound=Maker)

_makers: dict[type, Maker] = {}
_EMAIL_WIDTH = TAG_WIDTH + len("@example.test")
_URL = "https://example.test/{tag}"
_URL_WIDTH = len(_URL.format(tag="")) + TAG_WIDTH
_FIRST_MOMENT = datetime(2020, 1, 1)  # noqa: DTZ001 -- a column without a zone
_SECONDS = 5 * 365 * 24 * 3600
_DAYS = 2_900_000
_MANY = 2**24
SMALL_INTEGERS = {"TINYINT": 7, "SMALLINT": 15, "small_integer": 15}
"""By the name of the type: the bits of its greatest value."""
_LARGEST = 9_999
"""Of the numbers that no CHECK bounds."""


_UNKNOWN = "no value of its type {!r} is known; column_maker registers how to make one"


class NotKnownError(Exception):
    """No value can be guessed; the text says why."""


@dataclass(frozen=True)
class Field:
    """A column that needs a value.

    Attributes:
        column: the column.
        attribute: the mapped attribute.
        kind: the type; of an ARRAY also that of its items.
        bounds: what the CHECK constraints allow.
        is_scoped: whether every value must differ.
    """

    column: sa.Column[Any]
    attribute: str
    kind: TypeEngine[Any]
    bounds: Bounds = ANYTHING
    is_scoped: bool = False


class Converted(BaseDeclaration):
    """What another declaration gives, passed through a function.

    Args:
        source: the other declaration.
        convert: the function.
    """

    def __init__(self, source: BaseDeclaration, convert: Callable[[Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.source = source
        self.convert = convert

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> Any:
        """The converted value."""
        return self.convert(self.source.evaluate_pre(instance, step, extra))  # type: ignore[no-untyped-call]  # as above


_TYPE = Kind(lambda value: isinstance(value, type), "a class of column types", "MyType")


@checked(kind=_TYPE)
def column_maker(kind: type[TypeEngine[Any]]) -> Callable[[M], M]:
    """Register how values of a column type are made for factories from models.

    The function gets the column, and returns a declaration or a constant. It is called when a
    factory is first used; for a subclass of the type too.

    Args:
        kind: a class of column types, as a TypeDecorator of the project.

    Example:
        >>> @column_maker(MoneyType)
        ... def money(column):
        ...     return factory.LazyFunction(lambda: Money(5, "EUR"))
    """

    def register(maker: M) -> M:
        _makers[kind] = maker
        return maker

    return register


def declaration_for(field: Field) -> Any:
    """A declaration, or a constant, for a column.

    Raises:
        NotKnownError: the type is not known.
    """
    kind = field.kind
    for each in type(kind).__mro__:
        if each in _makers:
            return _makers[each](field.column)
    if isinstance(kind, sa.TypeDecorator) and not isinstance(kind, sa.Interval):
        return _of_decorator(field, kind)
    sample = sample_of(kind)
    if sample is not None:
        return Converted(ScopedInteger(), sample) if field.is_scoped else _drawn(sample, _MANY)
    for base, make in _BY_TYPE:
        if isinstance(kind, base):
            return make(field)
    python_type = _python_type(kind)
    for base, make in _BY_PYTHON_TYPE.items():
        if issubclass(python_type, base):
            return make(field)
    raise NotKnownError(_UNKNOWN.format(field.column.type))


def _drawn(make: Callable[[int], Any], count: int, first: int = 0) -> LazyFunction:
    """A declaration of what a function makes of a random number."""
    return LazyFunction(lambda: make(first + factory.random.randgen.randrange(count)))  # type: ignore[no-untyped-call]  # factory_boy's is untyped


# -- by type ---------------------------------------------------------------------------------------


def _text(field: Field) -> Any:
    bounds, longest = field.bounds, longest_of(field)
    if bounds.choices is not None:
        return _one_of([str(each) for each in bounds.choices if each not in bounds.excluded])
    if not field.is_scoped:
        is_filled_up = field.kind.__visit_name__ in {
            "CHAR",
            "NCHAR",
        }  # by the database, with spaces
        shortest = longest if is_filled_up and longest else bounds.shortest
        return text_declaration(
            field.attribute, field.column.table.name, shortest=shortest, longest=longest
        )
    if longest is not None and longest < TAG_WIDTH:
        raise NotKnownError(
            f"it is unique, and {longest} characters are too few for a text that nobody else has"
        )
    name = field.attribute.strip("_").lower()
    if name.endswith("email") and (longest is None or longest >= _EMAIL_WIDTH):
        return ScopedEmail()
    is_url = re.search(r"(?:^|_)(?:url|uri|link|website|homepage)$", name)
    if is_url and (longest is None or longest >= _URL_WIDTH):
        return Scoped(_URL)
    literal = re.sub(r"[^a-z0-9]+", "-", name)
    return Scoped(f"{literal}-{'x' * max(bounds.shortest - TAG_WIDTH, 0)}{{tag}}")


def longest_of(field: Field) -> int | None:
    """The greatest length in characters or bytes that its type and CHECK constraints allow."""
    kinds: list[Any] = [field.kind, field.column.type]
    while isinstance(kinds[-1], sa.TypeDecorator):
        kinds.append(kinds[-1].impl_instance)
    kinds += getattr(field.column.type, "_variant_mapping", {}).values()
    lengths = [kind.length for kind in kinds if isinstance(getattr(kind, "length", None), int)]
    lengths += [] if field.bounds.longest is None else [field.bounds.longest]
    return min(lengths, default=None)


def _one_of(values: list[Any]) -> LazyFunction:
    if not values:
        raise NotKnownError("its CHECK constraints allow no value")
    return _drawn(values.__getitem__, len(values))


def _enum(field: Field) -> Any:
    kind: Any = field.kind
    allowed = field.bounds.choices
    members = list(kind.enum_class or kind.enums)
    stored = [kind._db_value_for_elem(each) for each in members]  # noqa: SLF001 -- values_callable decides, and no public name tells the result
    pairs = zip(members, stored, strict=True)
    return _one_of([each for each, text in pairs if allowed is None or text in allowed])


def _number(field: Field, step: Decimal, greatest: Decimal, convert: Callable[[Any], Any]) -> Any:
    """Numbers that are multiples of ``step``, at most ``greatest`` where no CHECK says more."""
    bounds = field.bounds
    if bounds.choices is not None:
        return _one_of([convert(each) for each in bounds.choices if each not in bounds.excluded])
    low, high = bounds.low, bounds.high
    if low is None:
        low = step if step == 1 else Decimal(0)
        low = low if high is None or low < high else high - 10 * step
        first = math.ceil(low / step)
    else:
        first = math.ceil(low / step) + (not bounds.is_low_allowed and low % step == 0)
    if high is None:
        last = max(math.floor(greatest / step), first + 100)
    else:
        last = math.floor(high / step) - (not bounds.is_high_allowed and high % step == 0)
    if field.is_scoped and bounds.high is None:
        return Converted(ScopedInteger(start=max(math.ceil(low), first * step.__ceil__())), convert)
    if last < first:
        if step < Decimal("1e-9") or convert is int:
            raise NotKnownError("its CHECK constraints allow no value")
        return _number(field, step / 100, greatest, convert)

    def number(at: int) -> Any:
        value = at * step
        while value in bounds.excluded and value < last * step:
            value += step
        return convert(value)

    return _drawn(number, last - first + 1, first)


def _integer(field: Field) -> Any:
    bits = SMALL_INTEGERS.get(field.kind.__visit_name__, 31)
    greatest = Decimal(min(_LARGEST, 2**bits - 1))
    made = _number(field, Decimal(1), greatest, int)
    # the limits of the column are looked up by ScopedInteger itself
    return made.source if isinstance(made, Converted) else made


def _numeric(field: Field) -> Any:
    kind: Any = field.kind
    scale = kind.scale or 0
    digits = min((kind.precision or 10) - scale, 4)
    step = Decimal(1).scaleb(-scale)
    return _number(field, step, Decimal(10) ** digits - step, Decimal if kind.asdecimal else float)


def _float(field: Field) -> Any:
    # quarters: a FLOAT of four bytes holds them exactly
    is_decimal = getattr(field.kind, "asdecimal", False)
    convert: Callable[[Any], Any] = Decimal if is_decimal else float
    return _number(field, Decimal("0.25"), Decimal(1000), convert)


def _boolean(field: Field) -> Any:
    return _drawn(bool, 2)


def _datetime(field: Field) -> Any:
    has_zone = getattr(field.kind, "timezone", False)
    return _moment(field, _FIRST_MOMENT.replace(tzinfo=UTC if has_zone else None))


def _moment(field: Field, first: datetime) -> Any:
    def make(seconds: int) -> datetime:
        return first + timedelta(seconds=seconds)

    return Converted(ScopedInteger(), make) if field.is_scoped else _drawn(make, _SECONDS)


def _date(field: Field) -> Any:
    def make(days: int) -> date:
        return _FIRST_MOMENT.date() + timedelta(days=days % _DAYS)

    return Converted(ScopedInteger(), make) if field.is_scoped else _drawn(make, 5 * 365)


def _time(field: Field) -> Any:
    zone = UTC if getattr(field.kind, "timezone", False) else None

    def make(seconds: int) -> time:
        return time(seconds // 3600, seconds // 60 % 60, seconds % 60, tzinfo=zone)

    return _drawn(make, 24 * 3600)


def _interval(field: Field) -> Any:
    def make(seconds: int) -> timedelta:
        return timedelta(seconds=seconds)

    return Converted(ScopedInteger(), make) if field.is_scoped else _drawn(make, 100 * 24 * 3600)


def _binary(field: Field) -> Any:
    length = getattr(field.kind, "length", None) or TAG_WIDTH
    if field.is_scoped and length >= TAG_WIDTH:
        return Converted(Scoped("{tag}"), str.encode)
    if field.kind.__visit_name__ != "BINARY":  # which the database fills up with zeros
        length = min(length, TAG_WIDTH)
    return LazyFunction(lambda: factory.random.randgen.randbytes(length))  # type: ignore[no-untyped-call]  # factory_boy's is untyped


def _uuid(field: Field) -> Any:
    convert = uuid.UUID if getattr(field.kind, "as_uuid", True) else str

    def make() -> Any:
        random = factory.random.randgen.randbytes(16)
        # what makes values differ follows no seed
        return convert(str(uuid.uuid4() if field.is_scoped else uuid.UUID(bytes=random, version=4)))

    return LazyFunction(make)  # type: ignore[no-untyped-call]  # as above


def _json(field: Field) -> Any:
    return LazyFunction(dict)  # type: ignore[no-untyped-call]  # as above


def _array(field: Field) -> Any:
    kind: Any = field.kind
    item = declaration_for(replace(field, kind=kind.item_type, bounds=ANYTHING, is_scoped=False))

    def nested(value: Any) -> Any:
        for _ in range(kind.dimensions or 1):
            value = [value]
        return value

    if not isinstance(item, BaseDeclaration):
        return LazyFunction(lambda: nested(item))  # type: ignore[no-untyped-call]  # as above
    return Converted(item, nested)


_BY_TYPE: tuple[tuple[type, Callable[[Field], Any]], ...] = (
    (sa.Enum, _enum),
    (sa.Uuid, _uuid),
    (sa.String, _text),
    (sa.Boolean, _boolean),
    (sa.Integer, _integer),
    (sa.Float, _float),
    (sa.Numeric, _numeric),
    (sa.DateTime, _datetime),
    (sa.Date, _date),
    (sa.Time, _time),
    (sa.Interval, _interval),
    (sa.LargeBinary, _binary),
    (sa.JSON, _json),
    (sa.ARRAY, _array),
)

_BY_PYTHON_TYPE: dict[type, Callable[[Field], Any]] = {
    bytes: _binary,
    bool: _boolean,
    int: _integer,
    str: _text,
    float: _float,
    Decimal: _float,
    datetime: _datetime,
    date: _date,
    time: _time,
    timedelta: _interval,
    uuid.UUID: _uuid,
    dict: _json,
    list: lambda _: LazyFunction(list),  # type: ignore[no-untyped-call]  # factory_boy's is untyped
}


def _python_type(kind: TypeEngine[Any]) -> type:
    try:
        return kind.python_type
    except NotImplementedError:
        return object


# -- types of the project --------------------------------------------------------------------------

_DIALECT = DefaultDialect()
_HINTS: tuple[tuple[str, Callable[[Field], Any]], ...] = (
    ("uuid|guid", _uuid),
    ("json|dict|mapping", _json),
    ("list|array", _BY_PYTHON_TYPE[list]),
    ("utc|aware|tz", lambda field: _moment(field, _FIRST_MOMENT.replace(tzinfo=UTC))),
    ("datetime|timestamp", lambda field: _moment(field, _FIRST_MOMENT)),
)
_GUESSES = [make for _, make in _HINTS]


def _of_decorator(field: Field, kind: sa.TypeDecorator[Any]) -> Any:
    """The first declaration with a value that the TypeDecorator takes and gives back."""
    of_impl = replace(field, kind=kind.impl_instance)
    if type(kind).process_bind_param is sa.TypeDecorator.process_bind_param:
        return declaration_for(of_impl)  # it changes no value
    has_own_impl = type(kind).load_dialect_impl is not sa.TypeDecorator.load_dialect_impl
    stored_type = object if has_own_impl else _python_type(kind.impl_instance)
    state = factory.random.randgen.getstate()  # a test must draw the same values without this
    for make in [*_candidates(kind), lambda _: declaration_for(of_impl), *_GUESSES]:
        try:
            declaration = make(field)
            stored = kind.process_bind_param(_value_of(declaration), _DIALECT)
            with suppress(NotImplementedError):
                kind.process_result_value(stored, _DIALECT)
        except Exception:  # noqa: BLE001, S112 -- a decorator may refuse a value in any way: the next
            continue
        finally:
            factory.random.randgen.setstate(state)
        if isinstance(stored, stored_type):
            return declaration
    raise NotKnownError(_UNKNOWN.format(kind))


def _candidates(kind: sa.TypeDecorator[Any]) -> list[Callable[[Field], Any]]:
    """What suits the attributes and the name of a TypeDecorator."""
    found: list[Callable[[Field], Any]] = [
        partial(_member, value)
        for value in vars(kind).values()
        if isinstance(value, type) and issubclass(value, enum.Enum)
    ]
    python_type = _python_type(kind)
    found += [make for base, make in _BY_PYTHON_TYPE.items() if issubclass(python_type, base)]
    name = type(kind).__name__.lower()
    return found + [make for words, make in _HINTS if re.search(words, name)]


def _member(kind: type[enum.Enum], field: Field) -> Any:
    return _one_of(list(kind))


def _value_of(declaration: Any) -> Any:
    """A value of a declaration, outside of a factory."""
    if isinstance(declaration, Converted):
        source = declaration.source
        return declaration.convert(1 if isinstance(source, ScopedInteger) else _value_of(source))
    if isinstance(declaration, ScopedInteger):
        return 1
    if isinstance(declaration, LazyFunction):
        return declaration.function()
    return "text" if isinstance(declaration, BaseDeclaration) else declaration
