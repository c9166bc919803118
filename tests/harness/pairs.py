"""Few cases in place of a whole product: every two values of two parameters still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

from harness.targets import DRIVERS

FIXTURES = ("database", "engine", "house")
"""What the names of parameters end in that are handed to a fixture."""


def all_pairs(
    *values: Sequence[Any], allowed: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """Cases that cover every pair of values of two parameters; the same ones at every call.

    Args:
        values: those of each parameter. With two parameters alone, every case is needed.
        allowed: whether a case, given as arguments, can be.

    Example:
        >>> len(all_pairs(range(5), range(4), range(2)))
        20
    """
    cases = {
        at: case
        for at, case in zip(
            product(*(range(len(each)) for each in values)), product(*values), strict=True
        )
        if allowed(*case)
    }
    pairs = {at: set(combinations(enumerate(at), 2)) for at in cases}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(pairs, key=lambda at: len(pairs[at] & missing))  # the first of the best
        missing -= pairs[best]
        chosen.add(best)
    return [case for at, case in cases.items() if at in chosen]


def pairwise(
    *, allowed: Callable[..., bool] = lambda *_: True, **values: Sequence[Any]
) -> pytest.MarkDecorator:
    """Run a test with :func:`all_pairs` of these parameters, some of which are fixtures.

    Example:
        >>> @pairwise(database=ALL_DRIVERS, count=[1, 500], composite=[False, True])
        ... def test_so_many_keys(database, count, composite): ...
    """
    cases = all_pairs(*values.values(), allowed=allowed)
    indirect = [name for name in values if name.endswith(FIXTURES)]
    return pytest.mark.parametrize(tuple(values), cases, indirect=indirect)


def drivers_in_turn(fixture: str, **values: Sequence[Any]) -> pytest.MarkDecorator:
    """Run a test with each value on each database, where the drivers of one take turns.

    For what asks the database more than the driver.

    Example:
        >>> @drivers_in_turn("any_driver_engine", form=["one", "many"])
        ... def test_rows(any_driver_engine, form): ...
    """
    ((name, choices),) = values.items()
    cases = [
        (those[at % len(those)], choice)
        for those in DRIVERS.values()
        for at, choice in enumerate(choices)
    ]
    return pytest.mark.parametrize((fixture, name), cases, indirect=[fixture])
