"""A ledger under asynchronous engines: entries, sweeps, resources, and several tasks at once."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from harness.asynchronous import ALL, ONE_EACH, over
from harness.ledgers import entries
from harness.models import Currency, Org
from tidyrows import (
    CleanupManager,
    Ledger,
    LedgerError,
    ResourceTracker,
    SessionStateError,
    external_handler,
    find_orphans_async,
    sweep_async,
)
from tidyrows.greenlets import spawn

pytestmark = pytest.mark.slow

everywhere, one_each = over(*ALL), over(*ONE_EACH)


@asynccontextmanager
async def ledger_of(engine):
    """An installed ledger, closed at the end."""
    ledger = Ledger(engine)
    await ledger.install_async()
    try:
        yield ledger
    finally:
        await asyncio.to_thread(ledger.close)


async def make(engine, *names):
    async with engine.begin() as connection:
        for name in names:
            await connection.execute(sa.insert(Org).values(name=name))


def orgs(world):
    with world.engine.connect() as connection:
        return connection.execute(sa.select(Org.name).order_by(Org.name)).scalars().all()


@everywhere
def test_rows_are_entered_with_their_commit_and_entries_go_with_them(world):
    async def main(engine):
        async with ledger_of(engine) as ledger:
            tracker = ResourceTracker(engine, ledger=ledger)
            async with CleanupManager(tracker) as manager:
                async with engine.connect() as connection:
                    await connection.execute(sa.insert(Org).values(name="ours"))
                    assert not entries(world.engine)
                    await connection.commit()
                assert [each["kind"] for each in entries(world.engine)] == ["rows"]
            assert manager.report.total_deleted == 1
            assert not entries(world.engine)

    world.run(main)
    assert not orgs(world)


@everywhere
def test_what_a_dead_worker_left_is_swept(world):
    async def main(engine):
        async with ledger_of(engine) as ledger:
            tracker = ResourceTracker(engine, ledger=ledger).start()
            await make(engine, "a", "b")
            tracker.stop()
            tracker.dismiss_leak_warning()
        other = engine.execution_options()
        (found,) = await find_orphans_async(other, patience=0.0)
        assert [name.name for name in found.rows] == ["orgs"]
        report = await sweep_async(other, patience=0.0)
        assert report.total_deleted == 2
        assert not await find_orphans_async(other, patience=0.0)
        return await sweep_async(other, patience=0.0)

    assert world.run(main).total_deleted == 0
    assert not orgs(world)
    assert not entries(world.engine)


@one_each
def test_a_live_workers_rows_stay(world):
    async def main(engine):
        async with ledger_of(engine) as ledger:
            async with CleanupManager(ResourceTracker(engine, ledger=ledger)) as manager:
                await make(engine, "ours")
                assert (await sweep_async(world.engine, patience=0.0)).total_deleted == 0
                assert orgs(world) == ["ours"]
            assert manager.report.total_deleted == 1

    world.run(main)


@one_each
def test_several_tasks_at_once_are_entered_each_in_its_own_transaction(world):
    async def main(engine):
        async with ledger_of(engine) as ledger:
            async with CleanupManager(ResourceTracker(engine, ledger=ledger)) as manager:

                async def work(number):
                    async with engine.connect() as connection:
                        await connection.execute(sa.insert(Org).values(name=f"n{number}"))
                        if number % 3 == 0:
                            await connection.rollback()
                        else:
                            await connection.commit()

                await asyncio.gather(*(work(number) for number in range(9)))
                assert len(orgs(world)) == 6
                assert len(entries(world.engine)) == 6
            return manager.report.total_deleted

    assert world.run(main) == 6
    assert not orgs(world)
    assert not entries(world.engine)


@one_each
def test_a_cleanup_beside_tasks_that_go_on_keeps_their_entries(world):
    if world.backend == "sqlite":
        pytest.skip("SQLite has one writer")

    async def main(engine):
        async with ledger_of(engine) as ledger:
            tracker = ResourceTracker(engine, ledger=ledger).start()
            manager = CleanupManager(tracker)
            stop = asyncio.Event()

            async def write(worker):
                number = 0
                while not stop.is_set() and number < 40:
                    number += 1
                    async with engine.begin() as connection:
                        key = f"{chr(65 + worker)}{number:02}"
                        await connection.execute(sa.insert(Currency).values(code=key, name="ours"))

            writers = [asyncio.ensure_future(write(number)) for number in range(3)]
            for _ in range(6):
                await manager.cleanup_async()
            stop.set()
            await asyncio.gather(*writers)
            tracker.stop()
            await manager.cleanup_async()
            return len(tracker)

    assert world.run(main) == 0
    with world.engine.connect() as connection:
        assert not connection.execute(sa.select(Currency.code)).all()
    assert not entries(world.engine)


@one_each
def test_resources_are_entered_where_one_can_await(world):
    removed: list[Any] = []
    external_handler("ledger-async", replace=True)(removed.append)

    async def main(engine):
        async with ledger_of(engine) as ledger:
            tracker = ResourceTracker(engine, ledger=ledger)
            async with CleanupManager(tracker):
                with pytest.raises(SessionStateError, match="run_sync"):
                    tracker.track_external("ledger-async", {"id": 1})
                await tracker.run_sync(lambda t: t.track_external("ledger-async", {"id": 1}))
                assert [each["kind"] for each in entries(world.engine)] == ["external"]

    world.run(main)
    assert removed == [{"id": 1}]
    assert not entries(world.engine)


@one_each
def test_a_sweep_without_await_says_what_to_write(world):
    from tidyrows import sweep  # noqa: PLC0415 -- of this test only

    async def main(engine):
        async with ledger_of(engine):
            with pytest.raises((SessionStateError, LedgerError), match="sweep_async"):
                sweep(engine)
        with pytest.raises(LedgerError, match="sweep_async"):
            sweep(engine.url.render_as_string(hide_password=False))

    world.run(main)


@one_each
def test_told_rows_are_entered(world):
    async def main(engine):
        async with ledger_of(engine) as ledger:
            tracker = ResourceTracker(engine, ledger=ledger)
            async with CleanupManager(tracker) as manager:
                await asyncio.to_thread(theirs)
                await tracker.run_sync(
                    lambda t: t.track_query(sa.select(Currency).where(Currency.code == "USD"))
                )
                assert len(entries(world.engine)) == 1
            assert await spawn(len, tracker) == 0
            return manager.report.total_deleted

    def theirs():
        with world.engine.begin() as connection:
            connection.execute(sa.insert(Currency).values(code="USD", name="theirs"))

    assert world.run(main) == 1
