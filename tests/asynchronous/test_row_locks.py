"""Row locks in tasks."""

import asyncio

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from harness.asynchronous import ONE_EACH, over
from harness.models import Org
from tidyrows import LockTimeoutError, locked_async


@over(*ONE_EACH)
def test_in_tasks(world):
    async def main(engine):
        async with AsyncSession(engine) as mine:
            mine.add(Org(id=1, name="org"))
            await mine.commit()
            (org,) = await locked_async(mine, select(Org))
            assert org.name == "org"
            maker = async_sessionmaker(engine)
            registry = async_scoped_session(maker, scopefunc=asyncio.current_task)
            with pytest.raises(LockTimeoutError) as caught:
                await locked_async(registry, select(Org), timeout=1)
            assert caught.value.holders
            await registry.remove()
            async with engine.connect() as connection:
                with pytest.raises(LockTimeoutError):
                    await locked_async(connection, select(Org.id), nowait=True)

    world.run(main)
