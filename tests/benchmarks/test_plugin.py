"""What the pytest plugin costs: installed and not used, for a test of ten rows, and a whole suite.

Run: python -m pytest tests/benchmarks/test_plugin.py -m benchmark -s
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.measure import paired, say, seconds
from harness.suites import PLAIN, Suite, fresh_environment
from harness.targets import on

EMPTY = 2_000
TESTS = 100
WHOLE = 200
PAIRS = 5

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

SUITE = """
    import pytest
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from models import Org, User, engine

    if engine.dialect.name == "sqlite":  # as SQLAlchemy's documentation says, for savepoints

        @sa.event.listens_for(engine, "connect")
        def leave_transactions_alone(driver, record):
            driver.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def begin(connection):
            connection.exec_driver_sql("BEGIN")

    @pytest.fixture
    def rolled_back():
        with engine.connect() as connection:
            transaction = connection.begin()
            mode = "create_savepoint"
            with Session(connection, join_transaction_mode=mode) as session:
                yield session
            transaction.rollback()

    @pytest.fixture
    def committed():
        with Session(engine) as session:
            yield session

    @pytest.fixture
    def deleted(committed):
        yield committed
        committed.rollback()
        committed.execute(sa.delete(User).where(User.id < 900_000))
        committed.execute(sa.delete(Org).where(Org.id < 900_000))
        committed.commit()

    def ten_rows(session):
        org = Org(name="one")
        session.add(org)
        session.commit()
        for _ in range(9):
            session.add(User(org_id=org.id))
            session.flush()
        session.commit()
        assert len(session.scalars(sa.select(User).where(User.org_id == org.id)).all()) == 9

    @pytest.mark.parametrize("n", range(TESTS))
    def test_rolls_back(rolled_back, n):
        ten_rows(rolled_back)

    @pytest.mark.parametrize("n", range(TESTS))
    def test_deletes_itself(deleted, n):
        ten_rows(deleted)

    @pytest.mark.parametrize("n", range(TESTS))
    def test_leaves_them(committed, n):
        ten_rows(committed)
"""

CPU = """
    import time

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop():
        start = time.process_time()
        try:
            return (yield)
        finally:
            with open("cpu", "w") as file:
                file.write(str(time.process_time() - start))
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


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("name", "goal"), [("rolls_back", 1.05), ("deletes_itself", 1.15), ("leaves_them", 1.15)]
)
@on("sqlite", "postgresql+psycopg")
def test_the_processor_time_of_a_whole_suite(tmp_path, outside, name, goal):
    """Of the process, from the first test to the last, and the least of several runs."""
    suite = Suite(tmp_path, outside, PLAIN)
    suite.write("test_rows.py", SUITE.replace("TESTS", str(WHOLE)))
    suite.append("conftest.py", CPU)

    def run(value):
        ended = suite.pytest("-k", name, "-o", f"tidy_autouse={value}")
        assert ended.outcomes == {"passed": WHOLE, "deselected": 2 * WHOLE}
        with outside.begin() as connection:
            left = [
                connection.exec_driver_sql(f"DELETE FROM {table} WHERE id < 900000").rowcount
                for table in ("users", "orgs")
            ]
        assert not any(left) or (name, value) == ("leaves_them", "false")
        return float((suite.folder / "cpu").read_text())

    tidy, plain, ratio = paired(lambda: run("true"), lambda: run("false"), PAIRS, least=True)
    say(f"{outside.dialect.name}, {WHOLE} tests, {name}", tidy, plain, ratio, f"at most {goal}x")
