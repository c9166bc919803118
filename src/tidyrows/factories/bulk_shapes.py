"""Objects whose making and writing has no other effect than their row.

Such an object gets its values without SQLAlchemy's attribute events, and its row is written without
the unit of work. What a listener, a validator or a constructor of the model would see goes the
ordinary way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import ColumnProperty, Mapper, RelationshipDirection, RelationshipProperty
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import NO_VALUE

from tidyrows.greenlets import in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_CONSTRUCTOR = orm.registry().constructor
"""SQLAlchemy's own: a registry may have another."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A many-to-one relationship of such an object.

    Attributes:
        name: of the relationship.
        mapper: of the other class.
        keys: for each foreign-key column: the attribute, the column's key, and the column that it
            refers to.
        inverse: the relationships of the other class that would get the object.
    """

    name: str
    mapper: Mapper[Any]
    keys: tuple[tuple[str, str, Any], ...]
    inverse: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """The objects that one factory makes.

    Attributes:
        mapper: of the model.
        table: where their rows go.
        columns: the attributes that are given, each with its column's key.
        parents: the relationships that are given.
        defaulted: the keys of given columns with a default, which None means.
        fetched: columns that the database fills in.
        expired: attributes that are to be loaded when they are read.
        is_row: whether its values are the row as they are.
        names: what may be in its ``__dict__``; a declaration may have set more.
        absent: columns without a default, which a flush sends as NULL if they are not given.
        literals: types of values that are no SQL expressions, as far as they have been met.
    """

    mapper: Mapper[Any]
    table: sa.Table
    columns: tuple[tuple[str, str], ...]
    parents: tuple[Parent, ...]
    defaulted: tuple[str, ...]
    fetched: tuple[Any, ...]
    expired: tuple[str, ...]
    is_row: bool
    names: frozenset[str]
    absent: dict[str, None]
    literals: set[type] = field(default_factory=set)

    def make(self, values: dict[str, Any], knows: Callable[[Any], bool]) -> Any:
        """A new object; None where the model itself has to make it."""
        for parent in self.parents:
            value = values.get(parent.name)
            if value is None:
                if any(name in values for name, _column, _remote in parent.keys):
                    return None
            elif not knows(value) or not vars(value).keys().isdisjoint(parent.inverse):
                return None
        if not self.literals.issuperset(map(type, values.values())):
            kinds = set(map(type, values.values()))
            if any(hasattr(kind, "__clause_element__") for kind in kinds) or any(
                issubclass(kind, sa.ClauseElement) for kind in kinds
            ):
                return None  # an expression, which the database computes
            self.literals.update(kinds)
        instance = self.mapper.class_manager.new_instance()
        vars(instance).update(values)
        for parent in self.parents:  # as a change, if a session should get the object otherwise
            instance_state(instance).committed_state[parent.name] = NO_VALUE
        return instance

    def row(self, instance: Any) -> dict[str, Any]:
        """What to insert; foreign keys are set in the object too."""
        values = vars(instance)
        for parent in self.parents:
            other = values.get(parent.name)
            if other is not None:
                mapper = instance_state(other).mapper
                for name, _column, remote in parent.keys:
                    values[name] = getattr(other, mapper.get_property_by_column(remote).key)
        if self.is_row:
            row: dict[str, Any] = self.absent | values
            del row["_sa_instance_state"]
        else:
            given = {column: values[name] for name, column in self.columns if name in values}
            row = self.absent | given
        for column in self.defaulted:
            if row.get(column, column) is None:
                del row[column]
        return row


def shape_of(model: Any, names: Iterable[str]) -> Shape | None:
    """How objects with these attributes are made and written; None for the ordinary way."""
    mapper = sa.inspect(model, raiseerr=False)
    if not isinstance(mapper, Mapper) or not _is_plain(model, mapper):
        return None
    table: Any = mapper.local_table
    own: dict[str, Any] = {
        each.key: each.columns[0]
        for each in mapper.column_attrs
        if len(each.columns) == 1 and getattr(each.columns[0], "table", None) is table
    }
    columns = {}
    parents = []
    for name in names:
        attribute = mapper.attrs.get(name)
        listeners = list(getattr(model, name).impl.dispatch.set) if attribute is not None else []
        if isinstance(attribute, ColumnProperty) and name in own and not listeners:
            columns[name] = own[name]
        elif isinstance(attribute, RelationshipProperty):
            parent = _parent(mapper, attribute, own)
            # SQLAlchemy's own: the cascade of sessions, and what fills the inverse
            if parent is None or len(listeners) > 1 + bool(parent.inverse):
                return None
            parents.append(parent)
        else:
            return None
    for parent in parents:
        columns |= {name: own[name] for name, _column, _remote in parent.keys}
    fetched = tuple(
        column
        for column in table.columns
        if column.key not in {each.key for each in columns.values()} and _is_computed(column)
    )
    if fetched and (mapper.eager_defaults is False or not set(fetched) <= set(own.values())):
        return None
    return Shape(
        mapper,
        table,
        tuple((name, column.key) for name, column in columns.items()),
        tuple(parents),
        tuple(column.key for column in columns.values() if _has_default(column)),
        fetched,
        tuple(each.key for each in mapper.column_attrs if each.key not in own),
        not parents and all(name == column.key for name, column in columns.items()),
        frozenset({*columns, *(each.name for each in parents), "_sa_instance_state"}),
        dict.fromkeys(sorted(mapper._insert_cols_as_none[table])),  # noqa: SLF001 -- as a flush does
    )


def _is_plain(model: type[Any], mapper: Mapper[Any]) -> bool:
    """Whether a new object of this class is its values, and nothing listens to it."""
    orm.configure_mappers()
    manager: Any = mapper.class_manager
    methods: Any = model
    return (
        mapper.inherits is None
        and mapper.polymorphic_on is None
        and mapper.version_id_col is None
        and isinstance(mapper.local_table, sa.Table)
        and len(mapper.tables) == 1
        and mapper.local_table.implicit_returning
        and manager.original_init is _CONSTRUCTOR
        and methods.__new__ is object.__new__
        and methods.__setattr__ is object.__setattr__
        and len(manager.dispatch.init) == 1  # SQLAlchemy's own
        and not len(mapper.dispatch.before_insert)
        and not len(mapper.dispatch.after_insert)
        and not len(manager.dispatch.refresh_flush)
    )


def _parent(
    mapper: Mapper[Any], relation: RelationshipProperty[Any], own: dict[str, Any]
) -> Parent | None:
    if (
        relation.direction is not RelationshipDirection.MANYTOONE
        or relation.viewonly
        or relation.post_update
        or relation.secondary is not None
        or relation.mapper.base_mapper is mapper.base_mapper
    ):
        return None
    names = {column: name for name, column in own.items()}
    keys = []
    pairs: Any = relation.synchronize_pairs
    for remote, local in pairs:
        if local not in names:
            return None
        keys.append((names[local], local.key, remote))
    inverse = tuple(each.key for each in relation._reverse_property)  # noqa: SLF001 -- no public name tells both of back_populates and backref
    if inverse and in_greenlet():
        return None  # the inverse cannot be loaded later
    return Parent(relation.key, relation.mapper, tuple(keys), inverse)


def _is_computed(column: sa.Column[Any]) -> bool:
    """Whether the database fills this column in, other than by counting."""
    default = column.default
    return column.server_default is not None or (default is not None and default.is_clause_element)


def _has_default(column: sa.Column[Any]) -> bool:
    """Whether None leaves the value to a default, as in a flush."""
    if column.type.should_evaluate_none:
        return False
    return column.primary_key or column.default is not None or column.server_default is not None
