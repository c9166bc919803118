"""A suite chooses by one word how far a test is kept from the others, in every framework."""

from __future__ import annotations

import unittest
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.spaces import lease_of_this_process_ends
from harness.suites import PLAIN, Suite
from harness.targets import mostly_on
from tidyrows import (
    ArgumentError,
    IsolationError,
    Ledger,
    NotBoundError,
    Scoped,
    TrackedFactory,
    UntrackedRowsWarning,
    WorkerContext,
    prune,
)
from tidyrows.isolation.isolate import LEVELS
from tidyrows.isolation.levels import NAMES
from tidyrows.testing import Tidy, TidyTestCase
from tidyrows.testing.pytest_options import isolation_option
from tidyrows.testing.summary import RunSummary, notes_of

UNDOING = ("transaction", "schema", "database")


class Base(orm.DeclarativeBase):
    pass


class Org(Base):
    __tablename__ = "orgs"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(40), unique=True)


class User(Base):
    __tablename__ = "users"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    org_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("orgs.id"))
    org: orm.Mapped[Org] = orm.relationship()


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    org = factory.SubFactory(OrgFactory)


@contextmanager
def pruned(engine):
    yield engine
    lease_of_this_process_ends()
    prune(engine, older_than=0)


@pytest.fixture
def shop(engine):
    """Tables with the org of a stranger."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Org).values(id=900_000, name="a stranger's"))
    with pruned(engine):
        yield engine


def count(engine, kind=User):
    with orm.Session(engine) as session:
        return session.scalar(sa.select(sa.func.count()).select_from(kind))


def test_the_words_are_those_of_isolate():
    assert tuple(LEVELS) == NAMES


@pytest.mark.parametrize("level", NAMES)
def test_one_body_at_every_level(shop, level):
    """Twice: the second test finds nothing of the first, but at level none."""
    for before in (0, 1 if level == "none" else 0):
        with Tidy(shop, test="test_it", isolation=level, metadata=Base.metadata) as tidy:
            user = UserFactory()
            assert tidy.session.get_one(User, user.id).org.name == user.org.name
            assert count(tidy.engine) == before + 1
            strangers = 0 if level in {"schema", "database"} else 1
            assert count(tidy.engine, Org) == before + 1 + strangers
            assert {row.table.name for row in tidy.tracker.rows()} == {"users", "orgs"}
            assert (tidy.schema is None) == bool(strangers)
            assert (tidy.engine is shop) == (level in {"none", "worker"})
        assert count(shop) == before + (level == "none")
        assert count(shop, Org) == before + 1 + (level == "none")


@pytest.mark.parametrize("level", NAMES)
def test_an_application_in_another_process_finds_the_rows(shop, level):
    context = WorkerContext("nightly-17", "gw3", 3, test_id="test_it", worker_count=8)
    with Tidy(shop, context=context, isolation=level, metadata=Base.metadata, ledger=False) as tidy:
        UserFactory()
        if level == "transaction":
            with pytest.raises(IsolationError, match="another process would not see the rows"):
                tidy.environ()
            return
        environ = tidy.environ()
        theirs = sa.create_engine(environ["DATABASE_URL"])
        assert count(theirs) == 1
        theirs.dispose()
    assert (
        environ.items()
        >= {
            "TIDYROWS_RUN": "nightly-17",
            "TIDYROWS_WORKER": "gw3",
            "TIDYROWS_WORKER_INDEX": "3",
            "TIDYROWS_WORKER_COUNT": "8",
            "TIDYROWS_TEST": "test_it",
        }.items()
    )
    if shop.dialect.name == "postgresql":
        assert environ["PGAPPNAME"] == "tidyrows run nightly- gw3 test_it"


@pytest.mark.parametrize("level", NAMES)
def test_the_failure_of_the_test_surfaces(shop, level):
    failure = ZeroDivisionError("the test's own")
    with pytest.raises(ZeroDivisionError) as caught:
        with Tidy(shop, isolation=level, metadata=Base.metadata):
            UserFactory()
            raise failure
    assert caught.value is failure
    assert count(shop) == (level == "none")


def test_what_breaks_out_of_a_transaction_fails_the_test_by_name_and_hides_nothing(shop):
    def broken_out(tidy):
        UserFactory()
        with tidy.engine.connect() as connection:
            cursor = connection.connection.cursor()
            cursor.execute("COMMIT")
            cursor.close()

    with pytest.raises(IsolationError) as caught, Tidy(shop, isolation="transaction") as tidy:
        broken_out(tidy)
    assert "ended behind its back" in str(caught.value)
    assert caught.value.escaped
    with (
        pytest.raises(ZeroDivisionError) as own,
        Tidy(shop, isolation="transaction") as tidy,
    ):
        broken_out(tidy)
        raise ZeroDivisionError
    assert any("the end of isolate() failed too" in note for note in own.value.__notes__)
    assert count(shop) == 0


@pytest.mark.parametrize("kind", [orm.Session, orm.sessionmaker, sa.Engine.connect])
def test_a_bind_that_is_no_engine_has_levels_none_and_worker_only(shop, kind):
    bind = kind(shop)
    with pytest.raises(NotBoundError, match="'schema' of isolation gives the test an engine of it"):
        Tidy(bind, isolation="schema", metadata=Base.metadata)
    with Tidy(bind, isolation="none", ledger=False) as tidy:
        tidy.session.add(Org(name="stays"))
        tidy.session.commit()
        assert tidy.engine is shop
        assert tidy.environ()["DATABASE_URL"] == shop.url.render_as_string(hide_password=False)
    assert count(shop, Org) == 2
    if not isinstance(bind, orm.sessionmaker):
        bind.close()


def test_a_wrong_word_is_told_the_right_ones(shop):
    with pytest.raises(ArgumentError, match="isolation must be one of none, worker, transaction,"):
        Tidy(shop, isolation="rollback")
    with (
        pytest.raises(ArgumentError, match="neither metadata= nor migrate="),
        Tidy(shop, isolation="schema"),
    ):
        pass
    assert count(shop) == 0


@pytest.mark.parametrize("level", NAMES)
def test_what_is_said_of_the_rows_is_true(shop, level):
    tidy = Tidy(shop, test="test_it", isolation=level, metadata=Base.metadata, ledger=False).start()
    UserFactory()
    raw = "INSERT INTO orgs (id, name) SELECT 7, 'raw' FROM users"
    told = pytest.warns(UntrackedRowsWarning) if level == "worker" else nullcontext()
    with told, tidy.engine.begin() as connection:
        connection.exec_driver_sql(raw)
    tidy.finish()
    notes = notes_of(tidy)
    summary = RunSummary()
    summary.residue.add("test_it", notes.found)
    summary.look(notes.engines)
    (said, *_more) = [*summary.lines(tables=False), ""]
    left = {} if level in UNDOING else {"orgs": 2 if level == "none" else 1}
    assert count(shop, Org) == 1 + left.get("orgs", 0)
    assert count(shop) == (level == "none")
    if level in UNDOING:
        assert said == ""
    else:
        assert "orgs up to 1 not tracked" in said
        assert ("users 1 left at level none" in said) == (level == "none")
    with shop.begin() as connection:
        connection.execute(sa.delete(Org).where(Org.id == 7))


def test_unittest_has_it_for_each_test(shop):
    seen = []

    class Case(TidyTestCase):
        tidy_engine = shop
        tidy_options = {"isolation": "transaction", "ledger": False}  # noqa: RUF012

        @classmethod
        def setUpClass(cls):
            cls.org_id = OrgFactory().id  # of the class: committed, and deleted after it

        def test_a(self):
            assert count(self.tidy.engine) == 0
            with orm.Session(self.tidy.engine) as session:
                session.add(User(org_id=self.org_id))
                session.commit()
            seen.append((count(self.tidy.engine), count(shop)))

        test_b = test_a

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.errors + result.failures == []
    assert result.testsRun == 2
    assert seen == [(1, 0), (1, 0)]
    assert (count(shop), count(shop, Org)) == (0, 1)


# --- runs of pytest and behave


BODY = """
    import pytest
    import sqlalchemy as sa
    from sqlalchemy.orm import Session
    from models import Base, Org, OrgFactory, User, UserFactory

    @pytest.fixture(scope="session")
    def tidy_options():
        return {"metadata": Base.metadata}

    def body(tidy, is_own):
        UserFactory()
        with Session(tidy.engine) as session:
            found = session.scalars(sa.select(User.email)).all()
        assert len(found) == (1 if is_own else 2)
        assert len(tidy.tracker) == 2

    @pytest.mark.parametrize("n", range(2))
    def test_of_the_ini_file(tidy, n):
        assert tidy.isolation == "transaction"
        body(tidy, is_own=False)

    @pytest.mark.tidy(isolation="worker")
    def test_worker(tidy):
        body(tidy, is_own=False)

    @pytest.mark.parametrize("n", range(2))
    @pytest.mark.tidy(isolation="schema")
    def test_schema(tidy, n):
        body(tidy, is_own=True)

    @pytest.mark.tidy(isolation="database")
    def test_database(tidy):
        body(tidy, is_own=True)

    def test_fails(tidy):
        UserFactory()
        raise LookupError("mine")

    @pytest.mark.tidy(isolation="none")
    def test_z_none(tidy):
        body(tidy, is_own=False)
"""


@pytest.fixture
def suite(tmp_path, outside):
    with pruned(outside):
        yield Suite(tmp_path, outside)


@pytest.mark.slow
def test_levels_mix_in_a_suite_of_pytest(suite):
    suite.write("test_levels.py", BODY)
    suite.write("pytest.ini", "[pytest]\ntidy_isolation = transaction\n")
    Ledger(suite.engine).install()
    ended = suite.pytest("--tidy-report", "--tidy-sweep", "-p", "no:randomly")
    assert ended.outcomes == {"passed": 7, "failed": 1}
    assert "LookupError: mine" in ended.text
    first, *lines = ended.summary
    assert not [line for line in lines if "swept" in line]  # nothing locked it at that time
    assert first == "16 row(s) created in 8 test(s), 2 deleted, 12 undone"
    (tables,) = [line for line in lines if line.startswith("rows that tests left: ")]
    assert tables.count(" 1 left at level none") == 2
    with suite.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM users WHERE id <> 900000")
        connection.exec_driver_sql("DELETE FROM orgs WHERE id <> 900000")
    prune(suite.engine, older_than=0)
    assert suite.rows() == suite.before


WORKERS = """
    import os
    import signal
    import pytest
    import sqlalchemy as sa
    from sqlalchemy.orm import Session
    from models import Base, OrgFactory, User, UserFactory

    LEVELS = ["worker", "transaction", "schema", "database"]

    @pytest.fixture(scope="session")
    def tidy_options():
        return {"metadata": Base.metadata}

    @pytest.mark.parametrize("n", range(6))
    @pytest.mark.parametrize(
        "level", [pytest.param(each, marks=pytest.mark.tidy(isolation=each)) for each in LEVELS]
    )
    def test_rows(tidy, level, n):
        if tidy.schema:
            held = os.path.join(os.environ["HELD"], os.path.basename(tidy.schema))
            with open(held, "x"):  # two workers never have the same at one time
                pass
        UserFactory.create_batch(3)
        if level == "schema" and n == 3:
            os.remove(held)  # from now on another one may have it
            os.kill(os.getpid(), signal.SIGKILL)
        with Session(tidy.engine) as session:
            everybody = session.scalar(sa.select(sa.func.count()).select_from(User))
            mine = session.scalar(sa.select(sa.func.count()).where(tidy.tracker.mine(User)))
        assert mine == 3
        assert everybody == 3 or not tidy.schema
        if tidy.schema:
            os.remove(held)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, pytest.param(12, marks=pytest.mark.soak)])
def test_workers_at_once_have_a_schema_each_though_one_is_killed(suite, tmp_path, workers):
    suite.write("test_levels.py", WORKERS)
    (tmp_path / "held").mkdir()
    ended = suite.pytest("-n", str(workers), HELD=str(tmp_path / "held"))
    assert ended.outcomes == {"passed": 23, "failed": 1}, ended.text
    assert "crashed while running" in ended.text
    prune(suite.engine, older_than=0)
    assert suite.rows() == suite.before


def test_a_wrong_word_in_the_ini_file_is_an_error_of_usage():
    config = SimpleNamespace(getini={"tidy_isolation": "rollback"}.get)
    with pytest.raises(pytest.UsageError, match="rollback in the ini file is none of none, worker"):
        isolation_option(config)


ASYNC = """
    import os
    import pytest
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.pool import NullPool
    from models import Base, Org, OrgFactory

    @pytest.fixture(scope="session")
    def tidy_engine():
        url = sa.make_url(os.environ["SUITE_URL"]).set(drivername="postgresql+asyncpg")
        return create_async_engine(url, poolclass=NullPool)

    @pytest.fixture(scope="session")
    def tidy_options():
        return {"metadata": Base.metadata}

    async def body(tidy, before):
        await OrgFactory.create_async()
        async with AsyncSession(tidy.engine) as session:
            assert len((await session.scalars(sa.select(Org))).all()) == before + 1
        assert len(tidy.tracker) == 1

    @pytest.mark.asyncio
    @pytest.mark.parametrize("n", range(2))
    async def test_of_the_ini_file(tidy, n):
        await body(tidy, 1)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("n", range(2))
    @pytest.mark.tidy(isolation="schema")
    async def test_schema(tidy, n):
        await body(tidy, 0)

    def test_without_a_loop(tidy):
        pass
"""


@pytest.mark.slow
@mostly_on("postgresql+psycopg")
def test_a_suite_of_tasks(suite):
    suite.write("test_levels.py", ASYNC)
    suite.write("pytest.ini", "[pytest]\ntidy_isolation = transaction\n")
    ended = suite.pytest("-p", "asyncio")
    assert ended.outcomes == {"passed": 4, "error": 1}, ended.text
    assert "test_without_a_loop needs an event loop" in ended.text
    assert ended.summary == ["4 row(s) created in 4 test(s), 0 deleted, 4 undone"]
    prune(suite.engine, older_than=0)
    assert suite.rows() == suite.before


@pytest.mark.slow
@mostly_on("postgresql+psycopg")
def test_behave_has_it_for_each_scenario(tmp_path, outside):
    suite = Suite(tmp_path, outside, PLAIN)
    suite.write(
        "features/environment.py",
        """
        from models import *
        from tidyrows.testing.behave import setup

        def before_all(context):
            setup(context, engine, isolation="transaction")

        def before_feature(context, feature):
            assert context.tidy.isolation == context.tidy_run.isolation == "worker"
            context.org = add(Org(name="of the feature"))
        """,
    )
    suite.write(
        "features/steps/steps.py",
        """
        from behave import given, then
        from models import *

        @given("a user")
        def a_user(context):
            with Session(context.tidy.engine) as session:
                session.add(User(org_id=context.org.id))
                session.commit()
                assert session.query(User).count() == 2
            assert count("users") == 1
        """,
    )
    suite.write(
        "features/rows.feature",
        """
        Feature: rows
          Scenario: one
            Given a user
          Scenario: another
            Given a user
        """,
    )
    code, said = suite.run("behave")
    assert code == 0, said
    assert suite.rows() == suite.before
