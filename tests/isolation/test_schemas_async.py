"""The levels schema and database under asynchronous engines: each test has a loop of its own."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from harness.asynchronous import ALL, engine_on, over
from harness.spaces import METADATA, ORGS, lease_of_this_process_ends
from tidyrows.greenlets import spawn
from tidyrows.isolation.isolate import isolate
from tidyrows.isolation.own_loop import in_own_loop
from tidyrows.isolation.prune import prune_async


@over(*ALL)
@pytest.mark.parametrize("level", ["schema", "database"])
def test_tests_with_loops_of_their_own_use_one_schema(zoo_database, driver, level):
    names = []

    async def one_test():
        async with engine_on(zoo_database, driver) as engine:
            async with isolate(engine, level, metadata=METADATA) as db:
                names.append(db.schema)
                async with db.session() as session:
                    assert (await session.scalars(sa.select(ORGS.c.id))).all() == []
                    await session.execute(sa.insert(ORGS).values(id=1))
                    await session.commit()
                left = await db.engine.connect()
                await left.execute(sa.update(ORGS).values(kind="big"))
            await left.close()

    async def tidy():
        async with engine_on(zoo_database, driver) as engine:
            await spawn(in_own_loop, engine.sync_engine, lease_of_this_process_ends)
            assert set(names) <= set(await prune_async(engine, older_than=0))

    asyncio.run(one_test())
    asyncio.run(one_test())
    asyncio.run(tidy())
