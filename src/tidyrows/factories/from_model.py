"""Factories made from models, and the smallest set of rows that makes one object valid."""

from __future__ import annotations

from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from tidyrows.arguments import Kind, check, checked
from tidyrows.factories.factory import TrackedFactory
from tidyrows.factories.factory_of import factory_of
from tidyrows.factories.parents import tree

T = TypeVar("T")


def _is_mapped(model: Any) -> bool:
    return isinstance(model, type) and isinstance(sa.inspect(model, raiseerr=False), Mapper)


_MODEL = Kind(_is_mapped, "a mapped class", "User")


@checked(model=_MODEL)
def factory_for(model: type[T]) -> type[TrackedFactory[T]]:
    """The factory of a model, with a declaration for each column that needs one.

    There is one for each model. ``class Meta: auto = True`` adds the same declarations to a factory
    of your own.

    Args:
        model: a mapped class.

    Raises:
        AutoFactoryError: at a call that needs a value which cannot be guessed.

    Example:
        >>> user = factory_for(User)(name="Ada")
    """
    made: type[TrackedFactory[T]] = factory_of(model, TrackedFactory)
    return made


def create_tree(model: type[T], /, **overrides: Any) -> T:
    """Create an object with as few rows as possible: those that its foreign keys require.

    Where several foreign keys need a row of the same class, they share one.

    Args:
        model: a mapped class.
        overrides: of its attributes, as in a call of a factory; objects among them are shared too.

    Raises:
        AutoFactoryError: a value cannot be guessed.

    Example:
        >>> order = create_tree(Order)
    """
    check("create_tree", {"model": _MODEL}, [("model", model)])
    given = {
        type(value): value for value in overrides.values() if hasattr(value, "_sa_instance_state")
    }
    token = tree.set(given)
    try:
        return factory_for(model).create(**overrides)
    finally:
        tree.reset(token)
