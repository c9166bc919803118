"""A foreign key that a call gives wins over the declaration of its relationship.

``OrderFactory(user_id=7)`` creates no user, and its order has the user 7: factory_boy would pass
both values to the model, where the relationship overwrites the key.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory.builder import DeclarationSet
from factory.enums import SPLITTER
from factory.errors import InvalidDeclarationError
from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection

if TYPE_CHECKING:
    from collections.abc import Mapping


def key_attributes(options: Any) -> dict[str, frozenset[str]]:
    """Each field of a many-to-one relationship, with the attributes of its foreign key.

    A field that the model does not get (Params, ``Meta.exclude``) is none; nor is a positional one.
    """
    mapper = sa.inspect(options.get_model_class(), raiseerr=False)
    if not isinstance(mapper, Mapper):
        return {}
    fields = {attribute: field for field, attribute in options.rename.items()}
    kept = {*options.exclude, *options.parameters, *options.inline_args}
    found = {}
    for relationship in mapper.relationships:
        field = fields.get(relationship.key, relationship.key)
        columns = [local for _remote, local in relationship.synchronize_pairs]
        if (
            relationship.direction is RelationshipDirection.MANYTOONE
            and columns  # none where it is viewonly
            and all(map(mapper.columns.contains_column, columns))
            and field not in kept
        ):
            names = (mapper.get_property_by_column(column).key for column in columns)
            found[field] = frozenset(names)
    return found


class CallDeclarations(DeclarationSet):
    """The declarations of a factory, to a copy of which a call adds its own values.

    All builders copy it, those of plain factory_boy factories above this one too.

    Attributes:
        options: the factory's; None while the values are the factory's own.
    """

    options: Any = None

    def __init__(self, declared: Mapping[str, Any], options: Any) -> None:
        super().__init__(declared)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.options = options

    def copy(self) -> CallDeclarations:
        """A copy for one call; for each object, so it does not split the names anew."""
        made = object.__new__(type(self))
        made.options = self.options
        made.declarations = self.declarations.copy()
        made.contexts = defaultdict(dict)
        for name, context in self.contexts.items():
            if context:
                made.contexts[name] = context.copy()
        return made


class AttributeDeclarations(CallDeclarations):
    """The declarations of attributes."""

    _left_out: str | None = None  # the last relationship that is left out

    def update(self, values: Mapping[str, Any]) -> None:
        """Add values; a relationship whose key is among them is left out.

        Raises:
            InvalidDeclarationError: the values are also about another object of the relationship.
        """
        if not values:
            return
        super().update(values)  # type: ignore[no-untyped-call]  # as above
        if self.options is None:
            return
        names = [name.removesuffix(SPLITTER) for name in values]
        given = {self.options.rename.get(name, name) for name in names}
        for field, attributes in self.options.key_attributes.items():
            if field not in self or not attributes <= given:
                continue
            if values.get(field) is not None:
                self._refuse_other_key(field, values)
                continue
            nested = [name for name in names if name.startswith(f"{field}{SPLITTER}")]
            keys = ", ".join(sorted(attributes))
            if nested:
                raise InvalidDeclarationError(
                    f"{self.options.factory.__name__} is given {keys}, which names a row that is "
                    f"there, and {nested[0]}, which is about a new one. Leave one of them out."
                )
            del self.declarations[field]
            self.contexts.pop(field, None)
            self._left_out = f"{field} is left out, since {keys} is given; give {field}= instead"

    def _refuse_other_key(self, field: str, values: Mapping[str, Any]) -> None:
        """Raise where an object and the key of another one are given: SQLAlchemy drops the key."""
        options, value = self.options, values[field]
        state = sa.inspect(value, raiseerr=False)
        if not isinstance(state, InstanceState):
            return
        mapper = sa.inspect(options.get_model_class())
        given = {options.rename.get(name, name): each for name, each in values.items()}
        identity = dict(zip(state.mapper.primary_key, state.identity or (), strict=False))
        relationship = mapper.relationships[options.rename.get(field, field)]
        for remote, local in relationship.synchronize_pairs:
            name = mapper.get_property_by_column(local).key
            there = state.mapper.get_property_by_column(remote).key
            own, other = identity.get(remote, state.dict.get(there)), given[name]
            if type(own) is type(other) and own != other:
                raise InvalidDeclarationError(
                    f"{options.factory.__name__} is given {field}, whose {there} is {own!r}, and "
                    f"{name}={other!r}, which names another row. Leave one of them out."
                )

    def __repr__(self) -> str:
        # factory_boy's error about an unknown attribute, which a declaration reads, shows this
        text = super().__repr__()  # type: ignore[no-untyped-call]  # as above
        return f"{text} ({self._left_out})" if self._left_out else str(text)
