"""The declarations that a model needs, made from its mapping."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory.declarations import LazyFunction, SelfAttribute

from tidyrows.errors import AutoFactoryError, add_note
from tidyrows.factories.checks import ANYTHING, bounds_of, checks_of, text_of_check
from tidyrows.factories.column_values import Field, NotKnownError, declaration_for
from tidyrows.factories.constructor import PLAIN, Constructor, constructor_of
from tidyrows.factories.parents import Key, Parent, Refused, attribute_of, keys_of
from tidyrows.factories.unique_columns import scoped_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from sqlalchemy.orm import Mapper


@dataclass(frozen=True)
class AutoDeclarations:
    """The declarations that a factory gets from its model.

    Attributes:
        declarations: by name, without those that the factory has itself.
        parents: names of parents that are no attributes of the model.
        constructor: how the model is called.
    """

    declarations: dict[str, Any] = field(default_factory=dict)
    parents: frozenset[str] = frozenset()
    constructor: Constructor = PLAIN


def auto_declarations(
    model: type, declared: Collection[str], factory_of: Callable[[type], Any]
) -> AutoDeclarations:
    """The declarations that a model needs.

    Args:
        model: a mapped class.
        declared: names of attributes that the factory has itself.
        factory_of: the factory for a parent's model.
    """
    return _Reading(model, declared, factory_of).result()


class _Reading:
    """Reads one model."""

    def __init__(
        self, model: type, declared: Collection[str], factory_of: Callable[[type], Any]
    ) -> None:
        self.model = model
        self.mapper: Mapper[Any] = sa.inspect(model)
        self.declared = declared
        self.factory_of = factory_of
        self.constructor = constructor_of(model, self.mapper.attrs.keys())
        self.made: dict[str, Any] = {}
        self.parents: set[str] = set()
        self.from_parents: set[str] = set()

    def result(self) -> AutoDeclarations:
        needed = {
            column
            for prop in self.mapper.column_attrs
            for column in _plain_columns(prop)
            if self._is_needed(prop.key, column)
        }
        keys = keys_of(self.mapper, needed)
        for key in keys:
            self._add_key(key)
        fields = {
            column: Field(column, name, column.type)
            for column in needed
            if (name := attribute_of(self.mapper, column)) is not None
            and name not in self.from_parents
            and name not in self.declared
        }
        self._add_fields(fields)
        self._add_identity()
        self._add_arguments()
        return AutoDeclarations(self.made, frozenset(self.parents), self.constructor)

    def _is_needed(self, name: str, column: sa.Column[Any]) -> bool:
        mapper = self.mapper
        is_filled = (
            (column.nullable and not column.primary_key)
            or column.default is not None
            or column.server_default is not None
            or column is column.table.autoincrement_column
            or column is mapper.version_id_col
            or column is mapper.polymorphic_on
        )
        if is_filled or name in self.constructor.defaults:
            return False
        # what __post_init__ of a dataclass may set
        return self.constructor.takes(name) or not hasattr(self.model, "__post_init__")

    def _add_key(self, key: Key) -> None:
        names = [local for local, _ in key.pairs]
        self.from_parents.update(names)
        if not key.has_relationship:
            self.parents.add(key.name)
        if all(name in self.declared for name in names):
            return
        if key.target is None:
            for name in names:
                why = f"it references {key.target_table}, which is the table of no model here"
                self._refuse(name, key.table, f"{why}. Declare {name} = ...")
            return
        if key.name not in self.declared:
            self.made[key.name] = Parent(key, self.declared, self.factory_of)
        for local, remote in key.pairs:
            is_wanted = not key.has_relationship or local in self.constructor.names
            if is_wanted and local not in self.declared and local not in self.made:
                self.made[local] = SelfAttribute(f"{key.name}.{remote}")  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    def _add_fields(self, fields: dict[sa.Column[Any], Field]) -> None:
        tables = self.mapper.tables
        bounds = {table: bounds_of(table) for table in tables}
        fields = {
            column: replace(each, bounds=bounds[column.table].get(column.name, ANYTHING))
            for column, each in fields.items()
        }
        with_parent = [
            column
            for column in self.mapper.columns
            if attribute_of(self.mapper, column) in self.from_parents
        ]
        scoped = scoped_columns(tables, fields, with_parent)
        for column, each in sorted(fields.items(), key=lambda item: item[0].name):
            try:
                declaration = declaration_for(replace(each, is_scoped=column in scoped))
            except NotKnownError as error:
                line = f"{each.attribute} = factory.LazyFunction(lambda: ...)"
                self._refuse(each.attribute, column.table.fullname, f"{error}. Declare {line}")
            else:
                self.made[each.attribute] = declaration

    def _add_identity(self) -> None:
        """A class without an identity of its own has no rows of its own."""
        mapper = self.mapper
        column = mapper.polymorphic_on
        if not isinstance(column, sa.Column) or mapper.polymorphic_identity is not None:
            return
        name = attribute_of(mapper, column)
        if name is None or name in self.declared or column.nullable:
            return
        others = ", ".join(
            sorted(each.class_.__name__ for each in mapper.self_and_descendants if each != mapper)
        )
        self._refuse(
            name,
            column.table.fullname,
            f"{self.model.__name__} has no polymorphic_identity. Use the factory of a subclass "
            f"({others or 'there is none'})",
        )

    def _add_arguments(self) -> None:
        """What the constructor requires, though the database does not."""
        for name in sorted(self.constructor.required - self.made.keys() - set(self.declared)):
            prop = self.mapper.attrs.get(name)
            if prop is None:
                self._refuse(
                    name,
                    self.mapper.local_table.description,
                    f"the constructor requires it, and it is no mapped attribute. "
                    f"Declare {name} = ...",
                )
            elif getattr(prop, "uselist", False):
                self.made[name] = LazyFunction(getattr(prop, "collection_class", None) or list)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            else:
                self.made[name] = None  # SQLAlchemy then leaves the column to its default

    def _refuse(self, name: str, table: str, why: str) -> None:
        if name not in self.declared:
            text = f"{self.model.__name__}.{name} ({table}) has no value: {why}."
            error = AutoFactoryError(text, model=self.model, table=table, column=name)
            self.made[name] = Refused(error)


def _plain_columns(prop: Any) -> Iterator[sa.Column[Any]]:
    """The columns of an attribute, without those that follow another one of them."""
    columns = [each for each in prop.columns if isinstance(each, sa.Column)]
    for column in columns:
        if not any(column.references(each) for each in columns):
            yield column


def note_constraint(error: sa.exc.DBAPIError, model: type) -> None:
    """Add to the error of a flush which constraint the guessed values do not meet.

    That is a CHECK that is not simple, or a foreign key whose column has a default.
    """
    mapper: Mapper[Any] = sa.inspect(model)
    said = str(error.orig)
    for table in mapper.tables:
        for constraint in checks_of(table):
            text = text_of_check(constraint)
            name = constraint.name if isinstance(constraint.name, str) else ""
            if (name and name in said) or text in said:
                columns = [
                    column
                    for column in table.columns
                    if re.search(rf"\b{re.escape(column.name)}\b", text)
                ]
                _note(error, mapper, columns, f"values for the CHECK {name} ({text})")
        if "foreign key" in said.lower():
            for key in table.foreign_keys:
                if key.parent.default is not None or key.parent.server_default is not None:
                    what = f"whether {key.target_fullname} has the default of {key.parent.name}"
                    _note(error, mapper, [key.parent], what)


def _note(error: BaseException, mapper: Mapper[Any], columns: Iterable[Any], what: str) -> None:
    names = [attribute_of(mapper, column) for column in columns]
    lines = "; ".join(f"{name} = ..." for name in names if name)
    model = mapper.class_.__name__
    add_note(error, f"tidyrows: the factory of {model} does not know {what}. Declare {lines}")
