"""The suites of examples/shop leave nothing, with an application that commits for itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flask")
pytest.importorskip("httpx")

SHOP = Path(__file__).parent.parent / "examples" / "shop"
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        "shared",
        [pytest.param("sqlite_engine", marks=pytest.mark.soak), "postgresql_engine"],
        indirect=True,
    ),
]


@pytest.fixture
def shared(request):
    """An engine on the database that everybody uses."""
    return request.getfixturevalue(request.param)


def left_after(engine, *command):
    """Run a command on the database, and count the rows: how it ended, and what it said."""
    outer = ("PYTEST_", "TIDYROWS_", "_TIDYROWS_")  # it is a run of its own
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    done = subprocess.run(
        [sys.executable, "left.py", "--", sys.executable, *command],
        cwd=SHOP,
        env={**env, "SHOP_DATABASE_URL": engine.url.render_as_string(hide_password=False)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout


def test_two_workers_on_one_database_leave_nothing(shared):
    status, said = left_after(shared, *PYTEST, "tests_pytest", "-n", "2")
    assert status == 0, said
    assert said.endswith("\n0 rows left\n"), said


@pytest.mark.soak
def test_unittest_leaves_nothing(shared):
    status, said = left_after(shared, "-m", "unittest", "discover", "-s", "tests_unittest")
    assert status == 0, said
    assert said.endswith("\n0 rows left\n"), said


@pytest.mark.soak
def test_what_a_killed_worker_left_is_swept(shared):
    broken = (*PYTEST, "tests_pytest/broken.py", "-n", "2")
    status, said = left_after(shared, *broken)
    assert status == 1, said
    assert "2 failed, 6 passed" in said
    assert re.search(r"worker gw\d crashed: .*users 2 deleted", said), said
    assert said.endswith("\n0 rows left\n"), said
