"""How a row is named everywhere: database, real schema, table and primary key."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sqlalchemy as sa


@dataclass(frozen=True, slots=True, order=True)
class TableName:
    """A table as the database knows it, whatever the model called it.

    Attributes:
        database: the database, without credentials, as ``postgresql://host:5432/app``.
        schema: the real schema (on the MySQL family the database's name), never a translated one.
        name: the table's name.
    """

    database: str
    schema: str
    name: str

    @property
    def place(self) -> tuple[str, str]:
        """Schema and name, as the schema room names a table."""
        return self.schema, self.name

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


@dataclass(frozen=True, slots=True)
class RowKey:
    """One row.

    Attributes:
        table: the table it stands in.
        key: the values of its primary key, in the primary key's order, as Python values of the
            columns' types.
    """

    table: TableName
    key: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.table}({', '.join(repr(value) for value in self.key)})"


def python_type(column: sa.Column[Any]) -> type | None:
    """The type of a column's values in Python; None where only its TypeDecorator knows."""
    with suppress(NotImplementedError):
        if not isinstance(column.type, sa.types.TypeDecorator):
            return column.type.python_type
    return None


@dataclass(frozen=True, eq=False)
class KeyedTable:
    """A real table, with the columns and types of the project's own ``Table``.

    The types matter: the Python value of a TypeDecorator is not the database's value, and only
    the project's type converts one to the other.
    """

    name: TableName
    table: sa.Table  # a reflected one where the project has none
    transactional: bool = True  # False where a ROLLBACK does not undo what was written

    @cached_property
    def place(self) -> tuple[str, str]:
        """The place of :attr:`name`."""
        return self.name.place

    @cached_property
    def key_columns(self) -> tuple[sa.Column[Any], ...]:
        """The primary key's columns, in its order; empty where there is no primary key."""
        return tuple(self.table.primary_key)

    @cached_property
    def key_names(self) -> tuple[str, ...]:
        """How statements' parameters name the primary key's columns."""
        return tuple(column.key for column in self.key_columns)

    @cached_property
    def own_types(self) -> tuple[set[type], ...]:
        """By key column the types of values that are as a SELECT gives them; more are learnt."""
        return tuple({type(None), python_type(column) or type(None)} for column in self.key_columns)

    @cached_property
    def generated_name(self) -> str | None:
        """The parameter of the key column that a sequence or an auto-increment fills, if any."""
        column = self.table.autoincrement_column
        if column is None or not (column.default is None or column.default.is_sequence):
            return None
        own = column.server_default is None or column.server_default.is_identity
        return column.key if own else None

    @cached_property
    def clause(self) -> sa.TableClause:
        """A light copy for statements: fully qualified, all columns with the project's types."""
        return sa.table(
            self.table.name,
            *(sa.column(column.name, column.type) for column in self.table.columns),
            schema=sa.quoted_name(self.name.schema, quote=None),
        )

    @cached_property
    def key_clauses(self) -> tuple[sa.ColumnClause[Any], ...]:
        """The primary key's columns of :attr:`clause`."""
        return tuple(self.clause.c[column.name] for column in self.key_columns)

    def row(self, key: Any) -> RowKey:
        """The row of a stored key: a scalar where the primary key is one column, else a tuple."""
        return RowKey(self.name, key if len(self.key_columns) > 1 else (key,))


@lru_cache(maxsize=256)
def unresolved_table(database: str, *parts: str) -> KeyedTable:
    """Stands for the table that a statement names so, in parts; without a schema that is ''."""
    *schema, name = parts
    return KeyedTable(
        TableName(database, schema[-1] if schema else "", name), sa.Table(name, sa.MetaData())
    )
