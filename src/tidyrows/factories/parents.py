"""The foreign keys that a model must have, and the declarations that make their rows."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory.declarations import SKIP, BaseDeclaration, SubFactory
from sqlalchemy.orm import MANYTOONE, Mapper
from sqlalchemy.orm.exc import UnmappedColumnError

from tidyrows.cleanup.options import known_mappers
from tidyrows.errors import AutoFactoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from factory.builder import BuildStep, Resolver

tree: ContextVar[dict[type, Any] | None] = ContextVar("tidyrows_tree", default=None)
"""In a call of ``create_tree``: one object of each class that it has made."""


@dataclass(frozen=True)
class Key:
    """A foreign key whose columns are all NOT NULL, so that it needs a row.

    Attributes:
        table: the name of the table that has the key.
        name: the relationship, or the name under which a factory takes the parent.
        has_relationship: whether ``name`` is a relationship of the model.
        target: the mapper of the parent; None if no model has that table.
        target_table: the name of the parent's table.
        pairs: pairs of an attribute of the model and one of the parent.
        shared: for attributes that an earlier key fills: the name of that key, and the attribute
            of its parent.
    """

    table: str
    name: str
    has_relationship: bool
    target: Mapper[Any] | None
    target_table: str
    pairs: tuple[tuple[str, str], ...]
    shared: dict[str, tuple[str, str]] = field(default_factory=dict)


def attribute_of(mapper: Mapper[Any], column: sa.Column[Any]) -> str | None:
    """The attribute of a column; None if the model does not map the column."""
    try:
        return mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def keys_of(mapper: Mapper[Any], needed: Collection[sa.Column[Any]]) -> list[Key]:
    """The foreign keys that need a row, those of fewer columns first.

    Args:
        mapper: of the model.
        needed: the columns that need a value.
    """
    found: list[Key] = []
    names: set[str] = set()
    filled: dict[str, tuple[str, str]] = {}
    constraints = [
        constraint
        for table in mapper.tables
        for constraint in getattr(table, "foreign_key_constraints", ())
    ]
    constraints.sort(key=lambda each: (len(each.column_keys), each.column_keys))
    for constraint in constraints:
        pairs = _pairs(mapper, constraint, needed)
        if pairs is None:
            continue
        target = _mapper_of(mapper, constraint.referred_table)
        attributes = [
            (local, attribute_of(target, remote) if target is not None else remote.key)
            for local, remote in pairs
        ]
        if any(set(each.pairs) == set(attributes) for each in found):
            continue  # the same key, twice
        relationship = _relationship(mapper, constraint)
        if relationship is not None:
            target = relationship.mapper
        if any(remote is None for _, remote in attributes):
            target = None
        name = relationship.key if relationship is not None else _free_name(mapper, pairs, names)
        names.add(name)
        complete = tuple((local, remote or "") for local, remote in attributes)
        found.append(
            Key(
                constraint.table.fullname,
                name,
                relationship is not None,
                None if target is None else _concrete(target),
                constraint.referred_table.fullname,
                complete,
                {local: filled[local] for local, _ in complete if local in filled},
            )
        )
        filled = {local: (name, remote) for local, remote in complete} | filled
    return found


def _pairs(
    mapper: Mapper[Any], constraint: sa.ForeignKeyConstraint, needed: Collection[sa.Column[Any]]
) -> list[tuple[str, sa.Column[Any]]] | None:
    """Attributes and columns of the parent; None for a key that needs no row of its own."""
    pairs = []
    is_needed = False
    for element in constraint.elements:
        local = attribute_of(mapper, element.parent)
        if element.parent.nullable or local is None:
            return None
        is_needed |= element.parent in needed
        pairs.append((local, element.column))
    is_of_hierarchy = all(
        attribute_of(mapper, remote) == local and remote.table is not constraint.table
        for local, remote in pairs
    )
    return pairs if is_needed and not is_of_hierarchy else None


def _mapper_of(mapper: Mapper[Any], table: sa.Table) -> Mapper[Any] | None:
    """The mapper of a table; of several in one hierarchy the most basic one."""
    found = [each for each in known_mappers(mapper.registry) if each.local_table is table]
    for each in found:
        if each.inherits is None or each.inherits.local_table is not table:
            return each
    return None


def _concrete(mapper: Mapper[Any]) -> Mapper[Any]:
    """The mapper, or a subclass of it that has the identity which the mapper lacks."""
    if mapper.polymorphic_on is None or mapper.polymorphic_identity is not None:
        return mapper
    with_identity = [
        each for each in mapper.self_and_descendants if each.polymorphic_identity is not None
    ]
    return min(
        with_identity, key=lambda each: (len(each.tables), each.class_.__name__), default=mapper
    )


def _relationship(mapper: Mapper[Any], constraint: sa.ForeignKeyConstraint) -> Any:
    pairs = {(element.parent, element.column) for element in constraint.elements}
    for relationship in mapper.relationships:
        if (
            relationship.direction is MANYTOONE
            and not relationship.viewonly
            and set(relationship.local_remote_pairs or ()) == pairs
        ):
            return relationship
    return None


def _free_name(
    mapper: Mapper[Any], pairs: list[tuple[str, sa.Column[Any]]], names: Collection[str]
) -> str:
    """``user`` for ``user_id``; with the name of the table for a key of several columns."""
    name = pairs[-1][0].removesuffix("_id").strip("_")
    is_free = name not in mapper.all_orm_descriptors and name not in names
    return name if is_free else f"{name}_{pairs[-1][1].table.name}_row"


class Parent(SubFactory):
    """The row of a foreign key, made by the factory of its model.

    An explicit value of the foreign key wins: then no row is made. Attributes that an earlier key
    fills get the value of that key's row.

    Args:
        key: the foreign key.
        declared: attributes that the factory declares itself.
        factory_of: the factory of a model.

    Raises:
        AutoFactoryError: the row needs a row of a class that is being made.
    """

    def __init__(
        self, key: Key, declared: Collection[str], factory_of: Callable[[type], Any]
    ) -> None:
        assert key.target is not None  # noqa: S101 -- no other key has a Parent
        self.key = key
        self.model = key.target.class_
        self._declared = declared
        self._factory_of = factory_of
        BaseDeclaration.__init__(self)  # type: ignore[no-untyped-call]  # SubFactory's takes the factory itself, and here it is made when it is needed

    def get_factory(self) -> Any:
        """The factory of the parent's model."""
        return self._factory_of(self.model)

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> Any:
        """The parent, or SKIP if the call gives the key."""
        given = step.builder.extras
        if all(local in given for local, _ in self.key.pairs):
            return SKIP
        values = dict(self._shared_values(instance, given))
        objects = tree.get()
        if objects is not None and not extra:
            known = objects.get(self.model)
            if known is not None and all(getattr(known, k) == v for k, v in values.items()):
                return known
        self._refuse_cycle(step)
        made = super().evaluate(instance, step, values | extra)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        if objects is not None:
            objects.setdefault(self.model, made)
        return made

    def _shared_values(
        self, instance: Resolver, given: Collection[str]
    ) -> Iterator[tuple[str, Any]]:
        """The attributes of the parent whose values are fixed."""
        for local, remote in self.key.pairs:
            if local in given or local in self._declared:
                yield remote, getattr(instance, local)
            elif local in self.key.shared:
                name, attribute = self.key.shared[local]
                other = getattr(instance, name, None)
                if other is not None and other is not SKIP:
                    yield remote, getattr(other, attribute)

    def _refuse_cycle(self, step: BuildStep) -> None:
        chain: list[Any] = []
        at: Any = step
        while at is not None:
            chain.append(at.builder.factory_meta.model)
            if chain[-1] is self.model:
                break
            at = at.parent_step
        else:
            return
        models = [self.model, *chain[-2::-1], self.model]
        tables = " -> ".join(sa.inspect(each).local_table.fullname for each in models)
        raise AutoFactoryError(
            f"{chain[0].__name__} cannot be made: its row needs another one, which needs a row of "
            f"{self.model.__name__} again ({tables}; the columns are NOT NULL). "
            f"Give the object that exists: {self.key.name}=..., or declare {self.key.name} in a "
            f"factory of {chain[0].__name__}.",
            model=chain[0],
            table=self.key.table,
            column=self.key.pairs[0][0],
        )


class Refused(BaseDeclaration):
    """A value that cannot be guessed: an error, unless the call gives the value.

    Args:
        error: what to raise.
    """

    def __init__(self, error: AutoFactoryError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.error = error

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> Any:
        """Raise the error."""
        error = self.error
        raise AutoFactoryError(str(error), **vars(error))
