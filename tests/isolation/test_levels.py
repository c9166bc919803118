"""One test body at every level of isolation: what it commits it sees, and nobody sees it later."""

import asyncio

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.asynchronous import ONE_EACH, engine_on, over
from harness.models import Group, Org, Person, User
from tidyrows import ArgumentError, NotBoundError, Scoped, SessionStateError, TrackedFactory
from tidyrows.isolation.isolate import isolate

UNDOING = ["worker", "transaction"]


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org
        sqlalchemy_session_persistence = "commit"

    name = Scoped("org-{tag}")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User
        sqlalchemy_session_persistence = "commit"

    email = Scoped("{tag}@example.test")
    org = factory.SubFactory(OrgFactory)


def names(bind, column=Group.name):
    with bind.connect() as connection:
        return sorted(connection.scalars(sa.select(column)))


def the_body(db):
    """What a test may do, at any level."""
    with db.session() as session:
        session.add(Group(name="committed"))
        session.commit()
        session.add(Group(name="rolled back"))
        session.flush()
        session.rollback()
        session.add(Group(name="around a savepoint"))
        with session.begin_nested():
            session.add(Group(name="in a savepoint"))
        nested = session.begin_nested()
        session.add(Group(name="in one that is rolled back"))
        session.flush()
        nested.rollback()
        session.commit()
    with db.engine.begin() as connection:
        connection.execute(sa.insert(Group.__table__), [{"name": "one"}, {"name": "two"}])
    with pytest.raises(ZeroDivisionError), db.engine.begin() as connection:
        connection.execute(sa.insert(Group.__table__), {"name": "never"})
        raise ZeroDivisionError
    with db.engine.connect() as connection:
        connection.execute(sa.insert(Group.__table__), {"name": "not committed"})
    UserFactory()


@pytest.mark.parametrize("level", ["none", *UNDOING])
def test_one_body_sees_what_it_commits(zoo_engine, level):
    with isolate(zoo_engine, level) as db:
        the_body(db)
        seen = ["around a savepoint", "committed", "in a savepoint", "one", "two"]
        assert names(db.engine) == seen
        assert len(db.tracker) == len(seen) + 2
        assert {row.table.name for row in db.tracker.rows()} == {"groups", "orgs", "users"}
    assert db.level == level
    left = seen if level == "none" else []
    assert names(zoo_engine) == left
    if level == "none":
        with orm.Session(zoo_engine) as session:
            for kind in (User, Org, Group):
                session.execute(sa.delete(kind))
            session.commit()


@pytest.mark.parametrize("level", UNDOING)
def test_nothing_is_tracked_afterwards(any_driver_zoo_engine, level):
    for _ in range(2):
        with isolate(any_driver_zoo_engine, level) as db:
            the_body(db)
        assert len(db.tracker) == 0
    assert names(any_driver_zoo_engine) == []


@pytest.mark.parametrize("level", UNDOING)
def test_the_error_of_the_body_surfaces(zoo_engine, level):
    failure = ZeroDivisionError("the test's own")
    with pytest.raises(ZeroDivisionError) as caught, isolate(zoo_engine, level) as db:
        the_body(db)
        raise failure
    assert caught.value is failure
    assert not hasattr(failure, "__notes__")
    assert names(zoo_engine) == []


@over(*ONE_EACH)
@pytest.mark.parametrize("level", ["none", *UNDOING])
def test_one_body_of_a_task(world, level):
    async def main(engine):
        with pytest.raises(SessionStateError, match="async with isolate"), isolate(engine, level):
            pass
        async with isolate(engine, level) as db:
            async with db.session() as session:
                session.add(Person(name="committed", kind="person"))
                await session.commit()
                session.add(Person(name="rolled back", kind="person"))
                await session.flush()
                await session.rollback()
                async with session.begin_nested():
                    session.add(Person(name="in a savepoint", kind="person"))
                await session.commit()
            async with db.engine.begin() as connection:
                rows = [{"name": "one", "kind": "person"}, {"name": "two", "kind": "person"}]
                await connection.execute(sa.insert(Person.__table__), rows)
            await OrgFactory.create_async()
            async with db.engine.connect() as connection:
                found = sorted(await connection.scalars(sa.select(Person.name)))
            assert found == ["committed", "in a savepoint", "one", "two"]
            assert len(db.tracker) == 5
        assert world.added() == ({"persons": 4, "orgs": 1} if level == "none" else {})
        assert len(db.tracker) == (5 if level == "none" else 0)

    world.run(main)


@pytest.mark.parametrize("zoo_database", ["postgresql+psycopg"], indirect=True)
def test_two_tasks_have_a_transaction_each(zoo_database):
    """The tracker of one never has the rows of the other."""

    async def one(engine, name):
        async with isolate(engine, "transaction") as db, db.session() as session:
            session.add(Group(name=name))
            await session.commit()
            return len(db.tracker), (await session.scalars(sa.select(Group.name))).all()

    async def main():
        async with engine_on(zoo_database, "postgresql+asyncpg") as engine:
            return await asyncio.gather(one(engine, "a"), one(engine, "b"))

    assert asyncio.run(main()) == [(1, ["a"]), (1, ["b"])]


def test_wrong_calls_are_refused(engine):
    with pytest.raises(ArgumentError, match="one of none, worker, transaction, schema, database"):
        isolate(engine, "savepoint")
    with pytest.raises(NotBoundError, match="a Session is none"):
        isolate(orm.Session(engine))
