"""The network goes silent, without an error, or somebody locks a table: each call ends in time."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import DRIVERS
from harness.blocks import left_over, reference, table
from harness.targets import DEFAULT, on
from harness.wires import Wire
from tidyrows import (
    CleanupError,
    CleanupManager,
    Ledger,
    ResourceTracker,
    RetryPolicy,
    find_orphans,
    sweep,
)

servers = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
moments = pytest.mark.parametrize("moment", ["DELETE", "COMMIT", "now", "connect"])
DEADLINE = 1.0


@pytest.fixture
def wire(database):
    made = Wire(database.url)
    yield made
    made.close()


@pytest.fixture
def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    return parent, child


def rows(family):
    parent, child = family
    return (
        sa.insert(parent).values([{"id": n} for n in range(1, 4)]),
        sa.insert(child).values([{"id": n, "parent_id": n} for n in range(1, 4)]),
    )


def go_silent(wire, engine, moment):
    """From now on, or when this is sent; with ``connect`` the pool has no connection either."""
    if moment == "connect":
        engine.dispose()
    wire.dead = moment in {"now", "connect"}
    wire.dies_at = None if wire.dead else moment.encode()


@servers
@moments
@pytest.mark.parametrize("with_ledger", [False, True], ids=["alone", "ledger"])
def test_a_cleanup_ends_with_its_deadline(wire, family, moment, with_ledger):
    engine = sa.create_engine(wire.url)
    ledger = Ledger(engine, beat=60) if with_ledger else None
    if ledger is not None:
        ledger.install()
    tracker = ResourceTracker(engine, ledger=ledger)
    with engine.connect(), engine.connect():
        pass
    tracker.start()
    with engine.begin() as connection:
        for statement in rows(family):
            connection.execute(statement)
    tracker.stop()
    manager = CleanupManager(tracker, deadline=DEADLINE)
    go_silent(wire, engine, moment)
    began = time.monotonic()
    left = left_over(manager)
    assert time.monotonic() - began < DEADLINE + 1
    assert len(left) == len(tracker) == 6
    assert all("did not answer" in cause or "no connection" in cause for cause in left.values())
    wire.dies_at, wire.dead = None, False
    wire.hang_up()
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted + sum(report.already_gone.values()) == 6
    if ledger is not None:
        ledger.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("database", "driver"),
    [(sync, driver) for sync in DEFAULT[1:] for driver in DRIVERS[sync.partition("+")[0]]],
    indirect=["database"],
)
@moments
def test_in_a_task_it_is_the_same(wire, family, driver, moment):
    async def main():
        engine = create_async_engine(wire.url.set(drivername=driver))
        tracker = ResourceTracker(engine)
        tracker.start()
        async with engine.begin() as connection:
            for statement in rows(family):
                await connection.execute(statement)
        tracker.stop()
        if moment == "connect":
            await engine.dispose()
        go_silent(wire, engine.sync_engine, "now" if moment == "connect" else moment)
        began = time.monotonic()
        with pytest.raises(CleanupError):
            await CleanupManager(tracker, deadline=DEADLINE).cleanup_async()
        assert time.monotonic() - began < DEADLINE + 1
        assert len(tracker) == 6
        wire.dies_at, wire.dead = None, False
        wire.hang_up()
        report = await CleanupManager(tracker).cleanup_async()
        assert report.total_deleted + sum(report.already_gone.values()) == 6
        await engine.dispose()

    asyncio.run(main())


# -- every other call that asks the database -------------------------------------------------------

POLICY = RetryPolicy(deadline=DEADLINE)


def asking_late(tracker, select):
    tracker.track_query(select, late=True)
    CleanupManager(tracker, deadline=DEADLINE).cleanup()


TABLE = {
    "track_rows": lambda tracker, parent: tracker.track_rows(parent, [(1,)]),
    "track_query": lambda tracker, parent: tracker.track_query(sa.select(parent)),
    "track_tagged": lambda tracker, parent: tracker.track_tagged(parent.c.word, "{tag}"),
    "preserve": lambda tracker, parent: tracker.preserve(sa.select(parent)),
    "late": lambda tracker, parent: asking_late(tracker, sa.select(parent)),
    "plan": lambda tracker, _parent: CleanupManager(tracker, deadline=DEADLINE).plan(),
}
LEDGER = {
    "install": Ledger.install,
    "ddl": Ledger.ddl,
    "find_orphans": find_orphans,
    "sweep": lambda ledger: sweep(ledger, deadline=DEADLINE),
    "sweep again": lambda ledger: sweep(ledger, retry=POLICY),
}
pooled = pytest.mark.parametrize(
    "pooled", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["pooled", "new"]
)


@pytest.fixture
def words(engine):
    metadata = sa.MetaData()
    made = table(metadata, "words", sa.Column("word", sa.String(60)))
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(made).values(id=1, word="word"))
    return made


def assert_ends(call, *args):
    """It fails, in time, since the server gave no answer."""
    began = time.monotonic()
    with pytest.raises((ConnectionError, CleanupError), match=r"did not answer|no connection"):
        call(*args)
    assert time.monotonic() - began < DEADLINE + 1


@servers
@pooled
@pytest.mark.parametrize("call", TABLE.values(), ids=TABLE)
def test_a_question_about_a_table_ends(wire, words, pooled, call):
    engine = sa.create_engine(wire.url)
    tracker = ResourceTracker(engine, retry=POLICY)
    tracker.track_rows(words, [(1,)])
    if not pooled:
        engine.dispose()
    wire.dead = True
    assert_ends(call, tracker, words)
    wire.dead = False
    wire.hang_up()
    tracker.dismiss_leak_warning()
    engine.dispose()


@servers
@pooled
@pytest.mark.parametrize("call", LEDGER.values(), ids=LEDGER)
def test_a_question_about_a_ledger_ends(wire, pooled, call):
    engine = sa.create_engine(wire.url)
    ledger = Ledger(engine).within(DEADLINE)
    ledger.install()
    if not pooled:
        engine.dispose()
    wire.dead = True
    assert_ends(call, ledger)
    wire.dead = False
    wire.hang_up()
    engine.dispose()


@servers
@pytest.mark.parametrize("call", [*TABLE][1:-1])
def test_a_question_about_a_locked_table_ends(database, engine, words, call):
    tracker = ResourceTracker(engine, retry=POLICY)
    with locked(database, words.name):
        began = time.monotonic()
        with pytest.raises((sa.exc.DBAPIError, ConnectionError)):
            TABLE[call](tracker, words)
        assert time.monotonic() - began < DEADLINE + 1
    TABLE[call](tracker, words)


@servers
@pytest.mark.parametrize("call", ["find_orphans", "sweep", "sweep again"])
def test_a_question_about_a_locked_ledger_ends(database, engine, call):
    ledger = Ledger(engine).within(DEADLINE)
    ledger.install()
    with locked(database, ledger.name):
        began = time.monotonic()
        with pytest.raises((sa.exc.DBAPIError, ConnectionError)):
            LEDGER[call](ledger)
        assert time.monotonic() - began < DEADLINE + 1
    LEDGER[call](ledger)


@contextmanager
def locked(database, name):
    """Somebody holds a lock on a whole table."""
    holder = database.engine().connect()
    postgresql = database.backend == "postgresql"
    holder.exec_driver_sql(
        f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE" if postgresql else f"LOCK TABLES {name} WRITE"
    )
    try:
        yield
    finally:
        if not postgresql:
            holder.exec_driver_sql("UNLOCK TABLES")
        holder.close()
