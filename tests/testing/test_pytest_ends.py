"""The pytest plugin where a run does not end as it should: crashes and Ctrl-C."""

from __future__ import annotations

import re

import pytest

from harness.suites import Suite
from harness.targets import mostly_on
from tidyrows import find_orphans

pytestmark = pytest.mark.slow

SHARED = """
    import os, signal
    import pytest
    import sqlalchemy as sa
    from models import OrgFactory, UserFactory

    @pytest.fixture(scope="session")
    def org(tidy_run):
        return tidy_run.once("org", lambda: OrgFactory().id)
"""


@pytest.fixture
def suite(tmp_path, outside):
    return Suite(tmp_path, outside)


def left(suite):
    """What there is now, and what the ledger knows of."""
    return suite.rows(), find_orphans(suite.url)


@pytest.mark.parametrize("options", [(), ("--tidy-report",)], ids=["plain", "loaded at the start"])
@mostly_on("postgresql+psycopg")
def test_a_worker_that_crashes_before_its_first_report_leaves_nothing(suite, options):
    """It is the only one, so the controller knows of the database by its notes only."""
    suite.write(
        "test_crash.py",
        SHARED
        + """
    @pytest.fixture
    def crash(org, tidy):
        UserFactory(org_id=org)
        UserFactory()
        os._exit(3)

    def test_it(crash):
        pass
""",
    )
    ended = suite.pytest("-n", "1", "--max-worker-restart=0", *options)
    assert ended.outcomes == {"failed": 1}
    assert re.search(
        r"worker gw0 crashed: .*users 2 deleted.*orgs 1 deleted", "\n".join(ended.summary)
    )
    assert left(suite) == (suite.before, [])


INTERRUPTED = """
    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def interrupt(connection, cursor, statement, *rest):
        if statement.startswith("DELETE") and "users" in statement:
            sa.event.remove(sa.Engine, "before_cursor_execute", interrupt)
            signal.raise_signal(signal.SIGINT)

    def test_it(org, tidy):
        UserFactory(org_id=org)
        UserFactory()
"""


@mostly_on("sqlite")
def test_ctrl_c_in_the_middle_of_a_cleanup_leaves_nothing(suite):
    suite.write("test_it.py", SHARED + INTERRUPTED)
    ended = suite.pytest()
    assert ended.code == 2
    assert "KeyboardInterrupt" in ended.text
    assert suite.rows() == suite.before
    assert ended.summary[0] == "4 row(s) created in 2 test(s), 4 deleted"


@mostly_on("postgresql+psycopg")
def test_ctrl_c_for_the_controller_leaves_nothing_of_what_workers_share(suite):
    suite.write(
        "test_it.py",
        SHARED
        + """
    def test_it(org, tidy):
        UserFactory(org_id=org)
        os.kill(os.getppid(), signal.SIGINT)
""",
    )
    ended = suite.pytest("-n", "1", forked=False)
    assert ended.code == 2
    assert "KeyboardInterrupt" in ended.text
    assert left(suite) == (suite.before, [])


@pytest.mark.soak
@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
@pytest.mark.parametrize("phase", ["setup", "call", "teardown"])
@pytest.mark.parametrize(
    "how",
    [
        "-n 2",
        "-n 2 -x",
        "-n 2 --reruns 1",
        "-n 2 --dist worksteal",
        "-n 2 --dist loadfile",
        "-n 2 --dist loadscope",
        "--dist each --tx 2*popen",
    ],
)
def test_however_tests_are_dealt_out_a_crash_leaves_nothing(suite, how, phase, end):
    """Not with loadgroup: there xdist waits for ever, without tidyrows too."""
    suite.write(
        "test_crash.py",
        SHARED
        + f"""
    def crash(phase, n):
        if phase == {phase!r} and n == 2:
            try:
                os.mkdir("crashed")
            except FileExistsError:
                return
            {end}

    @pytest.fixture
    def users(org, tidy, n):
        UserFactory(org_id=org)
        UserFactory()
        crash("setup", n)
        yield
        crash("teardown", n)

    @pytest.mark.parametrize("n", range(6))
    def test_it(users, n):
        crash("call", n)
""",
    )
    ended = suite.pytest(*how.split())
    assert "crashed while running" in ended.text
    assert left(suite) == (suite.before, [])


@pytest.mark.soak
@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize("method", ["thread", "signal"])
def test_a_test_that_takes_too_long_leaves_nothing(suite, method):
    """By a thread pytest-timeout ends the process at once, by a signal the test fails."""
    suite.write(
        "test_it.py",
        SHARED
        + """
    def test_it(org, tidy):
        UserFactory(org_id=org)
        signal.pause()
""",
    )
    ended = suite.pytest("-n", "1", "-p", "timeout", "--timeout=2", f"--timeout-method={method}")
    assert ended.outcomes == {"failed": 1}
    assert left(suite) == (suite.before, [])
