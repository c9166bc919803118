"""``tidy_autouse``: suites that know nothing of tidyrows, run in a process of their own."""

from __future__ import annotations

import re

import pytest

from harness.suites import Suite
from harness.targets import mostly_on, on
from tidyrows import find_orphans

pytestmark = pytest.mark.slow

INI = "[pytest]\ntidy_autouse = true\n"

PLAIN = """
    import os
    import pytest
    import sqlalchemy as sa
    from sqlalchemy import orm
    from models import Org, User

    engine = sa.create_engine(os.environ["SUITE_URL"])
    Session = orm.scoped_session(orm.sessionmaker(engine))

    def names():
        outside = sa.create_engine(os.environ["SUITE_URL"], poolclass=sa.NullPool)
        with outside.connect() as connection:
            return sorted(connection.scalars(sa.select(Org.name)))

    @pytest.fixture(scope="session", autouse=True)
    def seeds():
        session = Session()
        session.add(Org(name="seed"))
        session.commit()
        yield
        Session.remove()
        with engine.begin() as connection:
            connection.execute(sa.delete(Org).where(Org.name == "seed"))
        engine.dispose()
"""


@pytest.fixture
def suite(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write("pytest.ini", INI)
    suite.write("plain.py", PLAIN)
    suite.write("conftest.py", "from plain import *  # noqa\n")
    return suite


STORY = """
    import asyncio
    import threading
    import unittest

    import factory
    from conftest import *

    class OrgFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = Org
            sqlalchemy_session = Session

        name = factory.Sequence("org-{}".format)

        @classmethod
        def _create(cls, model, *args, **kwargs):
            made = model(**kwargs)
            Session.add(made)
            Session.commit()
            return made

    @pytest.fixture(scope="module")
    def of_the_module():
        session = Session()
        session.add(Org(name="module"))
        session.commit()
        yield
        with engine.begin() as connection:
            connection.execute(sa.delete(Org).where(Org.name == "module"))

    @pytest.fixture
    def of_the_test():
        yield
        session = Session()
        session.add(Org(name="made while torn down"))
        session.commit()

    def test_a_factory_that_overrides_create():
        OrgFactory.create_batch(2)
        assert len(names()) == 4

    def test_fixtures_live_as_long_as_their_scope(of_the_module, of_the_test):
        assert names() == ["module", "seed", "stranger"]

    def test_the_module_s_rows_are_there_yet():
        assert names() == ["module", "seed", "stranger"]

    class TestClass(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            with orm.Session(engine) as session:
                session.add(Org(name="class"))
                session.commit()

        def test_one(self):
            self.assertEqual(names(), ["class", "module", "seed", "stranger"])

        def test_two(self):
            self.assertEqual(names(), ["class", "module", "seed", "stranger"])

    def test_the_class_s_rows_are_gone():
        assert names() == ["module", "seed", "stranger"]

    def test_an_engine_made_late_and_not_pooled():
        late = sa.create_engine(os.environ["SUITE_URL"], poolclass=sa.NullPool)
        with late.begin() as connection:
            connection.execute(sa.insert(Org), [{"name": "one"}, {"name": "two"}])

    def test_a_pool_that_has_no_connection_left():
        small = sa.create_engine(os.environ["SUITE_URL"], poolclass=sa.QueuePool,
                                 pool_size=1, max_overflow=0)
        test_a_pool_that_has_no_connection_left.kept = connection = small.connect()
        connection.execute(sa.insert(Org).values(name="small"))
        connection.commit()

    def test_a_thread():
        def work():
            with orm.Session(engine) as session:
                session.add(Org(name="thread"))
                session.commit()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def test_a_loop():
        from sqlalchemy.ext.asyncio import create_async_engine

        async def work():
            slow = create_async_engine(os.environ["ASYNC_URL"])
            async with slow.begin() as connection:
                await connection.execute(sa.insert(Org).values(name="loop"))
            await slow.dispose()

        asyncio.run(work())

    def test_what_is_rolled_back_was_never_there():
        with orm.Session(engine) as session:
            session.add(Org(name="never"))
            session.flush()
            session.rollback()

    def test_what_is_deleted_again():
        with orm.Session(engine) as session:
            org = Org(name="short")
            session.add(org)
            session.commit()
            session.delete(org)
            session.commit()

    def test_what_is_gone_already_is_deleted_again():
        with orm.Session(engine, expire_on_commit=False) as stale, engine.connect() as connection:
            orgs = [Org(name=f"stale {n}") for n in range(6)]
            stale.add_all(orgs)
            stale.commit()
            ids = [{"its": org.id} for org in orgs]
            delete = sa.delete(Org.__table__).where(Org.__table__.c.id == sa.bindparam("its"))
            connection.execute(delete, ids[:5])
            connection.commit()
            connection.execute(delete, ids)  # six DELETEs, of which one finds its row
            connection.commit()

    def test_a_shared_row_is_changed():
        session = Session()
        session.scalars(sa.select(Org).where(Org.name == "seed")).one().name = "changed"
        session.commit()
        with engine.begin() as connection:
            connection.execute(sa.update(Org).where(Org.name == "changed").values(name="seed"))

    def test_its_own_row_is_changed():
        session = Session()
        org = OrgFactory()
        org.name = "other"
        session.commit()
        session.execute(sa.update(Org).where(Org.name == "other").values(name="yet another"))
        session.commit()

    def test_raw_sql():
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO orgs (name) VALUES ('raw')")
            connection.exec_driver_sql("DELETE FROM orgs WHERE name = 'raw'")

    def test_a_private_database():
        private = sa.create_engine("sqlite://")
        Org.metadata.create_all(private)
        with orm.Session(private) as session:
            session.add(Org(name="private"))
            session.commit()
        private.dispose()

    def test_a_table_that_is_dropped(tmp_path):
        own = sa.create_engine(f"sqlite:///{tmp_path}/own.db")
        Org.metadata.create_all(own)
        with orm.Session(own) as session:
            session.add(Org(name="own"))
            session.commit()
        Org.metadata.drop_all(own)
        own.dispose()

    def test_a_file_that_is_deleted(tmp_path):
        own = sa.create_engine(f"sqlite:///{tmp_path}/own.db")
        Org.metadata.create_all(own)
        with orm.Session(own) as session:
            session.add(Org(name="own"))
            session.commit()
        own.dispose()
        (tmp_path / "own.db").unlink()

    def test_a_session_that_outlives_the_test():
        global kept
        kept = OrgFactory(id="77001")
        kept.name = "kept"
        Session.commit()

    def test_does_not_give_out_rows_that_are_gone():
        assert kept not in Session()
        assert Session().scalars(sa.select(Org).where(Org.name.like("org-%"))).all() == []

    def test_a_transaction_that_is_left_open():
        session = Session()
        session.add(Org(name="left open"))
        session.flush()

    def test_is_committed_by_the_next_one():
        Session.commit()
        assert "left open" in names()

    def test_and_is_gone_then():
        assert names() == ["module", "seed", "stranger"]
"""


@pytest.fixture
def async_url(suite):
    drivers = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "aiomysql"}
    url = suite.engine.url
    name = url.get_backend_name()
    return url.set(drivername=f"{name}+{drivers[name]}").render_as_string(hide_password=False)


def test_what_each_test_commits_is_gone_after_it_whatever_the_suite_does(suite, async_url):
    suite.write("test_story.py", STORY)
    ended = suite.pytest("-W", "error", ASYNC_URL=async_url)
    assert ended.outcomes == {"passed": 24}, ended.text
    assert suite.rows() == suite.before
    orgs = next(table for table in suite.before if "orgs" in str(table))
    schema = "main" if suite.engine.dialect.name == "sqlite" else str(orgs).split(".")[0]
    said = "\n".join(ended.summary)
    assert "\n  most of them:" not in said
    assert f"made before the first test or by session fixtures: {schema}.orgs 1" not in said
    assert "updated by test_story.py::test_a_shared_row_is_changed" in said
    for test in ("test_its_own_row_is_changed", "test_a_session_that_outlives_the_test"):
        assert test not in said.partition("not made them:")[2]
    assert "deleted by" not in said
    assert f"rows that tests left: {schema}.orgs up to 1 not tracked" in said
    assert f"{schema}.orgs not tracked: test_story.py::test_raw_sql (write insert(orgs)," in said
    assert "9 test(s) and wider fixtures of 1 scope(s) left 12 row(s), all deleted" in said


@mostly_on("sqlite")
def test_without_it_the_same_suite_leaves_its_rows(suite):
    """So the tests above and below can fail."""
    suite.write("test_orgs.py", LEAVES)
    assert suite.pytest("-o", "tidy_autouse=false").outcomes == {"passed": 1}
    assert suite.rows() != suite.before


LEAVES = """
    from conftest import *

    def test_leaves_a_row():
        Session.add(Org(name="left"))
        Session.commit()
"""


@mostly_on("postgresql+psycopg")
def test_a_worker_that_is_killed_leaves_nothing(suite):
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        @pytest.mark.parametrize("n", range(4))
        def test_dies(n):
            Session.add(Org(name=f"left {n}"))
            Session.commit()
            if n == 1:
                os._exit(3)
        """,
    )
    suite.write(
        "conftest.py",
        PLAIN.replace("seeds", "nothing").replace('name="seed"', "name=os.urandom(4).hex()"),
    )
    ended = suite.pytest("-n", "2")
    assert ended.outcomes == {"passed": 3, "failed": 1}, ended.text
    left = [row for row in str(suite.rows()).split("'") if row.startswith("left")]
    assert left == []
    assert not find_orphans(suite.url)


@on("sqlite")
def test_rows_of_session_fixtures_stay_unless_they_are_to_go_too(suite):
    suite.write(
        "conftest.py",
        """
        from plain import *

        @pytest.fixture(scope="session", autouse=True)
        def seeds():
            Session.add(Org(name="stays"))
            Session.commit()
        """,
    )
    suite.write("test_orgs.py", LEAVES)
    ended = suite.pytest()
    assert ended.summary[-1] == (
        "rows that stay, made before the first test or by session fixtures: main.orgs 1"
    )
    assert suite.rows() != suite.before
    with suite.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM orgs WHERE name = 'stays'")
    ended = suite.pytest("-o", "tidy_autouse=session")
    assert ended.outcomes == {"passed": 1}
    assert suite.rows() == suite.before


@on("sqlite")
def test_a_word_that_it_does_not_know_is_refused(suite):
    suite.write("test_orgs.py", LEAVES)
    ended = suite.pytest("-o", "tidy_autouse=always")
    assert ended.code == 4
    assert "tidy_autouse = always in the ini file is none of true, session, false" in ended.text


@on("sqlite")
def test_a_database_that_looks_like_production_is_not_listened_to(suite):
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        def test_commits(tmp_path):
            live = sa.create_engine(f"sqlite:///{tmp_path}/production.db")
            Org.metadata.create_all(live)
            with orm.Session(live) as session:
                session.add(Org(name="stays"))
                session.commit()
            test_commits.live = live

        def test_still_there():
            with test_commits.live.connect() as connection:
                assert connection.scalars(sa.select(Org.name)).all() == ["stays"]
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 2}, ended.text
    assert "looks like production" in "\n".join(ended.summary)


@mostly_on("sqlite")
def test_a_failed_test_is_cleaned_or_kept_as_asked(suite):
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        def test_fails():
            Session.add(Org(name="left"))
            Session.commit()
            raise LookupError("mine")
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"failed": 1}
    assert suite.rows() == suite.before
    ended = suite.pytest("--tidy-keep")
    assert ended.outcomes == {"failed": 1}
    assert "kept for study" in ended.text
    assert suite.rows() != suite.before


@mostly_on("postgresql+psycopg")
def test_what_cannot_be_deleted_in_the_end_is_named_and_the_run_has_failed(suite):
    """A transaction that a test leaves open holds the lock of a row that another has made."""
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        def test_leaves_a_row_and_a_lock():
            Session.add(Org(name="left"))
            Session.commit()
            other = sa.create_engine(os.environ["SUITE_URL"], poolclass=sa.NullPool)
            connection = test_leaves_a_row_and_a_lock.kept = other.connect()
            connection.exec_driver_sql("UPDATE orgs SET name = 'locked' WHERE name = 'left'")

        def test_passes():
            pass
        """,
    )
    suite.write("conftest.py", PLAIN.partition("@pytest.fixture")[0])
    suite.write("pytest.ini", INI)
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 2}, ended.text
    assert ended.code == 1
    (*_, title, told) = [
        line
        for line in ended.summary
        if "left a transaction open" in line or line == "still there:"
    ]
    assert title == "still there:"
    assert told.startswith(
        "  test_orgs.py::test_leaves_a_row_and_a_lock (it left a transaction open): "
    )


EDGES = """
    from conftest import *

    @pytest.fixture(scope="module", autouse=True)
    def of_the_module():
        yield
        add("while the module is torn down")

    class TestClass:
        @classmethod
        def teardown_class(cls):
            add("while the class is torn down")

        def test_with_hooks(self):
            assert names() == ["hook of test_with_hooks", "stranger"]

    def test_the_class_s_rows_are_gone():
        assert names() == ["hook of test_the_class_s_rows_are_gone", "stranger"]

    def test_a_connection_that_is_older_than_the_session_of_pytest():
        with orm.Session(old) as session:
            session.add(Org(name="old"))
            session.commit()

    @pytest.fixture(scope="session")
    def admin():
        with orm.Session(engine) as session:
            org = session.scalars(sa.select(Org).where(Org.name == "found")).one()
            session.add(User(email="admin", org_id=org.id))
            session.commit()

    def test_makes_what_a_session_fixture_finds(request):
        add("found")
        request.getfixturevalue("admin")

    def test_finds_it_too(admin):
        assert "found" in names()

    def test_puts_back_what_it_has_deleted():
        row = {"id": 900000, "email": "stranger", "org_id": 900000}
        with orm.Session(engine) as session:
            session.delete(session.get(User, 900000))
            session.commit()
            session.add(User(**row))
            session.commit()
            session.execute(sa.delete(User).where(User.email == "stranger"))
            session.execute(sa.insert(User), [row])
            session.commit()
"""

HOOKS = """
    from plain import *

    old = sa.create_engine(os.environ["SUITE_URL"], poolclass=sa.NullPool).connect()

    def add(name):
        with orm.Session(engine) as session:
            session.add(Org(name=name))
            session.commit()

    def pytest_runtest_setup(item):
        add(f"hook of {item.name}")

    @pytest.fixture(scope="session", autouse=True)
    def seeds():
        yield
        old.close()
        engine.dispose()
"""


@mostly_on("sqlite")
def test_rows_of_hooks_and_of_tear_downs_go_and_what_lasting_rows_need_stays(suite):
    suite.write("conftest.py", HOOKS)
    suite.write("test_edges.py", EDGES)
    ended = suite.pytest("-W", "error")
    assert ended.outcomes == {"passed": 6}, ended.text
    assert "(900000, 'stranger', 900000)" in str(suite.rows())
    names = sorted(
        row[1] for table, rows in suite.rows().items() if "orgs" in str(table) for row in rows
    )
    assert names == ["found", "stranger"]
    said = "6 test(s) and wider fixtures of 2 scope(s) left 10 row(s), 9 deleted"
    assert said in "\n".join(ended.summary)
    (stays,) = [line for line in ended.summary if line.startswith("rows that stay")]
    stays = stays.partition("by session fixtures: ")[2]
    assert [part.split()[-1] for part in stays.split(", ")] == ["1", "1"]


@mostly_on("sqlite")
@pytest.mark.parametrize("where", ["cleanup", "tear-down"])
def test_what_ctrl_c_keeps_from_being_deleted_is_deleted_in_the_end(suite, where):
    suite.write("conftest.py", HOOKS)
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        @pytest.fixture(scope="module", autouse=True)
        def of_the_module():
            add("module")
            yield
            if os.environ["WHERE"] == "tear-down":
                raise KeyboardInterrupt

        def test_passes():
            @sa.event.listens_for(engine, "before_cursor_execute")
            def press(connection, cursor, sql, *rest):
                if "DELETE" in sql and os.environ["WHERE"] == "cleanup":
                    os.environ["WHERE"] = "nowhere"
                    raise KeyboardInterrupt
        """,
    )
    ended = suite.pytest(WHERE=where)
    assert ended.code == 2
    assert suite.rows() == suite.before


@on("sqlite")
def test_a_plugin_that_a_conftest_names_listens_too(suite):
    suite.write(
        "conftest.py", 'pytest_plugins = ["pytest_tidyrows"]\nfrom plain import *  # noqa\n'
    )
    suite.write("test_orgs.py", LEAVES)
    ended = suite.pytest(every_plugin=True, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # nor by -p
    assert ended.outcomes == {"passed": 1}, ended.text
    assert suite.rows() == suite.before


DROPPED = """
    from conftest import *

    @pytest.fixture(scope=os.environ["SCOPE"])
    def own():
        name = f"{engine.url.database}_{os.getpid()}"
        boss = engine.execution_options(isolation_level="AUTOCOMMIT")
        with boss.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        own = sa.create_engine(engine.url.set(database=name))
        Org.metadata.create_all(own)
        yield own
        own.dispose()
        with boss.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")

    @pytest.mark.parametrize("n", range(2))
    def test_commits(own, n):
        for each in (own, engine):
            with orm.Session(each) as session:
                session.add(Org(name=f"org {os.getpid()} {n}"))
                session.commit()
"""


@on("postgresql+psycopg")  # the only one where a connection is in the way of DROP DATABASE
@pytest.mark.parametrize("scope", ["function", pytest.param("session", marks=pytest.mark.soak)])
def test_a_database_of_the_suite_s_own_can_be_dropped(suite, scope):
    suite.write("conftest.py", PLAIN.partition("@pytest.fixture")[0])
    suite.write("test_orgs.py", DROPPED)
    ended = suite.pytest("-n", "1", "--durations=1", SCOPE=scope)
    assert ended.outcomes == {"passed": 2}, ended.text
    assert ended.code == 0
    assert suite.rows() == suite.before
    assert "2 row(s), all deleted" in "\n".join(ended.summary)
    assert max(map(float, re.findall(r"^([\d.]+)s ", ended.text, re.MULTILINE))) < 5.0  # no retries


@on("postgresql+psycopg")
def test_what_one_role_may_not_delete_another_of_the_suite_s_does(suite):
    suite.write("conftest.py", PLAIN.partition("@pytest.fixture")[0])
    suite.write(
        "test_orgs.py",
        """
        from conftest import *

        def test_two_roles():
            role = f"{engine.url.database}_role"
            with engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
                connection.exec_driver_sql(f"GRANT SELECT, INSERT ON orgs TO {role}")
                connection.exec_driver_sql(f"GRANT USAGE ON SEQUENCE orgs_id_seq TO {role}")
            weak = sa.create_engine(engine.url.set(username=role), poolclass=sa.NullPool)
            for each in (weak, engine):
                with orm.Session(each) as session:
                    session.add(Org(name=str(each.url.username)))
                    session.commit()
        """,
    )
    try:
        ended = suite.pytest()
    finally:
        with suite.engine.begin() as connection:
            role = f"{suite.engine.url.database}_role"
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
    assert ended.outcomes == {"passed": 1}, ended.text
    assert suite.rows() == suite.before
