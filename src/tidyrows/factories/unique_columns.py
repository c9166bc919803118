"""Which columns get values that no other worker makes, so that every UNIQUE is met."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.factories.column_values import SMALL_INTEGERS, longest_of
from tidyrows.template import TAG_WIDTH

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from tidyrows.factories.column_values import Field

_NARROW = 4
"""From this rank of ``_rank`` on, the values of a column run out."""


def scoped_columns(
    tables: Collection[sa.FromClause],
    fields: Mapping[sa.Column[Any], Field],
    with_parent: Collection[sa.Column[Any]],
) -> set[sa.Column[Any]]:
    """One column of each primary key, UNIQUE constraint and unique index, if one is needed.

    Args:
        tables: of a model.
        fields: the columns for which a value is made.
        with_parent: the columns of foreign keys: each row gets a new parent.
    """
    scoped: set[sa.Column[Any]] = set()
    for columns in sorted(_unique_groups(tables), key=len):
        if any(each.nullable and each not in fields for each in columns) or scoped & set(columns):
            continue
        ranks = {each: _rank(fields[each]) for each in columns if each in fields}
        possible = [each for each in columns if ranks.get(each)]
        if not possible:
            continue
        best = min(possible, key=lambda each: (ranks[each], each.name))
        if ranks[best] < _NARROW or not set(columns) & set(with_parent):
            scoped.add(best)
    return scoped


def _unique_groups(tables: Collection[sa.FromClause]) -> Iterator[list[sa.Column[Any]]]:
    for table in tables:
        if not isinstance(table, sa.Table):
            continue
        yield list(table.primary_key.columns)
        for constraint in table.constraints:
            if isinstance(constraint, sa.UniqueConstraint):
                yield list(constraint.columns)
        for index in table.indexes:
            if index.unique:
                yield list(index.columns)


def _rank(field: Field) -> int:
    """How well values of a column can be made to differ: the lower the better, 0 for not at all."""
    kind = field.kind
    while isinstance(kind, sa.TypeDecorator) and not isinstance(kind, sa.Interval):
        kind = kind.impl_instance
    bounds = field.bounds
    if bounds.choices is not None or isinstance(kind, (sa.Enum, sa.Boolean, sa.JSON, sa.ARRAY)):
        return 0
    if isinstance(kind, sa.String):
        length = longest_of(field)
        return 1 if length is None or length >= TAG_WIDTH else 5
    if isinstance(kind, sa.Uuid):
        return 2
    if isinstance(kind, sa.Integer):
        return (
            0 if bounds.high is not None else 3 if kind.__visit_name__ not in SMALL_INTEGERS else 4
        )
    return 0 if isinstance(kind, sa.Time) else 4
