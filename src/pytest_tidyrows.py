"""The entry point of the pytest plugin: it imports tidyrows only once a test needs it.

Where tidyrows is only installed, a suite pays for a few options and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.testing.shared import Shared
    from tidyrows.testing.tidy import Tidy

_MARK = (
    "tidy(isolation=..., ledger=..., keep_on_failure=..., dependents=..., own=..., **options): "
    "how the `tidy` fixture of this test treats its rows; all that CleanupManager takes, ledger=, "
    "allow_production=, retry= of the tracker, and isolation= with what isolate() takes."
)
_PLUGIN, _LOADER, _AUTOUSE = "tidyrows plugin", "tidyrows loader", "tidyrows autouse"
_AUTOUSE_ON = {"true": False, "yes": False, "on": False, "1": False, "session": True}
"""Values of tidy_autouse: whether rows of session fixtures are deleted as well."""
_AUTOUSE_OFF = frozenset({"", "false", "no", "off", "0"})
_CHOICES = {
    "own": "tables whose rows that reference those of a test are deleted with them",
    "protect": "tables whose rows are never touched",
    "dependents": "follow_schema, delete or error",
    "lock_timeout": "the longest wait for one lock, in seconds",
    "deadline": "the longest time, in seconds",
    "rows_per_transaction": "the most rows that one transaction deletes",
    "verify": "whether to look again, after it, whether the rows are gone",
    "trust_keys": "whether to delete by key alone, where the database gives keys again",
    "keep_on_failure": "whether rows of failed tests are left for study",
    "allow_foreign_keys_off": "whether circles of NOT NULL keys are deleted without checks",
}
"""Options of CleanupManager in the ini file, each as ``tidy_`` and its name."""
_RESIDUE = ("warn", "fail", "ignore")
"""Values of tidy_residue."""
_RECORDS = "tidyrows"
"""The attribute of a report that carries the records of the plugin."""
_NOTES = "tidyrows_notes"
"""The key in xdist's ``workerinput`` of the folder for a worker's notes."""
_SEEDER = "tidyrows seeder"
_SEED_OF_RUN = "tidyrows_seed"
"""The key in ``workerinput`` of what :data:`_SEED` holds in the controller."""
_AUDITED = "_TIDYROWS_SEED"
"""The seed of the audit that has started this run."""
_RANDOMLY = "randomly_seed"
"""The option of pytest-randomly, which has a number after its own configuration."""
_SEED = pytest.StashKey[tuple[int, bool]]()
"""The seed of the run, and whether somebody has chosen it."""
_ENVIRONMENT = pytest.StashKey[dict[str, str]]()
"""The environment in which the audit starts the suite again: conftest.py may change it."""
_FOLDER = pytest.StashKey[Path]()
"""Where workers write notes for their controller."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and their kin in the ini file."""
    option = parser.getgroup("tidyrows", "test data that leaves no trace").addoption
    flag = partial(option, action="store_true")
    option(
        "--tidy-url",
        metavar="URL",
        help="the database, where there is no fixture tidy_engine (ini: tidy_url)",
    )
    flag("--tidy-keep", help="leave rows of failed tests for study, and print what deletes them")
    flag("--tidy-sweep", help="before the first test, delete what dead runs left")
    flag("--tidy-report", help="at the end, list for each table what was created and deleted")
    option(
        "--tidy-verify",
        choices=("on", "off"),
        help="off: do not look again, after the cleanup of each test, whether its rows are gone",
    )
    flag(
        "--tidy-audit",
        help="find the tests that leave rows, touch those of others, or pass in one order only",
    )
    option(
        "--tidy-audit-seeds",
        metavar="N",
        type=int,
        default=3,
        help="in how many random orders the audit runs the suite again; 0: it runs once",
    )
    option("--tidy-audit-json", metavar="PATH", help="write what the audit found as JSON")
    option("--tidy-audit-html", metavar="PATH", help="write it as one page of HTML")
    option(
        "--tidy-audit-order",
        metavar="SEED",
        type=int,
        help="run the tests in the order in which an audit saw one fail",
    )
    option("--tidy-audit-again", help=argparse.SUPPRESS)
    option(
        "--tidy-seed",
        metavar="N",
        type=int,
        help="repeat the random values of the run that had this seed (or set TIDYROWS_SEED)",
    )
    for name, choice in _CHOICES.items():
        text = f"for the cleanup of every test: {choice}"
        if name in {"own", "protect"}:
            parser.addini(f"tidy_{name}", text, type="linelist", default=[])
        else:
            parser.addini(f"tidy_{name}", text, default="")
    parser.addini("tidy_url", "the database, where there is no fixture tidy_engine")
    parser.addini(
        "tidy_ledger",
        "on, off, or auto: enter rows into a ledger, so that the rows of killed workers can be "
        "swept; auto: under pytest-xdist, and where the environment names other workers",
        default="auto",
    )
    parser.addini(
        "tidy_isolation",
        "how far the fixture tidy keeps a test from others: none, worker, transaction, schema or "
        "database",
        default="worker",
    )
    parser.addini(
        "tidy_residue",
        "what becomes of a run whose tests leave rows: warn names them at its end, fail makes the "
        "run fail too, ignore says nothing",
        default="warn",
    )
    parser.addini(
        "tidy_autouse",
        "true: the rows that any test commits, through any engine, are deleted after it; session: "
        "at the end also those of session fixtures",
        default="false",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest.py, so that its fixtures are set up after ours."""
    if early_config.known_args_namespace.tidy_audit:
        early_config.stash[_ENVIRONMENT] = dict(os.environ)
    _register_autouse(early_config)


def _register_autouse(config: pytest.Config) -> None:
    value = str(config.getini("tidy_autouse")).strip().lower()
    if value in _AUTOUSE_OFF or config.pluginmanager.has_plugin(_AUTOUSE):
        return
    if value not in _AUTOUSE_ON:
        raise pytest.UsageError(
            f"tidy_autouse = {value} in the ini file is none of true, session, false."
        )
    from tidyrows.testing.pytest_autouse import Autouse  # noqa: PLC0415 -- only where it is asked for

    config.pluginmanager.register(Autouse(config, everything=_AUTOUSE_ON[value]), _AUTOUSE)


@pytest.hookimpl(tryfirst=True)  # before pytest-randomly, which takes over our seed
def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and what was asked for; claim the worker's values for this process."""
    config.stash[_SEED] = _base_seed(config)
    config.addinivalue_line("markers", _MARK)
    residue = str(config.getini("tidy_residue"))
    if residue.strip().lower() not in _RESIDUE:
        raise pytest.UsageError(
            f"tidy_residue = {residue} in the ini file is none of {', '.join(_RESIDUE)}."
        )
    _register_autouse(config)  # where a conftest.py names the plugin, the hook above was too late
    worker = getattr(config, "workerinput", {})
    if _NOTES in worker:
        config.stash[_FOLDER] = Path(worker[_NOTES])
    if worker and not os.environ.get("TIDYROWS_RUN"):
        # Children inherit xdist's variables: they must not use its worker's values as their own.
        claim = f"{worker['testrunuid']} {worker['workerid'].removeprefix('gw')} {os.getpid()}"
        os.environ["_TIDYROWS_CLAIM"] = claim
    choices = any(config.getini(f"tidy_{name}") for name in _CHOICES)
    choices = choices or config.getini("tidy_isolation") != "worker"
    if choices or config.getoption("--tidy-sweep") or config.getoption("--tidy-report"):
        _load(config)
    order, again = (config.getoption(f"--tidy-audit-{kind}") for kind in ("order", "again"))
    if order is not None or again is not None:
        from tidyrows.testing.pytest_audit import OrderPlugin  # noqa: PLC0415 -- as above

        config.pluginmanager.register(OrderPlugin(config, order, again), "tidyrows order")
    elif config.getoption("--tidy-audit"):
        _audit(config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the whole-suite mode, if asked; the controller of pytest-xdist runs no test."""
    autouse = session.config.pluginmanager.get_plugin(_AUTOUSE)
    if autouse is not None and not session.config.pluginmanager.has_plugin("dsession"):
        autouse.begin(_load(session.config))


def pytest_report_header(config: pytest.Config) -> str | None:
    """The seed of the run; pytest-randomly prints its own."""
    if hasattr(config.option, _RANDOMLY):
        return None
    return f"tidyrows: --tidy-seed={config.stash[_SEED][0]}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Seed the tests of a suite with tracked factories.

    What test cases of unittest leave is said at the end of the run, too.
    """
    _seed_tests(session.config)
    cases = sys.modules.get("tidyrows.testing.unittest_case")
    if cases is not None:
        cases.RESIDUE.forward = _load(session.config).add


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Where the tests run without their server, that is said at the end of the run."""
    fallback = sys.modules.get("tidyrows.connections.fallback")
    while fallback is not None and fallback.NOTES:
        _load(item.config).add({"note": fallback.NOTES.popitem()[0]})


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller of pytest-xdist, before a worker starts."""
    config = node.config
    if _FOLDER not in config.stash:
        folder = config.stash[_FOLDER] = Path(tempfile.mkdtemp(prefix="tidyrows-"))
        config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))
        config.pluginmanager.register(_Loader(config), _LOADER)
    node.workerinput[_NOTES] = str(config.stash[_FOLDER])
    node.workerinput[_SEED_OF_RUN] = config.stash[_SEED]


def _base_seed(config: pytest.Config) -> tuple[int, bool]:
    """The seed of the run, and whether somebody has chosen it."""
    worker = getattr(config, "workerinput", {})
    if _SEED_OF_RUN in worker:
        return tuple(worker[_SEED_OF_RUN])
    seed = config.getoption("--tidy-seed")
    text = os.environ.get("TIDYROWS_SEED")
    if seed is None and text:
        try:
            seed = int(text)
        except ValueError:
            raise pytest.UsageError(f"TIDYROWS_SEED is {text!r}, which is no number.") from None
    if seed is None:
        audited = os.environ.get(_AUDITED)
        return int(audited or int.from_bytes(os.urandom(4), "big")), False
    if getattr(config.option, _RANDOMLY, None) == "default":
        setattr(config.option, _RANDOMLY, seed)
    return seed, True


def _seed_tests(config: pytest.Config) -> None:
    room = sys.modules.get("tidyrows.factories.factory")
    if room is None or not room.TrackedFactory.__subclasses__():
        return
    if config.pluginmanager.has_plugin(_SEEDER):
        return
    from tidyrows.factories.seeding import BaseSeed  # noqa: PLC0415 -- as above
    from tidyrows.testing.pytest_seed import SeedPlugin  # noqa: PLC0415 -- as above

    seed, given = config.stash[_SEED]
    if hasattr(config.option, _RANDOMLY):
        base = BaseSeed(str(config.getoption(_RANDOMLY)), is_given=True)
        seeds_tests = not config.getoption("randomly_reset_seed")
        plugin = SeedPlugin(base, "--randomly-seed", seeds_tests=seeds_tests)
    else:
        plugin = SeedPlugin(BaseSeed(str(seed), is_given=given), "--tidy-seed")
    config.pluginmanager.register(plugin, _SEEDER)


class _Loader:
    """Loads the plugin in a controller once a worker has sent records or written notes."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, _RECORDS) and not self._is_loaded():
            self._load().pytest_runtest_logreport(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        if self._has_notes() and not self._is_loaded():
            self._load().pytest_testnodedown(node, error)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._has_notes() and not self._is_loaded():
            self._load().pytest_sessionfinish(session)

    def _load(self) -> Any:
        # Ctrl-C in the middle of an import leaves half a module, which the end of the run needs
        # whole; it comes to the main thread only.
        importing = Thread(target=_import)
        importing.start()
        importing.join()
        return _load(self._config)

    def _is_loaded(self) -> bool:
        return self._config.pluginmanager.has_plugin(_PLUGIN)

    def _has_notes(self) -> bool:
        return any(self._config.stash[_FOLDER].glob("*"))


def _load(config: pytest.Config) -> Any:
    """The plugin itself, registered when it is first needed."""
    plugin = config.pluginmanager.get_plugin(_PLUGIN)
    if plugin is None:
        plugin = _import().Plugin(config, lambda: config.stash.get(_FOLDER, None))
        config.pluginmanager.register(plugin, _PLUGIN)
    return plugin


def _audit(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or getattr(config.option, "tx", None):
        raise pytest.UsageError(
            "--tidy-audit looks at the database after each test; with several workers it could not "
            "tell which worker's test made a row: add -n0."
        )
    from tidyrows.testing.pytest_audit import AuditPlugin  # noqa: PLC0415 -- as above

    environment = config.stash.get(_ENVIRONMENT, dict(os.environ))
    environment[_AUDITED] = str(config.stash[_SEED][0])  # or other data could make a test fail
    config.pluginmanager.register(AuditPlugin(config, environment), "tidyrows audit")


def _import() -> Any:
    return import_module("tidyrows.testing.pytest_plugin")


@pytest.fixture(scope="session")
def tidy_engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What the tests' rows go to: define a fixture of this name that returns it.

    An Engine, a sessionmaker, a Session, or one of their asynchronous kin. Without one it is an
    engine for ``--tidy-url``, or for ``tidy_url`` in the ini file.
    """
    yield from _load(request.config).engine()


@pytest.fixture(scope="session")
def tidy_options() -> dict[str, Any]:
    """How the rows of tests are treated: define a fixture of this name that returns a dict.

    In ``conftest.py``, a module or a class, with what ``@pytest.mark.tidy`` takes.
    """
    return {}


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
