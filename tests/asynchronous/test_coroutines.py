"""``async def`` in a factory: awaited where the factory is awaited, else refused by name."""

from __future__ import annotations

import asyncio
import warnings

import factory
import pytest
import sqlalchemy as sa
from factory.errors import InvalidDeclarationError

from harness.asynchronous import ONE_EACH, over
from harness.factories import OrgFactory
from harness.models import Org
from tidyrows import CleanupManager, ResourceTracker, SessionStateError, TrackedFactory, Unique

one_each = over(*ONE_EACH)


async def soon(value):
    await asyncio.sleep(0)
    return value


class AwaitedFactory(TrackedFactory[Org]):
    class Meta:
        model = Org
        exclude = ("word", "suffix")

    suffix = factory.LazyAttribute(lambda o: o.word.upper())  # declared before what it reads
    word = factory.LazyFunction(lambda: soon("word"))
    name = factory.LazyAttribute(lambda o: f"{o.word}-{o.suffix}")


def ending_in(text):
    async def hook(obj, create, extracted, **_):
        obj.name += await soon(text)
        return text

    return factory.PostGeneration(hook)


@one_each
def test_attributes_are_awaited_before_others_read_them(world):
    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)) as cleanup:
            assert (await AwaitedFactory.create_async()).name == "word-WORD"
            given = await AwaitedFactory.create_async(word=factory.LazyFunction(lambda: soon("w")))
            assert given.name == "w-W"
            lazy = Unique(factory.LazyAttribute(lambda o: soon(o.word)))
            assert (await AwaitedFactory.create_async(name=lazy)).name.startswith("word-")
            batch = await AwaitedFactory.create_batch_async(2, word="b")
            assert [each.name for each in batch] == ["b-B"] * 2
        return cleanup.report

    assert world.run(main).total_deleted == 5
    world.bystanders.assert_untouched()


@one_each
def test_hooks_are_awaited_in_their_order_and_what_they_change_is_committed(world):
    seen = []

    class Hooked(OrgFactory):
        name = "name"
        first = ending_in("-1")

        @factory.post_generation
        def second(obj, create, extracted, **_):  # noqa: N805 -- the object
            obj.name += "-2"

        third = ending_in("-3")

        @classmethod
        async def _after_postgeneration(cls, instance, create, results=None):
            seen.append(await soon((create, results)))
            instance.name += "-4"

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            org = await Hooked.create_async()
            with world.engine.connect() as connection:
                names = connection.scalars(sa.select(Org.name).where(Org.id == org.id)).all()
        return names

    assert world.run(main) == ["name-1-2-3-4"]
    assert seen == [(True, {"first": "-1", "second": None, "third": "-3"})]
    world.bystanders.assert_untouched()


@one_each
def test_a_coroutine_may_make_the_object(world):
    class Made(OrgFactory):
        @classmethod
        async def _create(cls, model_class, *args, **kwargs):
            session = cls._meta.sqlalchemy_session
            made = model_class(*args, **kwargs)
            session.add(await soon(made))
            return made

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)) as cleanup:
            assert (await Made.create_async()).id
        return cleanup.report

    assert world.run(main).total_deleted == 1
    world.bystanders.assert_untouched()


@one_each
def test_a_hook_makes_more_with_the_same_tracker(world):
    """Its factory has the session already; tasks that it starts use it one after the other."""

    class Nested(OrgFactory):
        @factory.post_generation
        async def more(obj, create, extracted, **_):  # noqa: N805 -- the object
            if extracted:
                await Nested.create_async(more=extracted - 1)
                await asyncio.gather(*(OrgFactory.create_async() for _ in range(3)))

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker) as cleanup:
            await asyncio.gather(Nested.create_async(more=2), Nested.create_async(more=1))
            assert len(tracker) == (3 + 2) + 2 * 3 + 3
            assert await tracker.run_sync(len) == 14
        return cleanup.report

    async def bounded(engine):
        async with asyncio.timeout(20):
            return await main(engine)

    assert world.run(bounded).total_deleted == 14
    world.bystanders.assert_untouched()


@one_each
def test_a_task_that_outlives_its_hook_ends_before_its_factory_does(world):
    tasks = []

    class Starting(OrgFactory):
        @factory.post_generation
        async def start(obj, create, extracted, **_):  # noqa: N805 -- the object
            tasks.append(asyncio.create_task(OrgFactory.create_async()))
            await asyncio.sleep(0)

    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            await asyncio.gather(Starting.create_async(), OrgFactory.create_async())
            await asyncio.gather(*tasks)
            await tracker.run_sync(lambda tracker: tracker.session.commit())
            assert len(tracker) == 3

    world.run(main)
    assert world.added() == {}


@one_each
def test_a_plain_call_in_a_coroutine_hook_is_refused(world):
    class Plain(OrgFactory):
        @factory.post_generation
        async def more(obj, create, extracted, **_):  # noqa: N805 -- the object
            OrgFactory()

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            with pytest.raises(SessionStateError, match=r"await OrgFactory.create_async\(\)"):
                await Plain.create_async()

    world.run(main)
    assert world.added() == {}


@one_each
def test_coroutines_are_awaited_over_a_synchronous_engine_too(world):
    async def main(_engine):
        async with CleanupManager(ResourceTracker(world.engine)) as cleanup:
            assert (await AwaitedFactory.create_async()).name == "word-WORD"
        return cleanup.report

    assert world.run(main).total_deleted == 1


class LastHook(OrgFactory):
    @classmethod
    async def _after_postgeneration(cls, instance, create, results=None):
        """Never run."""


class CoroutineMaker(OrgFactory):
    @classmethod
    async def _create(cls, model_class, *args, **kwargs):
        """Never run."""


class Hook(OrgFactory):
    fill = ending_in("!")


class Attribute(OrgFactory):
    name = factory.LazyFunction(lambda: soon("name"))


class Parent(factory.alchemy.SQLAlchemyModelFactory):
    """A plain factory_boy factory above a tracked one."""

    class Meta:
        model = Org

    name = factory.SubFactory(Attribute)


@one_each
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Hook, "Hook.fill"),
        (Attribute, "Attribute.name"),
        (LastHook, "LastHook._after_postgeneration"),
        (CoroutineMaker, "CoroutineMaker._create"),
    ],
)
def test_a_synchronous_call_refuses_coroutines_by_name(world, kind, name):
    with CleanupManager(ResourceTracker(world.engine)), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SessionStateError, match=rf"{name} is asynchronous") as refused:
            kind()
        assert f"await {kind.__name__}.create_async()" in str(refused.value)
    world.bystanders.assert_untouched()


def test_build_refuses_coroutines_by_name():
    with pytest.raises(SessionStateError, match=r"Attribute.build\(name=...\)"):
        Attribute.build()
    with pytest.raises(SessionStateError, match=r"Attribute.name is asynchronous"):
        Parent.build()
    assert Attribute.build(name="given").name == "given"


def test_what_factory_boy_needs_at_once_is_refused_with_the_class():
    with pytest.raises(InvalidDeclarationError, match=r"Adjusting._adjust_kwargs is async def"):

        class Adjusting(OrgFactory):
            @classmethod
            async def _adjust_kwargs(cls, **kwargs):
                """Never run."""
