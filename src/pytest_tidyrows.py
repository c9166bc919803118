"""The door of the pytest plugin: pytest loads this module, and tidyrows only once a test asks.

A suite in whose environment tidyrows is merely installed pays for a few options and nothing else.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.testing import Tidy
    from tidyrows.testing.shared import Shared

_MARK = (
    "tidy(ledger=..., keep_on_failure=..., dependents=..., own=..., **options): how the `tidy` "
    "fixture of this test treats its rows; all that CleanupManager takes, and ledger=, "
    "allow_production=, retry= of the tracker."
)
_AUTOUSE = "tidyrows, whatever the suite does"
_ALL = {"true": False, "yes": False, "on": False, "1": False, "session": True}
"""What tidy_autouse may say: whether rows of session fixtures are deleted as well."""
_NONE = frozenset({"", "false", "no", "off", "0"})
_PLUGIN, _DOOR, _SAID = "tidyrows at work", "tidyrows at the door", "tidyrows"
_PLACE = "tidyrows_board"
_ENVIRONMENT = pytest.StashKey[dict[str, str]]()
"""What the audit starts the suite with once more: conftest.py may change it."""
_KEY, _BOARD = pytest.StashKey[str](), pytest.StashKey[str]()
"""What the controller and its workers alone know, and a folder that they make if need be."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and their kin in the ini file."""
    group = parser.getgroup("tidyrows", "test data that leaves no trace")
    group.addoption(
        "--tidy-url",
        metavar="URL",
        help="the database, where no fixture tidy_engine says so (ini: tidy_url)",
    )
    group.addoption(
        "--tidy-keep",
        action="store_true",
        help="leave the rows of failed tests for study, and say what deletes them",
    )
    group.addoption(
        "--tidy-sweep",
        action="store_true",
        help="before the first test, delete what dead runs left",
    )
    group.addoption(
        "--tidy-report",
        action="store_true",
        help="at the end, say of each table what was created and deleted",
    )
    group.addoption(
        "--tidy-verify",
        choices=("on", "off"),
        default="on",
        help="off: do not look again, after the cleanup of each test, whether its rows are gone",
    )
    group.addoption(
        "--tidy-audit",
        action="store_true",
        help="find the tests that leave rows, touch those of others, or pass in one order only",
    )
    group.addoption(
        "--tidy-audit-seeds",
        metavar="N",
        type=int,
        default=3,
        help="in how many random orders the audit runs the suite again; 0: it runs once",
    )
    group.addoption("--tidy-audit-json", metavar="PATH", help="write what the audit found as JSON")
    group.addoption("--tidy-audit-html", metavar="PATH", help="write it as one page of HTML")
    group.addoption(
        "--tidy-audit-order",
        metavar="SEED",
        type=int,
        help="run the tests in the order in which an audit saw one fail",
    )
    group.addoption("--tidy-audit-again", help=argparse.SUPPRESS)
    parser.addini("tidy_url", "the database, where no fixture tidy_engine says so")
    parser.addini(
        "tidy_ledger",
        "on, off, or auto: enter rows into a ledger, by which killed workers are swept; auto does "
        "under pytest-xdist, and where the environment says that there are other workers",
        default="auto",
    )
    parser.addini(
        "tidy_autouse",
        "true: what any test commits, through whatever engine, is deleted after it; session: and "
        "at the end what session fixtures have made",
        default="false",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest.py, so that its fixtures are set up after ours."""
    if early_config.known_args_namespace.tidy_audit:
        early_config.stash[_ENVIRONMENT] = dict(os.environ)
    _look_at_all(early_config)


def _look_at_all(config: pytest.Config) -> None:
    said = str(config.getini("tidy_autouse")).strip().lower()
    if said in _NONE or config.pluginmanager.has_plugin(_AUTOUSE):
        return
    if said not in _ALL:
        raise pytest.UsageError(
            f"tidy_autouse = {said} in the ini file is none of true, session, false."
        )
    from tidyrows.testing.pytest_autouse import Autouse  # noqa: PLC0415 -- only where it is asked for

    config.pluginmanager.register(Autouse(config, everything=_ALL[said]), _AUTOUSE)


def pytest_configure(config: pytest.Config) -> None:
    """Let the mark be known, and which process this run's values belong to."""
    config.addinivalue_line("markers", _MARK)
    _look_at_all(config)  # where a conftest.py names the plugin, that was too late for the above
    given = getattr(config, "workerinput", None)
    config.stash[_KEY] = (given or {}).get(_SAID) or secrets.token_hex(16)
    config.stash[_BOARD] = (given or {}).get(_PLACE) or str(
        Path(tempfile.gettempdir()) / f"tidyrows-{secrets.token_hex(8)}"
    )
    if given is not None and not os.environ.get("TIDYROWS_RUN"):
        # Children inherit xdist's variables: they shall not take its worker's values for theirs.
        claim = f"{given['testrunuid']} {given['workerid'].removeprefix('gw')} {os.getpid()}"
        os.environ["_TIDYROWS_CLAIM"] = claim
    if config.getoption("--tidy-sweep") or config.getoption("--tidy-report"):
        _load(config)
    if any(config.getoption(f"--tidy-audit{kind}") is not None for kind in ("-order", "-again")):
        _order(config)
    elif config.getoption("--tidy-audit"):
        _audit(config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Listen to all, if asked; the controller of pytest-xdist runs no test."""
    autouse = session.config.pluginmanager.get_plugin(_AUTOUSE)
    if autouse is not None and not session.config.pluginmanager.has_plugin("dsession"):
        autouse.begin(_load(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller of pytest-xdist, before a worker starts."""
    if not node.config.pluginmanager.has_plugin(_DOOR):
        node.config.pluginmanager.register(_Door(node.config), _DOOR)
    node.workerinput[_SAID] = node.config.stash[_KEY]
    node.workerinput[_PLACE] = node.config.stash[_BOARD]


class _Door:
    """Lets the plugin in once a worker has something to say, or has left a note of it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, _SAID) and not self._is_in():
            self._let_in().pytest_runtest_logreport(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        if self._is_noted() and not self._is_in():
            self._let_in().pytest_testnodedown(node, error)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._is_noted() and not self._is_in():
            self._let_in().pytest_sessionfinish(session)

    def _let_in(self) -> Any:
        # Ctrl-C in the middle of an import leaves half a module, which the end of the run needs
        # whole; it comes to the main thread only.
        importing = Thread(target=_import)
        importing.start()
        importing.join()
        return _load(self._config)

    def _is_in(self) -> bool:
        return self._config.pluginmanager.has_plugin(_PLUGIN)

    def _is_noted(self) -> bool:
        return Path(self._config.stash[_BOARD]).exists()


def _load(config: pytest.Config) -> Any:
    """The plugin itself, registered with the first need of it."""
    plugin = config.pluginmanager.get_plugin(_PLUGIN)
    if plugin is None:
        plugin = _import().Plugin(config, config.stash[_KEY], config.stash[_BOARD])
        config.pluginmanager.register(plugin, _PLUGIN)
    return plugin


def _audit(config: pytest.Config) -> None:
    """Look at the suite as it is."""
    if hasattr(config, "workerinput") or getattr(config.option, "tx", None):
        raise pytest.UsageError(
            "--tidy-audit looks at the database after each test, and with several workers it could "
            "not tell whose row is whose: add -n0."
        )
    from tidyrows.testing.pytest_audit import Audit  # noqa: PLC0415 -- as above

    environment = config.stash.get(_ENVIRONMENT, dict(os.environ))
    config.pluginmanager.register(Audit(config, environment), "tidyrows audit")


def _order(config: pytest.Config) -> None:
    """Run the tests in an order that an audit has drawn."""
    from tidyrows.testing.audit_child import Again  # noqa: PLC0415 -- as above

    again = Again(config.getoption("--tidy-audit-order"), config.getoption("--tidy-audit-again"))
    config.pluginmanager.register(again, "tidyrows order")


def _import() -> Any:
    return import_module("tidyrows.testing.pytest_plugin")


@pytest.fixture(scope="session")
def tidy_engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What the tests' rows go to: define a fixture of this name that returns it.

    An Engine, a sessionmaker, a Session, or one of their asynchronous kin. Without one it is an
    engine for ``--tidy-url``, or for ``tidy_url`` in the ini file.
    """
    yield from _load(request.config).engine()


@pytest.fixture
def tidy(request: pytest.FixtureRequest) -> Iterator[Tidy]:
    """This test's tracker, context, session and cleanup: what it creates is gone after it."""
    yield from _load(request.config).for_test(request)


@pytest.fixture(scope="session")
def tidy_worker(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Rows that all tests of this process share: they go at its end."""
    yield from _load(request.config).for_worker(request)


@pytest.fixture(scope="session")
def tidy_run(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Rows that all tests of the run share, in whichever worker: they go at its end."""
    yield from _load(request.config).for_run(request)
