"""Options for every cleanup of the process, and which of several choices wins."""

from __future__ import annotations

import threading
import unittest

import pytest
import sqlalchemy as sa

from harness.bystanders import Bystanders, snapshot
from harness.suites import Suite
from harness.targets import on
from tidyrows import (
    ArgumentError,
    CleanupError,
    CleanupManager,
    Dependents,
    ResourceTracker,
    RetryPolicy,
    SessionStateError,
    TidyRowsError,
    UnknownTableError,
    configure,
)
from tidyrows.testing import Tidy, TidyTestCase

METADATA = sa.MetaData()
USERS = sa.Table("users", METADATA, sa.Column("id", sa.Integer, primary_key=True))
AUDIT = sa.Table(
    "audit",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("user_id", sa.ForeignKey("users.id")),
)


@pytest.fixture
def users(engine):
    """An engine with a stranger's user and audit row."""
    METADATA.create_all(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(USERS, {"id": 900})
    bystanders.insert(AUDIT, {"id": 900, "user_id": 900})
    yield engine
    bystanders.assert_untouched()


def a_user_with_audit_of_the_application(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(USERS).values(id=1))
    with sa.create_engine(engine.url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.insert(AUDIT).values(id=1, user_id=1))


def test_what_is_configured_once_holds_for_every_kind_of_cleanup(users):
    before = snapshot(users)

    class Case(TidyTestCase):
        tidy_engine = users
        tidy_options = {"ledger": False}  # noqa: RUF012 -- as the documentation has it

        def test_it(self):
            a_user_with_audit_of_the_application(users)

    with configure(own=["audit"]):
        with CleanupManager(ResourceTracker(users)) as cleanup:
            a_user_with_audit_of_the_application(users)
        assert [len(rows) for rows in cleanup.report.dependents.values()] == [1]
        assert snapshot(users) == before
        with Tidy(users, ledger=False):
            a_user_with_audit_of_the_application(users)
        assert snapshot(users) == before
        result = unittest.TestResult()
        Case("test_it").run(result)
        assert result.wasSuccessful(), (result.errors, result.failures)
        Case.doClassCleanups()
        assert snapshot(users) == before
    with CleanupManager(ResourceTracker(users)) as cleanup:
        a_user_with_audit_of_the_application(users)
    assert [len(rows) for rows in cleanup.report.detached.values()] == [1]
    with users.begin() as connection:
        connection.execute(sa.delete(AUDIT).where(AUDIT.c.id == 1))
    with configure(protect=[AUDIT]), pytest.raises(CleanupError, match="is protected"):
        with CleanupManager(ResourceTracker(users)) as cleanup:
            a_user_with_audit_of_the_application(users)
    cleanup.options = CleanupManager(cleanup.tracker, own=[AUDIT]).options
    cleanup.cleanup()


def test_later_calls_and_explicit_arguments_win_and_each_call_can_be_undone(sqlite_engine):
    def options(**given):
        return CleanupManager(ResourceTracker(sqlite_engine), **given).options

    assert options().lock_timeout == 5.0
    first = configure(lock_timeout=1.0, deadline=7.0, dependents=Dependents.DELETE)
    try:
        assert (options().lock_timeout, options().retry.deadline) == (1.0, 7.0)
        assert options(lock_timeout=2.0, dependents=Dependents.ERROR) == options(
            lock_timeout=2.0, dependents=Dependents.ERROR, deadline=7.0
        )
        assert options(deadline=None, retry=RetryPolicy(deadline=9)).retry.deadline == 9
        second = configure(lock_timeout=3.0)
        assert (options().lock_timeout, options().retry.deadline) == (3.0, 7.0)
        seen: list[float] = []
        thread = threading.Thread(target=lambda: seen.append(options().lock_timeout))
        thread.start()
        thread.join()
        assert seen == [3.0]
        first.reset()
        assert (options().lock_timeout, options().dependents.name) == (3.0, "FOLLOW_SCHEMA")
        second.reset()
        second.reset()
    finally:
        first.reset()
    assert options().lock_timeout == 5.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"protects": ["users"]},
        {"lock_timeout": "2s"},
        {"deadline": -1},
        {"retry": 3},
        {"own": "users"},
        {"own": [5]},
        {"own": [USERS], "protect": [USERS]},
        {"dependents": "delete"},
        {"tracker": None},
    ],
    ids=str,
)
def test_what_a_manager_would_refuse_is_refused_at_the_call(wrong, sqlite_engine):
    with pytest.raises(TidyRowsError) as by_configure:
        configure(**wrong)
    if "tracker" not in wrong:
        with pytest.raises(type(by_configure.value)) as by_manager:
            CleanupManager(ResourceTracker(sqlite_engine), **wrong)
        told, by_call = str(by_manager.value), str(by_configure.value)
        assert by_call.replace("configure(", "CleanupManager(").startswith(told[:60])
    assert CleanupManager(ResourceTracker(sqlite_engine)).options.lock_timeout == 5.0


def test_a_table_is_not_owned_by_one_call_and_protected_by_another(sqlite_engine):
    with configure(own=[USERS]):
        with pytest.raises(ArgumentError, match="users is in own= and in protect="):
            configure(protect=["users"])
        assert CleanupManager(ResourceTracker(sqlite_engine)).options.protect == frozenset()


def test_a_name_that_no_table_has_is_refused_before_the_block(users):
    with configure(own=["audti"]), pytest.raises(UnknownTableError, match="Did you mean 'audit'"):
        CleanupManager(ResourceTracker(users))


@on("sqlite")
@pytest.mark.slow
def test_a_mark_then_the_fixture_then_the_ini_file_then_configure_wins(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write("pytest.ini", "[pytest]\ntidy_lock_timeout = 3\ntidy_protect =\n  orgs\n")
    suite.append(
        "conftest.py",
        """
        import tidyrows
        tidyrows.configure(lock_timeout=1.0, deadline=30.0, protect=[], own=["users"])

        @pytest.fixture(scope="session")
        def tidy_options():
            return {"rows_per_transaction": 500, "verify": False}
        """,
    )
    suite.write(
        "test_it.py",
        """
        import pytest
        import tidyrows
        from models import OrgFactory, UserFactory

        def of(cleanup):
            options = cleanup.options
            own, protect = (sorted(map(str, each)) for each in (options.own, options.protect))
            return (options.lock_timeout, options.retry.deadline, options.rows_per_transaction,
                    options.verify, own, protect)

        def test_all(tidy):
            assert of(tidy.cleanup) == (3.0, 30.0, 500, False, ["users"], ["orgs"])

        @pytest.mark.tidy(lock_timeout=4.0, protect=[])
        def test_mark(tidy):
            assert of(tidy.cleanup) == (4.0, 30.0, 500, False, ["users"], [])

        def test_plain(tidy_engine):
            manager = tidyrows.CleanupManager(tidyrows.ResourceTracker(tidy_engine), deadline=8.0)
            assert of(manager) == (3.0, 8.0, 25_000, True, ["users"], ["orgs"])

        class TestClass:
            @pytest.fixture
            def tidy_options(self, tidy_options):
                return tidy_options | {"deadline": 6.0, "lock_timeout": 5.0}

            def test_it(self, tidy):
                assert of(tidy.cleanup) == (5.0, 6.0, 500, False, ["users"], ["orgs"])

            @pytest.mark.tidy(lock_timeout=4.0)
            def test_mark(self, tidy):
                assert of(tidy.cleanup) == (4.0, 6.0, 500, False, ["users"], ["orgs"])

        class TestWrong:
            @pytest.fixture
            def tidy_options(self):
                return {"lock_timeuot": 5.0}

            def test_it(self, tidy):
                UserFactory()

        class TestNoDict:
            @pytest.fixture
            def tidy_options(self):
                return ["users"]

            def test_it(self, tidy):
                UserFactory()
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 5, "error": 2}, ended.text
    assert "tidy_options() takes no lock_timeuot=. Did you mean lock_timeout=?" in ended.text
    assert "tidy_options returns a dict, and ['users'] is none" in ended.text
    assert suite.rows() == suite.before
    ended = suite.pytest("-o", "tidy_autouse=true", "test_it.py::TestWrong", "test_it.py::test_all")
    assert ended.outcomes == {"passed": 1, "error": 1}, ended.text
    for option, told in {
        "tidy_lock_timeout=2s": "must be a number of seconds, above 0; write tidy_lock_timeout = 5",
        "tidy_own=orgs": "orgs is in own= and in protect=",
    }.items():
        ended = suite.pytest("-o", option)
        assert ended.code == pytest.ExitCode.USAGE_ERROR
        assert told in ended.text


def test_a_block_that_ends_hides_no_error_and_holds_when_it_is_entered_again(sqlite_engine):
    def limit() -> float:
        return CleanupManager(ResourceTracker(sqlite_engine)).options.lock_timeout

    first = configure(own=["users"])
    with pytest.raises(ZeroDivisionError), configure(own=[]):
        second = configure(protect=["users"])
        raise ZeroDivisionError
    with pytest.raises(ArgumentError, match="users is in own= and in protect="):
        CleanupManager(ResourceTracker(sqlite_engine))
    first.reset()
    second.reset()
    again = configure(lock_timeout=2.0)
    for _ in range(2):
        with again:
            assert limit() == 2.0
            with pytest.raises(SessionStateError, match="has not ended"), again:
                pass
            assert limit() == 2.0
        assert limit() == 5.0


@on("sqlite")
@pytest.mark.slow
def test_a_generator_of_tables_protects_and_wider_fixtures_have_the_options(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.append(
        "conftest.py",
        """
        import sqlite3

        @pytest.fixture
        def a_user(tidy_engine):
            def make(org):
                with sqlite3.connect(tidy_engine.url.database) as connection:
                    connection.execute(
                        "INSERT INTO users (email, org_id) VALUES (?, ?)", (f"{org}@a.test", org)
                    )
                connection.close()
            return make
        """,
    )
    suite.write(
        "test_generators.py",
        """
        import pytest
        from models import OrgFactory

        @pytest.fixture
        def tidy_options():
            return {"protect": (name for name in ["users"])}

        def test_fixture(tidy, a_user):
            a_user(OrgFactory().id)

        class TestMark:
            @pytest.fixture
            def tidy_options(self):
                return {}

            @pytest.mark.tidy(protect=iter(["users"]))
            def test_mark(self, tidy, a_user):
                a_user(OrgFactory().id)
        """,
    )
    wider = """
        import pytest
        from models import Org
        from sqlalchemy.orm import Session

        {}

        @pytest.fixture(scope="module")
        def org(tidy_engine):
            with Session(tidy_engine) as session:
                session.add(org := Org(name=__name__))
                session.commit()
                return org.id

        def test_it(org, a_user):
            a_user(org)
    """
    mark = 'pytestmark = pytest.mark.tidy(protect=["users"])'
    of_all = """@pytest.fixture(scope="module")
        def tidy_options():
            return {"protect": ["users"]}"""
    suite.write("test_mark.py", wider.format(mark))
    suite.write("test_options.py", wider.format(of_all))
    autouse = ["-o", "tidy_autouse=true", "test_mark.py", "test_options.py"]
    for arguments in (["test_generators.py"], autouse):
        ended = suite.pytest(*arguments)
        assert ended.outcomes == {"passed": 2, "error": 2}, ended.text
        assert ended.text.count("is protected and references it by (org_id)") >= 2


@on("sqlite")
@pytest.mark.slow
def test_a_name_of_the_ini_file_waits_for_tables_that_each_test_makes(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write("pytest.ini", "[pytest]\ntidy_autouse = true\ntidy_own = audit\n")
    suite.write(
        "conftest.py",
        """
        import pytest
        import sqlalchemy as sa

        metadata = sa.MetaData()
        sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True))
        sa.Table("audit", metadata, sa.Column("id", sa.Integer, primary_key=True),
                 sa.Column("user_id", sa.ForeignKey("users.id")))

        @pytest.fixture(scope="session")
        def engine(tmp_path_factory):
            engine = sa.create_engine(f"sqlite:///{tmp_path_factory.mktemp('own')}/own.db")
            engine.connect().close()
            yield engine
            engine.dispose()

        @pytest.fixture
        def users(engine):
            metadata.create_all(engine)
            yield metadata.tables["users"]
            metadata.drop_all(engine)
        """,
    )
    suite.write(
        "test_it.py",
        """
        import pytest

        @pytest.mark.parametrize("n", [1, 2])
        def test_it(engine, users, n):
            with engine.begin() as connection:
                connection.execute(users.insert().values(id=n))
        """,
    )
    assert suite.pytest().outcomes == {"passed": 2}
