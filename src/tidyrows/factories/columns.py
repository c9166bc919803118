"""What the mapped column of the field being evaluated can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import ColumnProperty, Mapper

if TYPE_CHECKING:
    from factory.base import FactoryOptions
    from factory.builder import BuildStep, Resolver

_BITS = {"small_integer": 15, "SMALLINT": 15, "integer": 31, "INTEGER": 31}
_BITS |= {"big_integer": 63, "BIGINT": 63}


@dataclass(frozen=True, slots=True)
class ColumnLimits:
    """What a column can hold.

    Attributes:
        name: the column, as ``users.email``; None where the field is no mapped column.
        length: how many characters, None for no limit.
        largest: the largest number, None for no limit.
    """

    name: str | None = None
    length: int | None = None
    largest: int | None = None


UNKNOWN = ColumnLimits()

# By the options of the factory that evaluates, since Meta.rename is the factory's. Weak: factories
# that are made inside a test go with it.
_limits: WeakKeyDictionary[FactoryOptions, dict[str, ColumnLimits]] = WeakKeyDictionary()


def column_limits(instance: Resolver, step: BuildStep) -> ColumnLimits:
    """The limits of the column that the declaration under evaluation fills.

    A field without a mapped column of its own (a synonym, a hybrid, a parameter, a field of a
    model that is not mapped) has none.
    """
    # A declaration is not told its field's name. The resolver keeps the fields whose value is
    # being computed, to find cycles; the last one is ours, whatever wraps us (Maybe, a Trait).
    pending = getattr(instance, "_Resolver__pending", None)
    if not pending:
        return UNKNOWN
    options = step.builder.factory_meta
    known = _limits.get(options)
    if known is None:
        known = _limits[options] = {}
    field = pending[-1]
    limits = known.get(field)
    if limits is None:
        attribute = options.rename.get(field, field)
        limits = known[field] = _limits_of(options.get_model_class(), attribute)
    return limits


def _limits_of(model: Any, attribute: str) -> ColumnLimits:
    mapper = sa.inspect(model, raiseerr=False)
    if not isinstance(mapper, Mapper):
        return UNKNOWN
    mapped = mapper.attrs.get(attribute)
    if not isinstance(mapped, ColumnProperty):
        return UNKNOWN
    # The key of a joined subclass is a column of both tables.
    columns = [column for column in mapped.columns if isinstance(column, sa.Column)]
    if not columns:
        return UNKNOWN
    lengths = [length for column in columns if (length := _length(column.type)) is not None]
    numbers = [number for column in columns if (number := _largest(column.type)) is not None]
    return ColumnLimits(
        f"{columns[0].table.name}.{columns[0].name}",
        min(lengths, default=None),
        min(numbers, default=None),
    )


def _plain(type_: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    return type_.impl_instance if isinstance(type_, sa.types.TypeDecorator) else type_


def _length(type_: sa.types.TypeEngine[Any]) -> int | None:
    plain = _plain(type_)
    return plain.length if isinstance(plain, sa.String) else None


def _largest(type_: sa.types.TypeEngine[Any]) -> int | None:
    bits = _BITS.get(_plain(type_).__visit_name__)
    return None if bits is None else 2**bits - 1
