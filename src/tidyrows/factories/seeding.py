"""Seeds of tests: with one base seed a test draws the same values, in any worker and any order.

A test's seed is made of the base seed of the run and the test's id. What makes values unique, such
as a tag, follows no seed.

The generators of factory_boy, of Faker and of Python's ``random`` belong to the process. They are
seeded when a test begins, and get their former state back when it ends. Threads of one test share
them, so the order of their draws is not repeated.
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import faker.generator
from factory.random import randgen

from tidyrows.factories.factory import TrackedFactory

if TYPE_CHECKING:
    from types import TracebackType

_GENERATORS: tuple[Any, ...] = (randgen, faker.generator.random, random)
"""Of factory.fuzzy, of all locales of Faker, and of functions in declarations."""
_flags: Any = randgen
"""Its ``state_set``: whether somebody has seeded factory_boy."""


class BaseSeed(NamedTuple):
    """The seed of a run.

    Attributes:
        value: a number, as text.
        is_given: whether somebody chose it.
    """

    value: str
    is_given: bool

    @classmethod
    def of_process(cls) -> BaseSeed:
        """TIDYROWS_SEED, else one at random, the same during the life of this process."""
        global _of_process  # noqa: PLW0603 -- made when it is first needed
        if _of_process is None:
            given = os.environ.get("TIDYROWS_SEED")
            value = given or str(int.from_bytes(os.urandom(4), "big"))
            _of_process = cls(value, is_given=bool(given))
        return _of_process


_of_process: BaseSeed | None = None


ONE_WORKER = "w0"


def worker_id() -> str:
    """A part of the key of what each worker makes for several tests.

    With one seed for all, two workers would write the same values at the same time. It is read from
    the environment, and not of WorkerContext: a fixture may set these variables first.
    """
    read = os.environ.get
    worker = read("TIDYROWS_WORKER") or read("PYTEST_XDIST_WORKER")
    return worker or f"w{read('TIDYROWS_WORKER_INDEX') or 0}"


class Seeded:
    """A block whose random values follow a seed.

    It does nothing where no TrackedFactory is defined, or where the suite seeds factory_boy itself,
    by ``factory.random.reseed_random``, unless the base seed was given.

    Args:
        base: the seed of the run.
        key: what the seed belongs to, as the id of a test.
        is_shared: whether the block makes something for several tests. Where it seeds factory_boy
            itself, that seed stays.

    Attributes:
        base: see there.
        is_overridden: whether a seed of the suite's own stays.
    """

    def __init__(self, base: BaseSeed, *key: str, is_shared: bool = False) -> None:
        self.base = base
        self._key = "\0".join((base.value, *key))
        self._is_shared = is_shared
        self._is_on = self._has_drawn = self.is_overridden = False

    def __enter__(self) -> Self:
        """Seed the generators."""
        if not TrackedFactory.__subclasses__() or (_flags.state_set and not self.base.is_given):
            return self
        self._is_on = True
        self._former = [each.getstate() for each in _GENERATORS]
        self._was_set = _flags.state_set
        seed = hashlib.sha256(self._key.encode(errors="surrogatepass")).digest()
        # A state for each: they would else draw equal numbers. And not by factory_boy's
        # set_random_state, after which FuzzyDate warns.
        self._first = [
            random.Random(seed + bytes([at])).getstate()  # noqa: S311 -- test data
            for at in range(len(_GENERATORS))
        ]
        _set_states(self._first)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give the generators their former state."""
        if not self._is_on:
            return
        self._has_drawn = self.has_drawn
        self.is_overridden = self._is_shared and _flags.state_set and not self.base.is_given
        self.end()
        if not self.is_overridden:
            _set_states(self._former)
            _flags.state_set = self._was_set

    def end(self) -> None:
        """End the block, and leave the generators as they are."""
        self._is_on = False

    @property
    def has_drawn(self) -> bool:
        """Whether a generator was used in the block."""
        if self._is_on:
            return [each.getstate() for each in _GENERATORS] != self._first
        return self._has_drawn


def _set_states(states: list[Any]) -> None:
    for generator, state in zip(_GENERATORS, states, strict=True):
        generator.setstate(state)
