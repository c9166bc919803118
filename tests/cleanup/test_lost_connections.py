"""Connections that die outside the cleanup's own transactions, and servers that start again."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness import servers as homes
from harness.blocks import insert, tracked
from harness.bystanders import Bystanders, snapshot
from harness.own_servers import own_server
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker, RetryPolicy, TrackedFactory

servers = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
AT_ONCE = RetryPolicy(base=0.0)


class Base(orm.DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parents"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(40), default="parent")
    children: orm.Mapped[list[Child]] = orm.relationship(back_populates="parent")


class Child(Base):
    __tablename__ = "children"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    parent_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("parents.id"))
    parent: orm.Mapped[Parent] = orm.relationship(back_populates="children")


class ParentFactory(TrackedFactory[Parent]):
    class Meta:
        model = Parent


PARENT, CHILD = Parent.__table__, Child.__table__


def family(engine):
    Base.metadata.create_all(engine)
    insert(engine, (PARENT, [{"name": "stranger"}]), (CHILD, [{"parent_id": 1}]))


def ours():
    numbers = range(101, 106)
    return (
        (PARENT, [{"id": n} for n in numbers]),
        (CHILD, [{"id": n, "parent_id": n} for n in numbers]),
    )


@pytest.fixture
def kill(database):
    """End a connection from outside, as a restart of the server would."""
    killer = database.engine()

    def now(raw):
        with killer.connect() as outside:
            if database.backend == "mysql":
                outside.exec_driver_sql(f"KILL {raw.thread_id()}")
            else:
                outside.exec_driver_sql(
                    f"SELECT pg_terminate_backend({raw.info.backend_pid}, 5000)"
                )

    return now


def raw_of(connection):
    return connection.connection.driver_connection


# --- the test's own session and connections


@servers
@pytest.mark.parametrize("work", ["an open read", "flushed work"])
def test_a_session_whose_connection_has_died_keeps_no_row_from_going(engine, kill, work):
    family(engine)
    bystanders = Bystanders(engine)
    with orm.Session(engine) as session:
        with CleanupManager(ResourceTracker(session), retry=AT_ONCE) as cleanup:
            session.add(Parent(children=[Child()]))
            session.commit()
            if work == "an open read":
                session.scalars(sa.select(Parent)).all()
            else:
                session.add(Parent())
                session.flush()
            kill(raw_of(session.connection()))
        assert cleanup.report.total_deleted == 2
        assert len(cleanup.tracker) == 0
        assert session.scalars(sa.select(Parent.id)).all() == [1]
    bystanders.assert_untouched()


@servers
@pytest.mark.parametrize("work", ["an open read", "flushed work"])
def test_a_session_of_the_trackers_own_that_has_died_keeps_no_row_from_going(engine, kill, work):
    family(engine)
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine), retry=AT_ONCE) as cleanup:
        ParentFactory()
        session = cleanup.tracker.session
        if work == "an open read":
            session.scalars(sa.select(Parent)).all()
        else:
            session.add(Parent())
            session.flush()
        kill(raw_of(session.connection()))
    assert cleanup.report.total_deleted == 1
    assert len(cleanup.tracker) == 0
    bystanders.assert_untouched()


def fill_with_dead(pool_of, kill):
    """All that is in the engine's pool dies there."""
    held = [pool_of.connect() for _ in range(3)]
    raws = [raw_of(connection) for connection in held]
    for connection in held:
        connection.close()
    for raw in raws:
        kill(raw)


@servers
def test_rows_to_be_told_late_are_found_though_the_pool_is_dead(engine, database, kill):
    family(engine)
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine), retry=AT_ONCE) as cleanup:
        cleanup.tracker.track_query(sa.select(Parent).where(Parent.name == "late"), late=True)
        insert(database.engine(), (PARENT, [{"name": "late"}]))
        fill_with_dead(engine, kill)
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


@servers
def test_preserved_rows_are_put_back_though_the_pool_is_dead(engine, database, kill):
    family(engine)
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine), retry=AT_ONCE) as cleanup:
        assert cleanup.tracker.preserve(sa.select(Parent)) == 1
        with database.engine().begin() as application:
            application.execute(sa.update(PARENT).values(name="changed"))
        fill_with_dead(engine, kill)
    assert list(cleanup.report.restored.values()) == [1]
    bystanders.assert_untouched()


@on("sqlite")
def test_a_commit_of_the_users_that_sqlite_refuses_is_not_the_next_users(database, engine):
    """SQLAlchemy believes the transaction over; the driver has left it open."""
    family(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        everything = snapshot(engine)
        with database.engine().connect() as reader:
            reader.exec_driver_sql("BEGIN")
            reader.execute(sa.select(PARENT)).all()
            with engine.connect() as user:
                user.exec_driver_sql("PRAGMA busy_timeout = 50")
                user.execute(sa.insert(PARENT).values(id=2, name="mine"))
                with pytest.raises(sa.exc.OperationalError, match="locked"):
                    user.commit()
            reader.rollback()
        pooled = [engine.connect() for _ in range(engine.pool.checkedin() + 1)]
        for next_user in pooled:
            assert not next_user.connection.driver_connection.in_transaction
            next_user.commit()
            next_user.close()
        assert snapshot(engine) == everything
    assert not cleanup.report.total_deleted
    assert snapshot(engine) == everything


@on("mysql+pymysql", "mysql+mysqldb")
def test_a_commit_that_waited_in_vain_is_not_finished_by_the_next_attempt(engine, monkeypatch):
    """A lock timeout (FLUSH TABLES WITH READ LOCK) leaves the transaction open."""
    family(engine)
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours())
    manager = CleanupManager(tracker, retry=AT_ONCE)
    manager.plan()
    commit = engine.dialect.do_commit
    failed = []

    def in_vain(pooled):
        if not failed:
            failed.append(pooled)
            pooled.cursor().execute("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1205")
        commit(pooled)

    monkeypatch.setattr(engine.dialect, "do_commit", in_vain)
    report = manager.cleanup()
    assert failed
    assert report.retries == 1
    assert report.total_deleted == 10
    assert not report.already_gone
    bystanders.assert_untouched()


# --- servers that start again


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def server(request):
    """A server of our own, with a family on it."""
    try:
        with own_server(request.param) as made:
            made.url = _with_database(made.start())
            yield made
    except homes.AbsentError as absent:
        if homes.everything_required():
            pytest.fail(str(absent), pytrace=False)
        pytest.skip(str(absent))


def _with_database(url):
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE restarted")
    engine.dispose()
    return url.set(database="restarted")


@pytest.fixture
def restarted(server):
    """An engine on it."""
    engine = sa.create_engine(server.url)
    Base.metadata.drop_all(engine)
    family(engine)
    yield engine
    engine.dispose()


class Restart:
    """A policy that gets the server up again after so many attempts have found it down."""

    def __init__(self, server, *, up_after):
        self._server, self._up_after = server, up_after
        self.attempts = []
        self.policy = RetryPolicy(base=0.01, on_attempt=self._told)

    def _told(self, attempt):
        self.attempts.append(attempt)
        if len(self.attempts) == self._up_after:
            self._server.start()


def first(engine, word, do):
    """Do something once, just before the first statement that begins with a word."""
    done = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def strike(connection, cursor, statement, *_):
        if statement.startswith(word) and not done:
            done.append(statement)
            do()

    return done


@pytest.mark.parametrize("up_after", [1, 4])
def test_a_cleanup_outlives_a_restart_of_the_server(server, restarted, up_after):
    bystanders = Bystanders(restarted)
    tracker = tracked(restarted, *ours())
    restart = Restart(server, up_after=up_after)
    done = first(restarted, "DELETE", server.stop)
    report = CleanupManager(tracker, retry=restart.policy).cleanup()
    assert done
    assert report.retries == len(restart.attempts) >= up_after
    assert report.total_deleted == 10
    assert not report.already_gone
    assert not report.reappeared
    assert len(tracker) == 0
    bystanders.assert_untouched()


def test_a_server_may_go_down_while_the_cleanup_waits_for_its_next_attempt(server, restarted):
    bystanders = Bystanders(restarted)
    tracker = tracked(restarted, *ours())
    attempts = []

    def told(attempt):
        attempts.append(attempt)
        if attempt.number == 1:
            server.stop()
        elif attempt.number == 3:
            server.start()

    def fail():
        raise sa.exc.OperationalError(
            "DELETE", None, ConnectionError(), connection_invalidated=True
        )

    first(restarted, "DELETE", fail)
    policy = RetryPolicy(base=0.01, on_attempt=told)
    report = CleanupManager(tracker, retry=policy).cleanup()
    assert report.retries == len(attempts) >= 3
    assert report.total_deleted == 10
    assert len(tracker) == 0
    bystanders.assert_untouched()


def test_a_factory_outlives_a_restart_of_the_server(server, restarted):
    bystanders = Bystanders(restarted)
    restart = Restart(server, up_after=2)
    with CleanupManager(ResourceTracker(restarted, retry=restart.policy)) as cleanup:
        before = ParentFactory(name="before")
        done = first(restarted, "INSERT", server.stop)
        after = ParentFactory(name="after")
        assert done
        assert restart.attempts
        assert (before.name, after.name) == ("before", "after")
        with restarted.connect() as connection:
            names = connection.execute(sa.select(PARENT.c.name).order_by(PARENT.c.id)).scalars()
            assert names.all() == ["stranger", "before", "after"]
        assert len(cleanup.tracker) == 2
    assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()
