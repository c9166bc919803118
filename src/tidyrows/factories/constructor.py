"""How an object of a model is made from guessed values, whatever its constructor takes."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import add_note

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import Mapper

_GENERATED = ("__dataclass_fields__", "__attrs_attrs__", "__pydantic_fields__")
"""Attributes of classes whose constructor is made from their fields."""


@dataclass(frozen=True)
class Constructor:
    """The arguments of a constructor.

    Attributes:
        names: the arguments by name.
        takes_any: whether it takes arguments of other names too.
        required: the arguments without a default.
        defaults: the arguments whose default is the value of a new object.
        is_called: False for a constructor that needs what is no attribute, or takes no attribute.
        is_plain: whether it sets each argument as an attribute, and does nothing else.
    """

    names: frozenset[str] = frozenset()
    takes_any: bool = True
    required: frozenset[str] = frozenset()
    defaults: frozenset[str] = frozenset()
    is_called: bool = True
    is_plain: bool = True

    def takes(self, name: str) -> bool:
        """Whether it takes an argument of this name."""
        return self.is_called and (self.takes_any or name in self.names)

    def of(self, model: Any) -> Any:
        """What makes an object: the model, or a function that sets what the constructor does not.

        A constructor that is not called is left out as where SQLAlchemy loads an object.
        """
        return model if self.is_plain else _Maker(self, model)


@dataclass(frozen=True)
class _Maker:
    constructor: Constructor
    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        taken = {name: value for name, value in kwargs.items() if self.constructor.takes(name)}
        if self.constructor.is_called:
            try:
                instance = self.model(*args, **taken)
            except Exception as error:
                add_note(
                    error,
                    f"tidyrows: the constructor of {self.model.__name__} was given values guessed "
                    f"from its columns: {', '.join(taken)}. Declare what it refuses",
                )
                raise
        else:
            instance = _without_constructor(sa.inspect(self.model))
        state = sa.inspect(instance)
        for name, value in kwargs.items():
            if value is not None and (name not in taken or state.dict.get(name) is None):
                setattr(instance, name, value)
        return instance


def _without_constructor(mapper: Mapper[Any]) -> Any:
    instance = mapper.class_manager.new_instance()
    if mapper.polymorphic_on is not None and mapper.polymorphic_identity is not None:
        name = mapper.get_property_by_column(mapper.polymorphic_on).key
        setattr(instance, name, mapper.polymorphic_identity)
    return instance


PLAIN = Constructor()


def constructor_of(model: type, attributes: Iterable[str]) -> Constructor:
    """The arguments of a model's constructor.

    Args:
        model: a mapped class.
        attributes: its mapped attributes.
    """
    made: Any = model.__init__  # type: ignore[misc]  # of the very class, no instance is at hand
    original = getattr(made, "_sa_original_init", made)
    if original is object.__init__:
        return Constructor(takes_any=False, is_plain=False)
    if getattr(original, "__module__", "").startswith("sqlalchemy."):
        return PLAIN
    parameters = list(signature(made).parameters.values())[1:]
    variadic = {Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL}
    named = [each for each in parameters if each.kind not in variadic]
    names = {each.name for each in named}
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
    required = {each.name for each in named if each.default is Parameter.empty}
    is_generated = any(hasattr(model, name) for name in _GENERATED)
    if is_generated:  # a class of Pydantic tells its fields in its signature alone
        fields = signature(model).parameters.values()
        named += [each for each in fields if each.kind not in variadic]
    known = set(attributes)
    is_called = is_generated or (required <= known and (takes_any or not named or names & known))
    # in a hand-written constructor an empty text means that nothing is given
    absent = (Parameter.empty, None) if is_generated else (Parameter.empty, None, "")
    defaults = {each.name for each in named if each.default not in absent}
    return Constructor(
        frozenset(names),
        takes_any,
        frozenset(required) if is_called else frozenset(),
        frozenset(defaults) if is_called else frozenset(),
        bool(is_called),
        is_plain=False,
    )
