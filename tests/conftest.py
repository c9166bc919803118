"""Fixtures of the behaviour suite: every database, bystanders, and loud words where one is absent.

``database`` / ``engine``: an empty database, on SQLite, PostgreSQL and MariaDB.
``zoo_database`` / ``zoo_engine``: the same with the empty tables of :mod:`harness.models`.
``any_driver_engine`` / ``any_driver_zoo_engine``: with psycopg2 and mysqlclient too; where a test
has several cases, the drivers take turns (all of them with ``-m soak``).
``sqlite_engine``, ``postgresql_engine``, ``mysql_engine``: one database, for what only it does.
``sqlite_engine_without_foreign_keys``: SQLite as it comes.

``harness.pairs``: few cases in place of a product of parameters, for tests with many.

``ledgers``, ``worker``, ``outside``: workers with a ledger, and an engine that is none of theirs.
``database.engine(...)`` makes further engines, ``database.extra_schema()`` further schemas.
Environment: TIDYROWS_POSTGRESQL_URL (``pip`` forces the server from pip), TIDYROWS_MYSQL_URL,
TIDYROWS_REQUIRE=all (an absent database is a failure). The users need all rights: they make
databases, end leaked sessions, and look past row-level security.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

pytest.register_assert_rewrite("harness.bystanders")

from harness import servers, targets  # noqa: E402 -- after the assert rewriting it needs
from harness.bystanders import Snapshot  # noqa: E402 -- as above
from harness.databases import Database, Homes  # noqa: E402 -- as above
from harness.ledgers import Ledgers, Worker, closing_all  # noqa: E402 -- as above
from harness.models import zoo_file, zoo_metadata  # noqa: E402 -- as above
from tidyrows import production  # noqa: E402 -- as above
from tidyrows.capture.ownership import entered_sinks  # noqa: E402 -- as above

for _variable in (*production.ENVIRONMENT_VARIABLES, production.ALLOW_VARIABLE):
    os.environ.pop(
        _variable, None
    )  # the tests' trackers, in subprocesses too, are of no production

# PyMySQL reads it for every connection, encrypted or not: the machine's own takes 20 ms.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "harness" / "nobody.pem")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: the tests of Ctrl-C could not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ABSENT = "not at hand"


@pytest.fixture(scope="session")
def homes() -> Iterator[Homes]:
    """The databases of this process, dropped at its end."""
    made = Homes({"postgresql": servers.find_postgresql, "mysql": servers.find_mysql})
    yield made
    made.drop_all()


@contextmanager
def _lease(target: str, homes: Homes, tmp_path: Path, *, zoo: bool) -> Iterator[Database]:
    if target.startswith("sqlite"):
        file = tmp_path / "test.db"
        if zoo:
            file.write_bytes(zoo_file())
        database = Database(target, sa.URL.create("sqlite", database=str(file)))
    else:
        backend = target.partition("+")[0]
        try:
            servers.require_driver(target)
            kept = zoo_metadata(backend) if zoo else ()
            home = homes.home(backend, "zoo" if zoo else "", *kept)
        except servers.AbsentError as absent:
            if servers.everything_required():
                pytest.fail(f"{servers.REQUIRE_VARIABLE}=all, but {absent}", pytrace=False)
            pytest.skip(str(absent))
        database = Database(target, home.url.set(drivername=target), home)
    try:
        yield database
    finally:
        database.close()


@pytest.fixture(params=targets.DEFAULT)
def database(request: Any, homes: Homes, tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    with _lease(request.param, homes, tmp_path, zoo=False) as leased:
        yield leased


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """An engine on an empty database."""
    return database.engine()


@pytest.fixture(params=targets.DEFAULT)
def zoo_database(request: Any, homes: Homes, tmp_path: Path) -> Iterator[Database]:
    """A database with the zoo's tables, empty."""
    with _lease(request.param, homes, tmp_path, zoo=True) as leased:
        yield leased


@pytest.fixture
def zoo_engine(zoo_database: Database) -> sa.Engine:
    """An engine on a database with the zoo's tables, empty."""
    return zoo_database.engine()


@pytest.fixture(params=targets.ALL_DRIVERS)
def any_driver_engine(request: Any, homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """As ``engine``, with every driver."""
    with _lease(request.param, homes, tmp_path, zoo=False) as leased:
        yield leased.engine()


@pytest.fixture(params=targets.ALL_DRIVERS)
def any_driver_zoo_engine(request: Any, homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """As ``zoo_engine``, with every driver."""
    with _lease(request.param, homes, tmp_path, zoo=True) as leased:
        yield leased.engine()


@pytest.fixture
def sqlite_engine(homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty SQLite file that enforces foreign keys."""
    with _lease("sqlite", homes, tmp_path, zoo=False) as leased:
        yield leased.engine()


@pytest.fixture
def sqlite_engine_without_foreign_keys(homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty SQLite file as it comes: foreign keys are not enforced."""
    with _lease(targets.WITHOUT_FOREIGN_KEYS, homes, tmp_path, zoo=False) as leased:
        yield leased.engine()


@pytest.fixture
def postgresql_engine(homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty PostgreSQL database, through psycopg."""
    with _lease("postgresql+psycopg", homes, tmp_path, zoo=False) as leased:
        yield leased.engine()


@pytest.fixture
def mysql_engine(homes: Homes, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty MariaDB database, through PyMySQL."""
    with _lease("mysql+pymysql", homes, tmp_path, zoo=False) as leased:
        yield leased.engine()


@pytest.fixture
def outside(database: Database) -> sa.Engine:
    """An engine on the same database that no tracker listens to."""
    return database.engine()


@pytest.fixture
def ledgers() -> Iterator[Ledgers]:
    """The ledgers of a test, closed at its end."""
    with closing_all() as made:
        yield made


@pytest.fixture
def worker(database: Database, ledgers: Ledgers) -> Worker:
    """A worker with a ledger."""
    return Worker(database, ledgers)


@pytest.fixture(autouse=True)
def _no_tracker_is_left_behind() -> Iterator[None]:
    """A tracker that a test leaves ambient would own the rows of the tests after it."""
    yield
    left = entered_sinks()
    for tracker in left:
        tracker.stop()
    assert not left, f"the test left trackers started: {left}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a test has several cases, the drivers of one database take turns.

    The other cases run with ``-m soak``. Every case of a module with ``EVERY_DRIVER`` runs always.
    """
    turns: dict[tuple[str, str], dict[str, list[pytest.Item]]] = {}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        drivers = [each for each in values if isinstance(each, str) and each in targets.SEVERAL]
        if len(drivers) == 1 and not hasattr(item.module, "EVERY_DRIVER"):
            backend = drivers[0].partition("+")[0]
            cases = turns.setdefault((item.nodeid.partition("[")[0], backend), {})
            cases.setdefault(item.name.replace(drivers[0], backend), []).append(item)
    for cases in turns.values():
        several = [each for each in cases.values() if len(each) > 1]
        for number, each in enumerate(several if len(several) > 1 else ()):
            for at, item in enumerate(each):
                if at != number % len(each):
                    item.add_marker(pytest.mark.soak)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Say which rows differ between two snapshots (``now == before``), not where two dicts do."""
    if op == "==" and isinstance(left, Snapshot) and isinstance(right, Snapshot):
        return ["the database is as before", *right.difference(left)]
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A run without a database must not look like a run with it."""
    missing: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        if isinstance(report.longrepr, tuple) and ABSENT in report.longrepr[2]:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            missing[reason] = missing.get(reason, 0) + 1
    for reason, count in missing.items():
        terminalreporter.write_line(f"NOT TESTED, {count} tests skipped: {reason}", yellow=True)
