"""The runs of ``pytest --tidy-audit`` after the first: how they begin, and how they may end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from harness.suites import Suite, fresh_environment
from tidyrows import sweep
from tidyrows.audit.runs import SuiteCommand

pytestmark = pytest.mark.slow

BARE = ("-p", "pytest_tidyrows", "-p", "no:cacheprovider")
ALONE = {**fresh_environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def write(folder, name, text):
    (folder / name).write_text(textwrap.dedent(text))


def test_a_run_that_does_not_come_to_its_end_is_said(tmp_path):
    """Its first tests have passed, and nobody knows of the others."""
    write(
        tmp_path,
        "test_all.py",
        """
        import os

        def test_environment():
            assert os.environ["SEEN"] == "at the start"

        def test_crashes():
            os._exit(3)

        def test_after():
            pass
        """,
    )
    command = SuiteCommand(BARE, tmp_path, 60.0, {**ALONE, "SEEN": "at the start"})
    order = [f"test_all.py::test_{each}" for each in ("environment", "crashes", "after")]
    run = command.run("once more", order)
    assert run.failed == {"test_all.py::test_environment": False}
    assert run.fault.startswith("it ended with exit code 3")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)]
)
def test_ctrl_c_in_a_further_run_leaves_none_of_its_rows_and_what_was_found_is_told(
    outside, tmp_path, number
):
    """That run is killed after a COMMIT and before its cleanup: its ledger is swept.

    Where the audit itself is killed, by the next sweep.
    """
    suite = Suite(tmp_path, outside)
    os.mkfifo(suite.folder / "alive")
    suite.write(
        "conftest.py",
        """
        import os

        assert "SET_BY_CONFTEST" not in os.environ
        os.environ["SET_BY_CONFTEST"] = "1"
        """,
    )
    suite.write(
        "test_all.py",
        """
        import os
        import threading
        from pathlib import Path

        import sqlalchemy as sa
        from models import Org
        from sqlalchemy.orm import Session

        def test_leaves():
            with Session(sa.create_engine(os.environ["SUITE_URL"])) as session:
                session.add(Org(name="left"))
                session.commit()
            if Path("once").exists():
                alive = open("alive", "w")
                print("committed", file=alive, flush=True)
                threading.Event().wait()
            Path("once").touch()
        """,
    )
    # Opened for reading and writing so as not to wait; then for reading only, to see the end.
    both = os.open(suite.folder / "alive", os.O_RDWR)
    reading = os.open(suite.folder / "alive", os.O_RDONLY)
    audit = suite.start("pytest", "-q", *BARE, "--tidy-audit", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    try:
        assert select.select([reading], [], [], 60)[0]
        assert os.read(reading, 100) == b"committed\n"
        os.close(both)
        audit.send_signal(number)
        text, _ = audit.communicate(timeout=60)
        assert select.select([reading], [], [], 30)[0], "the run is still there"
    finally:
        audit.kill()
        os.close(reading)
    if number == signal.SIGKILL:
        assert suite.rows() != suite.before
        sweep(outside, as_superuser=True)
        assert suite.rows() == suite.before
        return
    assert audit.returncode == pytest.ExitCode.INTERRUPTED
    assert "test_all.py::test_leaves\n  leaves rows  leaves 1 row(s) of" in text
    assert "not seen: the runs in other orders were interrupted" in text
    assert "not put back" not in text
    assert suite.rows() == suite.before


AUDITING = """
import os, sys
from pathlib import Path
from tidyrows.audit.runs import SuiteCommand

command = SuiteCommand(sys.argv[1:], Path.cwd(), 60.0, dict(os.environ))
command.run("once more", ["test_all.py::test_it"])
"""


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no groups of processes")
def test_a_run_ends_with_the_audit_that_was_killed(tmp_path):
    """As on a CI machine that takes the job away: the run may be one that hangs."""
    os.mkfifo(tmp_path / "alive")
    write(
        tmp_path,
        "test_all.py",
        """
        import threading

        def test_it():
            alive = open("alive", "w")
            print("begun", file=alive, flush=True)
            threading.Event().wait()
        """,
    )
    # Opened for reading and writing so as not to wait; then for reading only, to see the end.
    both = os.open(tmp_path / "alive", os.O_RDWR)
    reading = os.open(tmp_path / "alive", os.O_RDONLY)
    environment = {**ALONE, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", AUDITING, *BARE]
    audit = subprocess.Popen(command, cwd=tmp_path, env=environment)
    assert select.select([reading], [], [], 30)[0]
    assert os.read(reading, 100) == b"begun\n"
    os.close(both)
    audit.send_signal(signal.SIGKILL)
    audit.wait(10)
    assert select.select([reading], [], [], 10)[0], "the run is still there"
    assert os.read(reading, 100) == b""
    os.close(reading)
