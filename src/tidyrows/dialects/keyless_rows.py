"""Role *keyless rows*: rows of a table without a primary key, found again by all their values.

A value is read so that it compares exactly: not through the project's own types, which may lose
something, and as text where a type has no equality or one that calls two values the same (a
collation that ignores case, JSON on PostgreSQL, a point). No column is left out, not even a
generated one: a row that differs in one column only is another row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy as sa

from tidyrows.dialects.driver import DriverAccess
from tidyrows.dialects.keys import run

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    kind: Any = column.type
    while True:
        # By with_variant(); dialect_impl() would lose that a Float is one.
        kind = kind._variant_mapping.get(dialect.name, kind)  # noqa: SLF001 -- nothing public has it
        if not isinstance(kind, sa.types.TypeDecorator):
            return kind  # type: ignore[no-any-return]
        kind = kind.load_dialect_impl(dialect)


def is_exact(kind: TypeEngine[Any]) -> bool:
    """Whether the database compares values of this type exactly, as the driver hands them over."""
    return isinstance(kind, _EXACT) and not isinstance(kind, sa.Enum)


def is_as_given(column: sa.Column[Any]) -> bool:
    """Whether a statement's parameter is what would be read of the column afterwards."""
    plain = isinstance(column.type, (sa.Integer, sa.String, sa.LargeBinary))
    return plain and not isinstance(column.type, (sa.Enum, sa.types.TypeDecorator))


class KeylessStatements(DriverAccess):
    """DELETE and COUNT of rows by all their values."""

    deletes_keyless_rows: ClassVar[bool] = False
    """Whether ``delete_equal_rows`` compares exactly, and deletes no more rows than asked."""

    def read_exactly(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """What to read of a column so that ``delete_equal_rows`` can find the row by it."""
        return column

    def delete_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """Delete up to ``count`` rows that equal this one in every column; the number deleted.

        Only where :attr:`deletes_keyless_rows` is true.

        Args:
            connection: in the cleanup's transaction.
            table: it needs no primary key.
            row: the values in the order of the table's columns, as ``read_exactly`` read them.
            count: the most rows that may go.
        """
        raise NotImplementedError

    def count_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any]
    ) -> int:
        """How many rows equal this one in every column."""
        condition = self._equals_row(table, table.clause, row)
        counted = sa.select(sa.func.count()).select_from(table.clause).where(condition)
        return int(run(connection, counted).scalar_one())

    def _equals_row(
        self, table: KeyedTable, clause: sa.TableClause, row: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        pairs = zip(table.table.columns, row, strict=True)
        return sa.and_(*(self._equals(clause.c[column.name], value) for column, value in pairs))

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        """Whether a column holds exactly this value, as ``read_exactly`` read it; NULL too."""
        exact = self.read_exactly(column)
        return exact.is_not_distinct_from(sa.bindparam(None, value, type_=exact.type))
