"""Run the tests in the order that was asked for, and write the outcome of each test."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tidyrows.audit.run_order import as_listed, shuffled


class Outcomes:
    """The outcome of each test, in the order in which they ran.

    Attributes:
        failed: by test, whether it failed; a test that was skipped is not there.
    """

    def __init__(self) -> None:
        self.failed: dict[str, bool] = {}

    def add(self, report: pytest.TestReport) -> bool:
        """Add a report; whether it changes the outcome."""
        before = self.failed.get(report.nodeid)
        if report.when == "setup":  # run once more by another plugin, the last time counts
            before = self.failed.pop(report.nodeid, None)
        if report.failed:
            self.failed[report.nodeid] = True
        elif report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            # Where a subtest has failed, its test has a report of its own that may say otherwise.
            self.failed.setdefault(report.nodeid, False)
        return self.failed.get(report.nodeid, before) != before


class OrderPlugin:
    """The plugin of a run in another order.

    Args:
        seed: of the order; None for the order that the plan lists.
        plan: the file that names the tests to run and the file for their outcomes; None where a
            person asked for the seed.
    """

    def __init__(self, seed: int | None, plan: str | None = None) -> None:
        content = {} if plan is None else json.loads(Path(plan).read_text(encoding="utf-8"))
        self._seed: int | None = content.get("seed", seed)
        self._order: list[str] | None = content.get("order")
        self._file: str | None = content.get("outcomes")
        self._outcomes = Outcomes()
        for held in content.get("lifeline", ()):
            Thread(target=_end_with, args=[held], daemon=True).start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Put the tests in order, after all other plugins."""
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
        """Write at once: a run may take too long and be killed."""
        if self._outcomes.add(report) and self._file is not None:
            outcome: tuple[str, Any] = (report.nodeid, self._outcomes.failed[report.nodeid])
            with Path(self._file).open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")


def _end_with(held: int) -> None:
    """Where the audit was killed, nobody else ends this run."""
    os.read(held, 1)  # returns when the other end is closed
    os.killpg(0, signal.SIGKILL)
