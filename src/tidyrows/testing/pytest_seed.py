"""pytest: each test has a seed of its own, and so has each fixture that several tests share.

Registered where the suite has a TrackedFactory. Hooks, not an autouse fixture: that would run after
fixtures of a wider scope, and be listed among the fixtures of every test.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import pytest

from tidyrows.factories.seeding import ONE_WORKER, BaseSeed, Seeded, worker_id

if TYPE_CHECKING:
    from collections.abc import Generator

_SEEDED = pytest.StashKey[Seeded]()


class SeedPlugin:
    """One process of pytest that runs tests.

    Args:
        base: the seed of the run.
        option: the option of the command line that repeats it.
        seeds_tests: False where pytest-randomly seeds each test.
    """

    def __init__(self, base: BaseSeed, option: str, *, seeds_tests: bool = True) -> None:
        self._base = base
        self._option = option
        self._seeds_tests = seeds_tests
        self._drawn: set[str] = set()  # names of shared fixtures
        self._test: Seeded | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Begin before anything that the test or its fixtures do."""
        self._test = item.stash[_SEEDED] = Seeded(self._base, item.nodeid)
        if self._seeds_tests:
            self._test.__enter__()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        """End after everything that they do."""
        try:
            return (yield)
        finally:
            if self._test is not None:
                self._test.__exit__()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: Any, request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        """What tests share does not depend on the test that asks for it first."""
        if fixturedef.scope == "function":
            return (yield)
        place = (request.node.nodeid, fixturedef.baseid, fixturedef.argname)
        key = (worker_id(), *place, str(getattr(request, "param_index", 0)))
        seeded = Seeded(self._base, *key, is_shared=True)
        try:
            with seeded:
                return (yield)
        finally:
            if seeded.is_overridden:
                if self._test is not None:
                    self._test.end()
            elif seeded.has_drawn:
                self._drawn.add(fixturedef.argname)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add to a failure the line that repeats its data, if there is any."""
        report = yield
        if report.failed and item.stash.get(_SEEDED, None) is not None:
            shares = not self._drawn.isdisjoint(getattr(item, "fixturenames", ()))
            if shares or item.stash[_SEEDED].has_drawn or not self._seeds_tests:
                report.sections.append(("tidyrows", self._line(item.nodeid, shares=shares)))
        return report

    def _line(self, test: str, *, shares: bool) -> str:
        worker = worker_id()
        is_needed = shares and worker != ONE_WORKER
        begin = f"TIDYROWS_WORKER={shlex.quote(worker)} " if is_needed else ""
        command = f"{begin}pytest {self._option}={self._base.value} {shlex.quote(test)}"
        return f"the data of this test again: {command}"
