"""Which arguments the constructor of a model takes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any


@dataclass(frozen=True)
class Constructor:
    """The arguments of a constructor.

    Attributes:
        names: the arguments by name; None if it takes any.
        required: the arguments without a default.
        defaults: the arguments with a default other than None.
    """

    names: frozenset[str] | None
    required: frozenset[str]
    defaults: frozenset[str]

    def takes(self, name: str) -> bool:
        """Whether it takes an argument of this name."""
        return self.names is None or name in self.names

    def of(self, model: Any) -> Any:
        """The model, or a function that sets afterwards what the constructor does not take."""
        names = self.names
        if names is None:
            return model

        def construct(*args: Any, **kwargs: Any) -> Any:
            later = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
            instance = model(*args, **kwargs)
            for name, value in later.items():
                setattr(instance, name, value)
            return instance

        return construct


ANY_ARGUMENTS = Constructor(None, frozenset(), frozenset())


def constructor_of(model: type) -> Constructor:
    """The arguments of a model's constructor."""
    made: Any = model.__init__  # type: ignore[misc]  # of the very class, no instance is at hand
    if getattr(made, "_sa_original_init", made) is object.__init__:
        return Constructor(frozenset(), frozenset(), frozenset())
    parameters = list(signature(made).parameters.values())[1:]
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
    variadic = {Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL}
    named = [each for each in parameters if each.kind not in variadic]
    with suppress(ValueError):  # a class of Pydantic tells its fields here, its __init__ does not
        fields = signature(model).parameters.values()
        named += [each for each in fields if each.kind not in variadic]
    required = {each.name for each in parameters if each.default is Parameter.empty}
    required -= {each.name for each in parameters if each.kind in variadic}
    return Constructor(
        None if takes_any else frozenset(each.name for each in named),
        frozenset(required),
        frozenset(
            each.name
            for each in named
            if each.default is not Parameter.empty and each.default is not None
        ),
    )
