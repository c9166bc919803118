"""The plugin of ``pytest --tidy-audit``: what each test and each shared fixture did."""

from __future__ import annotations

import json
import re
import time
import unittest
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tidyrows.audit.findings import Known, of_rows
from tidyrows.audit.makers import Book, Maker
from tidyrows.audit.observer import Ear
from tidyrows.audit.orders import of_orders, rerun
from tidyrows.audit.page import html
from tidyrows.audit.report import Report, reported
from tidyrows.audit.runs import Command, Run
from tidyrows.audit.text import lines
from tidyrows.audit.watches import Watches
from tidyrows.testing.audit_child import Outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

_PATIENCE = 60.0
"""Seconds that each further run may take beyond three times the first."""
_XUNIT = re.compile(r"_(?:xunit|unittest)_(\w+?)_fixture(?:_(.*))?$")
_ENDED = Maker("the end of shared fixtures", is_test=False)


class Audit:
    """One run of a suite, looked at.

    Args:
        config: pytest's.
        environment: what the suite found when it was started.
    """

    def __init__(self, config: pytest.Config, environment: Mapping[str, str]) -> None:
        self._config = config
        self._environment = environment
        self._ear = Ear()
        self._watches = Watches(self._ear.be_deaf_to_this_thread, self._ear.deaf)
        self._book = Book(self._watches.sees)
        self._outcomes = Outcomes()
        self._who = Maker("what was done before the first test", is_test=False)
        self._unittests: set[str] = set()
        self._began = time.monotonic()
        self._report: Report | None = None
        self._written: list[str] = []
        self._ear.open(self._watches.meet, self._watches.release)

    # -- stretches of time ---------------------------------------------------------------------

    def _enter(self) -> None:
        """Whatever happened since the last look was done by whoever is at work."""
        heard = self._ear.take()
        self._book.enter(self._who, self._watches.look(self._who, heard), heard)

    @contextmanager
    def _at_work(self, who: Maker) -> Iterator[None]:
        self._enter()
        before, self._who = self._who, who
        try:
            yield
        finally:
            self._enter()
            self._who = before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """A test, up to the end of its own fixtures."""
        if isinstance(getattr(item, "cls", None), type) and issubclass(
            item.cls,  # type: ignore[attr-defined]
            unittest.TestCase,
        ):
            self._unittests.add(item.nodeid)
        # After a test's own fixtures, and before those that end with it, pytest calls this one.
        usual, last = item.teardown, nextitem is None
        item.teardown = self._teardown(usual, last=last)  # type: ignore[method-assign]
        with self._at_work(Maker(item.nodeid)):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Another plugin may run a test again after its end."""
        if self._who == _ENDED:
            self._enter()
            self._who = Maker(item.nodeid)

    def _teardown(self, usual: Callable[[], None], *, last: bool) -> Callable[[], None]:
        def teardown() -> None:
            try:
                usual()
            finally:
                self._enter()
                self._who = _ENDED
                if last:
                    self._watches.release()

        return teardown

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """A fixture that several tests share."""
        if fixturedef.scope == "function":
            return (yield)
        with self._at_work(Maker(_fixture(fixturedef), is_test=False)):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How a test has ended."""
        self._outcomes.hear(report)

    # -- the end -----------------------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Run the suite in other orders, and say what was found."""
        self._enter()
        self._ear.close()
        self._watches.close()
        failed = self._outcomes.failed
        runs = [Run("as it is", failed)]
        whole = exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
        seeds = int(self._config.getoption("--tidy-audit-seeds"))
        if seeds and failed and whole and not session.shouldstop:
            try:
                for run in self._in_other_orders(runs[0], seeds):
                    runs.append(run)  # noqa: PERF402 -- those are kept that have ended before Ctrl-C
            except KeyboardInterrupt:
                session.exitstatus = pytest.ExitCode.INTERRUPTED
                self._watches.notes["the runs in other orders were interrupted"] = None
        known = Known(
            self._ear.models, self._unittests, self._watches.own, self._watches.is_keyless
        )
        if not self._watches.met:
            self._watches.notes["no database was met: nobody used SQLAlchemy in this process"] = (
                None
            )
        findings = [*of_rows(self._book, known), *of_orders(runs, self._book)]
        self._report = reported(findings, len(failed), runs, list(self._watches.notes))
        self._written = list(self._write(self._report))

    def _in_other_orders(self, first: Run, seeds: int) -> Iterator[Run]:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        given = self._config.invocation_params
        seconds = _PATIENCE + 3 * (time.monotonic() - self._began)
        order = list(first.failed)
        arguments = [str(each) for each in given.args]
        command = Command(arguments, given.dir, seconds, self._environment, self._kept_apart)

        if reporter is not None and reporter.verbosity < 0:
            reporter.write("\n")  # -q leaves the line of dots open

        def run(name: str, seed: int | None) -> Run:
            if reporter is not None:
                reporter.write_line(f"tidyrows audit: {len(order)} test(s) {name}")
            return command.run(name, order, seed)

        return rerun(first, range(1, seeds + 1), run)

    def _kept_apart(self, folder: Path) -> Iterator[str]:
        """What keeps the further runs from the files that the first has written."""
        plugins = self._config.pluginmanager
        given = [
            *map(str, self._config.invocation_params.args),
            *self._config.getini("addopts"),
            self._environment.get("PYTEST_ADDOPTS", ""),
        ]
        if plugins.has_plugin("randomly") and not any("--randomly" in each for each in given):
            yield from ("-p", "no:randomly")  # it would draw other data in each run, too
        if plugins.has_plugin("cacheprovider"):
            yield from ("-o", f"cache_dir={folder / 'cache'}")
        if self._config.getoption("xmlpath", None):
            yield f"--junitxml={folder / 'junit.xml'}"
        if plugins.has_plugin("pytest_cov"):
            yield "--no-cov"

    def _write(self, report: Report) -> Iterator[str]:
        """Write what was asked for; what cannot be written is said."""
        texts = {"json": json.dumps(report.as_json(), indent=1), "html": html(report)}
        for kind, text in texts.items():
            given = self._config.getoption(f"--tidy-audit-{kind}")
            if given:
                path = Path(self._config.invocation_params.dir, given)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8", errors="backslashreplace")
                except OSError as error:
                    yield f"--tidy-audit-{kind}: {path} could not be written ({error.strerror})"
                else:
                    yield f"written to {path}"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table of culprits."""
        if self._report is not None and self._report.tests:
            terminalreporter.write_sep("=", "tidyrows audit")
            for line in (*lines(self._report), *self._written):
                terminalreporter.write_line(line)


def _fixture(fixturedef: pytest.FixtureDef[Any]) -> str:
    """How a shared fixture is named: the set-up of a class or a module by its own name."""
    found = _XUNIT.match(fixturedef.argname)
    if found is not None:
        return f"{found[1]} of {found[2] or fixturedef.baseid}"
    return f"fixture {fixturedef.argname} ({fixturedef.scope})"
