"""Tasks that are cancelled at any wait: nothing of ours is left, and nothing of others goes."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from harness.asynchronous import ALL, over
from harness.factories import UserFactory
from harness.ledgers import entries
from harness.models import Org, User
from harness.races import CancelledAt
from tidyrows import CleanupError, CleanupManager, Ledger, ResourceTracker


async def work(engine, tracker):
    """What a test does: a factory, a session with a savepoint, a transaction without one."""
    async with CleanupManager(tracker):
        await UserFactory.create_async()
        async with AsyncSession(engine) as session:
            session.add(Org(name="committed"))
            await session.flush()
            async with session.begin_nested():
                session.add(Org(name="in a savepoint"))
            await session.commit()
            session.add(Org(name="never"))
            await session.flush()
        async with engine.begin() as connection:
            await connection.execute(sa.insert(Org).values(name="by itself"))


async def storm(world, engine, times, ledger):
    """Cancel the work so many times, and clean up; returns how often it was cancelled."""
    rng = random.Random(world.driver)
    struck = longest = 0
    for number in range(times + 2):
        tracker = ResourceTracker(engine, ledger=ledger)
        wait = rng.randint(1, longest) if number > 1 else 0
        task = CancelledAt(work(engine, tracker), wait, answered=rng.random() < 0.5)
        said = []
        try:
            await asyncio.create_task(awaited(task))
        except asyncio.CancelledError as error:
            struck += 1
            said += getattr(error, "__notes__", [])
        if wait == 0:  # at the second time, what is asked once has been asked
            longest = task.waits
        await commit_all(engine)
        if len(tracker):
            try:
                await CleanupManager(tracker).cleanup_async()
            except CleanupError as error:
                said.append(str(error))
        assert len(tracker) == 0
        left = {name: rows for name, rows in world.added().items() if name != "tidyrows_ledger"}
        for name, rows in left.items():
            assert str(said).count(f"{name}(") >= rows, f"round {number}, wait {wait} of {longest}"
        if left:
            forget_ours(world)
        assert ledger is None or entries(world.engine) == []
    return struck


def forget_ours(world):
    with world.engine.begin() as connection:
        connection.execute(sa.delete(User))
        connection.execute(sa.delete(Org).where(Org.name.not_like("stranger%")))


async def awaited(awaitable):
    return await awaitable


async def commit_all(engine):
    """Use each connection of the pool, and commit: what was left open on it comes with that."""
    async with AsyncExitStack() as stack:
        for _ in range(engine.sync_engine.pool.checkedin()):
            connection = await stack.enter_async_context(engine.connect())
            await connection.execute(sa.text("SELECT 1"))
            await connection.commit()


@pytest.mark.parametrize("with_ledger", [False, True], ids=["alone", "ledger"])
@pytest.mark.parametrize("times", [pytest.param(1000, marks=pytest.mark.soak), 20])
@over(*ALL)
def test_wherever_a_test_is_cancelled_nothing_is_left(world, times, with_ledger):
    async def main(engine):
        if not with_ledger:
            return await storm(world, engine, times, None)
        ledger = Ledger(engine)
        await ledger.install_async()
        try:
            return await storm(world, engine, times, ledger)
        finally:
            await asyncio.to_thread(ledger.close)
            with world.engine.begin() as connection:
                connection.exec_driver_sql("DROP TABLE tidyrows_ledger")

    world.bystanders.insert(Org, *({"name": f"stranger {each}"} for each in range(3)))
    assert world.run(main) > times / 2
    world.bystanders.assert_untouched()


@over("sqlite+aiosqlite")
def test_a_cancelled_select_keeps_no_lock(world):
    """The traceback holds its cursor, and the cursor the lock of the closed connection."""
    world.bystanders.insert(Org, *({"name": f"stranger {each}"} for each in range(3)))

    async def main(engine):
        tracker = ResourceTracker(engine)

        async def look():
            async with engine.connect() as connection:
                await connection.execute(sa.select(Org))

        counted = CancelledAt(look())
        await awaited(counted)
        errors = []
        for wait in range(1, counted.waits + 1):
            try:
                await asyncio.create_task(awaited(CancelledAt(look(), wait)))
            except asyncio.CancelledError as error:
                errors.append(error)
            with world.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 1")
                connection.execute(sa.update(Org).values(name=Org.name))
                connection.commit()
        assert len(tracker) == 0
        assert errors

    world.run(main)
    world.bystanders.assert_untouched()
