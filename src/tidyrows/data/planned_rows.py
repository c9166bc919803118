"""The rows of a file, checked against the factories, in the order of their references."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from tidyrows.data.arguments_of_rows import TAG, Literal, Many, Reference, Text, scoped
from tidyrows.data.nodes import Node, Place, at, nearest
from tidyrows.data.reading import read
from tidyrows.data.values import bytes_of, converted, is_text, is_unique
from tidyrows.errors import DataFileError, ScopeError
from tidyrows.factories.fields import Field, Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

    from tidyrows.data.arguments_of_rows import Argument, Made, RowName
    from tidyrows.factories import TrackedFactory

    Factories = Mapping[str, type[TrackedFactory[Any]]]

COUNT, TRAITS = "count", "traits"
FORMS = ("ref", "env", "exact", "base64")
_OPTIONS = {"env": {"env", "default", "exact"}}
_ABSENT = Node(None)


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One named entry of a file: a row, or as many as its count.

    Attributes:
        name: its factory's name in the file, and its own.
        fields: the names that the factory takes.
        number: its place among the entries of the file.
        place: where it is in the file.
        count: how many rows; None for one row that is no list.
        arguments: of the factory call.
        references: the entries that it refers to, and where.
    """

    name: RowName
    fields: Fields
    number: int
    place: Place
    count: int | None
    arguments: dict[str, Argument]
    references: dict[RowName, Place]

    def make(self, made: Made) -> Any:
        """Call the factory: an object, or a list of them."""
        create = self.fields.factory.create

        def one(number: int | None) -> Any:
            given = {name: each.value(made, number) for name, each in self.arguments.items()}
            return create(**given)

        if self.count is None:
            return one(None)
        return [one(number) for number in range(1, self.count + 1)]

    def __str__(self) -> str:
        times = "" if self.count is None else f" x {self.count}"
        given = ", ".join(f"{name}={each}" for name, each in self.arguments.items())
        return f"{'.'.join(self.name)}{times}: {self.fields.factory.__name__}({given})"


def plan_rows(path: str | os.PathLike[str], factories: Factories) -> list[PlannedRow]:
    """The rows of a file, each after those that it refers to.

    Raises:
        DataFileError: the file has something that the factories or columns do not take.
    """
    file, root = read(path)
    return _Planner(file, root, factories).rows()


@dataclass
class _Planner:
    file: str
    root: Node
    factories: Factories
    fields: dict[str, Fields] = field(default_factory=dict)

    def rows(self) -> list[PlannedRow]:
        self.root.value.pop("$schema", None)  # for editors
        for name in self.root.value:
            place = self.root.names[name]
            if name not in self.factories:
                raise self.wrong(
                    place, f"there is no factory {name!r}. {nearest(name, self.factories)}"
                )
            self.fields[name] = Fields(self.factories[name])
        planned: dict[RowName, PlannedRow] = {}
        for factory, entries in self.root.value.items():
            for name, node in self.mapping(entries, f"{factory} has named rows").value.items():
                row = factory, name
                if not name or "." in name:
                    raise self.wrong(
                        entries.names[name],
                        f"{name!r} is no name of a row, since {{ref: {factory}.name}} has a dot. "
                        f"Write a name without dots.",
                    )
                planned[row] = _RowPlanner(self, row, len(planned), entries.names[name]).planned(
                    node
                )
        return self.in_order(planned)

    def in_order(self, planned: dict[RowName, PlannedRow]) -> list[PlannedRow]:
        sorter = TopologicalSorter({row: each.references for row, each in planned.items()})
        try:
            return [planned[row] for row in sorter.static_order()]
        except CycleError as error:
            cycle: list[RowName] = error.args[1][::-1]
            names = " -> ".join(".".join(row) for row in cycle)
            place = planned[cycle[0]].references[cycle[1]]
            raise self.wrong(
                place,
                f"the rows refer to each other in a circle: {names}. Leave one reference out, and "
                f"set it in the test.",
            ) from None

    def mapping(self, node: Node, what: str) -> Node:
        if node.value is None:
            return Node({}, node.place)
        if not isinstance(node.value, dict):
            raise self.wrong(node.place, f"{what}, and this is no mapping. Write {{name: value}}.")
        return node

    def row_of(self, text: Any, place: Place) -> tuple[RowName, str | None]:
        """The row of a ``{ref: factory.row}`` or ``{ref: factory.row.attribute}``."""
        parts = text.split(".") if isinstance(text, str) else []
        match parts:
            case [factory, row, *attribute] if len(attribute) < 2:  # noqa: PLR2004 -- an attribute at most
                if row in self.entries(factory):
                    return (factory, row), attribute[0] if attribute else None
        known = [f"{factory}.{row}" for factory in self.fields for row in self.entries(factory)]
        raise self.wrong(place, f"there is no row {text!r}. {nearest(text, known)}")

    def entries(self, factory: str) -> Any:
        found = self.root.value.get(factory, _ABSENT).value
        return found if isinstance(found, dict) else {}

    def is_list(self, row: RowName) -> bool:
        found = self.entries(row[0])[row[1]].value
        is_column = isinstance(found, dict) and _is_form(found.get(COUNT, _ABSENT), "exact")
        return isinstance(found, dict) and COUNT in found and not is_column

    def wrong(self, place: Place, text: str) -> DataFileError:
        return at(self.file, place, text)


def _is_form(node: Node, form: str) -> bool:
    return isinstance(node.value, dict) and form in node.value


@dataclass
class _RowPlanner:
    """Plans one entry of a file."""

    planner: _Planner
    row: RowName
    number: int
    place: Place
    references: dict[RowName, Place] = field(default_factory=dict)

    @property
    def fields(self) -> Fields:
        return self.planner.fields[self.row[0]]

    def planned(self, node: Node) -> PlannedRow:
        label = ".".join(self.row)
        node = self.planner.mapping(node, f"{label} is a row")
        count = self.count(node)
        arguments = self.traits(node)
        for name, value in node.value.items():
            if name in {COUNT, TRAITS} and not _is_form(value, "exact"):
                continue
            found = self.field(name, node.names[name])
            try:
                arguments[name] = self.argument(found, value, is_numbered=count is not None)
            except DataFileError:
                raise
            except ValueError as error:
                text = f"{label}.{name}: {error}"
                if isinstance(error, ScopeError):
                    text += " Or write {exact: ...} for a value that others may have too."
                raise self.wrong(value.place, text) from error
        return PlannedRow(
            self.row, self.fields, self.number, self.place, count, arguments, self.references
        )

    def wrong(self, place: Place, text: str) -> DataFileError:
        return self.planner.wrong(place, text)

    # -- names ---------------------------------------------------------------------------------

    def count(self, node: Node) -> int | None:
        given = node.value.get(COUNT)
        if given is None or _is_form(given, "exact"):
            return None
        if self.fields.field(COUNT) is not None:
            raise self.wrong(
                node.names[COUNT],
                f"count is also a name of {self.fields.factory.__name__}. Write "
                f"count: {{exact: ...}} for that; its rows are named one by one.",
            )
        value = self.environment(given) if _is_form(given, "env") else given.value
        if isinstance(value, str) and _is_form(given, "env") and value.strip().isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(
                given.place,
                f"count is {given.plain!r}, and takes a number of rows, as in count: 3.",
            )
        return value

    def traits(self, node: Node) -> dict[str, Argument]:
        given = node.value.get(TRAITS)
        if given is None or _is_form(given, "exact"):
            return {}
        if not isinstance(given.value, list):
            raise self.wrong(given.place, "traits takes a list of names, as in traits: [admin].")
        found: dict[str, Argument] = {}
        for each in given.value:
            if each.value not in self.fields.traits:
                raise self.wrong(
                    each.place,
                    f"{self.fields.factory.__name__} has no trait {each.plain!r}. "
                    f"{nearest(each.plain, self.fields.traits)}",
                )
            found[each.value] = Literal(literal=True)
        return found

    def field(self, name: str, place: Place) -> Field:
        """What a name leads to, through SubFactories too: ``org__name``."""
        fields = self.fields
        first, *rest = name.split("__")
        while rest:
            below, may_have = fields.below(first)
            if not may_have:
                raise self.unknown(first, place, fields, fields.declared)
            if below is None:
                return Field()
            fields, (first, *rest) = below, rest
        found = fields.field(first)
        if found is None:
            own = (COUNT, TRAITS) if fields is self.fields else ()
            raise self.unknown(first, place, fields, (*fields.names, *own))
        return found

    def unknown(
        self, name: str, place: Place, fields: Fields, known: tuple[str, ...]
    ) -> DataFileError:
        text = f"{fields.factory.__name__} has no {name!r}. {nearest(name, known)}"
        return self.wrong(place, text)

    # -- values --------------------------------------------------------------------------------

    def argument(self, into: Field, node: Node, *, is_numbered: bool) -> Argument:
        if isinstance(node.value, dict):
            return self.form(into, node)
        if isinstance(node.value, list):
            plain = Field()
            return Many(tuple(self.argument(plain, each, is_numbered=False) for each in node.value))
        if isinstance(node.value, str):
            return self.text(into, node.value, is_numbered=is_numbered)
        if into.relationship is not None and node.value is not None:
            raise ValueError(
                f"it takes a row, and this is {node.value!r}. Write {{ref: factory.row}}."
            )
        return Literal(node.value if into.column is None else converted(into.column, node.value))

    def text(self, into: Field, text: str, *, is_numbered: bool) -> Argument:
        if into.relationship is not None:
            raise ValueError(f"it takes a row, and this is {text!r}. Write {{ref: factory.row}}.")
        column = into.column
        if column is not None and not is_text(column):
            return Literal(converted(column, text))
        is_own = column is not None and is_unique(column) and not column.foreign_keys
        is_scoped = is_own or (TAG in text and column is not None)
        if is_scoped:
            scoped(text, column)  # is refused here, before anything is written
        return Text(text, column, is_scoped) if is_scoped or is_numbered else Literal(text)

    def form(self, into: Field, node: Node) -> Argument:
        form = next((each for each in FORMS if each in node.value), None)
        if form is None:
            raise ValueError(
                f"a mapping is one of {', '.join(f'{{{each}: ...}}' for each in FORMS)}. "
                f"Write {{exact: {{...}}}} for a value of JSON, and name__field: value for what "
                f"a SubFactory makes."
            )
        for name, place in node.names.items():
            if name not in (known := _OPTIONS.get(form, {form})):
                raise self.wrong(
                    place, f"{{{form}: ...}} takes no {name!r} beside it. {nearest(name, known)}"
                )
        if form == "ref":
            return self.reference(into, node.value["ref"])
        if form == "base64":
            return Literal(bytes_of(node.value["base64"].plain))
        if form == "exact":
            return Literal(node.value["exact"].plain)
        return self.from_environment(into, node)

    def from_environment(self, into: Field, node: Node) -> Argument:
        value = self.environment(node)
        if node.value.get("exact", _ABSENT).value is True:
            return Literal(value)
        if isinstance(value, str) and (into.column is None or is_text(into.column)):
            return self.text(into, value, is_numbered=False)
        if into.column is None:
            return Literal(value)
        return Literal(converted(into.column, value, from_text=True))

    def environment(self, node: Node) -> Any:
        name = node.value["env"].value
        if isinstance(name, str) and name in os.environ:
            return os.environ[name]
        if "default" not in node.value:
            raise self.wrong(
                node.value["env"].place,
                f"the environment has no {name}. Set it, or write {{env: {name}, default: ...}}.",
            )
        return node.value["default"].plain

    def reference(self, into: Field, node: Node) -> Argument:
        row, attribute = self.planner.row_of(node.value, node.place)
        self.references.setdefault(row, node.place)
        target, is_list = self.planner.fields[row[0]], self.planner.is_list(row)
        label = ".".join(row)
        if attribute is not None:
            if is_list or not hasattr(target.mapper.class_, attribute):
                known = [] if is_list else target.mapped
                raise ValueError(f"{label} has no {attribute!r}. {nearest(attribute, known)}")
            return Reference(row, attribute)
        if into.column is not None:
            return Reference(row, self.referenced(into.column, target, label, is_list=is_list))
        if into.relationship is not None:
            self.check_related(into.relationship, target, label, is_list=is_list)
        return Reference(row)

    def referenced(
        self, column: sa.Column[Any], target: Fields, label: str, *, is_list: bool
    ) -> str:
        """The attribute of a row whose value a foreign-key column takes."""
        for key in column.foreign_keys:
            if not is_list and key.column.table in target.mapper.tables:
                return target.mapper.get_property_by_column(key.column).key
        raise ValueError(
            f"{column.table.name}.{column.name} has no foreign key to {label}. Write "
            f"{{ref: {label}.attribute}} for one of its values, or the relationship in place of "
            f"the column."
        )

    def check_related(
        self, relationship: Any, target: Fields, label: str, *, is_list: bool
    ) -> None:
        if not issubclass(target.mapper.class_, relationship.mapper.class_):
            raise ValueError(  # noqa: TRY004 -- one exception for all that a row does not take
                f"it takes a {relationship.mapper.class_.__name__}, and {label} is a "
                f"{target.mapper.class_.__name__}."
            )
        if bool(relationship.uselist) != is_list:
            need = f"a list, as in [{{ref: {label}}}]" if relationship.uselist else "one row"
            raise ValueError(f"it takes {need}, and {label} is {'a list' if is_list else 'one'}.")
