"""The network goes silent, without an error: a cleanup ends with its deadline all the same."""

from __future__ import annotations

import asyncio
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import DRIVERS
from harness.blocks import left_over, reference, table
from harness.targets import DEFAULT, on
from harness.wires import Wire
from tidyrows import CleanupError, CleanupManager, Ledger, ResourceTracker

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
