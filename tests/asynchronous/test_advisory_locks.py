"""Advisory locks in tasks, with every asynchronous driver."""

import asyncio
import re

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from harness.asynchronous import ALL, over
from tidyrows import LockTimeoutError, SessionStateError, advisory_lock, try_advisory_lock


@over(*ALL)
def test_in_tasks(world):
    async def main(engine):
        async with advisory_lock(engine, "seed") as held:
            assert held
            async with try_advisory_lock(engine, "seed", shared=True) as shared:
                assert not shared
            with pytest.raises(LockTimeoutError, match="'seed'"):
                async with advisory_lock(AsyncSession(engine), "seed", timeout=0.1):
                    pass
            waiting = asyncio.ensure_future(advisory_lock(engine, "seed").__aenter__())
            await asyncio.sleep(0.1)  # it waits for the lock by now, or is about to
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with advisory_lock(engine, "seed", session=True, timeout=20):
            pass
        with pytest.raises(SessionStateError, match=re.escape("async with advisory_lock(")):
            advisory_lock(engine, "seed").__enter__()
        assert engine.pool.checkedout() == 0

    world.run(main)
