"""Locks, deadlocks and deadlines: every wait ends, and what could not go stays tracked."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from harness.blocks import (
    FORBIDDEN,
    insert,
    left_over,
    reference,
    refuse_deletes,
    table,
    tracked,
)
from harness.bystanders import Bystanders, snapshot
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker, RetryPolicy

servers = on("postgresql+psycopg", "mysql+pymysql")


@pytest.fixture
def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents", sa.Column("note", sa.Integer))
    child = table(
        metadata, "children", reference("parent_id", "parents.id"), sa.Column("note", sa.Integer)
    )
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child


def ours(parent, child, numbers=range(2, 7)):
    return (
        (parent, [{"id": n} for n in numbers]),
        (child, [{"id": n, "parent_id": n} for n in numbers]),
    )


def rows_of(engine, name):
    (found,) = (rows for full, rows in snapshot(engine).items() if full.endswith(f".{name}"))
    return found


@on("sqlite", "postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
def test_a_lock_that_somebody_holds_is_waited_for_as_long_as_said(database, engine, family):
    parent, child = family
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, lock_timeout=0.3, retry=RetryPolicy(attempts=2, base=0.0))
    manager.plan()
    with database.engine().connect() as holder:
        if database.backend == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            holder.execute(sa.update(child).where(child.c.id == 4).values(note=1))
        began = time.monotonic()
        left = left_over(manager)
        took = time.monotonic() - began
        holder.rollback()
    one_wait = 1.0 if database.backend == "mysql" else 0.3  # the MySQL family counts in seconds
    assert 2 * one_wait * 0.9 <= took < 4 * one_wait + 3
    assert all("gave up" in cause and "2 attempts" in cause for cause in left.values())
    if database.backend == "sqlite":  # its one lock is the whole file's
        assert len(left) == len(tracker) == 10
        assert manager.report.retries == 1
    else:
        assert set(left) == {("children", 4), ("parents", 4)}
        assert len(tracker) == 2
        assert manager.report.total_deleted == 8
    assert manager.cleanup().total_deleted == len(left)
    assert len(tracker) == 0
    bystanders.assert_untouched()


@servers
def test_a_lock_is_waited_for_while_all_other_rows_go(database, engine, family):
    """Three waits, then the others, then the one row again: the lock is given up in between."""
    parent, child = family
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, lock_timeout=0.3, retry=RetryPolicy(base=0.0))
    manager.plan()
    with database.engine().connect() as holder:
        holder.execute(sa.update(child).where(child.c.id == 4).values(note=1))

        @sa.event.listens_for(engine, "begin")
        def give_up(_connection):
            there = {row[0] for row in rows_of(engine, "children")}
            if there == {1, 4} and {row[0] for row in rows_of(engine, "parents")} == {1, 4}:
                holder.rollback()

        report = manager.cleanup()
    assert report.total_deleted == 10
    assert not report.leftovers
    bystanders.assert_untouched()


@servers
def test_a_row_that_stays_for_another_reason_is_told_so_beside_a_locked_one(
    database, engine, family
):
    parent, child = family
    notes = table(parent.metadata, "notes", reference("parent_id", "parents.id"))
    notes.create(engine)
    tracker = tracked(engine, *ours(parent, child))
    insert(database.engine(), (notes, [{"id": 1, "parent_id": 5}]))
    manager = CleanupManager(
        tracker, lock_timeout=0.3, retry=RetryPolicy(attempts=2, base=0.0), protect=[notes]
    )
    manager.plan()
    with database.engine().connect() as holder:
        holder.execute(sa.update(child).where(child.c.id == 4).values(note=1))
        left = left_over(manager)
        holder.rollback()
    assert set(left) == {("children", 4), ("parents", 4), ("parents", 5)}
    assert "notes" in left["parents", 5]
    assert "gave up" in left["children", 4]


@on("postgresql+psycopg", "mysql+pymysql")
def test_a_table_that_somebody_locked_whole_is_waited_for_as_long_as_said(database, engine, family):
    """Not even looking is possible then."""
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, lock_timeout=0.3, retry=RetryPolicy(attempts=1))
    manager.plan()
    with database.engine().connect() as holder:
        if database.backend == "postgresql":
            holder.exec_driver_sql("LOCK TABLE children IN ACCESS EXCLUSIVE MODE")
        else:
            holder.exec_driver_sql("LOCK TABLES children WRITE")
        began = time.monotonic()
        assert len(left_over(manager)) == 10
        assert time.monotonic() - began < 6
        holder.rollback()
        if database.backend == "mysql":
            holder.exec_driver_sql("UNLOCK TABLES")
    assert manager.cleanup().total_deleted == 10


@servers
def test_a_deadlock_is_survived(database, engine, family):
    """A real one: the other transaction holds the parent, and wants the child that we deleted."""
    parent, child = family
    metadata = sa.MetaData()
    weight = table(metadata, "weights")
    metadata.create_all(engine)
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    manager.plan()
    outside = database.engine()
    ready, go = threading.Event(), threading.Event()
    outcome = []

    def other():
        with outside.connect() as connection:
            if database.backend == "postgresql":
                connection.exec_driver_sql("SET deadlock_timeout = '60s'")  # we shall be the victim
            else:  # InnoDB rolls back who has changed least
                connection.execute(sa.insert(weight), [{"id": n} for n in range(500)])
            connection.execute(sa.update(parent).where(parent.c.id == 4).values(note=1))
            ready.set()
            go.wait(20)
            try:
                connection.execute(sa.update(child).where(child.c.id == 4).values(note=1))
                outcome.append("went on")
            except sa.exc.DBAPIError as error:
                outcome.append(error)
            connection.rollback()

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(20)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def cross(connection, cursor, statement, *_):
        if statement.startswith("DELETE") and "parents" in statement:
            go.set()

    report = manager.cleanup()
    thread.join(20)
    assert outcome == ["went on"]
    assert report.retries >= 1
    assert report.total_deleted == 10
    assert not report.already_gone
    assert rows_of(engine, "children") == [(1, 1, None)]
    assert rows_of(engine, "parents") == [(1, None)]


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_two_cleanups_of_the_same_rows_at_once_both_end_well(engine, family):
    parent, child = family
    bystanders = Bystanders(engine)
    trackers = [ResourceTracker(engine), ResourceTracker(engine)]
    batches = ours(parent, child, range(2, 102))
    insert(engine, *batches)
    for tracker in trackers:
        for each, rows in batches:
            tracker.track_rows(each, [row["id"] for row in rows])
    managers = [CleanupManager(tracker) for tracker in trackers]
    threads = [threading.Thread(target=manager.cleanup) for manager in managers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    totals = [manager.report.total_deleted for manager in managers]
    assert sum(totals) == 200
    assert [len(tracker) for tracker in trackers] == [0, 0]
    bystanders.assert_untouched()


class Clock:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_the_deadline_holds_while_looking_for_the_rows_that_cannot_go(database, engine, family):
    parent, _child = family
    tracker = tracked(engine, (parent, [{"id": n} for n in range(2, 102)]))
    refuse_deletes(engine, parent, [50])
    clock = Clock()
    tries = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def tick(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            tries.append(statement)
            clock.now += 10.0

    manager = CleanupManager(tracker, deadline=35.0, retry=RetryPolicy(clock=clock, base=0.0))
    left = left_over(manager)
    assert len(tries) == 4  # one whole, and three more before the time was over
    assert manager.report.seconds == 40.0
    assert len(tracker) == len(left)
    assert any("deadline" in cause for cause in left.values())
    assert rows_of(database.engine(), "children") == [(1, 1, None)]
    sa.event.remove(engine, "before_cursor_execute", tick)
    assert set(left_over(CleanupManager(tracker))) == {("parents", 50)}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_a_transaction_in_which_the_deadline_strikes_deletes_nothing(engine, family):
    """Its locks would be held past the time that was said."""
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    clock = Clock()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def tick(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            clock.now += 40.0

    manager = CleanupManager(tracker, deadline=35.0, retry=RetryPolicy(clock=clock, base=0.0))
    left = left_over(manager)
    sa.event.remove(engine, "before_cursor_execute", tick)
    assert len(left) == len(tracker) == 10
    assert all("deadline" in cause for cause in left.values())
    assert len(rows_of(engine, "children")) == len(rows_of(engine, "parents")) == 6
    assert CleanupManager(tracker).cleanup().total_deleted == 10


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_a_wait_for_a_lock_ends_with_the_deadline(database, engine, family):
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, lock_timeout=20.0, deadline=0.5)
    manager.plan()
    with database.engine().connect() as holder:
        if database.backend == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            holder.execute(sa.update(child).values(note=1))
        began = time.monotonic()
        assert len(left_over(manager)) == 10
        assert time.monotonic() - began < 10
        holder.rollback()


@on("postgresql+psycopg", "mysql+pymysql")
def test_no_statement_runs_longer_than_the_deadline(database, engine, family):
    """SQLite has no statement timeout."""
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    with engine.begin() as connection:
        if database.backend == "postgresql":
            connection.exec_driver_sql(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(30); RETURN OLD; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER slow BEFORE DELETE ON children FOR EACH ROW EXECUTE FUNCTION slow()"
            )
        else:
            connection.exec_driver_sql(
                "CREATE TRIGGER slow BEFORE DELETE ON children FOR EACH ROW SET @x = SLEEP(30)"
            )
    manager = CleanupManager(tracker, lock_timeout=0.5, deadline=1.0)
    manager.plan()
    began = time.monotonic()
    assert len(left_over(manager)) == 10
    assert time.monotonic() - began < 8
    with engine.begin() as connection:
        on_table = " ON children" if database.backend == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER slow{on_table}")
    assert CleanupManager(tracker).cleanup().total_deleted == 10


# --- how far the search for the rows that cannot go is driven


def transactions(engine):
    seen = []

    @sa.event.listens_for(engine, "begin")
    def note(connection):
        seen.append(connection)

    return seen


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_many_blocked_rows_between_others_are_all_found(database, engine, family):
    """More than the bound, as long as others go in between."""
    parent, _child = family
    numbers = range(2, 302)
    blocked = set(numbers[::4])
    tracker = tracked(engine, (parent, [{"id": n} for n in numbers]))
    refuse_deletes(engine, parent, blocked)
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("parents", n) for n in blocked}
    assert {row[0] for row in rows_of(engine, "parents")} == {1, *blocked}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_where_nothing_can_go_the_search_ends_soon(database, engine, family):
    parent, _child = family
    numbers = range(2, 1002)
    tracker = tracked(engine, (parent, [{"id": n} for n in numbers]))
    refuse_deletes(engine, parent, numbers)
    begun = transactions(engine)
    left = left_over(CleanupManager(tracker))
    assert len(left) == len(tracker) == 1000
    assert len(begun) < 150
    assert all(FORBIDDEN in left["parents", n] for n in range(2, 50))
