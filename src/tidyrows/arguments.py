"""Arguments of public calls: each is checked at the call, and the error says what to write.

A call lists what its arguments take, one :class:`Kind` each, in the decorator :func:`checked`.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from tidyrows.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

P = ParamSpec("P")
T = TypeVar("T")
_SHOWN = 60


class Kind(NamedTuple):
    """What an argument takes.

    Attributes:
        fits: whether it takes a value.
        need: the same in words.
        example: a value to write.
    """

    fits: Callable[[Any], bool]
    need: str
    example: str


def instance_of(*types: type, need: str, example: str) -> Kind:
    """An instance of one of these classes."""
    return Kind(lambda value: isinstance(value, types), need, example)


def number(example: str, *, above: float = -math.inf, least: float = -math.inf) -> Kind:
    """A number of seconds."""
    bound = f", above {above:g}" if above > least else f", at least {least:g}"

    def fits(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and value > above and value >= least

    return Kind(fits, f"a number of seconds{bound}", example)


def whole(example: str, *, least: int | None = None) -> Kind:
    """A whole number."""

    def fits(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and (least is None or value >= least)

    return Kind(fits, "a whole number" + ("" if least is None else f", at least {least}"), example)


def optional(kind: Kind) -> Kind:
    """The same, or None."""
    return Kind(lambda value: value is None or kind.fits(value), f"{kind.need}, or None", kind[2])


def function(example: str) -> Kind:
    """What can be called."""
    return Kind(callable, "a function", example)


def name(example: str) -> Kind:
    """A text that is not empty."""
    return Kind(
        lambda value: isinstance(value, str) and bool(value.strip()),
        "a text that is not empty (a shell variable that is not set gives an empty one)",
        repr(example),
    )


SWITCH = instance_of(bool, need="True or False", example="True")


def check(call: str, kinds: Mapping[str, Kind], given: Iterable[tuple[str, Any]]) -> None:
    """Raise for the first argument that has a value which it does not take.

    Raises:
        ArgumentError: it names the call, the argument, the value, and a value to write.
    """
    for argument, value in given:
        kind = kinds.get(argument)
        if kind is not None and not kind.fits(value):
            raise ArgumentError(
                f"{call}({argument}={_shown(value)}): {argument} must be {kind.need}; "
                f"write {argument}={kind.example}",
                argument=argument,
                value=value,
            )


def checked(
    *passed_on: Callable[..., Any], **kinds: Kind
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have each argument of a call checked before anything else is done.

    Args:
        passed_on: checked calls that get the keyword arguments which this one does not have.
        kinds: what the arguments take, by name; those that are not listed are not checked here.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = signature(function).parameters.values()
        options = [each for other in passed_on for each in signature(other).parameters.values()]
        names = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD]
        names += [
            e.name for e in options if e.kind is Parameter.KEYWORD_ONLY and e.name not in names
        ]
        positional = [e.name for e in parameters if e.kind is Parameter.POSITIONAL_OR_KEYWORD]
        every = {
            name: kind for other in passed_on for name, kind in kinds_of(other).items()
        } | kinds
        call = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @wraps(function)
        def checking(*args: P.args, **options: P.kwargs) -> T:
            check_names(call, names, options)
            check(call, every, chain(zip(positional, args, strict=False), options.items()))
            return function(*args, **options)

        checking.kinds = every  # type: ignore[attr-defined]  # for calls that pass arguments on
        return checking

    return decorate


def kinds_of(call: Callable[..., Any]) -> Mapping[str, Kind]:
    """What the arguments of a checked call, or of a class, take."""
    kinds: Mapping[str, Kind] = getattr(getattr(call, "__init__", call), "kinds", {})
    return getattr(call, "kinds", kinds)


def check_names(call: str, names: Collection[str], given: Iterable[str]) -> None:
    """Raise for the first argument that a call does not have.

    Raises:
        ArgumentError: it names the call, the argument, the nearest name, and all names.
    """
    for argument in given:
        if argument not in names:
            known = [name for name in names if name not in {"self", "cls"}]
            near = get_close_matches(argument, known, n=1)
            near = near or [name for name in known if name.startswith(argument)]
            meant = f"Did you mean {near[0]}=? " if near else ""
            raise ArgumentError(
                f"{call}() takes no {argument}=. {meant}It takes {', '.join(known)}.",
                argument=argument,
            )


def _shown(value: Any) -> str:
    """A value without the secrets of a URL."""
    if isinstance(value, str) and "://" in value:
        return "a URL"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"a {type(value).__name__}"
