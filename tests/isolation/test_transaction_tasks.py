"""Level transaction with asynchronous drivers: event loops, tasks that go on, errors."""

import asyncio
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import ALL, ONE_EACH, over
from harness.models import Group, Org
from tidyrows.dialects import dialect_for
from tidyrows.errors import IsolationError
from tidyrows.isolation.isolate import isolate

GROUPS = Group.__table__


async def add(bind, name):
    async with bind.begin() as connection:
        await connection.execute(sa.insert(GROUPS), {"name": name})


async def names(bind):
    async with bind.connect() as connection:
        return sorted(await connection.scalars(sa.select(Group.name)))


def in_another_loop(main):
    """What an application in a thread with a loop of its own does."""

    async def wait():
        return await asyncio.to_thread(asyncio.run, main())

    return wait()


@over(*ALL)
def test_another_event_loop_is_refused_before_the_driver_sees_it(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db:
            await add(db.engine, "one")
            with pytest.raises(IsolationError, match="used from another event loop"):
                await in_another_loop(lambda: add(db.engine, "two"))
            async with db.engine.connect() as connection:
                await connection.execute(sa.insert(GROUPS), {"name": "three"})
                with pytest.raises(IsolationError, match="used from another event loop"):
                    await in_another_loop(lambda: connection.execute(sa.select(Group)))
                with pytest.raises(IsolationError, match="used from another event loop"):
                    await in_another_loop(connection.commit)
            assert await names(db.engine) == ["one"]  # and it still works

    world.run(main)
    assert world.added() == {}


@over(*ALL)
def test_the_failed_statement_of_one_fails_no_other(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db:
            await add(db.engine, "committed")
            async with db.engine.connect() as first, db.engine.connect() as second:
                await first.execute(sa.insert(GROUPS), {"name": "undone"})
                with pytest.raises(sa.exc.DBAPIError):
                    await first.execute(sa.text("SELECT * FROM there_is_no_such_table"))
                assert "committed" in (await second.scalars(sa.select(Group.name))).all()
                await first.rollback()
                await first.execute(sa.insert(GROUPS), {"name": "again"})
                await first.commit()
            assert await names(db.engine) == ["again", "committed"]

    world.run(main)
    assert world.added() == {}


@over("postgresql+asyncpg", "postgresql+psycopg")
def test_a_transaction_in_which_a_statement_has_failed_commits_nothing(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db:
            async with db.engine.connect() as connection:
                await connection.execute(sa.insert(GROUPS), {"name": "undone"})
                with pytest.raises(sa.exc.DBAPIError):
                    await connection.execute(sa.text("SELECT 1/0"))
                await connection.commit()
            assert await names(db.engine) == []

    world.run(main)


@over(*ONE_EACH)
def test_a_commit_past_sqlalchemy_fails_the_test(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db, db.session() as session:
            session.add(Org(name="committed"))
            await session.flush()

            def commit(session):
                cursor = session.connection().connection.cursor()
                cursor.execute("COMMIT")
                cursor.close()

            await session.run_sync(commit)
            await session.commit()

    with pytest.raises(IsolationError, match="ended behind its back") as caught:
        world.run(main)
    assert len(caught.value.rows) == 1
    assert world.added() == {}


@over(*ONE_EACH)
def test_tasks_that_write_at_once_are_one_after_the_other(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db:
            await asyncio.gather(*(add(db.engine, f"{number}") for number in range(5)))
            assert await names(db.engine) == list("01234")
            assert len(db.tracker) == 5

    world.run(main)
    assert world.added() == {}


@over(*ALL)
def test_a_stream_is_read_to_its_end_while_another_one_writes(world):
    async def main(engine):
        async with isolate(engine, "transaction") as db:
            for name in "abc":
                await add(db.engine, name)
            read = []
            async with db.engine.connect() as reader, db.engine.connect() as writer:
                async for name in await reader.stream_scalars(sa.select(Group.name)):
                    read.append(name)
                    await writer.execute(sa.delete(GROUPS))
                    await writer.rollback()
            assert sorted(read) == ["a", "b", "c"]

    world.run(main)


@over(*ALL)
def test_a_task_that_goes_on_after_the_test_does_not_hang_it(world):
    """Else asyncmy waits for ever where two tasks read from one connection."""
    sleeping = {
        "mysql": "SELECT SLEEP(20)",
        "postgresql": "SELECT pg_sleep(20)",
        "sqlite": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 2e6) "
        "SELECT count(*) FROM c",
    }[world.backend]

    async def main(engine):
        async def go_on():
            async with db.engine.connect() as connection:
                sa.event.listen(
                    connection.sync_connection, "before_cursor_execute", lambda *_: runs.set()
                )
                await connection.exec_driver_sql(sleeping)

        runs = asyncio.Event()
        isolation = isolate(engine, "transaction")
        async with isolation as db:
            await add(db.engine, "one")
            task = asyncio.create_task(go_on())
            await runs.wait()
        task.cancel()
        with suppress(BaseException):
            await task

    with pytest.raises(IsolationError, match="still runs"):
        world.run(main)
    assert world.added() == {}


@over("postgresql+asyncpg", "mysql+aiomysql")
def test_a_broken_connection_is_named(world):
    kill = "KILL {}" if world.backend == "mysql" else "SELECT pg_terminate_backend({})"

    async def main(engine):
        async with isolate(engine, "transaction") as db:
            await add(db.engine, "lost")
            async with db.engine.connect() as connection:
                raw = (await connection.get_raw_connection()).dbapi_connection
                number = dialect_for(engine.sync_engine).server_id(raw)
                with world.engine.connect() as other:
                    other.exec_driver_sql(kill.format(number))
                with pytest.raises(sa.exc.DBAPIError):
                    await connection.execute(sa.select(Group))

    with pytest.raises(IsolationError, match="lost with its connection"):
        world.run(main)
    assert world.added() == {}


@over("postgresql+asyncpg", "mysql+aiomysql", "mysql+asyncmy")
def test_a_pool_of_another_event_loop_is_named(world):
    engine = create_async_engine(world.database.url.set(drivername=world.driver))

    async def one():
        async with isolate(engine, "transaction") as db:
            await add(db.engine, "one")
            return await names(db.engine)

    with asyncio.Runner() as runner:
        assert runner.run(one()) == ["one"]
        pool = engine.sync_engine.pool
        with pytest.raises(IsolationError, match="has connections of another event loop"):
            asyncio.run(one())
        assert pool.checkedout() == 0
        assert runner.run(one()) == ["one"]
        runner.run(engine.dispose())
