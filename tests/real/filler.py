"""Rows for a schema that nobody here wrote: whatever its columns ask for, and nothing more.

Foreign keys lead to rows made before, texts keep to their length, and since every value carries a
number that never comes again, every unique constraint is met.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa


class Filler:
    """Makes rows for somebody.

    Args:
        start: the first number; give everybody numbers of their own.
        rows: rows per table.
    """

    def __init__(self, start: int, *, rows: int) -> None:
        self._numbers: Iterator[int] = itertools.count(start)
        self._rows = rows
        self._made: dict[sa.Table, list[sa.RowMapping]] = {}

    def fill(self, connection: sa.Connection, tables: Iterable[sa.Table]) -> None:
        """Insert rows into each of the tables; parents must come before their children.

        One by one, as a list of parameters and as one INSERT with several rows, in turns.
        """
        for place, table in enumerate(tables):
            before = {_key(table, row) for row in self._all(connection, table)}
            rows = [self._row(table, at) for at in range(self._rows)]
            if place % 3 == 0:
                for row in rows:
                    connection.execute(sa.insert(table).values(row))
            elif place % 3 == 1:
                connection.execute(sa.insert(table), rows)
            else:
                connection.execute(sa.insert(table).values(rows))
            if table.primary_key:
                self._made[table] = [
                    row for row in self._all(connection, table) if _key(table, row) not in before
                ]

    def close_circles(self, connection: sa.Connection) -> None:
        """Point the nullable references that had to wait for their parents at rows of ours."""
        for table, rows in self._made.items():
            for key in table.foreign_keys:
                parents = self._made.get(key.column.table, [])
                for row, parent in zip(rows, parents, strict=False):
                    if row[key.parent.key] is None:
                        condition = [column == row[column.key] for column in table.primary_key]
                        values = {key.parent: parent[key.column.key]}
                        connection.execute(sa.update(table).where(*condition).values(values))

    def _all(self, connection: sa.Connection, table: sa.Table) -> list[sa.RowMapping]:
        query = sa.select(table).order_by(*table.primary_key)
        return list(connection.execute(query).mappings()) if table.primary_key else []

    def _row(self, table: sa.Table, at: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for column in table.columns:
            if column is table.autoincrement_column:
                continue
            if column.foreign_keys:
                (key, *_) = column.foreign_keys
                parents = self._made.get(key.column.table)
                if parents:
                    row[column.key] = parents[at][key.column.key]
                else:
                    assert column.nullable, f"{column} is NOT NULL and its parent comes later"
            else:
                row[column.key] = self._value(column)
        return row

    def _value(self, column: sa.Column[Any]) -> Any:
        number = next(self._numbers)
        kind = column.type
        if isinstance(kind, sa.String):  # Text too
            return f"text {number}" if kind.length is None else f"{number:x}"[-kind.length :]
        if isinstance(kind, sa.SmallInteger):
            return number % 30_000
        if isinstance(kind, sa.Integer):
            return number
        if isinstance(kind, sa.LargeBinary):
            return str(number).encode()
        if isinstance(kind, sa.TypeDecorator):  # Buildbot's only one: JSON in a text
            return {"number": number}
        raise NotImplementedError(repr(column))


def _key(table: sa.Table, row: sa.RowMapping) -> tuple[Any, ...]:
    return tuple(row[column] for column in table.primary_key)
