"""create_bulk_async: the rows of many objects, through asynchronous drivers."""

from __future__ import annotations

import asyncio

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from harness.asynchronous import ALL, ONE_EACH, over
from harness.factories import DogFactory, EngineerFactory, GroupFactory, OrgFactory
from harness.models import Org, User
from tidyrows import BulkError, CleanupManager, ResourceTracker, Scoped, TrackedFactory
from tidyrows.errors import SessionStateError

everywhere, one_each = over(*ALL), over(*ONE_EACH)


async def soon(value):
    await asyncio.sleep(0)
    return value


class MemberFactory(TrackedFactory[User]):
    class Meta:
        model = User
        exclude = ("word",)

    email = Scoped("{tag}@example.test")
    word = factory.LazyFunction(lambda: soon("word"))
    name = factory.LazyAttribute(lambda o: o.word.upper())
    org = factory.SubFactory(OrgFactory)


@everywhere
def test_rows_are_made_readable_and_deleted_exactly(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            users = await MemberFactory.create_bulk_async(4, chunk_size=3)
            assert [user.name for user in users] == ["WORD"] * 4
            assert all(user.org.users == [user] for user in users)
            assert all(user.groups == user.orders == [] for user in users)
            groups = await GroupFactory.create_bulk_async(2)
            [member] = await MemberFactory.create_bulk_async(1, groups=groups)
            assert member.groups == groups
            assert await MemberFactory.create_bulk_async(3, returning=False, chunk_size=2) == []
            await EngineerFactory.create_bulk_async(2)
            assert {dog.kind for dog in await DogFactory.create_bulk_async(2)} == {"dog"}
            added = world.added()
            assert (added["users"], added["orgs"], added["user_groups"]) == (8, 8, 2)
            assert len(tracker) == sum(added.values())
        return cleanup.report, sum(added.values())

    report, made = world.run(main)
    assert report.total_deleted == made
    world.bystanders.assert_untouched()


@one_each
def test_tasks_share_a_tracker(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            made = await asyncio.gather(*(MemberFactory.create_bulk_async(3) for _ in range(4)))
            assert len({user.email for users in made for user in users}) == 12
            assert len(tracker) == 24

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_what_cannot_be_honoured_is_refused_by_name(world):
    class OwnFactory(OrgFactory):
        @classmethod
        async def _create(cls, model_class, *args, **kwargs):
            return super()._create(model_class, *args, **kwargs)

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            with pytest.raises(BulkError, match=r"OwnFactory\._create"):
                await OwnFactory.create_bulk_async(2)
            assert len(await OwnFactory.create_bulk_async(2, hooks=True)) == 2
            with pytest.raises(SessionStateError, match=r"await OrgFactory\.create_bulk_async"):
                OrgFactory.create_bulk(2)
        async with AsyncSession(engine) as session:
            made = await OrgFactory.using(session).create_bulk_async(2)
            assert await session.scalar(sa.select(sa.func.count(Org.id))) >= 2
            assert all(org.users == [] for org in made)
            await session.rollback()

    world.run(main)
    world.bystanders.assert_untouched()


def test_a_coroutine_is_refused_where_nothing_awaits():
    class OwnFactory(OrgFactory):
        name = factory.LazyFunction(lambda: soon("word"))

    with sa.create_engine("sqlite://").connect() as connection:
        Org.metadata.create_all(connection)
        with CleanupManager(ResourceTracker(connection)):
            with pytest.raises(SessionStateError, match=r"OwnFactory\.name is asynchronous"):
                OwnFactory.create_bulk(2)
