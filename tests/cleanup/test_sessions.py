"""The cleanup's own connection: whatever the pool, the engine's options and earlier users did."""

from __future__ import annotations

import sys

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

from harness.blocks import insert, left_over, reference, table, tracked
from harness.bystanders import Bystanders
from harness.targets import DRIVERS, on
from tidyrows import (
    CleanupManager,
    Dependents,
    ResourceTracker,
    RetryPolicy,
    SessionStateError,
)


def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child


def ours(parent, child):
    return (parent, [{"id": 2}, {"id": 3}]), (child, [{"id": 2, "parent_id": 3}])


LEFT = {
    "postgresql": [
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY",
        "SET default_transaction_read_only = on",
        "SET ROLE pg_monitor",
        "SET search_path = pg_catalog",
        "SET statement_timeout = '1ms'",
        "SET lock_timeout = '1ms'",
        "SET bytea_output = 'escape'",
        "SET DateStyle = 'SQL, DMY'",
        "CREATE TEMP TABLE parents (id integer); CREATE TEMP TABLE children (id integer)",
    ],
    "mysql": [
        "SET SESSION TRANSACTION READ ONLY",
        "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET foreign_key_checks = 0",
        "SET sql_safe_updates = 1",
        "SET autocommit = 1",
        "SET innodb_lock_wait_timeout = 1",
        "SET SESSION sql_mode = 'ANSI_QUOTES'",
        "USE information_schema",
        "SET max_statement_time = 0.0001",
        "CREATE TEMPORARY TABLE {}.parents (id INTEGER PRIMARY KEY)",
        "CREATE TEMPORARY TABLE {0}.parents AS SELECT id FROM {0}.parents",
    ],
    "sqlite": [
        "PRAGMA busy_timeout = 1",
        "PRAGMA defer_foreign_keys = ON",
        "CREATE TEMP TABLE parents (id INTEGER)",
    ],
}


@pytest.mark.parametrize(
    ("database", "left"),
    [
        pytest.param(drivers[at % len(drivers)], left, id=f"{left}-{drivers[at % len(drivers)]}")
        for backend, drivers in DRIVERS.items()
        for at, left in enumerate(LEFT[backend])  # the drivers take turns: it is the server's
    ],
    indirect=["database"],
)
def test_what_an_earlier_user_left_on_a_pooled_connection_is_not_trusted(database, left):
    engine = database.engine(pool_size=1, max_overflow=0)
    parent, child = family(database.engine())
    bystanders = Bystanders(database.engine(), outside=database.engine())
    tracker = tracked(engine, *ours(parent, child))
    with engine.connect() as earlier:
        earlier.exec_driver_sql(left.format(engine.url.database))
        earlier.commit()
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    assert manager.cleanup().total_deleted == 3
    bystanders.assert_untouched()


@on("mysql+pymysql", "mysql+mysqldb")
@pytest.mark.parametrize("left", ["SET sql_select_limit = 1", "SET foreign_key_checks = 0"])
def test_what_an_earlier_user_left_hides_and_orphans_nothing(database, left):
    engine = database.engine(pool_size=1, max_overflow=0)
    parent, child = family(engine)
    tracker = tracked(engine, (parent, [{"id": n} for n in range(2, 7)]))
    insert(database.engine(), (child, [{"id": n, "parent_id": n} for n in range(2, 7)]))
    with engine.connect() as earlier:
        earlier.exec_driver_sql(left)
        earlier.commit()
    bystanders = Bystanders(database.engine())
    assert set(left_over(CleanupManager(tracker, dependents=Dependents.ERROR))) == {
        ("parents", n) for n in range(2, 7)
    }
    bystanders.assert_untouched()


@on("mysql+pymysql", "mysql+mysqldb")
def test_settings_of_the_session_are_as_before_after_a_cleanup(database):
    engine = database.engine(pool_size=1, max_overflow=0)
    parent, child = family(engine)
    tracker = tracked(engine, *ours(parent, child))
    question = (
        (
            "SELECT @@foreign_key_checks, @@sql_safe_updates, @@innodb_lock_wait_timeout,"
            " @@lock_wait_timeout, @@max_statement_time, @@transaction_isolation,"
            " @@transaction_read_only, connection_id()"
        )
        .replace("@@transaction_isolation", "@@tx_isolation")
        .replace("@@transaction_read_only", "@@tx_read_only")
    )
    with engine.connect() as earlier:
        earlier.exec_driver_sql("SET sql_safe_updates = 1, innodb_lock_wait_timeout = 33")
        before = earlier.exec_driver_sql(question).one()
    CleanupManager(tracker).cleanup()
    with engine.connect() as later:
        assert later.exec_driver_sql(question).one() == before


@on("sqlite", "postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "SERIALIZABLE"},
        {"poolclass": NullPool},
        {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1},
        {"execution_options": {"schema_translate_map": {None: None}}},
    ],
    ids=str,
)
def test_an_engine_with_options_is_cleaned(database, options):
    parent, child = family(database.engine())
    bystanders = Bystanders(database.engine())
    engine = database.engine(**options)
    tracker = tracked(engine, *ours(parent, child))
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted == 3
    assert report.retries == 0
    bystanders.assert_untouched()


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_a_map_that_swaps_two_schemas_does_not_swap_them_twice(database):
    """The rows' real schema must not go through the engine's map again."""
    other, third = database.extra_schema("other"), database.extra_schema("third")
    engine = database.engine(
        execution_options={"schema_translate_map": {other: third, third: other}}
    )
    metadata = sa.MetaData()
    parent = reference("parent_id", f"{other}.nodes.id", nullable=True)
    nodes = table(metadata, "nodes", parent, schema=other)
    metadata.create_all(plain := database.engine())
    twin = nodes.to_metadata(sa.MetaData(), schema=third)
    twin.create(plain)
    insert(plain, (nodes, [{"id": 1}, {"id": 2}]), (twin, [{"id": 1}]))
    bystanders = Bystanders(plain)
    rows = [{"id": 2, "parent_id": 1}, {"id": 3, "parent_id": 2}]
    tracker = tracked(engine, (nodes, rows))  # into the third
    assert {row.table.schema for row in tracker.rows()} == {third}
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_the_trackers_own_session_does_not_keep_the_only_connection(database):
    engine = database.engine(pool_size=1, max_overflow=0, pool_timeout=1)
    parent, child = family(engine)
    bystanders = Bystanders(engine)
    for bind in (engine, sessionmaker(engine), Session(engine)):
        tracker = ResourceTracker(bind)
        with CleanupManager(tracker) as cleanup:
            session = tracker.session
            session.execute(sa.insert(parent).values(id=2))
            session.commit()
            session.execute(sa.insert(child).values(id=2, parent_id=2))
            session.commit()
            session.execute(sa.select(parent)).all()  # and the connection is out again
        assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_an_exhausted_pool_is_said(database):
    engine = database.engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    parent, child = family(engine)
    bystanders = Bystanders(database.engine())
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker, retry=RetryPolicy(attempts=2, base=0.0))
    with engine.connect():
        left = left_over(manager)
    assert len(left) == len(tracker) == 3
    assert all("QueuePool limit" in cause for cause in left.values())
    assert manager.cleanup().total_deleted == 3
    bystanders.assert_untouched()


# --- one connection for all: SQLite in memory


def in_memory(pool, **options):
    engine = sa.create_engine("sqlite://", poolclass=pool, **options)

    @sa.event.listens_for(engine, "connect")
    def prepare(dbapi_connection, record):
        dbapi_connection.execute("PRAGMA foreign_keys = ON")

    return engine


pools = pytest.mark.parametrize("pool", [StaticPool, SingletonThreadPool])


@pools
def test_a_database_in_memory_is_cleaned(pool):
    engine = in_memory(pool)
    parent, child = family(engine)
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert(engine, *ours(parent, child))
        tracker.session.execute(sa.select(parent)).all()
    assert cleanup.report.total_deleted == 3
    bystanders.assert_untouched()
    engine.dispose()


@pools
def test_a_transaction_of_somebody_on_the_only_connection_is_not_ended(pool):
    """Its uncommitted row would be lost, or committed with our deletes."""
    engine = in_memory(pool)
    parent, child = family(engine)
    tracker = tracked(engine, *ours(parent, child))
    manager = CleanupManager(tracker)
    with Session(engine) as somebody:
        somebody.execute(sa.insert(parent).values(id=77))
        with pytest.raises(SessionStateError, match="Commit or roll back"):
            manager.cleanup()
        assert len(tracker) == 3
        assert somebody.scalars(sa.select(parent.c.id).order_by(parent.c.id)).all() == [
            1, 2, 3, 77,
        ]  # fmt: skip  # one list
        somebody.commit()
    assert manager.cleanup().total_deleted == 3
    with engine.connect() as connection:
        assert connection.scalars(sa.select(parent.c.id)).all() == [1, 77]
    engine.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has autocommit=False from 3.12 on")
def test_python_312s_way_of_transactions_in_memory_is_cleaned():
    engine = in_memory(StaticPool, connect_args={"autocommit": False})
    parent, child = family(engine)
    tracker = tracked(engine, *ours(parent, child))
    assert CleanupManager(tracker).cleanup().total_deleted == 3
    engine.dispose()
