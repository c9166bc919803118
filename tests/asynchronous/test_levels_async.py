"""Levels of isolation of one test, in tasks."""

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from harness.asynchronous import ONE_EACH, over
from harness.models import Org
from tidyrows import Scoped, TrackedFactory
from tidyrows.testing import Tidy


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


@over(*ONE_EACH)
@pytest.mark.parametrize("level", ["none", "transaction"])
def test_one_body_in_a_task(world, level):
    async def main(engine):
        async with Tidy(engine, isolation=level, ledger=False) as tidy:
            assert isinstance(tidy.engine, AsyncEngine)
            await OrgFactory.create_async()
            async with AsyncSession(tidy.engine) as session:
                assert len((await session.scalars(select(Org))).all()) == 1
            assert len(tidy.tracker) == 1
        with pytest.raises(ZeroDivisionError) as caught:
            async with Tidy(engine, isolation=level, ledger=False):
                await OrgFactory.create_async()
                raise ZeroDivisionError
        assert not hasattr(caught.value, "__notes__")
        by_hand = await Tidy(engine, isolation=level, ledger=False).start_async()
        await OrgFactory.create_async()
        await by_hand.finish_async()
        assert world.added() == ({"orgs": 3} if level == "none" else {})

    world.run(main)
