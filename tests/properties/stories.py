"""A random life of a random schema: what we do in transactions, and what strangers do between.

Nothing is predicted: what may be referenced, changed or deleted is read from the database as it
is. What is really there in the end, and whose it is, says the column ``owner``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import sqlalchemy as sa
from hypothesis import note
from sqlalchemy.orm import Session

from properties.examples import THEIRS
from properties.schemas import TableSpec, own_key_values, reference_columns

OURS = "ours"
FIRST_NUMBER = 1000
"""The keys of the strangers' first rows; what comes later takes the lowest that is free."""
FORMS = ("single", "list", "values", "returning", "select")

_CHECKS_OFF = {
    "postgresql": "SET session_replication_role = replica",
    "mysql": "SET foreign_key_checks = 0",
    "sqlite": "PRAGMA foreign_keys = OFF",
}


@dataclass
class World:
    """A schema that is really there, and chance."""

    schema: tuple[TableSpec, ...]
    tables: list[sa.Table]
    outside: sa.Engine
    random: Random
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(FIRST_NUMBER + 1))

    @property
    def backend(self) -> str:
        return self.outside.dialect.name

    def found(self) -> None:
        """Make the tables, and one strangers' row in each, so that NOT NULL can always be met."""
        self.tables[0].metadata.create_all(self.outside, checkfirst=False)
        keys: list[list[Any]] = []
        for spec in self.schema:
            own = own_key_values(spec.key, FIRST_NUMBER) or [FIRST_NUMBER]
            keys.append([*(keys[spec.line_of.parent] if spec.line_of else ()), *own])
        with self.outside.connect() as connection:
            # Rows in a circle of NOT NULL keys: no order of INSERTs is right for them.
            connection.exec_driver_sql(_CHECKS_OFF[self.backend])
            for number, (spec, table) in enumerate(zip(self.schema, self.tables, strict=True)):
                row = dict(zip(table.primary_key.columns.keys(), keys[number], strict=True))
                for at, reference in enumerate(spec.references):
                    names = [column.name for column in reference_columns(table, at)]
                    row |= dict(zip(names, keys[reference.parent], strict=True))
                connection.execute(sa.insert(table).values(owner=THEIRS, **row))
            connection.commit()
        self.outside.dispose()  # with the connection that does not check

    def keys_of(self, owner: str) -> set[tuple[Any, ...]]:
        """The rows that are really there, as (table, key): the oracle."""
        with self.outside.connect() as connection:
            return {
                (table.name, tuple(row))
                for table in self.tables
                for row in connection.execute(
                    sa.select(*table.primary_key).where(table.c.owner == owner)
                )
            }

    @contextmanager
    def stranger(self) -> Iterator[Actor]:
        """Somebody else, who commits at the end of the block, or tries to."""
        with self.outside.connect() as connection, connection.begin() as transaction:
            yield Actor(self, connection, THEIRS)
            self.end(transaction, "commit")

    @staticmethod
    def end(transaction: Any, how: str) -> None:
        """Commit or roll back; a deferred foreign key may refuse the COMMIT."""
        note(how)
        try:
            getattr(transaction, how)()
        except sa.exc.IntegrityError as error:
            note(f"  refused: {error.orig}")
            transaction.rollback()


@dataclass
class Actor:
    """Somebody with a connection or a session, who does things at random."""

    world: World
    does: sa.Connection | Session
    owner: str
    autocommit: bool = False
    savepoints: list[Any] = field(default_factory=list)

    def act(self) -> None:
        """Do one thing."""
        acts = [self.insert] * 5 + [self.point_elsewhere] * 2 + [self.delete, self.change_key]
        if not self.autocommit:
            acts += [self.set_savepoint, self.release, self.roll_back_to] * 2
        self.world.random.choice(acts)()

    def insert(self, *, numbers: Iterator[int] | None = None) -> None:
        """A few rows of one table in one of the forms that an INSERT has."""
        random = self.world.random
        number, table = self._some_table()
        form = random.choice(FORMS)
        count = random.randint(1, 3)
        rows: list[dict[str, Any]] = []
        for _ in range(count):
            row = self._row(number, rows, numbers)
            if row is None:
                return
            rows.append(row)
        note(f"{self.owner}: insert {form} {table.name} {rows}")
        insert = sa.insert(table)
        if form == "single":
            for row in rows:
                self.does.execute(insert.values(row))
        elif form == "list":
            self.does.execute(insert, rows)
        elif form == "values":
            self.does.execute(insert.values(rows))
        elif form == "returning":
            answers = self.does.execute(insert.returning(table.c.owner), rows).all()
            assert answers == [(self.owner,)] * len(rows)
        else:
            selects = [
                sa.select(*(sa.literal(value, table.c[name].type) for name, value in row.items()))
                for row in rows
            ]
            whole = sa.union_all(*selects) if len(selects) > 1 else selects[0]
            self.does.execute(insert.from_select(list(rows[0]), whole))

    def point_elsewhere(self) -> None:
        """Change what a row of our own references; so the circles come to be."""
        number, table = self._some_table()
        references = self.world.schema[number].references
        row = self._some_row(table, self.owner)
        if not references or row is None:
            return
        at = self.world.random.randrange(len(references))
        values = self._reference(number, at)
        if values is None:
            return
        note(f"{self.owner}: point {table.name} {row} at {values}")
        self.does.execute(sa.update(table).where(*_is(table, row)).values(values))

    def delete(self) -> None:
        """Delete a row of our own, if nothing references it.

        Not where the database would delete children behind everybody's back.
        """
        number, table = self._some_table()
        row = self._some_row(table, self.owner)
        if row is not None and not self._is_cascaded(number):
            self._try(f"delete {table.name} {row}", sa.delete(table).where(*_is(table, row)))

    def change_key(self) -> None:
        """Give a row of our own another key, if nothing references it."""
        number, table = self._some_table()
        row = self._some_row(table, self.owner)
        if row is None:
            return
        own = self._free_key(number, row[: -_width(self.world.schema[number].key)], set())
        if self.world.schema[number].key == "serial":
            own = [own[0] + 1_000]  # far above what the database will give somebody by itself
        names = table.primary_key.columns.keys()[-len(own) :]
        new = dict(zip(names, own, strict=True))
        statement = sa.update(table).where(*_is(table, row)).values(new)
        self._try(f"change key {table.name} {row} to {new}", statement)

    def set_savepoint(self) -> None:
        """Begin a savepoint, in the one that is open."""
        note(f"{self.owner}: savepoint")
        self.savepoints.append(self.does.begin_nested())

    def release(self) -> None:
        """Release the innermost savepoint."""
        if self.savepoints:
            note(f"{self.owner}: release")
            self.savepoints.pop().commit()

    def roll_back_to(self) -> None:
        """Roll back to the innermost savepoint."""
        if self.savepoints:
            note(f"{self.owner}: roll back to savepoint")
            self.savepoints.pop().rollback()

    # -- how -----------------------------------------------------------------------------------

    def _try(self, what: str, statement: Any) -> None:
        """Run what a foreign key may forbid, so that the transaction survives it."""
        note(f"{self.owner}: {what}")
        try:
            if self.autocommit:
                self.does.execute(statement)
            else:
                with self.does.begin_nested():
                    self.does.execute(statement)
        except sa.exc.IntegrityError as error:
            note(f"  refused: {error.orig}")

    def _some_table(self) -> tuple[int, sa.Table]:
        number = self.world.random.randrange(len(self.world.tables))
        return number, self.world.tables[number]

    def _rows(self, table: sa.Table, owner: str | None = None) -> list[tuple[Any, ...]]:
        query = sa.select(*table.primary_key)
        if owner is not None:
            query = query.where(table.c.owner == owner)
        return sorted((tuple(row) for row in self.does.execute(query)), key=repr)

    def _some_row(self, table: sa.Table, owner: str | None) -> tuple[Any, ...] | None:
        rows = self._rows(table, owner)
        return self.world.random.choice(rows) if rows else None

    def _parent(self, number: int) -> tuple[Any, ...] | None:
        """A row to reference: strangers know only their own, we know all."""
        # With luck one of ours, where circles are to be had.
        owner = THEIRS if self.owner == THEIRS else self.world.random.choice((OURS, OURS, None))
        table = self.world.tables[number]
        return self._some_row(table, owner) or self._some_row(table, THEIRS)

    def _reference(self, number: int, at: int) -> dict[str, Any] | None:
        spec = self.world.schema[number].references[at]
        names = [column.name for column in reference_columns(self.world.tables[number], at)]
        if spec.nullable and self.world.random.randrange(3) == 0:
            return dict.fromkeys(names)
        parent = self._parent(spec.parent)
        return dict(zip(names, parent, strict=True)) if parent else None

    def _row(
        self, number: int, others: list[dict[str, Any]], numbers: Iterator[int] | None
    ) -> dict[str, Any] | None:
        spec, table = self.world.schema[number], self.world.tables[number]
        key: list[Any] = []
        if spec.line_of:
            parent = self._parent(spec.line_of.parent)
            if parent is None:
                return None
            key.extend(parent)
        names = table.primary_key.columns.keys()
        if spec.key != "serial":
            taken = {tuple(row[name] for name in names) for row in others}
            key += self._free_key(number, tuple(key), taken, numbers)
        row = dict(zip(names, key, strict=False))
        for at in range(len(spec.references)):
            values = self._reference(number, at)
            if values is None:
                return None
            row |= values
        return row | {"owner": self.owner}

    def _free_key(
        self,
        number: int,
        inherited: tuple[Any, ...],
        taken: set[tuple[Any, ...]],
        numbers: Iterator[int] | None = None,
    ) -> list[Any]:
        """The lowest that is free, so that the keys of rows that went come back."""
        kind, table = self.world.schema[number].key, self.world.tables[number]
        taken = {*taken, *self._rows(table)}
        for candidate in numbers or itertools.count(self.world.random.randrange(3)):
            own = own_key_values(kind, candidate) or [candidate + 1]
            if (*inherited, *own) not in taken:
                return own
        raise AssertionError

    def _is_cascaded(self, number: int) -> bool:
        return any(
            reference.parent == number and reference.on_delete == "CASCADE"
            for spec in self.world.schema
            for reference in (*spec.references, *([spec.line_of] if spec.line_of else []))
        )


def _is(table: sa.Table, key: tuple[Any, ...]) -> Iterator[Any]:
    return (column == value for column, value in zip(table.primary_key, key, strict=True))


def _width(kind: str) -> int:
    return len(own_key_values(kind, 0)) or 1
