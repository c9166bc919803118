"""The rows of a tracker as the entries of a data file, which refer to each other by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows.data.written_row import Entry, unwritten
from tidyrows.factories.fields import Fields
from tidyrows.tracking.selection import is_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sqlalchemy.orm import Mapper, RelationshipProperty

    from tidyrows.data.arguments_of_rows import RowName
    from tidyrows.factories import TrackedFactory
    from tidyrows.tracking.tracker import ResourceTracker


@dataclass
class Writer:
    """Writes the committed rows of one tracker.

    Attributes:
        tracker: has the rows.
        factories: by the names that the file has for them.
    """

    tracker: ResourceTracker
    factories: Mapping[str, type[TrackedFactory[Any]]]
    rows: dict[RowName, Any] = field(default_factory=dict)
    names: dict[int, RowName] = field(default_factory=dict)  # by the id of the object

    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries of the file, by factory and name.

        Raises:
            DataFileError: a row or a value has no form in a file.
        """
        associations = self.check_tables()
        for mapper in {fields.mapper.base_mapper: None for fields in self.fields.values()}:
            self.read(mapper)
        written: dict[RowName, dict[str, Any]] = {
            row: Entry(self.find, self.tracker.context.tag, self.fields[row[0]], instance).written()
            for row, instance in self.rows.items()
        }
        for relationship in associations:
            self.associate(relationship, written)
        self.refuse_circles(written)
        found: dict[str, dict[str, Any]] = {}
        for (kind, name), entry in written.items():
            found.setdefault(kind, {})[name] = entry
        return {kind: found[kind] for kind in self.factories if kind in found}

    @cached_property
    def fields(self) -> dict[str, Fields]:
        """The fields of those factories whose rows may be here."""
        held = [each.table for each in self.tracker.store.snapshot() if each]
        every = {name: Fields(factory) for name, factory in self.factories.items()}
        same = {each.table for each in held}
        own = {name: each for name, each in every.items() if same & {*each.mapper.tables}}
        return own or {
            name: each
            for name, each in every.items()
            if any(is_of(one, table) for one in held for table in _tables(each.mapper))
        }

    @cached_property
    def kinds(self) -> dict[Mapper[Any], str]:
        """The name of the factory for each class."""
        return {fields.mapper: name for name, fields in reversed(self.fields.items())}

    @cached_property
    def referenced(self) -> set[sa.Column[Any]]:
        """The columns to which foreign keys lead, and the primary keys."""
        tables = {table for mapper in self.kinds for table in _tables(mapper)}
        led_to = {key.column for table in tables for key in table.foreign_keys}
        return led_to.union(*(table.primary_key for table in tables))

    @cached_property
    def index(self) -> dict[tuple[sa.Column[Any], Any], set[RowName]]:
        """The rows by the values that foreign keys may have."""
        found: dict[tuple[sa.Column[Any], Any], set[RowName]] = {}
        for row, instance in self.rows.items():
            for attribute in sa.inspect(instance).mapper.column_attrs:
                for column in self.referenced.intersection(attribute.columns):
                    found.setdefault((column, getattr(instance, attribute.key)), set()).add(row)
        return found

    def find(self, values: Iterable[tuple[Any, Any]]) -> RowName | None:
        """The row that has these values in these columns."""
        rows = [self.index.get(pair, set()) for pair in values]
        found = set.intersection(*rows) if rows else set()
        return found.pop() if len(found) == 1 else None

    def check_tables(self) -> list[RelationshipProperty[Any]]:
        """The relationships whose association rows are held; every other table has a factory."""
        associations = []
        for held in self.tracker.store.snapshot():
            if not held:
                continue
            if not any(is_of(held.table, each) for m in self.kinds for each in _tables(m)):
                associations.append(self.association(held.table))
            elif held.keyless_count:
                raise unwritten(f"{held.table.name} has no primary key, so its rows have no name.")
        return associations

    def association(self, table: Any) -> RelationshipProperty[Any]:
        """The relationship whose association rows a table has."""
        found = [
            (relationship, self.fields[kind])
            for mapper, kind in self.kinds.items()
            for relationship in mapper.relationships
            if isinstance(relationship.secondary, sa.Table)
            and is_of(table, relationship.secondary)
            and relationship.secondary.primary_key.columns
        ]
        if not found:
            raise unwritten(
                f"No factory makes the rows of {table.name}. Write factories={{...}} with one for "
                f"each table."
            )
        declared = [one for one, fields in found if one.key in fields.declared]
        return declared[0] if declared else found[0][0]

    def read(self, mapper: Mapper[Any]) -> None:
        """Read the committed rows of a class and its subclasses."""
        model: Any = mapper.class_
        query = sa.select(model).where(self.tracker.mine(model))
        query = query.order_by(*mapper.primary_key)
        numbers: dict[str, int] = {}
        with (
            self.tracker.sessions.new_connection(model.__table__) as connection,
            orm.Session(connection) as session,
        ):
            for instance in session.scalars(query):
                kind = self.kinds.get(sa.inspect(instance).mapper)
                if kind is None:
                    raise unwritten(
                        f"No factory makes a {type(instance).__name__}. Write factories={{...}} "
                        f"with one for each class."
                    )
                numbers[kind] = numbers.get(kind, 0) + 1
                row = kind, f"{kind}{numbers[kind]}"
                for attribute in sa.inspect(instance).mapper.column_attrs:
                    getattr(instance, attribute.key)  # a deferred one, or one of a subclass
                self.rows[row] = instance
                self.names[id(instance)] = row
            session.expunge_all()

    def associate(
        self, relationship: RelationshipProperty[Any], written: dict[RowName, dict[str, Any]]
    ) -> None:
        """Write association rows as a list of references."""
        secondary: Any = relationship.secondary
        query = sa.select(secondary).where(self.tracker.mine(secondary))
        query = query.order_by(*secondary.primary_key)
        sides = relationship.synchronize_pairs, relationship.secondary_synchronize_pairs
        with self.tracker.sessions.new_connection(secondary) as connection:
            for values in connection.execute(query).mappings():
                ends = [self.find((one, values[at]) for one, at in pairs or ()) for pairs in sides]
                if ends[0] is None or ends[1] is None:
                    raise unwritten(
                        f"A row of {secondary.fullname} references a row that is not tracked."
                    )
                fields = self.fields[ends[0][0]]
                name = fields.name_of(relationship.key)
                written[ends[0]].setdefault(name, []).append({"ref": ".".join(ends[1])})

    def refuse_circles(self, written: dict[RowName, dict[str, Any]]) -> None:
        """Raise for rows of which none could be made first."""
        graph = {
            row: {tuple(ref.split(".")[:2]) for ref in _references(entry)}
            for row, entry in written.items()
        }
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            names = " -> ".join(".".join(row) for row in error.args[1][::-1])
            raise unwritten(f"Rows reference each other in a circle: {names}.") from None


def _tables(mapper: Mapper[Any]) -> Iterator[sa.Table]:
    return (table for table in mapper.tables if isinstance(table, sa.Table))


def _references(value: Any) -> Iterator[str]:
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict) and set(each) == {"ref"}:
            yield each["ref"]
        elif isinstance(each, list):
            yield from _references(each)
