"""``tidy_autouse`` in the ini file: the rows of a whole suite, as it is, are deleted."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tidyrows.cleanup.configuration import configured
from tidyrows.errors import UnknownTableError
from tidyrows.suite.suite import WholeSuite
from tidyrows.testing.pytest_options import ledger_option
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tidyrows.suite.tracker import SuiteTracker
    from tidyrows.testing.pytest_plugin import Plugin


class Autouse:
    """Reports pytest's tests and fixtures to a :class:`WholeSuite`."""

    def __init__(self, config: pytest.Config, *, everything: bool) -> None:
        self._config = config
        self._everything = everything
        self._plugin: Plugin | None = None
        self._suite: WholeSuite | None = None
        self._shared: dict[pytest.Item | pytest.Collector, SuiteTracker] = {}
        self._fixtures: dict[pytest.Item | pytest.Collector, Any] = {}
        self._test = ExitStack()
        self._options: dict[str, Any] = {}
        self._wrong: BaseException | None = None

    def begin(self, plugin: Plugin) -> None:
        """Start, where tests are run: not in the controller of pytest-xdist."""
        self._plugin = plugin
        option = ledger_option(self._config)
        # xdist replaces a worker that crashes, even if it has one only
        is_worker = hasattr(self._config, "workerinput")
        several = is_worker or WorkerContext.current().worker_count > 1
        option_of = self._config.getoption
        # for a process after this one
        keeps = option_of("--tidy-keep") or configured().get("keep_on_failure", False)
        # each run of the audit begins with the database as it was
        is_audited = bool(option_of("--tidy-audit") or option_of("--tidy-audit-again"))
        self._suite = WholeSuite(
            plugin.add,
            with_ledger=several or keeps or is_audited if option is None else option,
            on_ledger=plugin.add_ledger,
            everything=self._everything or is_audited,
        )
        self._suite.start()
        plugin.before_the_end.append(self._end)

    def _end(self) -> None:
        if self._suite is not None:
            self._suite.end()
            self._suite = None

    # -- tests -----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """A test begins with the suite's own hooks, before its first fixture."""
        if self._suite is not None and self._plugin is not None:
            self._options, self._wrong = self._options_of(self._plugin, item, {})
            keeps = partial(self._plugin.keeps, item, self._options)
            show = partial(item.add_report_section, "teardown", "tidyrows")
            self._test.enter_context(self._suite.test(item.nodeid, self._options, keeps, show))
        return (yield)

    def _options_of(
        self, plugin: Plugin, item: pytest.Item | pytest.Collector, fixture: Any
    ) -> tuple[dict[str, Any], BaseException | None]:
        """The options of a test, and what is wrong in them: it fails the test's first fixture.

        A hook that fails here would keep the hooks of other plugins from being called.
        """
        try:
            return plugin.whole_suite_options(item, fixture), None
        except pytest.fail.Exception as error:
            return {}, error

    @pytest.fixture(autouse=True)
    def _tidy_autouse(self, request: pytest.FixtureRequest, tidy_options: Any) -> Iterator[None]:
        """Set up before the test's other fixtures, and so torn down after them."""
        if self._suite is not None and self._plugin is not None:
            if tidy_options:
                options, self._wrong = self._options_of(self._plugin, request.node, tidy_options)
                self._options.update(options)
            for node in request.node.listchain():  # rows of wider fixtures may end after it
                self._fixtures[node] = tidy_options
            if self._wrong is not None:
                raise self._wrong
            try:
                self._suite.refuse_unknown_tables(self._options)
            except UnknownTableError as error:
                pytest.fail(str(error), pytrace=False)
        yield
        self._test.close()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """Where no fixture was set up, the test ends here."""
        try:
            return (yield)
        finally:
            self._test.close()

    # -- fixtures of a wider scope ---------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """The rows of such a fixture, its tear-down included, live as long as its scope."""
        if request.scope == "function" or self._suite is None:
            return (yield)
        engines, tracker = self._suite.engines, self._tracker_of(self._suite, request.node)
        torn_down = ExitStack()
        fixturedef.addfinalizer(torn_down.close)  # the first that is added is the last to be called
        with engines.pushed(tracker):
            value = yield
        fixturedef.addfinalizer(lambda: torn_down.callback(engines.push(tracker)))
        return value

    def _tracker_of(self, suite: WholeSuite, node: pytest.Item | pytest.Collector) -> SuiteTracker:
        if isinstance(node, pytest.Session):
            return suite.outside
        tracker = self._shared.get(node)
        if tracker is None:
            tracker = self._shared[node] = suite.shared(node.nodeid)
            node.addfinalizer(partial(self._end_shared, suite, node))
        return tracker

    def _end_shared(self, suite: WholeSuite, node: pytest.Item | pytest.Collector) -> None:
        """Delete the rows of a scope's fixtures: by its marks, and by its last ``tidy_options``."""
        tracker = self._shared.pop(node)
        options: dict[str, Any] = {}
        if self._plugin is not None:
            fixture = self._fixtures.pop(node, {})
            options, _wrong_in_each_test = self._options_of(self._plugin, node, fixture)
        suite.finish(tracker, options)
