"""Asynchronous tests under pytest-asyncio and anyio, and the plugins that other suites have."""

from __future__ import annotations

import pytest

from harness.suites import Suite
from harness.targets import mostly_on

pytestmark = pytest.mark.slow

DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "aiomysql"}
CONFTEST = """
    import os

    import pytest
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    @pytest.fixture(scope="SCOPE")
    def tidy_engine():
        url = sa.make_url(os.environ["SUITE_URL"])
        return create_async_engine(
            url.set(drivername=url.get_backend_name() + "+DRIVER"), poolclass=NullPool
        )
"""
TESTS = """
    import asyncio
    import pytest
    import sqlalchemy as sa
    from models import Org, OrgFactory, UserFactory

    class Person(UserFactory):
        org_id = None

    async def make(tidy):
        org = await OrgFactory.create_async()
        await Person.create_batch_async(2, org_id=org.id)
        assert len(tidy.tracker) == 3

    MARK
    @pytest.mark.parametrize("n", range(3))
    async def test_it(tidy, n):
        await make(tidy)

    MARK
    async def test_failing(tidy):
        await make(tidy)
        raise LookupError("mine")
"""


@pytest.fixture
def suite(tmp_path, outside):
    made = Suite(tmp_path, outside)
    driver = DRIVERS[outside.dialect.name]
    made.write("conftest.py", CONFTEST.replace("DRIVER", driver).replace("SCOPE", "session"))
    return made


@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize(
    ("plugin", "mark"),
    [
        ("asyncio", "@pytest.mark.asyncio"),
        ("asyncio", "@pytest.mark.asyncio(loop_scope='session')"),
        ("anyio", "@pytest.mark.anyio"),
    ],
)
def test_an_asynchronous_test_is_cleaned_in_its_own_loop(suite, plugin, mark):
    suite.write("test_it.py", TESTS.replace("MARK", mark))
    backend = "\n    @pytest.fixture\n    def anyio_backend():\n        return 'asyncio'\n"
    if plugin == "anyio":
        suite.append("conftest.py", backend)
    ended = suite.pytest("-p", plugin)
    assert ended.outcomes == {"passed": 3, "failed": 1}
    assert "LookupError: mine" in ended.text
    assert suite.rows() == suite.before
    assert ended.summary == ["12 row(s) created in 4 test(s), 12 deleted"]


@pytest.mark.soak
def test_a_ledger_is_installed_where_there_are_several_workers(suite):
    suite.write("test_it.py", TESTS.replace("MARK", "@pytest.mark.asyncio"))
    ended = suite.pytest("-p", "asyncio", "-n", "2")
    assert ended.outcomes == {"passed": 3, "failed": 1}
    assert suite.rows() == suite.before


@mostly_on("sqlite")
def test_a_plain_test_may_run_loops_of_its_own(suite):
    suite.write(
        "test_it.py",
        TESTS.split("MARK", maxsplit=1)[0]
        + """
    def test_it(tidy):
        asyncio.run(make(tidy))
""",
    )
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 1}
    assert suite.rows() == suite.before


# --- plugins of other suites


BESIDE = """
    import pytest
    from models import OrgFactory, UserFactory

    tries = []

    @pytest.mark.parametrize("n", range(4))
    def test_users(tidy, n):
        UserFactory()
        assert len(tidy.tracker) == 2

    @pytest.mark.flaky(reruns=2)
    def test_flaky(tidy):
        OrgFactory()
        tries.append(1)
        assert len(tidy.tracker) == 1
        assert len(tries) == 3
"""


@mostly_on("postgresql+psycopg")
def test_plugins_that_other_suites_have_work_beside_it(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write("test_it.py", BESIDE)
    suite.append(
        "conftest.py",
        "\nfrom pytest_factoryboy import register\n"
        "from models import OrgFactory\nregister(OrgFactory)\n",
    )
    suite.write(
        "test_fixture.py",
        """
        def test_a_factory_as_a_fixture(tidy, org):
            assert len(tidy.tracker) == 1
        """,
    )
    arguments = ["-p", "randomly", "--timeout=60", "--cov=models", "-p", "pytest_cov"]
    for more in ([], ["-n", "2"]):
        ended = suite.pytest(*arguments, *more, every_plugin=True)
        assert ended.outcomes == {"passed": 6, "rerun": 2}
        assert suite.rows() == suite.before
