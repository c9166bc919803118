"""An order of tests by a seed: modules, in them classes, in them tests."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")


def shuffled(items: Iterable[T], seed: int, name: Callable[[T], str]) -> list[T]:
    """The items in the order of a seed.

    Two tests keep their order whichever others are there, so that a few of them can be run alone in
    the order in which one failed.

    Args:
        items: in any order.
        seed: another number is another order.
        name: the id of one, ``folder/test_module.py::TestClass::test_it[1]``.
    """

    def place(item: T) -> tuple[str, ...]:
        module, _, inner = name(item).partition("::")
        inner = inner.partition("[")[0]  # what a test is given may have colons too
        group = inner.rpartition("::")[0] or inner
        return tuple(_hashed(seed, part) for part in (module, f"{module}::{group}", name(item)))

    return sorted(items, key=place)


def as_listed(items: Iterable[T], order: Sequence[str], name: Callable[[T], str]) -> list[T]:
    """The items in the order of a list of their names, without those that are not in it."""
    places = {each: place for place, each in enumerate(order)}
    return sorted((i for i in items if name(i) in places), key=lambda item: places[name(item)])


def _hashed(seed: int, part: str) -> str:
    return hashlib.sha256(f"{seed} {part}".encode()).hexdigest()
