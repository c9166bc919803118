"""In a child of pytest: the order that was asked for, and what became of each test."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tidyrows.audit.shuffled import as_listed, shuffled


class Outcomes:
    """What became of each test, in the order in which they ran.

    Attributes:
        failed: by test, whether it failed; a test that was skipped is not there.
    """

    def __init__(self) -> None:
        self.failed: dict[str, bool] = {}

    def hear(self, report: pytest.TestReport) -> bool:
        """Take a report; whether it says something new."""
        before = self.failed.get(report.nodeid)
        if report.when == "setup":  # run once more by another plugin, the last time counts
            before = self.failed.pop(report.nodeid, None)
        if report.failed:
            self.failed[report.nodeid] = True
        elif report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            # Where a subtest has failed, its test has a report of its own that may say otherwise.
            self.failed.setdefault(report.nodeid, False)
        return self.failed.get(report.nodeid, before) != before


class Again:
    """The plugin of a run in another order.

    Args:
        seed: of the order; None for the order that the plan lists.
        plan: the file that says which tests to run and where to write what became of them; None
            where a person asked for the seed.
    """

    def __init__(self, seed: int | None, plan: str | None = None) -> None:
        said = {} if plan is None else json.loads(Path(plan).read_text(encoding="utf-8"))
        self._seed: int | None = said.get("seed", seed)
        self._order: list[str] | None = said.get("order")
        self._told: str | None = said.get("told")
        self._outcomes = Outcomes()
        for held in said.get("lifeline", ()):
            Thread(target=_end_with, args=[held], daemon=True).start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Put the tests in order, after all other plugins have had their say."""
        chosen = list(items)
        if self._order is not None:
            chosen = as_listed(items, self._order, lambda item: item.nodeid)
        if self._seed is not None:
            chosen = shuffled(chosen, self._seed, lambda item: item.nodeid)
        kept = set(map(id, chosen))
        left_out = [item for item in items if id(item) not in kept]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write at once: a run that takes too long tells what it has come to."""
        if self._outcomes.hear(report) and self._told is not None:
            said: tuple[str, Any] = (report.nodeid, self._outcomes.failed[report.nodeid])
            with Path(self._told).open("a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")


def _end_with(held: int) -> None:
    """Where the audit was killed, nobody else ends this run, which may be one that hangs."""
    os.read(held, 1)  # returns when the other end is closed
    os.killpg(0, signal.SIGKILL)
