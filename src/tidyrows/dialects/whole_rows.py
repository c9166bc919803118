"""Rows of a table without a primary key: what to read of them, and how to find them again by it.

A value is read so that it compares exactly: not through the project's own types, which may lose
something on the way, and as text where a type has no equality or one that takes two values for the
same (a collation that ignores case, JSON on PostgreSQL, a point). No column is left out, generated
ones neither: a row that differs in one column only is somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.types import TypeEngine

    from tidyrows.keys import KeyedTable

_EXACT = (
    sa.Integer,
    sa.Numeric,
    sa.types._Binary,  # noqa: SLF001 -- BINARY, VARBINARY and BLOBs have no other class in common
    sa.Boolean,
    sa.Date,
    sa.DateTime,
    sa.Time,
    sa.Interval,
)


def stored_type(column: Any, dialect: sa.Dialect) -> TypeEngine[Any]:
    """The type under a project's own ones."""
    kind: Any = _variant(column.type, dialect)
    while isinstance(kind, sa.types.TypeDecorator):
        kind = _variant(kind.load_dialect_impl(dialect), dialect)
    found: TypeEngine[Any] = kind
    return found


def _variant(kind: Any, dialect: sa.Dialect) -> Any:
    """What with_variant() says; dialect_impl() would lose that a Float is one."""
    return kind._variant_mapping.get(dialect.name, kind)  # noqa: SLF001 -- nothing public tells


def is_exact(kind: TypeEngine[Any]) -> bool:
    """Whether the database compares values of this type exactly, as the driver hands them over."""
    return isinstance(kind, _EXACT) and not isinstance(kind, sa.Enum)


def is_as_given(column: sa.Column[Any]) -> bool:
    """Whether a statement's parameter is what would be read of the column afterwards."""
    plain = isinstance(column.type, (sa.Integer, sa.String, sa.LargeBinary))
    return plain and not isinstance(column.type, (sa.Enum, sa.types.TypeDecorator))


def same_row(
    table: KeyedTable,
    clause: sa.TableClause,
    row: Sequence[Any],
    same: Callable[[sa.ColumnElement[Any], Any], sa.ColumnElement[bool]],
) -> sa.ColumnElement[bool]:
    """All columns together."""
    names = [column.name for column in table.table.columns]
    pairs = zip(names, row, strict=True)
    return sa.and_(*(same(clause.c[name], value) for name, value in pairs))
