"""Sessions of the caller's own, awaited: by ``using``, by Meta, and begun by hand."""

from __future__ import annotations

import asyncio

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from harness.asynchronous import ALL, ONE_EACH, engine_on, over
from harness.factories import GroupFactory, OrderFactory, OrgFactory, UserFactory
from harness.models import Order, Org, User
from tidyrows import CleanupManager, ResourceTracker, SessionStateError

everywhere, one_each = over(*ALL), over(*ONE_EACH)


def assert_readable(order):
    """Nothing of these new objects needs the database."""
    user = order.user
    assert (user.groups, user.orders, user.manager) == ([], [order], None)
    assert user.org.users == [user]
    assert {line.order for line in order.lines} == {order}
    for each in (order, user, user.org):
        assert not sa.inspect(each).expired_attributes


@everywhere
def test_a_session_is_used_by_awaited_calls_with_and_without_a_tracker(world):
    async def create(engine):
        before = world.added()
        async with AsyncSession(engine) as session:
            with pytest.raises(SessionStateError, match=r"await OrderFactory.create_async\(\)"):
                OrderFactory.using(session).create()
            assert_readable(await OrderFactory.using(session).create_async())
            users = await UserFactory.using(session).create_batch_async(2, groups=[])
            assert [user.groups for user in users] == [[], []]
            assert world.added() == before
            await session.rollback()
        registry = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
        assert (await OrgFactory.using(registry).create_async()).users == []
        await registry.commit()
        await registry.remove()

    async def main(engine):
        await create(engine)
        assert world.added() == {"orgs": 1}
        async with CleanupManager(ResourceTracker(engine)) as cleanup:
            await create(engine)
            async with engine_on(world.database, world.driver) as another:
                async with AsyncSession(another) as session:
                    await GroupFactory.using(session).create_async()
                    await session.commit()
            assert len(cleanup.tracker) == 2
        assert world.added() == {"orgs": 1}

    world.run(main)


@one_each
@pytest.mark.parametrize("persistence", ["flush", "commit"])
def test_meta_may_name_an_asynchronous_session(world, persistence):
    async def main(engine):
        registry = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)

        class NamedOrg(OrgFactory):
            class Meta:
                sqlalchemy_session = registry
                sqlalchemy_session_persistence = persistence

        class NamedUser(UserFactory):
            class Meta:
                sqlalchemy_session_factory = registry
                sqlalchemy_session_persistence = persistence

            org = factory.SubFactory(NamedOrg)

            @factory.post_generation
            async def rename(obj, create, extracted, **_):  # noqa: N805 -- the object
                obj.name = "changed in a hook"
                await NamedUser._meta.sqlalchemy_session.execute(sa.insert(Org).values(name="n"))

        async with CleanupManager(ResourceTracker(engine)) as cleanup:
            with pytest.raises(SessionStateError, match=r"await NamedUser.create_async\(\)"):
                NamedUser()
            user = await NamedUser.create_async()
            assert (user.name, user.groups, user.orders) == ("changed in a hook", [], [])
            assert user.org.users == [user]
            if persistence == "flush":
                assert world.added() == {}
                await registry.commit()
            assert world.added() == {"users": 1, "orgs": 2}
            with world.engine.connect() as connection:
                names = sa.select(User.name).where(User.name == "changed in a hook")
                assert len(connection.scalars(names).all()) == 1
            await registry.remove()
        return cleanup.report

    assert world.run(main).total_deleted == 3
    world.bystanders.assert_untouched()


@one_each
@pytest.mark.parametrize("begin", ["begin", "begin_nested"])
def test_in_a_transaction_begun_by_hand_everything_can_be_read_too(world, begin):
    async def main(engine):
        async with AsyncSession(engine) as session:
            async with CleanupManager(ResourceTracker(session)) as cleanup:
                async with getattr(session, begin)():
                    assert_readable(await OrderFactory.create_async())
                await session.commit()
        return cleanup.report

    assert world.run(main).total_deleted == 5
    world.bystanders.assert_untouched()


@one_each
def test_a_hook_can_read_everything_of_what_it_awaits(world):
    """And of its own object, before the outermost call has committed."""

    class Hooked(UserFactory):
        @factory.post_generation
        async def groups(obj, create, extracted, **_):  # noqa: N805 -- the object
            assert (obj.groups, obj.orders, obj.manager) == ([], [], None)
            obj.groups.append(await GroupFactory.create_async())
            session = AsyncSession(sync_session_class=lambda **_: sa.orm.object_session(obj))
            await session.execute(sa.insert(Order).values(user_id=obj.id))

        @factory.post_generation
        async def more(obj, create, extracted, **_):  # noqa: N805 -- the object
            assert (len(obj.groups), len(obj.orders)) == (1, 1)
            assert_readable(await OrderFactory.create_async())

        @classmethod
        async def _after_postgeneration(cls, instance, *_):
            assert instance.manager is None

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)) as cleanup:
            user = await Hooked.create_async()
            assert (len(user.groups), len(user.orders)) == (1, 1)
        return cleanup.report

    assert world.run(main).total_deleted == 10
    world.bystanders.assert_untouched()


# --- several tasks


@one_each
def test_tasks_of_a_group_have_a_tracker_or_a_session_each(world):
    """And one that fails takes only its own rows with it."""

    async def main(engine):
        async def tracked(number):
            tracker = ResourceTracker(engine)
            async with CleanupManager(tracker) as cleanup:
                await UserFactory.create_batch_async(number)
                assert len(tracker) == 2 * number
            return cleanup.report.total_deleted

        async def with_a_session():
            async with AsyncSession(engine) as session:
                await OrgFactory.using(session).create_async()
                await session.commit()

        async with CleanupManager(ResourceTracker(engine)) as outer:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(tracked(number)) for number in (1, 2)]
                if world.backend != "sqlite":  # which has one writer at a time
                    group.create_task(with_a_session())
                else:
                    await with_a_session()
            assert [task.result() for task in tasks] == [2, 4]
            assert len(outer.tracker) == 1
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(UserFactory.create_async(email=None))
            await OrgFactory.create_async()
        return outer.report

    assert world.run(main).total_deleted == 2
    world.bystanders.assert_untouched()


@one_each
def test_the_tasks_of_anyio_are_tasks_too(world):
    anyio = pytest.importorskip("anyio", reason="anyio is not at hand: `pip install anyio`")

    async def main(engine):
        async def tracked(number, found):
            async with CleanupManager(ResourceTracker(engine)) as cleanup:
                await UserFactory.create_batch_async(number)
            found.append(cleanup.report.total_deleted)

        found = []
        async with CleanupManager(ResourceTracker(engine)) as outer:
            async with anyio.create_task_group() as group:
                for number in (1, 2):
                    group.start_soon(tracked, number, found)
                group.start_soon(UserFactory.create_async)
            with anyio.move_on_after(0):
                await UserFactory.create_async()
        return sorted(found), outer.report

    found, report = world.run(main)
    assert found == [2, 4]
    assert report.total_deleted == 2
    world.bystanders.assert_untouched()
