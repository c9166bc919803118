"""What the pytest plugin costs: installed and not used, and for a test of ten rows.

Run: python -m pytest tests/benchmarks/test_plugin.py -m benchmark -s
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.measure import paired, say, seconds
from harness.suites import Suite, fresh_environment
from harness.targets import on

EMPTY = 2_000
TESTS = 100

ROWS = """
    import os

    import factory
    import pytest
    import sqlalchemy as sa
    from factory.alchemy import SQLAlchemyModelFactory
    from sqlalchemy import orm

    from models import Org, OrgFactory, User, UserFactory

    maker = orm.sessionmaker(expire_on_commit=False)
    session = orm.scoped_session(maker)

    class PlainOrg(SQLAlchemyModelFactory):
        class Meta:
            model = Org
            sqlalchemy_session = session
            sqlalchemy_session_persistence = "commit"
        name = factory.Sequence(lambda n: f"org-{os.getpid()}-{n}")

    class PlainUser(SQLAlchemyModelFactory):
        class Meta:
            model = User
            sqlalchemy_session = session
            sqlalchemy_session_persistence = "commit"
        email = factory.Sequence(lambda n: f"user-{os.getpid()}-{n}")

    @pytest.fixture
    def by_hand(tidy_engine):
        session.configure(bind=tidy_engine)
        made = []
        yield made
        session.remove()
        with tidy_engine.begin() as connection:
            for table in (User, Org):
                ids = [row.id for row in made if isinstance(row, table)]
                connection.execute(sa.delete(table).where(table.id.in_(ids)))

    @pytest.mark.parametrize("n", range(TESTS))
    def test_by_hand(by_hand, n):
        org = PlainOrg()
        by_hand += [org, *(PlainUser(org_id=org.id) for _ in range(9))]

    @pytest.mark.parametrize("n", range(TESTS))
    def test_tidy(tidy, n):
        org = OrgFactory()
        for _ in range(9):
            UserFactory(org_id=org.id)
"""

TIMES = """
    def pytest_runtest_logreport(report):
        with open("times", "a") as file:
            file.write(f"{report.nodeid.partition('[')[0]} {report.duration}\\n")
"""


@pytest.mark.benchmark
def test_a_suite_that_does_not_use_it(tmp_path):
    tests = "".join(f"def test_{n}():\n    pass\n\n" for n in range(EMPTY))
    (tmp_path / "test_empty.py").write_text(tests)
    others = ("cacheprovider", "randomly", "asyncio", "pytest_cov", "factoryboy", "xdist")

    def run(*more):
        command = [sys.executable, "-m", "pytest", "-q", "test_empty.py", *more]
        command += [part for name in others for part in ("-p", f"no:{name}")]
        subprocess.run(
            command, cwd=tmp_path, env=fresh_environment(), check=True, capture_output=True
        )

    run()
    run("-p", "no:tidyrows")
    medians = paired(lambda: seconds(run), lambda: seconds(lambda: run("-p", "no:tidyrows")), 11)
    say(f"{EMPTY} empty tests, installed against not", *medians, "at most 1.02x")


@pytest.mark.benchmark
@on("sqlite", "postgresql+psycopg")
def test_ten_rows_against_setup_and_teardown_by_hand(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write("test_rows.py", ROWS.replace("TESTS", str(TESTS)))
    suite.append("conftest.py", TIMES)

    def run(name):
        (suite.folder / "times").unlink(missing_ok=True)
        ended = suite.pytest("-k", name)
        assert ended.outcomes == {"passed": TESTS, "deselected": TESTS}
        lines = (suite.folder / "times").read_text().splitlines()
        return sum(float(line.split()[1]) for line in lines)

    medians = paired(lambda: run("test_tidy"), lambda: run("test_by_hand"), 5)
    say(f"{outside.dialect.name}, {TESTS} tests of ten rows", *medians, "at most 1.3x")
    assert suite.rows() == suite.before
