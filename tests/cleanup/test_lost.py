"""Connections that die and COMMITs that fail: the cleanup ends right, whatever was answered."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import insert, left_over, reference, table, tracked
from harness.bystanders import Bystanders, snapshot
from harness.scene import told
from harness.targets import on
from tidyrows import CleanupManager, Dependents, RetryPolicy

servers = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")


@pytest.fixture
def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child


def ours(parent, child):
    numbers = range(2, 7)
    return (
        (parent, [{"id": n} for n in numbers]),
        (child, [{"id": n, "parent_id": n} for n in numbers]),
    )


@pytest.fixture
def kill(database):
    """End a connection from outside, as a restart of the server would."""
    killer = database.engine()

    def now(pooled):
        raw = pooled.driver_connection
        with killer.connect() as connection:
            if database.backend == "mysql":
                connection.exec_driver_sql(f"KILL {raw.thread_id()}")
            else:
                connection.exec_driver_sql(
                    f"SELECT pg_terminate_backend({raw.info.backend_pid}, 5000)"
                )

    return now


@servers
@pytest.mark.parametrize("at", ["children", "parents", "commit"])
def test_a_connection_killed_in_mid_cleanup_is_replaced(engine, family, kill, at):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    manager.plan()
    deleting, killed = [], []

    def strike(connection):
        if deleting and not killed:  # the cleanup commits after it has read, too
            killed.append(connection)
            kill(connection.connection)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def at_statement(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            deleting.append(statement)
            if at in statement:
                strike(connection)

    if at == "commit":
        sa.event.listen(engine, "commit", strike)
    report = manager.cleanup()
    assert killed
    assert report.retries >= 1
    assert report.total_deleted == 10
    assert not report.already_gone
    assert len(tracker) == 0
    bystanders.assert_untouched()


@servers
@pytest.mark.parametrize("times", [1, 2, 3])
def test_commits_whose_answers_are_lost_one_after_the_other_count_what_the_first_one_deleted(
    engine, family, kill, monkeypatch, times
):
    """What was deleted of others must be in the report."""
    parent, child = family
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (parent, [{"id": n} for n in range(2, 7)]))
    insert(engine, (child, [{"id": 70, "parent_id": 3}]))
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    manager.plan()
    commit = engine.dialect.do_commit
    lost = []

    def without_an_answer(pooled):
        commit(pooled)
        if len(lost) < times:
            lost.append(pooled)
            kill(pooled)
            pooled.cursor().execute("SELECT 1")

    monkeypatch.setattr(engine.dialect, "do_commit", without_an_answer)
    report = manager.cleanup()
    assert len(lost) == times
    assert report.total_deleted == 5
    assert told(report.dependents) == {"children": [70]}
    assert not report.already_gone
    bystanders.assert_untouched()


@servers
def test_a_commit_whose_answer_is_lost_counts_what_it_deleted(engine, family, kill, monkeypatch):
    """It had succeeded; run again, the transaction finds nothing to delete."""
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    manager.plan()
    commit = engine.dialect.do_commit
    lost = []

    def without_an_answer(pooled):
        commit(pooled)
        if not lost:
            lost.append(pooled)
            kill(pooled)
            pooled.cursor().execute("SELECT 1")

    monkeypatch.setattr(engine.dialect, "do_commit", without_an_answer)
    report = manager.cleanup()
    assert lost
    assert report.retries == 1
    assert report.total_deleted == 10
    assert not report.already_gone
    assert not report.reappeared
    bystanders.assert_untouched()


@servers
def test_a_pool_full_of_dead_connections_is_no_trouble(engine, family, kill):
    """They died while the test ran; the cleanup is the first to notice."""
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    held = [engine.connect() for _ in range(3)]
    for connection in held:
        kill(connection.connection)
    for connection in held:
        try:
            connection.close()
        except sa.exc.DBAPIError:
            connection.invalidate()
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    assert manager.cleanup().total_deleted == 10
    bystanders.assert_untouched()


@servers
def test_where_every_attempt_is_killed_all_rows_stay_tracked(engine, family, kill):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    manager = CleanupManager(tracker, retry=RetryPolicy(attempts=3, base=0.0))
    manager.plan()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def strike(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            kill(connection.connection)

    left = left_over(manager)
    assert len(left) == len(tracker) == 10
    assert all("3 attempts" in cause for cause in left.values())
    sa.event.remove(engine, "before_cursor_execute", strike)
    assert manager.cleanup().total_deleted == 10
    bystanders.assert_untouched()


@on("postgresql+psycopg", "mysql+pymysql")
def test_a_server_that_is_gone_is_a_leftover_for_each_row(engine, family, monkeypatch):
    """Even the plan cannot be made."""
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    manager = CleanupManager(tracker, retry=RetryPolicy(attempts=2, base=0.0))
    engine.dispose()
    with monkeypatch.context() as patched:

        def refuse(*_arguments, **_options):
            raise engine.dialect.loaded_dbapi.OperationalError(2003, "connection refused")

        patched.setattr(engine.dialect, "connect", refuse)
        engine.dispose()
        left = left_over(manager)
    assert len(left) == len(tracker) == 10
    assert all("connection refused" in cause for cause in left.values())
    assert manager.report.leftovers
    assert manager.cleanup().total_deleted == 10
    bystanders.assert_untouched()


@on("sqlite")
def test_a_commit_that_sqlite_refuses_is_never_finished_by_the_next_user(database, family, engine):
    """A reader keeps COMMIT from its lock; the driver then leaves the transaction open."""
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    everything = snapshot(engine)
    retry = RetryPolicy(attempts=2, base=0.0)
    manager = CleanupManager(tracker, lock_timeout=0.05, retry=retry)
    manager.plan()
    with database.engine().connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.execute(sa.select(parent)).all()
        left = left_over(manager)
        reader.rollback()
    assert len(left) == len(tracker) == 10
    assert all("locked" in cause for cause in left.values())
    for _ in range(engine.pool.checkedin() + 1):
        with engine.connect() as next_user:
            assert not next_user.connection.dbapi_connection.in_transaction
            next_user.commit()
    assert snapshot(engine) == everything
    assert manager.cleanup().total_deleted == 10


@on("sqlite")
def test_a_failed_commit_of_a_deferred_violation_is_never_finished_either(database, engine):
    """A circle that a stranger's row references: SQLite speaks at COMMIT only."""
    metadata = sa.MetaData()
    nodes = table(metadata, "nodes", reference("parent_id", "nodes.id"))
    metadata.create_all(engine)
    tracker = tracked(engine, (nodes, [{"id": 1, "parent_id": 1}, {"id": 2, "parent_id": 1}]))
    insert(database.engine(), (nodes, [{"id": 3, "parent_id": 1}]))
    assert set(left_over(CleanupManager(tracker, dependents=Dependents.ERROR))) == {("nodes", 1)}
    with engine.connect() as next_user:
        assert not next_user.connection.dbapi_connection.in_transaction
        next_user.commit()
    (rows,) = snapshot(engine).values()
    assert rows == [(1, 1), (3, 1)]


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("where", ["delete", "commit", "look"])
def test_an_interrupt_in_mid_cleanup_loses_nothing(engine, family, where):
    """Ctrl-C: what is committed and counted is forgotten, everything else stays tracked."""
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    manager = CleanupManager(tracker)
    manager.plan()
    deleting = []

    def interrupt(*_):
        if deleting:  # the cleanup commits after it has read, too
            raise KeyboardInterrupt

    @sa.event.listens_for(engine, "before_cursor_execute")
    def at_statement(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            deleting.append(statement)
            if where == "delete" and "parents" in statement:
                raise KeyboardInterrupt
        elif where == "look" and deleting and statement.startswith("SELECT") and (
            "parents" in statement or "children" in statement
        ):  # fmt: skip  # one condition
            raise KeyboardInterrupt

    if where == "commit":
        sa.event.listen(engine, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.cleanup()
    assert deleting
    assert len(tracker) == (0 if where == "look" else 10)
    sa.event.remove(engine, "before_cursor_execute", at_statement)
    if where == "commit":
        sa.event.remove(engine, "commit", interrupt)
    assert manager.cleanup().total_deleted == (0 if where == "look" else 10)
    bystanders.assert_untouched()
