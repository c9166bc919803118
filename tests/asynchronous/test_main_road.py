"""Asynchronous engines: what is created is tracked, usable, and deleted exactly."""

from __future__ import annotations

import asyncio

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from harness.asynchronous import ALL, ONE_EACH, over
from harness.factories import (
    DogFactory,
    EngineerFactory,
    GroupFactory,
    OrderFactory,
    OrgFactory,
    UserFactory,
)
from harness.models import Group, Order, Org, User
from tidyrows import (
    CleanupManager,
    NotBoundError,
    ResourceTracker,
    RetryPolicy,
    Scoped,
    SessionStateError,
    TrackedFactory,
)
from tidyrows.greenlets import spawn
from tidyrows.testing import Tidy

everywhere, one_each = over(*ALL), over(*ONE_EACH)


@everywhere
def test_what_factories_make_is_there_and_is_gone_afterwards(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            await UserFactory.create_batch_async(3, groups=2)
            order = await OrderFactory.create_async()
            assert isinstance(order, Order)
            await EngineerFactory.create_async()
            await DogFactory.create_async()
            added = world.added()
            assert len(tracker) == sum(added.values())
            assert added["users"] == 4
            assert added["user_groups"] == 6
            assert added["order_lines"] == 2
            assert added["engineers"] == 1
        return cleanup.report, sum(added.values())

    report, made = world.run(main)
    assert report.total_deleted == made
    assert not report.already_gone
    world.bystanders.assert_untouched()


@everywhere
def test_everything_of_the_objects_is_usable_afterwards(world):
    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            user = await UserFactory.create_async(groups=2, managed=True)
            order = await OrderFactory.create_async(user=user)
            for each in (user, user.org, user.manager, order):
                for attribute in sa.inspect(each).mapper.column_attrs:
                    getattr(each, attribute.key)
            assert order.user is user
            assert len(user.groups) == 2
            assert {line.order for line in order.lines} == {order}

    world.run(main)
    world.bystanders.assert_untouched()


def binds(engine):
    maker = async_sessionmaker(engine)
    return {
        "engine": engine,
        "maker": maker,
        "maker of its own class": async_sessionmaker(
            engine, sync_session_class=type("Mine", (orm.Session,), {})
        ),
        "session": AsyncSession(engine),
        "registry": async_scoped_session(maker, scopefunc=asyncio.current_task),
    }


KINDS = ("engine", "maker", "maker of its own class", "session", "registry")


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_tracker_is_bound_to(world, kind):
    async def main(engine):
        bind = binds(engine)[kind]
        made_with = dict(getattr(bind, "kw", {}))
        tracker = ResourceTracker(bind)
        async with CleanupManager(tracker) as cleanup:
            user = await UserFactory.create_async()
            assert user.org.name
            assert world.added() == {"users": 1, "orgs": 1}
            assert len(tracker) == 2
            if kind in {"maker", "maker of its own class"}:
                async with bind() as session:
                    session.add(Org(name="through the maker"))
                    await session.commit()
                assert len(tracker) == 3
            if kind in {"session", "registry"}:
                bind.add(Org(name="through the session"))
                await bind.commit()
                assert len(tracker) == 3
        assert world.added() == {}
        if hasattr(bind, "kw"):
            assert bind.kw == made_with
            made = bind()
            assert type(made.sync_session) is bind.kw.get("sync_session_class", orm.Session)
            assert not made.sync_session.dispatch.after_begin
        if hasattr(bind, "close"):
            await bind.close()
        return cleanup.report

    assert world.run(main).total_deleted >= 2
    world.bystanders.assert_untouched()


@one_each
def test_what_the_sessions_of_another_maker_write_is_not_ours(world):
    async def main(engine):
        mine, theirs = async_sessionmaker(engine), async_sessionmaker(engine)
        tracker = ResourceTracker(mine)
        async with CleanupManager(tracker):
            async with theirs() as session:
                session.add(Org(name="theirs"))
                await session.commit()
            assert len(tracker) == 0
        assert world.added() == {"orgs": 1}

    world.run(main)


@one_each
def test_a_connection_is_followed_too(world):
    async def main(engine):
        async with engine.connect() as connection:
            tracker = ResourceTracker(connection)
            async with CleanupManager(tracker):
                await connection.execute(sa.insert(Org.__table__).values(name="mine"))
                await connection.commit()
                assert len(tracker) == 1
        assert world.added() == {}
        with pytest.raises(SessionStateError, match=r"async with engine\.connect"):
            ResourceTracker(engine.connect())

    world.run(main)


@one_each
def test_a_user_s_own_session_is_heard_through_the_engine(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            async with AsyncSession(engine) as session:
                session.add_all([Org(name=f"raw {n}") for n in range(3)])
                await session.flush()
                assert len(tracker) == 0
                await session.commit()
                assert len(tracker) == 3
                session.add(Org(name="never"))
                await session.flush()
                await session.rollback()
            async with engine.begin() as connection:
                await connection.execute(
                    sa.insert(Org.__table__), [{"name": "core 1"}, {"name": "core 2"}]
                )
            assert len(tracker) == 5
        assert world.added() == {}

    world.run(main)
    world.bystanders.assert_untouched()


# --- several tasks


@one_each
def test_tasks_with_a_tracker_each_own_exactly_their_rows(world):
    async def main(engine):
        meet = asyncio.Barrier(4) if world.backend != "sqlite" else None

        async def task(number):
            tracker = ResourceTracker(engine)
            async with CleanupManager(tracker) as cleanup:
                await UserFactory.create_batch_async(number)
                if meet is not None:
                    await meet.wait()
                await GroupFactory.create_async()
                assert len(tracker) == 2 * number + 1
            assert cleanup.report.total_deleted == 2 * number + 1

        await asyncio.gather(*(task(number) for number in range(1, 5)))

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_tasks_under_one_tracker_take_turns(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            users = await asyncio.gather(*(UserFactory.create_async() for _ in range(8)))
            assert len({user.id for user in users}) == 8
            assert len(tracker) == 16

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_run_sync_waits_for_its_turn_too(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            await asyncio.gather(
                *(UserFactory.create_async() for _ in range(6)),
                *(tracker.run_sync(lambda _tracker: UserFactory()) for _ in range(6)),
            )
            assert len(tracker) == 24
        assert cleanup.report.total_deleted == 24

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_a_cleanup_waits_for_its_turn_too(world):
    """Beside a task that is creating yet, in the tracker's one session."""

    async def main(engine):
        began = asyncio.Event()
        sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: began.set())
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            creating = asyncio.create_task(UserFactory.create_async())
            await began.wait()
            report = await asyncio.wait_for(cleanup.cleanup_async(), 30)
            await asyncio.wait_for(creating, 30)
            assert report.total_deleted == 2

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
@pytest.mark.parametrize("keep", [False, True])
def test_so_does_the_end_of_the_block(world, keep):
    """What that task makes is tracked, be it cleaned up or kept."""

    async def main(engine):
        began = asyncio.Event()
        sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: began.set())
        tracker = ResourceTracker(engine)
        cleanup = CleanupManager(tracker, keep_on_failure=keep)
        with pytest.raises(ZeroDivisionError) as caught:
            async with cleanup:
                creating = asyncio.create_task(UserFactory.create_async())
                await began.wait()
                raise ZeroDivisionError
        await asyncio.wait_for(creating, 30)
        if keep:
            assert "2 row(s)" in caught.value.__notes__[0]
            await cleanup.cleanup_async()
        assert cleanup.report.total_deleted == 2

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_a_tracker_may_outlive_its_loop(world):
    made = []

    async def create(engine):
        tracker = ResourceTracker(engine)
        tracker.start()
        await UserFactory.create_async()
        tracker.stop()
        made.append(tracker)

    world.run(create)
    text = made[0].to_json()
    assert world.added() == {"users": 1, "orgs": 1}

    async def clean(engine):
        tracker = await ResourceTracker.from_json_async(text, engine)
        return await CleanupManager(tracker).cleanup_async()

    assert world.run(clean).total_deleted == 2
    world.bystanders.assert_untouched()


# --- errors


@one_each
def test_the_body_s_own_exception_surfaces(world):
    mine = ValueError("mine")

    async def main(engine):
        with pytest.raises(ValueError, match="mine") as caught:
            async with CleanupManager(ResourceTracker(engine)):
                await UserFactory.create_async()
                raise mine
        assert caught.value is mine

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_what_would_block_the_loop_is_refused_with_the_line_to_write(world):
    async def main(engine):
        tracker = ResourceTracker(engine)
        with pytest.raises(SessionStateError, match=r"async with CleanupManager"):
            with CleanupManager(tracker):
                pass
        async with CleanupManager(tracker) as cleanup:
            with pytest.raises(SessionStateError, match=r"await UserFactory.create_async\(\)"):
                UserFactory()
            with pytest.raises(SessionStateError, match=r"UserFactory.create_batch_async\(2\)"):
                UserFactory.create_batch(2)
            for call in (
                lambda: tracker.track_query(sa.select(Org)),
                lambda: tracker.track_rows(Org, [1]),
                lambda: tracker.track_tagged(Org.name, "x-{tag}"),
                lambda: tracker.preserve(sa.select(Org)),
            ):
                with pytest.raises(SessionStateError, match=r"await tracker.run_sync\("):
                    call()
            with pytest.raises(SessionStateError, match=r"await manager.cleanup_async\(\)"):
                cleanup.cleanup()
            with pytest.raises(SessionStateError, match="run_sync"):
                cleanup.plan()

    world.run(main)


@one_each
def test_what_asks_the_database_runs_in_run_sync(world):
    with world.engine.begin() as connection:
        connection.execute(sa.insert(Org.__table__).values(name="told of"))

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            told = sa.select(Org).where(Org.name == "told of")
            await tracker.run_sync(lambda tracker: tracker.track_query(told))
            plan = await tracker.run_sync(lambda _tracker: cleanup.plan())
            assert plan.total_rows == 1
        assert cleanup.report.total_deleted == 1

    world.run(main)
    world.bystanders.assert_untouched()


def test_something_else_of_sqlalchemy_s_asynchronous_module_is_refused():
    class Other:
        __module__ = "sqlalchemy.ext.asyncio.engine"

    with pytest.raises(NotBoundError):
        ResourceTracker(Other())


@one_each
def test_a_manager_of_a_synchronous_tracker_works_too(world):
    async def main(_engine):
        async with CleanupManager(ResourceTracker(world.engine)) as cleanup:
            UserFactory()
        return cleanup.report

    assert world.run(main).total_deleted == 2
    world.bystanders.assert_untouched()


# --- what factories do


class HookedFactory(UserFactory):
    @factory.post_generation
    def change(self, create, extracted, **kwargs):
        self.name = "changed in a hook"
        OrgFactory(name="made in a hook")


@one_each
def test_hooks_run_and_their_changes_are_committed(world):
    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            user = await HookedFactory.create_async()
            assert user.name == "changed in a hook"
            assert world.added() == {"users": 1, "orgs": 2}
            with world.engine.connect() as connection:
                found = sa.select(User.name).where(User.id == user.id)
                assert connection.execute(found).scalar_one() == "changed in a hook"

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_get_or_create_finds_what_is_there(world):
    class FindingFactory(TrackedFactory[Group]):
        class Meta:
            model = Group
            sqlalchemy_get_or_create = ("name",)

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            one = await FindingFactory.create_async(name="the one")
            assert await FindingFactory.create_async(name="the one") is one
            assert len(tracker) == 1

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_a_lost_transaction_is_run_again_and_the_loop_goes_on(world):
    lost, ticks = [], []

    class LosingFactory(UserFactory):
        @factory.post_generation
        def lose(self, create, extracted, **kwargs):
            if not lost:
                lost.append(1)
                raise ConnectionResetError

    async def main(engine):
        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.005)

        policy = RetryPolicy(wait=lambda _state: 0.1)
        async with CleanupManager(ResourceTracker(engine, retry=policy)):
            creating = asyncio.create_task(LosingFactory.create_async())
            beside = asyncio.create_task(tick())
            await creating
            beside.cancel()
            assert world.added() == {"users": 1, "orgs": 1}

    world.run(main)
    assert lost
    assert len(ticks) > 5
    world.bystanders.assert_untouched()


def test_a_wait_lets_the_other_tasks_go_on():
    """In a blocked loop nobody could give the lock back that the next attempt needs."""
    order = []

    async def other():
        order.append("other")

    async def main():
        task = asyncio.create_task(other())
        await spawn(RetryPolicy().sleep, 0.01)
        order.append("waited")
        await task

    asyncio.run(main())
    assert order == ["other", "waited"]


@everywhere
def test_relationships_that_nobody_set_can_be_read_afterwards(world):
    """A new object's collection is empty, or holds what a hook inserted by its key."""

    class ByKey(TrackedFactory[User]):
        class Meta:
            model = User

        email = Scoped("{tag}@example.test")
        name = "has an org by its key"

    class WithOrders(UserFactory):
        @factory.post_generation
        def orders_by_key(obj, create, extracted, **_):  # noqa: N805 -- the object
            for _number in range(extracted or 0):
                session = WithOrders._meta.sqlalchemy_session
                session.execute(sa.insert(Order).values(user_id=obj.id))

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            group = await GroupFactory.create_async()
            assert group.users == []
            user = await UserFactory.create_async()
            assert (user.groups, user.orders, user.manager) == ([], [], None)
            by_key = await ByKey.create_async(org_id=user.org_id)
            assert by_key.org.id == user.org_id
            with_orders = await WithOrders.create_async(orders_by_key=2)
            assert len(with_orders.orders) == 2
            assert with_orders.groups == []

    world.run(main)
    world.bystanders.assert_untouched()


@one_each
def test_what_get_or_create_found_is_not_said_to_be_empty(world):
    class Found(OrgFactory):
        class Meta:
            sqlalchemy_get_or_create = ("name",)

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            user = await UserFactory.create_async(org__name="found")
            tracker_of_another = ResourceTracker(engine)
            async with CleanupManager(tracker_of_another):
                found = await Found.create_async(name="found")
                names = await tracker_of_another.run_sync(lambda _: [u.id for u in found.users])
        assert names == [user.id]

    world.run(main)


@one_each
def test_the_session_of_an_asynchronous_test_is_asynchronous(world):
    async def main(engine):
        maker = async_sessionmaker(engine)
        for bind in (engine, maker, maker()):
            async with Tidy(bind, ledger=False) as tidy:
                with pytest.raises(SessionStateError, match=r"Write await tidy\.async_session"):
                    print(tidy.session)
                org = await OrgFactory.create_async()
                session = tidy.async_session
                assert isinstance(session, AsyncSession)
                assert session is tidy.async_session
                assert await session.get(Org, org.id) is org, "it is the session of the factories"
                session.add(Org(name="by hand"))
                await session.commit()
                assert len(tidy.tracker) == 2
                await tidy.tracker.run_sync(lambda _tracker, tidy=tidy: tidy.session.get(Org, 1))
            assert tidy.report.total_deleted == 2
            if isinstance(bind, AsyncSession):
                assert session is bind
                await bind.close()

    world.run(main)
    world.bystanders.assert_untouched()
