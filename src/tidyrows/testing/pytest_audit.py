"""The plugin of ``pytest --tidy-audit``: what each test and each shared fixture did."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import unittest
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from tidyrows.audit.databases import WatchedDatabases
from tidyrows.audit.findings import Wording, row_findings
from tidyrows.audit.observer import AuditObserver
from tidyrows.audit.orders import OrderRuns, order_findings
from tidyrows.audit.page import html
from tidyrows.audit.report import AuditReport, lines, report_of, wrapped
from tidyrows.audit.row_history import Maker, RowHistory
from tidyrows.audit.runs import AuditRun, SuiteCommand, as_listed, shuffled
from tidyrows.testing.put_back import PutBack
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

_PATIENCE = 60.0
"""Seconds that each further run may take beyond three times the first."""
_SHORT = 120.0
"""Seconds that all runs of a few tests may take together beyond that."""
_XUNIT = re.compile(r"_(?:xunit|unittest)_(\w+?)_fixture(?:_(.*))?$")
_ENDED = Maker("the end of shared fixtures", is_test=False)


class AuditPlugin:
    """The audit of one run of a suite."""

    def __init__(self, config: pytest.Config, environment: Mapping[str, str]) -> None:
        self._config = config
        self._environment = environment
        self._observer = AuditObserver()
        self._databases = WatchedDatabases()
        self._history = RowHistory(self._databases.sees)
        self._outcomes = Outcomes()
        self._maker = Maker("what was done before the first test", is_test=False)
        self._unittests: set[str] = set()
        self._began = time.monotonic()
        self._report: AuditReport | None = None
        self._written: list[str] = []
        self._changed: tuple[str, ...] = ()
        self._not_put_back: dict[str, None] = {}
        self._observer.open(self._databases.meet, self._databases.release)
        self._put_back = PutBack(config, self._observer)

    # -- what ran ---------------------------------------------------------------------------

    def _look(self) -> None:
        """What is different since the last look was done by the current maker."""
        observed = self._observer.pop_observed()
        self._databases.add_look(self._history, self._maker, observed)

    @contextmanager
    def _running(self, maker: Maker) -> Iterator[None]:
        self._look()
        before, self._maker = self._maker, maker
        try:
            yield
        finally:
            self._look()
            self._maker = before

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
        self._put_back.begin_test()
        with self._running(Maker(item.nodeid)):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Another plugin may run a test again after its end."""
        if self._maker == _ENDED:
            self._look()
            self._maker = Maker(item.nodeid)

    def _teardown(self, usual: Callable[[], None], *, last: bool) -> Callable[[], None]:
        def teardown() -> None:
            try:
                usual()
            finally:
                self._look()
                self._maker = _ENDED
                if last:
                    self._databases.release()

        return teardown

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """A fixture that several tests share."""
        if fixturedef.scope == "function":
            return (yield)
        with self._running(Maker(_fixture(fixturedef), is_test=False)):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How a test has ended."""
        self._outcomes.add(report)

    # -- the end -----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, object, object]:
        """Delete what the tests left, run the suite in other orders, and make the report."""
        self._look()
        try:
            return (yield)
        finally:
            self._finish(session, exitstatus)

    def _finish(self, session: pytest.Session, exitstatus: int) -> None:
        notes = self._databases.notes
        interrupted = False
        try:
            self._put_back.end()
        except KeyboardInterrupt:
            interrupted = True
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        self._observer.close()
        self._compare()
        runs = [AuditRun("as it is", self._outcomes.failed)]
        seeds = int(self._config.getoption("--tidy-audit-seeds"))
        whole = exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
        if seeds and runs[0].failed and whole and not (interrupted or session.shouldstop):
            others = self._other_runs(runs[0], range(1, seeds + 1))
            runs = others.runs
            try:
                others.run_all()
            except KeyboardInterrupt:
                session.exitstatus = pytest.ExitCode.INTERRUPTED
                self._compare()
                notes["the runs in other orders were interrupted"] = None
            notes |= dict.fromkeys(others.notes)
        self._databases.close()
        wording = Wording(
            self._observer.models, self._unittests, self._databases.own, self._databases.is_keyless
        )
        findings = [*row_findings(self._history, wording), *order_findings(runs, self._history)]
        notes |= {
            note: None
            for note in self._put_back.notes
            if not any(name in note for name in self._databases.own)
        }
        self._report = report_of(findings, runs, list(notes), list(self._not_put_back))
        self._written = list(self._write(self._report))

    def _compare(self) -> None:
        """See whether the database is as it was."""
        found = self._databases.changes()
        self._changed = tuple(each.text for each in found if not each.is_setup)
        self._not_put_back |= dict.fromkeys(each.text for each in found)
        self._databases.release()  # no connection is in the way of the next run

    def _other_runs(self, first: AuditRun, seeds: Iterable[int]) -> OrderRuns:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        given = self._config.invocation_params
        seconds = _PATIENCE + 3 * (time.monotonic() - self._began)
        command = SuiteCommand(
            [str(each) for each in given.args],
            given.dir,
            seconds,
            self._environment,
            self._separate,
            self._put_back.sweep,
        )
        if reporter is not None and reporter.verbosity < 0:
            reporter.write("\n")  # -q leaves the line of dots open

        def run(name: str, order: Sequence[str], seed: int | None = None) -> AuditRun:
            if reporter is not None:
                tests = "" if "::" in name else f"{len(order)} test(s) "  # a few have their own
                for line in wrapped(f"tidyrows audit: {tests}{name}", self._width):
                    reporter.write_line(line)
            done = replace(command.run(name, order, seed), changed=self._changed)
            self._compare()
            return done

        until = seconds + _SHORT
        short: list[float] = []

        def has_time() -> bool:
            short.append(time.monotonic())
            return short[-1] - short[0] < until

        return OrderRuns(first, seeds, self._history, run, has_time)

    @property
    def _width(self) -> int:
        return self._config.get_terminal_writer().fullwidth

    def _separate(self, folder: Path) -> Iterator[str]:
        """Arguments that keep the other runs from the files that the first has written."""
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

    def _write(self, report: AuditReport) -> Iterator[str]:
        """Write the files that were asked for; lines that report it."""
        texts = {"json": json.dumps(report.as_json(), indent=1), "html": html(report)}
        for kind, text in texts.items():
            given = self._config.getoption(f"--tidy-audit-{kind}")
            if given:
                path = Path(self._config.invocation_params.dir, given)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8", errors="backslashreplace")
                except OSError as error:
                    yield f"--tidy-audit-{kind}: {given} could not be written ({error.strerror})"
                else:
                    yield f"written to {given}"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, object, object]:
        """Print the report, before the failures and warnings of the suite."""
        if self._report is not None and self._report.tests:
            terminalreporter.write_sep("=", "tidyrows audit")
            for line in lines(self._report, self._width):
                terminalreporter.write_line(line)
            for written in self._written:
                for line in wrapped(written, self._width):
                    terminalreporter.write_line(line)
        return (yield)


def _fixture(fixturedef: pytest.FixtureDef[Any]) -> str:
    """The name of a shared fixture; of the set-up of a class or a module its own name."""
    found = _XUNIT.match(fixturedef.argname)
    if found is not None:
        return f"{found[1]} of {found[2] or fixturedef.baseid}"
    return f"fixture {fixturedef.argname} ({fixturedef.scope})"


class Outcomes:
    """The outcome of each test, in the order in which they ran."""

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
    """The plugin of a run in another order."""

    def __init__(self, config: pytest.Config, seed: int | None, plan: str | None = None) -> None:
        content = {} if plan is None else json.loads(Path(plan).read_text(encoding="utf-8"))
        self._seed: int | None = content.get("seed", seed)
        self._order: list[str] | None = content.get("order")
        self._file: str | None = content.get("outcomes")
        self._outcomes = Outcomes()
        self._put_back: PutBack | None = None
        if self._file is not None:  # a run of the audit
            self._write(None, WorkerContext.current().run_id)
            self._put_back = PutBack(config)
        for descriptor in content.get("lifeline", ()):
            Thread(target=_end_with, args=[descriptor], daemon=True).start()

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
            self._write(report.nodeid, self._outcomes.failed[report.nodeid])

    def _write(self, name: str | None, what: Any) -> None:
        with Path(str(self._file)).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, what]) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        """A test begins."""
        if self._put_back is not None:
            self._put_back.begin_test()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Delete what the tests left."""
        try:
            return (yield)
        finally:
            if self._put_back is not None:
                self._put_back.end()


def _end_with(descriptor: int) -> None:
    """Where the audit was killed, nobody else ends this run."""
    os.read(descriptor, 1)  # returns when the other end is closed
    os.killpg(0, signal.SIGKILL)
