"""unittest's test cases: rows go after the test, whatever the test does."""

from __future__ import annotations

import pytest

from harness.suites import PLAIN, Suite
from harness.targets import mostly_on

HEAD = """
import unittest
from models import *
from tidyrows.testing import TidyTestCase

class Case(TidyTestCase):
    tidy_engine = engine
"""


@pytest.fixture
def suite(tmp_path, outside):
    return Suite(tmp_path, outside, PLAIN)


RUNNERS = [("unittest",), ("pytest", "-q", "-p", "no:cacheprovider"), ("unittest_parallel", "-j2")]


@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner[0])
def test_rows_of_class_and_test_are_gone_and_setups_need_no_super(suite, runner):
    suite.write(
        "test_it.py",
        HEAD
        + """
    @classmethod
    def setUpClass(cls):
        cls.org = add(Org(name="shared"))
        assert len(cls.tidy_class.tracker) == 1

    def setUp(self):
        self.user = add(User(org_id=self.org.id))
        self.addCleanup(self.still_there)

    def tearDown(self):
        self.still_there()

    def still_there(self):
        assert count(f"users WHERE id = {self.user.id}") == 1

    def test_a(self):
        assert len(self.tidy.tracker) == 1

    def test_b(self):
        with self.subTest("x"):
            add(User(org_id=self.org.id))
        self.skipTest("no more")

    @unittest.expectedFailure
    def test_c(self):
        self.fail("as expected")
""",
    )
    code, said = suite.run(*runner)
    assert code == 0, said
    assert suite.rows() == suite.before


ADD = "        add(Org(name='x'))\n"
TEST = "    def test_a(self):\n"
CLASS = "    @classmethod\n    def setUpClass(cls):\n"
BREAK = "        1 / 0\n"
FAULTS = {
    "test": TEST + ADD + BREAK,
    "tearDown": "    def tearDown(self):\n" + BREAK + TEST + ADD,
    "addCleanup": TEST + "        self.addCleanup(lambda: 1 / 0)\n" + ADD,
    "setUp": "    def setUp(self):\n" + ADD + BREAK + TEST + ADD,
    "setUpClass": CLASS + ADD + BREAK + TEST + ADD,
}


@mostly_on("sqlite")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_failure_is_told_and_leaves_nothing(suite, fault):
    suite.write("test_it.py", HEAD + fault)
    code, said = suite.run("unittest")
    assert code == 1, said
    assert "ZeroDivisionError" in said
    assert suite.rows() == suite.before


@mostly_on("mysql+pymysql")
@pytest.mark.parametrize(
    "place",
    ["test_a", "tearDownClass", pytest.param("setUpClass", marks=pytest.mark.soak)],
)
def test_an_interrupt_leaves_nothing(suite, place):
    suite.write(
        "test_it.py",
        HEAD
        + f"""
    @classmethod
    def setUpClass(cls):
        cls.org = add(Org(name="shared"))
        cls.at("setUpClass")

    @classmethod
    def at(cls, place):
        if place == "{place}":
            raise KeyboardInterrupt

    def test_a(self):
        add(User(org_id=self.org.id))
        self.at("test_a")

    @classmethod
    def tearDownClass(cls):
        cls.at("tearDownClass")
""",
    )
    _, said = suite.run("unittest")
    assert "KeyboardInterrupt" in said
    assert suite.rows() == suite.before


@mostly_on("postgresql+psycopg")
def test_a_failed_cleanup_stands_beside_the_failure(suite):
    suite.write(
        "test_it.py",
        HEAD
        + """
    tidy_options = {"protect": [User]}

    def test_a(self):
        org = add(Org(name="needed"))
        import subprocess, sys
        subprocess.run([sys.executable, "-c",
            f"from models import *; add(User(org_id={org.id}))"], check=True)
        self.fail("the test's own")
""",
    )
    code, said = suite.run("unittest")
    assert code == 1
    assert "the test's own" in said
    assert "CleanupError" in said
    assert "failures=1, errors=1" in said


@mostly_on("sqlite")
@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner[0])
def test_what_is_kept_is_said_with_the_failure(suite, runner):
    suite.write(
        "test_it.py",
        HEAD
        + """
    tidy_options = {"keep_on_failure": True}

    def test_a(self):
        add(Org(name="kept"))
        self.fail("the test's own")

    def test_b(self):
        add(Org(name="gone"))
""",
    )
    code, said = suite.run(*runner)
    assert code == 1
    assert "kept for study" in said
    assert suite.count("orgs") == 2


def test_an_async_test_is_cleaned_in_its_own_loop(suite):
    drivers = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "aiomysql"}
    backend = suite.url.partition(":")[0].partition("+")[0]
    suite.write(
        "test_it.py",
        f"""
from models import *
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool
from tidyrows.testing import AsyncTidyTestCase

url = sa.make_url(os.environ["SUITE_URL"]).set(drivername="{backend}+{drivers[backend]}")
async_engine = create_async_engine(url, poolclass=NullPool)

class Case(AsyncTidyTestCase):
    tidy_engine = async_engine

    async def asyncSetUp(self):
        await self.add()

    async def add(self):
        async with AsyncSession(async_engine) as session:
            session.add(Org(name="x"))
            await session.commit()

    async def test_a(self):
        await self.add()
        assert len(self.tidy.tracker) == 2

    async def test_b(self):
        raise KeyboardInterrupt
""",
    )
    _, said = suite.run("unittest")
    assert "KeyboardInterrupt" in said
    assert "AssertionError" not in said
    assert suite.rows() == suite.before


@mostly_on("mysql+pymysql")
def test_two_processes_at_once_delete_their_own_rows_only(suite):
    suite.write(
        "test_it.py",
        HEAD
        + """
    def test_a(self):
        for _ in range(20):
            org = add(Org(name="x"))
            add(User(org_id=org.id))
        assert len(self.tidy.tracker) == 40
""",
    )
    both = [suite.start("unittest"), suite.start("unittest")]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert suite.rows() == suite.before
