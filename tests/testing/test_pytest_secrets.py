"""The password of the database goes from a worker to its controller in one file only."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.suites import Suite, fresh_environment
from harness.targets import on
from tidyrows import find_orphans

pytestmark = pytest.mark.slow

SECRET = "s3cr3t-Xq"

CONFTEST = """
    import json, logging, os, stat, sys
    from pathlib import Path

    import pytest
    import sqlalchemy as sa

    # Joined at run time: the compiler joins constants itself and writes the whole in the bytecode.
    SECRET = "-".join(["s3cr3t", "Xq"])
    logging.getLogger().setLevel(logging.DEBUG)
    seen = Path(__file__).parent / "seen"

    @pytest.fixture(scope="session")
    def tidy_engine():
        url = sa.make_url(os.environ["SUITE_URL"]).set(password=SECRET)
        return sa.create_engine(url)

    def note(text):
        with seen.open("a") as file:
            file.write(text + chr(10))

    def pytest_runtest_logreport(report):
        note(repr(vars(report)))

    def pytest_testnodedown(node, error):
        note(repr(getattr(node, "workeroutput", None)) + repr(node.workerinput) + str(error))

    @pytest.fixture
    def folder(request):
        return Path(request.config.workerinput["tidyrows_notes"])

    def modes(folder):
        return {
            path.name: (stat.S_IMODE(path.stat().st_mode), SECRET in path.read_text())
            for path in folder.iterdir()
        }, stat.S_IMODE(folder.stat().st_mode)

    @pytest.fixture(autouse=True)
    def look(request):
        yield
        note(repr(dict(os.environ)) + repr(sys.argv))
        for pid in {os.getpid(), os.getppid()}:
            for name in ("cmdline", "environ"):
                note(Path(f"/proc/{pid}/{name}").read_text())
"""

TESTS = """
    import os, signal, time

    import pytest
    from conftest import modes
    from models import OrgFactory, UserFactory

    @pytest.mark.parametrize("n", range(4))
    def test_users(tidy, folder, n):
        UserFactory()
        files, mode = modes(folder)
        assert mode == 0o700
        name = os.environ["PYTEST_XDIST_WORKER"] + ".json"
        assert files[name] == (0o600, True)  # it is there, or this test proves nothing
        if n == 2 and "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def suite(tmp_path, outside):
    folder = tmp_path / "suite"
    (folder / "tmp").mkdir(parents=True)
    made = Suite(folder, outside)
    made.write("conftest.py", CONFTEST)
    made.write("test_users.py", TESTS)
    return made


def temporary(suite):
    """Where the run puts temporary files; a path of xdist's sockets must stay short."""
    return {"TMPDIR": str(suite.folder / "tmp")}


def files_with_the_secret(suite):
    return [
        path
        for path in suite.folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("killed", [{}, {"KILLED": "1"}], ids=["ends", "a worker is killed"])
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="it reads /proc")
@on("postgresql+psycopg")
def test_the_password_is_in_a_private_file_and_in_nothing_else(suite, killed):
    """Reports, what xdist sends, logs, arguments, environments, what is printed and written."""
    ended = suite.pytest(
        *("-n", "2", "--log-file=log", "--log-file-level=DEBUG", "--log-level=DEBUG", "-rA"),
        "--junitxml=junit.xml",
        **killed,
        **temporary(suite),
    )
    assert ended.outcomes == ({"passed": 3, "failed": 1} if killed else {"passed": 4})
    assert (suite.folder / "seen").read_text().count("tidyrows_notes") >= 2
    assert SECRET not in ended.text
    assert files_with_the_secret(suite) == []
    assert list((suite.folder / "tmp").glob("tidyrows-*")) == []
    assert (suite.rows(), find_orphans(suite.url)) == (suite.before, [])


@pytest.mark.soak
@on("postgresql+psycopg")
def test_workers_whose_controller_was_killed_remove_their_notes(suite):
    text, _, _ = TESTS.partition("        if n == 2")
    suite.write("test_users.py", f"{text}        open('waits', 'w').close(); time.sleep(3)")
    only = ("-p", "no:cacheprovider", "-p", "pytest_tidyrows", "-p", "xdist.plugin")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *only, "-n", "1"],
        cwd=suite.folder,
        env={
            **fresh_environment(),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "SUITE_URL": suite.url,
            **temporary(suite),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until((suite.folder / "waits").exists)
        assert files_with_the_secret(suite)
    finally:
        process.kill()
        process.wait()
    _until(lambda: not list((suite.folder / "tmp").glob("tidyrows-*")))


def _until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
