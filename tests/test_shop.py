"""The suites of examples/shop leave nothing, with an application that commits for itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.suites import fresh_environment

pytest.importorskip("flask")
pytest.importorskip("httpx")

SHOP = Path(__file__).parent.parent / "examples" / "shop"
SCENARIOS = 40
"""Of behave: each row of an outline is one."""
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]

pytestmark = pytest.mark.slow

on_one_database = pytest.mark.parametrize(
    "shared",
    [
        pytest.param("sqlite_engine", marks=pytest.mark.soak),
        "postgresql_engine",
        pytest.param("mysql_engine", marks=pytest.mark.soak),
    ],
    indirect=True,
)


@pytest.fixture
def shared(request):
    """An engine on the database that everybody uses."""
    return request.getfixturevalue(request.param)


def left_after(engine, *command, sweeps=False, **environment):
    """Run a command on the database, and count the rows: how it ended, and what it said."""
    environment["SHOP_DATABASE_URL"] = engine.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "left.py", *["--sweep"] * sweeps, "--", sys.executable, *command],
        cwd=SHOP,
        env={**fresh_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout


@on_one_database
def test_two_workers_on_one_database_leave_nothing(shared):
    status, said = left_after(shared, *PYTEST, "tests_pytest", "-n", "2")
    assert status == 0, said
    assert said.endswith("\n0 rows left\n"), said


@on_one_database
@pytest.mark.soak
def test_eight_workers_on_one_database_leave_nothing(shared):
    status, said = left_after(shared, *PYTEST, "tests_pytest", "-n", "8")
    assert status == 0, said
    assert said.endswith("\n0 rows left\n"), said


@on_one_database
@pytest.mark.parametrize("jobs", ["2", pytest.param("8", marks=pytest.mark.soak)])
def test_unittest_in_several_processes_leaves_nothing(shared, jobs):
    parallel = ("-m", "unittest_parallel", "-s", "tests_unittest", "--level", "class", "-j", jobs)
    status, said = left_after(shared, *parallel, TIDYROWS_WORKER_COUNT=jobs)
    assert status == 0, said
    assert said.endswith("\nOK\n0 rows left\n"), said


@on_one_database
@pytest.mark.soak
def test_unittest_leaves_nothing(shared):
    status, said = left_after(shared, "-m", "unittest", "discover", "-s", "tests_unittest")
    assert status == 0, said
    assert said.endswith("\n0 rows left\n"), said


@on_one_database
@pytest.mark.parametrize("processes", ["2", pytest.param("8", marks=pytest.mark.soak)])
def test_several_behaves_at_once_leave_nothing(shared, processes):
    status, said = left_after(shared, "behave_parallel.py", "-n", processes)
    assert status == 0, said
    assert sum(map(int, re.findall(r"(\d+) scenarios? passed", said))) == SCENARIOS
    assert said.endswith("\n0 rows left\n"), said


@on_one_database
@pytest.mark.soak
def test_behave_leaves_nothing(shared):
    status, said = left_after(shared, "-m", "behave")
    assert status == 0, said
    assert f"{SCENARIOS} scenarios passed" in said
    assert said.endswith("\n0 rows left\n"), said


@on_one_database
@pytest.mark.soak
def test_what_a_killed_worker_of_pytest_left_is_deleted(shared):
    broken = (*PYTEST, "tests_pytest/broken.py", "-n", "2")
    status, said = left_after(shared, *broken)
    assert status == 1, said
    assert "2 failed, 6 passed" in said
    assert re.search(r"worker gw\d crashed: .*users 2 deleted", said), said
    assert said.endswith("\n0 rows left\n"), said


UNITTEST = ("-m", "unittest", "discover", "-s", "tests_unittest", "-p", "broken.py")
BEHAVE = ("behave_parallel.py", "--tags=@broken", "features/broken/broken.feature")


@on_one_database
@pytest.mark.soak
@pytest.mark.parametrize("command", [UNITTEST, BEHAVE], ids=["unittest", "behave"])
def test_what_a_killed_process_left_is_swept(shared, command):
    status, said = left_after(shared, *command, sweeps=True, TIDYROWS_WORKER_INDEX="1")
    assert status != 0, said
    assert re.search(r"^F?sweep: .*users 1 deleted", said, re.MULTILINE), said
    assert said.endswith("\n0 rows left\n"), said


def test_the_scenarios_are_the_same_in_every_framework():
    pytest_s = said_in("tests_pytest/test_[!b]*.py", r"^def test_(\w+)")
    assert len(pytest_s) > 20
    assert said_in("tests_unittest/test_*.py", r"^    def test_(\w+)") == pytest_s
    assert said_in("features/*.feature", r"^  Scenario(?: Outline)?: (.*)") == pytest_s


def said_in(files, pattern):
    """The names of tests or scenarios, as sentences; those in a browser are pytest's alone."""
    found = [
        re.sub(r"[_ -]", " ", name).lower()
        for path in SHOP.glob(files)
        for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(found) == len(set(found)), sorted(found)
    return set(found)
