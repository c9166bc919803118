"""Setup: rows of several factories that belong together, made in one commit."""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa

from harness.asynchronous import ONE_EACH, World, over
from harness.factories import GroupFactory, OrderFactory, OrgFactory, UserFactory
from harness.models import Org, User
from tidyrows import ArgumentError, CleanupManager, NoSessionError, ResourceTracker, Setup


class Complete(Setup):
    org = Setup.one(OrgFactory)
    group = Setup.one(GroupFactory)
    users = Setup.many(UserFactory, 2, org=org, groups=[group])
    orders = Setup.many(OrderFactory, 1, user__org=org)
    title = factory.LazyAttribute(lambda setup: setup.org.name.upper())


class WithAudience(Complete):
    org = Setup.one(OrgFactory, name="Large")
    users = Setup.many(UserFactory, 3, org=Complete.org)
    audience = Setup.one(GroupFactory, users=users)

    def emails(self):
        return [user.email for user in self.users]


def test_members_are_made_in_one_commit_and_leave_with_the_block(zoo_engine):
    commits = []
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        sa.event.listen(zoo_engine, "commit", lambda _: commits.append(1))
        setup = Complete.create()
        assert len(commits) == 1
        assert len(setup.users) == 2
        assert all(user.org is setup.org and user.groups == [setup.group] for user in setup.users)
        assert setup.orders[0].user.org is setup.org
        assert setup.title == setup.org.name.upper()
        assert repr(setup) == "<Complete: org, group, users, orders, title>"
    assert {table.name: n for table, n in cleanup.report.deleted.items()}["users"] == 3


def test_members_take_numbers_values_and_arguments(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine)):
        first = Complete.create(users=3, users__name="Ada", org__name="Acme", orders=0)
        assert [(user.name, user.org.name) for user in first.users] == [("Ada", "Acme")] * 3
        assert first.orders == []
        again = Complete.create(org=first.org, users=first.users[:1], group=None)
        assert again.users == first.users[:1]
        assert (again.orders[0].user.org, again.group) == (first.org, None)
        assert len(Complete.create().users) == 2


def test_a_subclass_replaces_members_and_shares_the_new_ones(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine)):
        setup = WithAudience.create()
        assert {user.org.name for user in setup.users} == {"Large"}
        assert setup.orders[0].user.org is setup.org
        assert setup.audience.users == setup.users
        assert len(set(setup.emails())) == 3


def test_a_member_that_fails_takes_all_others_along(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine)):
        with pytest.raises(sa.exc.IntegrityError):
            Complete.create(orders__note="x", orders__user__email=None)
        with zoo_engine.connect() as connection:
            for model in Org, User:
                assert not connection.scalar(sa.select(sa.func.count()).select_from(model))


@over(*ONE_EACH)
def test_a_setup_is_created_through_an_asynchronous_engine(zoo_database, driver):
    class Awaited(Complete):
        @factory.lazy_attribute
        async def note(self):
            return "awaited"

        @factory.post_generation
        async def rename(self, create, extracted, **kwargs):
            self.org.name = "renamed"

    async def main(engine):
        async with CleanupManager(ResourceTracker(engine)):
            setup = await Awaited.create_async(users=1)
            assert setup.users[0].org is setup.org
            assert (setup.note, setup.org.name) == ("awaited", "renamed")
            with pytest.raises(Exception, match=r"await Awaited\.create_async\(\)"):
                Awaited.create()

    World(zoo_database, driver).run(main)


def test_wrong_calls_and_members_are_told(tracker):
    for call, said in (
        (lambda: Complete.create(user=3), r"takes no user=\. Did you mean users="),
        (lambda: Complete.create(user__name="x"), r"takes no user=\. Did you mean users="),
        (lambda: Complete.create(users=-1), "users must be a whole number, at least 0"),
        (lambda: Complete.create(users=True), "users must be a whole number, at least 0"),
        (lambda: Complete.create(org=None, org__name="x"), r"org__name=.* no effect: org= is giv"),
        (lambda: Complete.create(users__org__name="x"), "no effect: org of users is another membe"),
        (Complete, r"Complete\(\) makes nothing\. Write Complete\.create"),
        (Setup.create, "Setup has no members"),
        (lambda: Setup.one(User), "is no factory"),
        (lambda: Setup.many(UserFactory, -1), "size must be a whole number"),
        (lambda: type("S", (Setup,), {"create": Setup.one(OrgFactory)}), "is no name of a member"),
        (
            lambda: type("S", (Setup,), {"users": factory.RelatedFactoryList(UserFactory)}),
            r"users is a RelatedFactoryList.* Write users = Setup\.many",
        ),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()
    assert tracker.ended == []


def test_a_setup_without_a_tracker_is_told_as_a_factory_is():
    with pytest.raises(NoSessionError, match="OrgFactory has no session"):
        Complete.create()
