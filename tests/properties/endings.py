"""What a cleanup must leave, foretold in plain Python from the rows as they are before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from properties.schemas import TableSpec, reference_columns
from tidyrows import Dependents

Row = tuple[int, tuple[Any, ...]]
"""A row: the number of its table, and its key."""
Values = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """A foreign key: of which table's columns, to the primary key of which other."""

    child: int
    columns: tuple[str, ...]
    parent: int
    nullable: bool
    on_delete: str | None


def links_of(schema: tuple[TableSpec, ...], tables: list[sa.Table]) -> list[Link]:
    """All foreign keys of a drawn schema."""
    found = []
    for number, spec in enumerate(schema):
        for at, each in enumerate(spec.references):
            columns = tuple(column.name for column in reference_columns(tables[number], at))
            found.append(Link(number, columns, each.parent, each.nullable, each.on_delete))
        if spec.line_of:
            columns = tuple(tables[number].primary_key.columns.keys()[:-1])
            found.append(
                Link(number, columns, spec.line_of.parent, False, spec.line_of.on_delete)  # noqa: FBT003 -- part of a key
            )
    return found


def read(engine: sa.Engine, tables: list[sa.Table]) -> dict[Row, Values]:
    """Every row of every table."""
    with engine.connect() as connection:
        return {
            (number, tuple(row[column.name] for column in table.primary_key)): dict(row)
            for number, table in enumerate(tables)
            for row in connection.execute(sa.select(table)).mappings()
        }


@dataclass
class Ending:
    """What is left, and what the report says.

    Attributes:
        rows: the whole database.
        dependents: untracked rows that go.
        detached: untracked rows that are detached.
        kept: tracked rows that stay.
    """

    rows: dict[Row, Values] = field(default_factory=dict)
    dependents: set[Row] = field(default_factory=set)
    detached: set[Row] = field(default_factory=set)
    kept: set[Row] = field(default_factory=set)


@dataclass
class Foretold:
    """The design's table, followed row by row until nothing changes.

    Attributes:
        rows: the whole database before.
        links: its foreign keys.
        ours: the tracked rows.
        policy: what becomes of dependents.
        own: numbers of tables whose rows go.
        protect: numbers of tables whose rows are not touched.
    """

    rows: dict[Row, Values]
    links: list[Link]
    ours: set[Row]
    policy: Dependents
    own: frozenset[int]
    protect: frozenset[int]

    def ending(self) -> Ending:
        """What a cleanup must leave."""
        kept: set[Row] = set()
        while True:
            gone, detached, blocked = self._spread(kept)
            if not blocked:
                break
            kept |= blocked
            while more := {
                parent
                for row in kept
                for _link, parent in self._references(row)
                if parent in gone and parent not in kept
            }:
                kept |= more
        rows = {row: dict(values) for row, values in self.rows.items() if row not in gone}
        for row, link in detached:
            if row not in gone:
                rows[row] |= dict.fromkeys(link.columns)
        return Ending(
            rows,
            gone - self.ours,
            {row for row, _link in detached if row not in gone},
            kept & self.ours,
        )

    def _spread(self, kept: set[Row]) -> tuple[set[Row], list[tuple[Row, Link]], set[Row]]:
        gone = self.ours - kept
        while True:
            detached, blocked, more = [], set(), set()
            for row in self.rows:
                if row in gone:
                    continue
                for link, parent in self._references(row):
                    if parent not in gone:
                        continue
                    fate = "kept" if row in kept else self._fate(link)
                    if fate == "kept":
                        blocked.add(parent)
                    elif fate == "deleted":
                        more.add(row)
                    else:
                        detached.append((row, link))
            if not more:
                return gone, detached, blocked
            gone |= more

    def _fate(self, link: Link) -> str:
        if link.child in self.protect:
            return "kept"
        if link.child in self.own or self.policy is Dependents.DELETE:
            return "deleted"
        if self.policy is Dependents.ERROR:
            return "kept"
        if link.on_delete == "CASCADE" or not link.nullable:
            return "deleted"
        return "detached"

    def _references(self, row: Row) -> Iterator[tuple[Link, Row]]:
        values = self.rows[row]
        for link in self.links:
            if link.child == row[0]:
                key = tuple(values[name] for name in link.columns)
                if None not in key:
                    yield link, (link.parent, key)
