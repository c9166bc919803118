"""One commit per outermost call, in the ambient tracker's session."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from contextvars import copy_context

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness.models import Group, Order, Org, User
from tidyrows.errors import NoSessionError
from tidyrows.factories import Scoped, TrackedFactory
from tidyrows.factories.call import Call


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Sequence("org{}".format)


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("{tag}@example.test")
    org = factory.SubFactory(OrgFactory)


class OrderFactory(TrackedFactory[Order]):
    class Meta:
        model = Order

    user = factory.SubFactory(UserFactory)


class BusyFactory(UserFactory):
    """Adds and changes things after the object has been made."""

    orders = factory.RelatedFactoryList(OrderFactory, factory_related_name="user", size=2)

    @factory.post_generation
    def extras(self, create, extracted, **kwargs):
        if not create:
            return
        self.name = "changed afterwards"
        self.groups.append(Group(name="raw"))
        OrgFactory(name="called in a hook")


def test_a_call_commits_once_with_all_that_it_made(tracker, rows):
    user = BusyFactory()
    assert tracker.ended == ["commit"]
    assert (rows(User), rows(Org), rows(Order), rows(Group)) == (1, 2, 2, 1)
    assert user.id is not None
    assert not tracker.session.in_transaction()


def test_what_a_hook_changed_is_committed_too(tracker, shop):
    BusyFactory()
    with shop.connect() as connection:
        assert connection.scalar(sa.select(User.name)) == "changed afterwards"


@pytest.mark.parametrize(
    "call",
    [
        lambda: BusyFactory.create_batch(5),
        lambda: BusyFactory.generate_batch(factory.CREATE_STRATEGY, 5),
        lambda: BusyFactory.simple_generate_batch(create=True, size=5),
    ],
)
def test_a_batch_commits_once(tracker, rows, call):
    assert len({user.id for user in call()}) == 5
    assert tracker.ended == ["commit"]
    assert (rows(User), rows(Order)) == (5, 10)


@pytest.mark.parametrize(
    "call",
    [
        UserFactory,
        UserFactory.create,
        lambda: UserFactory.generate(factory.CREATE_STRATEGY),
        lambda: UserFactory.simple_generate(create=True),
        lambda: factory.create(Org, FACTORY_CLASS=TrackedFactory, name="x"),
    ],
)
def test_every_way_to_create_commits_once(tracker, rows, call):
    call()
    assert tracker.ended == ["commit"]
    assert rows(Org) == 1


@pytest.mark.parametrize("call", [UserFactory.build, UserFactory.stub])
def test_building_touches_no_session(tracker, rows, call):
    call()
    assert tracker.ended == []
    assert not tracker.session.new
    assert rows(Org) == 0


def test_every_object_has_its_key_when_a_hook_sees_it(tracker):
    seen = []

    class Seeing(UserFactory):
        @factory.post_generation
        def look(self, create, extracted, **kwargs):
            seen.append((self.id, self.org.id))

    Seeing()
    assert None not in seen[0]


def test_a_create_method_that_calls_no_super_is_flushed_and_committed(tracker, rows):
    class Own(UserFactory):
        @classmethod
        def _create(cls, model_class, *args, **kwargs):
            made = model_class(*args, **kwargs)
            cls._meta.sqlalchemy_session.add(made)
            return made

    assert Own().id is not None
    assert tracker.ended == ["commit"]
    assert rows(User) == 1


def test_a_create_inside_a_build_is_an_outermost_call(tracker, rows):
    class Building(UserFactory):
        org = factory.LazyFunction(OrgFactory)

    Building.build()
    assert tracker.ended == ["commit"]
    assert rows(Org) == 1


def test_the_tracked_subfactory_of_a_plain_factory_is_committed(tracker, rows):
    class PlainFactory(SQLAlchemyModelFactory):
        class Meta:
            model = User
            sqlalchemy_session_factory = Session

        email = "plain"
        org = factory.SubFactory(OrgFactory)

        @classmethod
        def _create(cls, model_class, *args, **kwargs):
            return model_class(*args, **kwargs)

    PlainFactory()
    assert rows(Org) == 1


# -- failure -----------------------------------------------------------------------------------


class FailingFactory(UserFactory):
    @factory.post_generation
    def fail(self, create, extracted, **kwargs):
        message = "the hook's own"
        raise LookupError(message)


def test_what_a_failing_call_made_is_rolled_back_and_the_error_surfaces(tracker, rows):
    with pytest.raises(LookupError, match=r"^the hook's own$") as caught:
        FailingFactory()
    assert tracker.ended == ["rollback"]
    assert rows(Org) == 0
    assert not getattr(caught.value, "__notes__", [])
    UserFactory()
    assert rows(User) == 1


def test_the_session_works_again_after_a_failed_flush(tracker, rows):
    with pytest.raises(sa.exc.IntegrityError):
        UserFactory(email=None)
    UserFactory()
    assert rows(User) == 1


def test_one_failure_in_a_batch_takes_the_whole_batch(tracker, rows):
    with pytest.raises(sa.exc.IntegrityError):
        UserFactory.create_batch(3, email=factory.Iterator(["a", "b", "a"]))
    assert rows(User) == 0


def test_a_commit_that_fails_is_rolled_back_and_surfaces(tracker, rows):
    def fail(session):
        message = "no commit"
        raise LookupError(message)

    sa.event.listen(tracker.session, "before_commit", fail)
    with pytest.raises(LookupError, match="no commit"):
        UserFactory()
    sa.event.remove(tracker.session, "before_commit", fail)
    UserFactory()
    assert rows(User) == 1


def test_a_rollback_that_fails_too_becomes_a_note(tracker, monkeypatch):
    def fail():
        message = "connection lost"
        raise OSError(message)

    monkeypatch.setattr(tracker.session, "rollback", fail)
    with pytest.raises(LookupError) as caught:
        FailingFactory()
    assert "connection lost" in caught.value.__notes__[0]


def test_a_session_of_the_callers_is_not_rolled_back(make_tracker):
    with make_tracker(owns_session=False).block() as tracker:
        kept = Org(name="kept")
        tracker.session.add(kept)
        with pytest.raises(LookupError):
            FailingFactory()
        assert tracker.ended == []
        assert kept in tracker.session


@pytest.mark.parametrize("begin", ["begin", "begin_nested"])
def test_a_transaction_begun_by_hand_is_the_callers_to_commit(make_tracker, rows, begin):
    with make_tracker(owns_session=False).block() as tracker:
        with getattr(tracker.session, begin)():
            assert UserFactory().id is not None
            assert rows(User) == 0
        tracker.session.commit()
        assert rows(User) == 1


def test_a_session_of_the_callers_is_committed_otherwise(make_tracker, rows):
    with make_tracker(owns_session=False).block() as tracker:
        UserFactory()
        assert tracker.ended == ["commit"]
        assert rows(User) == 1


# -- several trackers, threads -------------------------------------------------------------------


def test_a_block_inside_a_hook_commits_before_it_ends(tracker, make_tracker, rows):
    inner = make_tracker()

    class Nesting(OrgFactory):
        @factory.post_generation
        def nest(self, create, extracted, **kwargs):
            tracker.session.commit()  # SQLite has one writer at a time
            with inner.block():
                UserFactory()
                assert rows(User) == 1

    Nesting()
    assert inner.ended == ["commit"]
    assert rows(Org) == 2


def test_a_call_that_outlives_its_outermost_one_commits_itself(tracker, rows):
    """A task started in a hook has a copy of the context, with the call in it."""
    copied = Call(tracker).run(copy_context)
    copied.run(UserFactory)
    assert rows(User) == 1


def test_scoped_to_reaches_another_thread(make_tracker, shop, rows):
    tracker = make_tracker()

    def work():
        tracker.session = Session(shop)
        bound = UserFactory.scoped_to(tracker)
        made.extend([bound(), bound.create(name="n"), *bound.create_batch(2)])
        built.extend([bound.build(), *bound.build_batch(2)])
        tracker.session.close()

    made, built = [], []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (len(made), len(built)) == (4, 3)
    assert rows(User) == 4


def test_without_a_session_the_error_shows_the_lines_to_write():
    with pytest.raises(NoSessionError) as caught:
        OrgFactory()
    text = str(caught.value)
    assert "OrgFactory has no session" in text
    assert "    def test_it(tidy):\n        OrgFactory()\n" in text
    assert "OrgFactory.scoped_to(tracker).create()" in text
    assert isinstance(caught.value, RuntimeError)


# -- a session that Meta names -------------------------------------------------------------------


def test_a_named_session_is_used_watched_and_not_committed(tracker, shop, rows):
    session = Session(shop)

    class Named(OrgFactory):
        class Meta:
            sqlalchemy_session = session

    org = Named()
    assert org in session
    assert org.id is None
    assert tracker.watched == [session]
    assert tracker.ended == []
    session.rollback()


def test_a_scoped_session_is_watched_as_the_session_behind_it(tracker, shop):
    registry = scoped_session(sessionmaker(shop))

    class Named(OrgFactory):
        class Meta:
            sqlalchemy_session_factory = registry.__call__
            sqlalchemy_session_persistence = "commit"

    Named()
    assert tracker.watched == [registry()]
    registry.remove()


@pytest.mark.parametrize(("persistence", "committed"), [("flush", 0), ("commit", 1)])
def test_persistence_is_honoured_in_the_ambient_session(tracker, rows, persistence, committed):
    class Persistent(OrgFactory):
        class Meta:
            sqlalchemy_session_persistence = persistence

    assert Persistent().id is not None
    assert rows(Org) == committed


@pytest.mark.parametrize("ambient", [True, False])
@pytest.mark.parametrize(("persistence", "saved"), [("flush", 0), ("commit", 1)])
def test_what_hooks_change_is_saved_as_the_object_is(
    make_tracker, shop, persistence, saved, ambient
):
    """factory_boy saves the object before its hooks, and not again."""
    session = Session(shop)

    class Hooked(OrgFactory):
        class Meta:
            sqlalchemy_session = session
            sqlalchemy_session_persistence = persistence

        @factory.post_generation
        def rename(self, create, extracted, **kwargs):
            self.name = "changed in a hook"
            self.users.append(User(email=self.name))

    class Last(OrgFactory):
        class Meta:
            sqlalchemy_session = session
            sqlalchemy_session_persistence = persistence

        @classmethod
        def _after_postgeneration(cls, instance, *_):
            instance.name = "changed at last"

    with make_tracker().block() if ambient else nullcontext():
        for number, kind in enumerate((Hooked, Last), 1):
            org = kind()
            assert not session.dirty
            assert not session.new
            with shop.connect() as connection:
                names = connection.scalars(sa.select(Org.name).where(Org.name == org.name)).all()
            assert len(names) == saved, number
        assert Hooked.build().name == "changed in a hook"
    session.close()


def test_meta_has_the_ambient_session_only_while_there_is_one(make_tracker):
    with make_tracker().block() as tracker:
        assert OrgFactory._meta.sqlalchemy_session is tracker.session
    assert OrgFactory._meta.sqlalchemy_session is None


def test_a_subclass_made_inside_a_block_keeps_no_session_of_it(make_tracker):
    with make_tracker().block():

        class Inside(OrgFactory):
            pass

        Inside()
    with make_tracker().block() as later:
        assert Inside() in later.session
    assert Inside._meta.sqlalchemy_session is None


def test_a_subclass_inherits_a_named_session_and_may_drop_it(tracker, shop):
    session = Session(shop)

    class Named(OrgFactory):
        class Meta:
            sqlalchemy_session = session

    class Heir(Named):
        pass

    class Dropping(Named):
        class Meta:
            sqlalchemy_session = None

    assert Heir._meta.sqlalchemy_session is session
    assert Dropping._meta.sqlalchemy_session is tracker.session
