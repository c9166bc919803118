"""The column that a field fills, and its limits: factory_boy tells a declaration neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import ColumnProperty, Mapper

if TYPE_CHECKING:
    from factory.base import FactoryOptions
    from factory.builder import BuildStep, Resolver

_BITS = {"small_integer": 15, "SMALLINT": 15, "integer": 31, "INTEGER": 31}
_BITS |= {"big_integer": 63, "BIGINT": 63}
_FIXED_FORMS = {"uuid", "UUID", "enum", "ENUM", "SET", "INET", "CIDR", "MACADDR", "MACADDR8"}


class ColumnLimits(NamedTuple):
    """What a column can hold; None for no limit."""

    name: str | None = None  # as users.email; None where the field is no mapped column
    length: int | None = None  # characters
    largest: int | None = None
    fixed_form: str | None = None  # the type, where it takes text of one form only


# By the options of the factory, since Meta.rename belongs to it. Weak, for factories of one test.
_limits: WeakKeyDictionary[FactoryOptions, dict[str, ColumnLimits]] = WeakKeyDictionary()


def field_of(instance: Resolver) -> str | None:
    """The field for which a declaration is evaluated."""
    # A declaration is not given the name of its field. To find cycles, the resolver keeps a list
    # of the fields under evaluation; the last one is this declaration's, in a Maybe or Trait too.
    pending = getattr(instance, "_Resolver__pending", None)
    return pending[-1] if pending else None


def column_limits(instance: Resolver, step: BuildStep) -> ColumnLimits:
    """The limits of the column for which a declaration is evaluated."""
    field, options = field_of(instance), step.builder.factory_meta
    if field is None:
        return ColumnLimits()
    known = _limits.setdefault(options, {})
    if field not in known:
        attribute = options.rename.get(field, field)
        known[field] = _limits_of(options.get_model_class(), attribute)
    return known[field]


def _limits_of(model: Any, attribute: str) -> ColumnLimits:
    """No limits for a field without a column of its own: a synonym, a hybrid, a parameter."""
    mapper = sa.inspect(model, raiseerr=False)
    mapped = mapper.attrs.get(attribute) if isinstance(mapper, Mapper) else None
    columns = mapped.columns if isinstance(mapped, ColumnProperty) else ()
    # The key of a joined subclass is a column of both tables.
    plain = [column for column in columns if isinstance(column, sa.Column)]
    if not plain:
        return ColumnLimits()
    types = [getattr(column.type, "impl_instance", column.type) for column in plain]
    lengths = [each.length for each in types if isinstance(each, sa.String)]
    bits = [_BITS[each.__visit_name__] for each in types if each.__visit_name__ in _BITS]
    return ColumnLimits(
        f"{plain[0].table.name}.{plain[0].name}",
        min((each for each in lengths if each is not None), default=None),
        2 ** min(bits) - 1 if bits else None,
        next((type(each).__name__ for each in types if each.__visit_name__ in _FIXED_FORMS), None),
    )
