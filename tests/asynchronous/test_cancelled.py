"""Cancelled tasks: what was not deleted is tracked, and nothing stays locked."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from harness.asynchronous import ALL, over
from harness.factories import OrgFactory, UserFactory
from harness.models import Org
from harness.races import cancelled_while_it_waits
from tidyrows import CleanupManager, ResourceTracker

everywhere = over(*ALL)
# SQLite's other writers are kept out by the whole file, so nothing waits where these tests strike.
servers = over(*(driver for driver in ALL if not driver.startswith("sqlite")))


async def assert_usable(engine, world):
    """Nobody holds a lock, and no transaction is left in the pool."""
    with world.engine.begin() as connection:
        connection.execute(sa.update(Org.__table__).values(name=Org.__table__.c.name))
    before = world.added()
    for _ in range(3):
        async with engine.begin() as connection:
            await connection.execute(sa.text("SELECT 1"))
    assert world.added() == before


def held(world):
    """A connection of somebody's that has locked every org."""
    connection = world.engine.connect()
    connection.execute(sa.update(Org.__table__).values(name=Org.__table__.c.name))
    return connection


@servers
def test_a_cleanup_that_is_cancelled_while_it_waits(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        tracker.start()
        await UserFactory.create_batch_async(3)
        tracker.stop()
        manager = CleanupManager(tracker, lock_timeout=30)
        with held(world) as holder:
            await cancelled_while_it_waits(manager.cleanup_async(), world.engine)
            assert len(tracker) == 6
            holder.rollback()
        await assert_usable(engine, world)
        report = await manager.cleanup_async()
        assert report.total_deleted == 6
        assert len(tracker) == 0

    world.run(main)
    world.bystanders.assert_untouched()


@servers
def test_what_earlier_transactions_have_deleted_is_tracked_no_more(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        tracker.start()
        await UserFactory.create_batch_async(3)
        tracker.stop()
        manager = CleanupManager(tracker, lock_timeout=30, rows_per_transaction=1)
        with held(world) as holder:
            await cancelled_while_it_waits(manager.cleanup_async(), world.engine)
            assert world.added() == {"orgs": 3}  # the users reference them, so they went first
            assert {row.table.name for row in tracker.rows()} == {"orgs"}
            holder.rollback()
        assert (await manager.cleanup_async()).total_deleted == 3
        await assert_usable(engine, world)

    world.run(main)
    world.bystanders.assert_untouched()


@everywhere
def test_a_body_that_is_cancelled_is_cleaned_up_after(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                async with CleanupManager(tracker):
                    await UserFactory.create_async()
                    await asyncio.sleep(30)
        assert len(tracker) == 0
        assert world.added() == {}
        await assert_usable(engine, world)

    world.run(main)
    world.bystanders.assert_untouched()


@servers
def test_a_factory_call_that_is_cancelled_leaves_nothing(world):
    with world.engine.begin() as connection:
        connection.execute(sa.insert(Org.__table__).values(id=90_000, name="locked"))

    class WaitingFactory(UserFactory):
        pass

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            first = await OrgFactory.create_async()
            with held(world) as holder:
                before = world.added()
                session = tracker.session
                call = tracker.run_sync(
                    lambda _tracker: (
                        session.add(Org(name="never")),
                        session.flush(),
                        session.execute(sa.update(Org).where(Org.id == first.id).values(name="x")),
                    )
                )
                await cancelled_while_it_waits(call, world.engine)
                holder.rollback()
                assert world.added() == before
            await tracker.run_sync(lambda tracker: tracker.session.rollback())
            await UserFactory.create_async()
            await assert_usable(engine, world)
            assert len(tracker) == 3
        assert world.added() == {"orgs": 1}

    world.run(main)


@everywhere
@pytest.mark.parametrize("moment", range(1, 14))
def test_wherever_in_a_create_it_is_cancelled(world, moment):
    """Cancelled at each await in turn: what is in the database is tracked, or in doubt."""

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            await OrgFactory.create_async()  # what is asked once is asked by now
            task = asyncio.create_task(UserFactory.create_async())
            for _ in range(moment):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await assert_usable(engine, world)
        assert world.added() == {}
        assert len(tracker) == 0

    world.run(main)
    world.bystanders.assert_untouched()


@everywhere
@pytest.mark.parametrize("moment", range(1, 30, 2))
def test_wherever_in_a_cleanup_it_is_cancelled(world, moment):
    async def main(engine):
        tracker = ResourceTracker(engine)
        tracker.start()
        await UserFactory.create_batch_async(2)
        tracker.stop()
        manager = CleanupManager(tracker, rows_per_transaction=2)
        await tracker.run_sync(lambda _tracker: manager.plan())
        task = asyncio.create_task(manager.cleanup_async())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await assert_usable(engine, world)
        there = sum(world.added().values())
        assert there <= len(tracker) <= 4
        report = await manager.cleanup_async()
        assert report.total_deleted == there
        assert len(tracker) == 0
        assert world.added() == {}

    world.run(main)
    world.bystanders.assert_untouched()


@everywhere
def test_a_session_of_the_users_that_is_cancelled_is_heard_as_rolled_back(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3), AsyncSession(engine) as session:
                    session.add(Org(name="never"))
                    await session.flush()
                    await asyncio.sleep(30)
            assert len(tracker) == 0

    world.run(main)
    world.bystanders.assert_untouched()


@everywhere
def test_a_commit_that_a_listener_refused_is_committed_by_nobody(world):
    """SQLAlchemy returns the connection with its transaction open."""
    refusing = []

    async def main(engine):
        @sa.event.listens_for(engine.sync_engine, "commit")
        def refuse(_connection):
            if refusing:
                raise refusing.pop()

        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            await OrgFactory.create_async()
            refusing.append(RuntimeError("refused"))
            with pytest.raises(RuntimeError, match="refused"):
                async with AsyncSession(engine) as session:
                    session.add(Org(name="never"))
                    await session.commit()
            before = world.added()
            await OrgFactory.create_async()
            assert (before, world.added()) == ({"orgs": 1}, {"orgs": 2})
        assert world.added() == {}

    world.run(main)
    world.bystanders.assert_untouched()
