"""``UserFactory.using(session)``: the caller's session, for all factories that a call reaches."""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness.factories import GroupFactory, OrgFactory, UserFactory
from harness.models import Org, User
from tidyrows import ArgumentError, CleanupManager, ResourceTracker

other = Session()


class NamedOrgFactory(OrgFactory):
    """Its Meta names another session, and would commit."""

    class Meta:
        sqlalchemy_session = other
        sqlalchemy_session_persistence = "commit"


class NamedUserFactory(UserFactory):
    org = factory.SubFactory(NamedOrgFactory)

    @factory.post_generation
    def more(obj, create, extracted, **_):  # noqa: N805 -- the object
        obj.name = "changed in a hook"
        OrgFactory(name="made in a hook")

    @classmethod
    def _create(cls, model_class, *args, **kwargs):
        """Without super, as real suites have it."""
        made = model_class(*args, **kwargs)
        cls._meta.sqlalchemy_session.add(made)
        return made


def committed(engine):
    with engine.connect() as connection:
        count = sa.select(sa.func.count())
        return [connection.scalar(count.select_from(each.__table__)) for each in (User, Org)]


@pytest.mark.parametrize("tracked", [True, False])
def test_all_objects_are_flushed_in_the_session_and_its_user_commits(zoo_engine, tracked):
    tracker = ResourceTracker(zoo_engine)
    cleanup = CleanupManager(tracker)
    if tracked:
        tracker.start()
    with Session(zoo_engine) as session:
        users = NamedUserFactory.using(session)
        made = [users(), users.create(), *users.create_batch(2, groups=[])]
        assert {sa.orm.object_session(each) for user in made for each in (user, user.org)} == {
            session
        }
        assert all(user.id and user.name == "changed in a hook" for user in made)
        assert not session.dirty
        assert not session.new
        assert users.build().id is None
        assert [len(each) for each in (users.build_batch(2), session.new)] == [2, 0]
        assert NamedUserFactory._meta.sqlalchemy_session is not session
        assert NamedOrgFactory._meta.sqlalchemy_session is other
        assert NamedOrgFactory._meta.sqlalchemy_session_persistence == "commit"
        session.rollback()
        users.create()
        session.commit()
    assert committed(zoo_engine) == [1, 2]
    if tracked:
        assert len(tracker) == 3
        tracker.stop()
        assert cleanup.cleanup().total_deleted == 3
        assert committed(zoo_engine) == [0, 0]


def test_a_call_in_another_one_s_hook_commits_nothing_of_its_session(zoo_engine):
    """Nor does a factory keep the session of a block in which it is defined."""
    with zoo_engine.connect() as connection, CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        session = Session(connection)

        class Inner(GroupFactory):
            @factory.post_generation
            def define(obj, create, extracted, **_):  # noqa: N805 -- the object
                class Defined(OrgFactory):
                    pass

                assert Defined._meta.sqlalchemy_session is session
                Inner.defined = Defined

        class Outer(OrgFactory):
            @factory.post_generation
            def inside(obj, create, extracted, **_):  # noqa: N805 -- the object
                cleanup.tracker.session.commit()  # SQLite has one writer at a time
                Inner.using(session).create()
                session.rollback()

        Outer()
        assert Inner.defined._meta.named_session is None
        assert Inner.defined._meta.named_persistence is None
        assert len(cleanup.tracker) == 1
        session.close()


def test_a_registry_is_a_session_and_a_maker_is_none(zoo_engine):
    registry = scoped_session(sessionmaker(zoo_engine))
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        assert OrgFactory.using(registry).create() in registry()
        registry.commit()
        assert len(cleanup.tracker) == 1
        registry.remove()
    for wrong in (sessionmaker(zoo_engine), zoo_engine, None):
        with pytest.raises(ArgumentError, match=r"using\(session=.*session=Session\(engine\)"):
            OrgFactory.using(wrong)
