"""What a factory call has drawn, so that it is drawn again where its transaction was lost.

Nothing that others draw from is set back: the same values are handed out once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import faker.generator
from factory.declarations import (
    BaseDeclaration,
    Iterator,
    Maybe,
    SelfAttribute,
    Sequence,
    SubFactory,
    Transformer,
)
from factory.faker import Faker
from factory.fuzzy import BaseFuzzyAttribute
from factory.random import randgen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from random import Random

T = TypeVar("T")

_GENERATORS: tuple[Random, ...] = (faker.generator.random, randgen)
# What the last ones draw is drawn by the factory that they call, or not at random.
_PLAIN = (SubFactory, Sequence, SelfAttribute, Iterator)


class Draws:
    """The values of one outermost call: of sequences, scoped declarations and random generators."""

    __slots__ = ("_at", "_iterators", "_states", "_values")

    def __init__(self) -> None:
        self._values: dict[Any, list[Any]] = {}
        self._at: dict[Any, int] | None = None
        self._states: dict[Random, Any] = {}
        self._iterators: dict[Iterator, int] = {}

    def draw(self, source: Any, new: Callable[[], T]) -> T:
        """The next value of a source: one of the attempt before, or a new one."""
        values = self._values.setdefault(source, [])
        if self._at is None:
            value = new()
            values.append(value)
            return value
        at = self._at.get(source, 0)
        self._at[source] = at + 1
        if at == len(values):
            values.append(new())
        known: T = values[at]
        return known

    def begin(self, sources: Sources) -> None:
        """A factory is about to draw from these for the first time in the call, maybe."""
        for generator in sources.generators:
            if generator not in self._states:
                self._states[generator] = generator.getstate()
        for iterator in sources.iterators:
            if iterator not in self._iterators:
                given = iterator.iterator
                self._iterators[iterator] = 0 if given is None else len(given.past_elements)

    def again(self) -> None:
        """Begin anew, with the same values."""
        self._at = {}
        for generator, state in self._states.items():
            generator.setstate(state)
        for iterator, count in self._iterators.items():
            given = iterator.iterator
            while given is not None and len(given.past_elements) > count:
                given.next_elements.appendleft(given.past_elements.pop())


class Sources:
    """Where the declarations of one factory draw from, besides sequences and scoped values.

    Attributes:
        generators: random generators.
        iterators: ``factory.Iterator`` declarations.
    """

    __slots__ = ("generators", "iterators")

    def __init__(self, declarations: Iterable[Any]) -> None:
        plain = list(_unwrapped(declarations))
        found = [each for one in plain for each in _generators_of(one)]
        self.generators = tuple(dict.fromkeys(found))
        self.iterators = tuple(each for each in plain if isinstance(each, Iterator))

    def __bool__(self) -> bool:
        return bool(self.generators or self.iterators)


def _unwrapped(declarations: Iterable[Any]) -> Iterable[Any]:
    for each in declarations:
        if isinstance(each, Maybe):
            yield from _unwrapped((each.yes, each.no))
        elif isinstance(each, Transformer):
            yield from _unwrapped((each.default,))
        else:
            yield each


def _generators_of(declaration: Any) -> tuple[Random, ...]:
    """What a declaration may draw from; a function may draw from anything."""
    if isinstance(declaration, Faker):
        return _GENERATORS[:1]
    if isinstance(declaration, BaseFuzzyAttribute):
        return _GENERATORS[1:]
    if isinstance(declaration, _PLAIN) or not isinstance(declaration, BaseDeclaration):
        return ()
    return _GENERATORS


ANYTHING = Sources([BaseDeclaration()])  # type: ignore[no-untyped-call]  # factory_boy's is untyped
"""The sources of declarations that a call is given as arguments."""
