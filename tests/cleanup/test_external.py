"""External resources go in their place in the order, or stay and are named."""

from __future__ import annotations

import multiprocessing
import uuid

import pytest
import sqlalchemy as sa

from harness.blocks import insert, reference, table, tracked
from harness.bystanders import snapshot
from harness.commits import deleting
from tidyrows import (
    CleanupError,
    CleanupManager,
    ResourceTracker,
    RetryPolicy,
    RowKey,
    SessionStateError,
    TableName,
    external_handler,
)
from tidyrows.capture.changes import Inserted
from tidyrows.cleanup.resources import RemovalOrder, removal_order
from tidyrows.external import ExternalResource, Tie

AT_ONCE = RetryPolicy(attempts=3, base=0.0, max_wait=0.0)


class World:
    """Orgs with users with orders, and external things that say what they saw when they went."""

    def __init__(self, engine):
        self.engine = engine
        metadata = sa.MetaData()
        self.orgs = table(metadata, "orgs")
        self.users = table(metadata, "users", reference("org_id", "orgs.id"))
        self.orders = table(metadata, "orders", reference("user_id", "users.id", nullable=True))
        metadata.create_all(engine)
        # somebody else's
        insert(engine, (self.orgs, [{"id": 900}]), (self.users, [{"id": 900, "org_id": 900}]))
        self.before = snapshot(engine)
        self.kind = f"thing-{uuid.uuid4().hex[:8]}"
        self.went = []
        self.fails = {}
        external_handler(self.kind)(self.remove)
        self.outside = sa.create_engine(engine.url)

    def remove(self, payload):
        failures = self.fails.get(payload, [])
        if failures:
            raise failures.pop(0)
        with self.outside.connect() as connection:
            counts = [
                connection.scalar(sa.select(sa.func.count()).select_from(each).where(each.c.id < 9))
                for each in (self.orders, self.users, self.orgs)
            ]
        self.went.append((payload, *counts))

    def tracker(self, users=1):
        ids = range(1, users + 1)
        return tracked(
            self.engine,
            (self.orgs, [{"id": 1}]),
            (self.users, [{"id": n, "org_id": 1} for n in ids]),
            (self.orders, [{"id": n, "user_id": n} for n in ids]),
        )

    def row(self, tracker, of, number=1):
        (row,) = (r for r in tracker.rows() if r.table.name == of.name and r.key == (number,))
        return row

    def gone(self):
        return snapshot(self.engine) == self.before


@pytest.fixture
def world(engine):
    made = World(engine)
    yield made
    made.outside.dispose()


def leftovers(manager):
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    assert caught.value.leftovers == manager.report.leftovers
    assert all(str(each) in str(caught.value) for each in caught.value.leftovers)
    return {str(each.resource or each.row): each.cause for each in caught.value.leftovers}


# --- in its place


def test_a_resource_goes_after_what_needs_it_and_before_what_it_needs(world):
    tracker = world.tracker()
    user, org = world.row(tracker, world.users), world.row(tracker, world.orgs)
    tracker.track_external(world.kind, "account", after=[user], before=[org])
    report = CleanupManager(tracker).cleanup()
    assert world.went == [("account", 0, 0, 1)]
    assert report.external == {world.kind: 1}
    assert report.total_deleted == 3
    assert f"{world.kind} 1 removed" in str(report)
    assert tracker.externals() == []
    assert world.gone()


def test_tables_stand_for_all_their_tracked_rows(world):
    tracker = world.tracker(users=3)
    tracker.track_external(world.kind, "a", after=[world.orders], before=[world.users])
    tracker.track_external(world.kind, "b", after=[world.users], before=[world.orgs])
    report = CleanupManager(tracker).cleanup()
    assert world.went == [("a", 0, 3, 1), ("b", 0, 0, 1)]
    assert report.deleted == {r: n for r, n in report.deleted.items() if n in {1, 3}}
    assert report.total_deleted == 7
    assert world.gone()


def test_rows_that_wait_do_not_make_others_wait(world):
    """User 2 is needed by a resource; user 1 is not, though they are in one table."""
    tracker = world.tracker(users=2)
    first, second = (world.row(tracker, world.users, n) for n in (1, 2))
    tracker.track_external(world.kind, "a", after=[first], before=[second])
    report = CleanupManager(tracker).cleanup()
    assert world.went == [("a", 0, 1, 1)]
    assert sorted(report.deleted.values()) == [1, 2, 2]  # of the users, one in each phase
    assert world.gone()


def test_resources_go_in_the_order_of_their_handles(world):
    tracker = ResourceTracker(world.engine)
    bucket = tracker.track_external(world.kind, "bucket")
    file = tracker.track_external(world.kind, "file", before=[bucket])
    tracker.track_external(world.kind, "link", before=[file])
    tracker.track_external(world.kind, "account", after=[bucket])
    report = CleanupManager(tracker).cleanup()
    assert [each[0] for each in world.went] == ["link", "file", "bucket", "account"]
    assert str(report).startswith(f"{world.kind} 4 removed (")


def test_without_resources_every_database_is_asked_once(world, monkeypatch):
    """The common case pays nothing."""
    tracker = world.tracker()
    runs = []
    clean = CleanupManager._delete
    monkeypatch.setattr(
        CleanupManager,
        "_delete",
        lambda self, *given: runs.append(given[-1]) or clean(self, *given),
    )
    CleanupManager(tracker).cleanup()
    assert runs == [None]
    assert world.gone()


def test_a_resource_in_no_order_costs_no_further_transaction(world):
    tracker = world.tracker()
    tracker.track_external(world.kind, "a")
    begun = []
    with deleting(world.engine, lambda: begun.append(1)):
        CleanupManager(tracker).cleanup()
    assert len(begun) == 1
    assert world.went == [("a", 0, 0, 0)]


def test_several_databases_are_cleaned_in_one_order(world, tmp_path):
    """An account in one database, its profile in the other, and a file in between."""
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    metadata = sa.MetaData()
    profiles = table(metadata, "profiles")
    metadata.create_all(other)
    tracker = ResourceTracker(world.engine)
    tracker.engines.capture(other)
    tracker.start()
    try:
        insert(world.engine, (world.orgs, [{"id": 1}]))
    finally:
        tracker.stop()
    second = tracked(other, (profiles, [{"id": 1}]))
    (held,) = second.store.snapshot()
    tracker.store.apply(Inserted(held.table, [1]))
    second.store.forget(held.table, [1])
    (org,) = (row for row in tracker.rows() if row.table.name == "orgs")
    (profile,) = (row for row in tracker.rows() if row.table.name == "profiles")
    for after, before in ((org, profile), (profile, org)):
        seen = []

        def look(payload, seen=seen):
            with other.connect() as connection, world.outside.connect() as outside:
                seen.append(connection.scalar(sa.select(sa.func.count()).select_from(profiles)))
                query = sa.select(sa.func.count()).select_from(world.orgs)
                seen.append(outside.scalar(query.where(world.orgs.c.id == 1)))

        external_handler(world.kind, replace=True)(look)
        tracker.track_external(world.kind, "file", after=[after], before=[before])
        CleanupManager(tracker).cleanup()
        assert seen == ([1, 0] if after is org else [0, 1])
        assert len(tracker) == 0
        insert(other, (profiles, [{"id": 1}]))
        insert(world.engine, (world.orgs, [{"id": 1}]))
        tracker.store.apply(Inserted(held.table, [1]))
        tracker.track_rows(world.orgs, [1])
    CleanupManager(tracker).cleanup()
    other.dispose()
    assert world.gone()


def test_the_handler_runs_outside_of_any_transaction(world):
    """It may call an application that writes to the same database."""
    tracker = world.tracker()
    account = world.row(tracker, world.users)

    @external_handler(world.kind, replace=True)
    def remove(payload):
        with world.outside.begin() as connection:
            connection.execute(sa.delete(world.orgs).where(world.orgs.c.id == 901))
            connection.execute(sa.insert(world.orgs).values(id=901))
            connection.execute(sa.delete(world.orgs).where(world.orgs.c.id == 901))
        world.went.append(payload)

    tracker.track_external(world.kind, "a", after=[account], before=[world.orgs])
    CleanupManager(tracker, lock_timeout=0.5).cleanup()
    assert world.went == ["a"]
    assert world.gone()


# --- what fails


def test_a_passing_failure_is_tried_again(world):
    tracker = ResourceTracker(world.engine)
    tracker.track_external(world.kind, "a")
    world.fails["a"] = [ConnectionError("reset"), TimeoutError("slow")]
    report = CleanupManager(tracker, retry=AT_ONCE).cleanup()
    assert report.external == {world.kind: 1}
    assert report.retries == 2


def test_what_passes_is_for_the_handler_to_say(world):
    external_handler(world.kind, retry_on=[LookupError], replace=True)(world.remove)
    tracker = ResourceTracker(world.engine)
    tracker.track_external(world.kind, "a")
    tracker.track_external(world.kind, "b")
    world.fails = {"a": [KeyError("later")], "b": [ConnectionError("no")]}
    manager = CleanupManager(tracker, retry=AT_ONCE)
    assert list(leftovers(manager)) == [f"external resource {world.kind} #2"]
    assert manager.report.retries == 1


def test_what_fails_stays_with_what_it_needs_and_the_rest_goes(world):
    tracker = world.tracker(users=2)
    insert(world.engine, (world.orgs, [{"id": 2}]))
    tracker.track_rows(world.orgs, [2])
    user = world.row(tracker, world.users, 1)
    handle = tracker.track_external(world.kind, "a", after=[world.orders], before=[user])
    world.fails["a"] = [ValueError("the service says no")]
    manager = CleanupManager(tracker)
    name = f"external resource {world.kind} #1"
    left = leftovers(manager)
    assert left.pop(name) == "its handler failed: ValueError: the service says no"
    assert left.pop(str(user)) == f"{name} needs it and is still there"
    org = world.row(tracker, world.orgs, 1)
    assert str(user) in left.pop(str(org))
    assert left == {}
    assert manager.report.leftovers[0].resource is handle
    assert manager.report.leftovers[0].table is None
    assert tracker.externals() == [handle]
    assert set(tracker.rows()) == {user, org}
    with world.engine.connect() as connection:  # nothing was detached, nobody else's touched
        assert connection.scalar(sa.select(world.users.c.org_id).where(world.users.c.id == 1)) == 1

    report = manager.cleanup()  # the service says yes
    assert report.external == {world.kind: 1}
    assert world.gone()


def test_the_handlers_failure_is_the_cause_of_the_error(world):
    tracker = ResourceTracker(world.engine)
    tracker.track_external(world.kind, "a")
    failure = ValueError("no")
    world.fails["a"] = [failure]
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker).cleanup()
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_whoever_stops_a_handler_stops_the_cleanup_and_loses_nothing(world, stop):
    tracker = world.tracker()
    handle = tracker.track_external(world.kind, "a", before=[world.orgs])
    world.fails["a"] = [stop()]
    with pytest.raises(stop):
        CleanupManager(tracker).cleanup()
    assert tracker.externals() == [handle]
    CleanupManager(tracker).cleanup()
    assert world.gone()


def test_a_resource_whose_rows_are_still_there_is_not_removed(world):
    """Somebody's protected order keeps the user, and the user its account."""
    tracker = world.tracker()
    insert(world.engine, (world.orders, [{"id": 901, "user_id": 1}]))
    user = world.row(tracker, world.users)
    account = tracker.track_external(world.kind, "account", after=[user])
    tracker.track_external(world.kind, "realm", after=[account])
    tracker.track_external(world.kind, "file")
    manager = CleanupManager(tracker, protect=["orders"])
    left = leftovers(manager)
    assert world.went == [("file", 0, 1, 1)] or [each[0] for each in world.went] == ["file"]
    assert left[f"external resource {world.kind} #1"] == f"{user} needs it and is still there"
    assert left[f"external resource {world.kind} #2"] == f"{account} needs it and is still there"
    with world.engine.begin() as connection:
        connection.execute(sa.delete(world.orders).where(world.orders.c.id == 901))
    CleanupManager(tracker).cleanup()
    assert world.gone()


def test_a_row_left_over_in_one_phase_is_no_dependent_of_the_next(world):
    """A tracked order that cannot go must not be detached when its user's turn has come."""
    tracker = world.tracker()
    order = world.row(tracker, world.orders)
    tracker.track_external(world.kind, "a", before=[order])
    tracker.track_external(world.kind, "b", after=[order], before=[world.users])
    world.fails["a"] = [ValueError("no")]
    manager = CleanupManager(tracker)
    left = leftovers(manager)
    assert len(left) == 5
    assert manager.report.detached == {}
    assert manager.report.dependents == {}
    CleanupManager(tracker).cleanup()
    assert [each[0] for each in world.went] == ["a", "b"]
    assert world.gone()


def test_a_row_held_for_another_tracker_holds_its_resource_too(world):
    """Neither is an error: both go after the other tracker has cleaned."""
    tracker = world.tracker()
    user = world.row(tracker, world.users)
    handle = tracker.track_external(world.kind, "a", after=[user], before=[world.orgs])
    theirs = tracked(world.engine, (world.orders, [{"id": 5, "user_id": 1}]))
    manager = CleanupManager(tracker)
    report = manager.cleanup()
    assert {each.resource or each.row for each in report.held} == {
        user,
        handle,
        world.row(tracker, world.orgs),
    }
    assert len({each.by for each in report.held}) == 1
    assert world.went == []
    CleanupManager(theirs).cleanup()
    manager.cleanup()
    assert world.gone()


def test_what_a_held_row_needs_is_held_in_a_later_phase_too(world):
    tracker = world.tracker()
    user, org = world.row(tracker, world.users), world.row(tracker, world.orgs)
    tracker.track_external(world.kind, "a", after=[world.orders], before=[world.orgs])
    theirs = tracked(world.engine, (world.orders, [{"id": 5, "user_id": 1}]))
    manager = CleanupManager(tracker)
    assert [each.row for each in manager.cleanup().held] == [user, org]
    assert world.went == [("a", 1, 1, 1)]
    CleanupManager(theirs).cleanup()
    manager.cleanup()
    assert world.gone()


def test_a_row_left_over_is_reported_once_and_not_tried_in_every_phase(world):
    tracker = world.tracker()
    insert(world.engine, (world.orders, [{"id": 901, "user_id": 1}]))
    user, org = world.row(tracker, world.users), world.row(tracker, world.orgs)
    tracker.track_external(world.kind, "a", before=[org])
    manager = CleanupManager(tracker, protect=["orders"])
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    assert [each.row for each in caught.value.leftovers] == [user, org]
    assert [each[0] for each in world.went] == ["a"]


def test_what_a_failed_resource_needs_is_not_removed_under_it(world):
    tracker = ResourceTracker(world.engine)
    bucket = tracker.track_external(world.kind, "bucket")
    file = tracker.track_external(world.kind, "file", before=[bucket])
    world.fails["file"] = [ValueError("no")]
    left = leftovers(CleanupManager(tracker))
    assert set(left) == {str(file), str(bucket)}
    assert left[str(bucket)] == f"{file} needs it and is still there"
    assert world.went == []


def test_a_kind_without_a_handler_is_named(world):
    tracker = world.tracker()
    tracker.track_external("nobody's", 1, before=[world.orgs])
    left = leftovers(CleanupManager(tracker))
    assert '@external_handler("nobody\'s")' in left["external resource nobody's #1"]
    assert len(left) == 2
    assert len(tracker) == 1


def test_after_the_deadline_no_handler_is_called(world):
    now = [0.0]
    policy = RetryPolicy(deadline=10.0, clock=lambda: now[0])
    tracker = ResourceTracker(world.engine)
    tracker.track_external(world.kind, "a")
    last = tracker.track_external(world.kind, "b")

    @external_handler(world.kind, replace=True)
    def slow(payload):
        now[0] += 11.0
        world.went.append(payload)

    left = leftovers(CleanupManager(tracker, retry=policy))
    assert world.went == ["a"]
    assert left == {str(last): "the cleanup's deadline had passed before it was tried"}


def test_a_failing_handler_is_not_called_for_ever(world):
    tracker = ResourceTracker(world.engine)
    tracker.track_external(world.kind, "a")
    world.fails["a"] = [ConnectionError("down")] * 50
    left = leftovers(CleanupManager(tracker, retry=AT_ONCE))
    assert "failed after 3 attempts" in left[f"external resource {world.kind} #1"]
    assert len(world.fails["a"]) == 47


def test_a_failing_body_surfaces_with_the_resource_in_a_note(world):
    failure = AssertionError("the test's own")
    with (
        pytest.raises(AssertionError) as caught,
        CleanupManager(ResourceTracker(world.engine)) as m,
    ):
        m.tracker.track_external(world.kind, "a")
        world.fails["a"] = [ValueError("no")]
        raise failure
    assert caught.value is failure
    assert f"external resource {world.kind} #1" in failure.__notes__[0]


def test_a_database_that_refuses_keeps_its_resources(world):
    """A transaction of the caller's that began before: nothing is deleted, nothing removed."""
    session = sa.orm.Session(world.engine)
    session.execute(sa.select(world.orgs))
    tracker = ResourceTracker(session)
    manager = CleanupManager(tracker)
    with pytest.raises(SessionStateError), manager:
        tracker.track_external(world.kind, "a")
    session.close()
    assert world.went == []
    manager.cleanup()
    assert [each[0] for each in world.went] == ["a"]


# --- circles


def test_a_circle_is_named_and_nothing_in_it_is_touched(world):
    tracker = world.tracker()
    insert(world.engine, (world.orgs, [{"id": 2}]))
    tracker.track_rows(world.orgs, [2])
    user, org = world.row(tracker, world.users), world.row(tracker, world.orgs)
    # the user references the org, so it goes first; the resource says the opposite
    tracker.track_external(world.kind, "a", after=[org], before=[user])
    tracker.track_external(world.kind, "free")
    manager = CleanupManager(tracker)
    left = leftovers(manager)
    name = f"external resource {world.kind} #1"
    assert set(left) == {name, str(user), str(org)}
    for cause in left.values():
        assert f"{name} before {user} before {org} before {name}" in cause
        assert "after= or before=" in cause
    assert [each[0] for each in world.went] == ["free"]
    assert set(tracker.rows()) == {user, org}


def test_a_circle_of_one_handle_is_named(world):
    tracker = ResourceTracker(world.engine)
    first = tracker.track_external(world.kind, "a")
    second = tracker.track_external(world.kind, "b", after=[first], before=[first])
    left = leftovers(CleanupManager(tracker))
    assert set(left) == {str(first), str(second)}
    assert world.went == []


# --- another process


def test_another_process_removes_what_this_one_tracked(world):
    tracker = world.tracker()
    tracker.track_external(world.kind, "a", after=[world.users], before=[world.orgs])
    other = ResourceTracker.from_json(tracker.to_json(), world.engine)
    assert CleanupManager(other).cleanup().external == {world.kind: 1}
    assert world.went == [("a", 0, 0, 1)]
    assert world.gone()


def _clean(tracker, answers):
    report = CleanupManager(tracker).cleanup()
    answers.put(report.external)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_removes_nothing(sqlite_engine):
    world = World(sqlite_engine)
    world.outside.dispose()
    tracker = ResourceTracker(sqlite_engine)
    tracker.track_external(world.kind, "a")
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_clean, args=(tracker, answers))
    child.start()
    child.join(30)
    assert answers.get() == {}
    assert len(tracker.externals()) == 1


# --- the order alone


def name(table):
    return TableName("db", "main", table)


def resource(number):
    return ExternalResource("x", None, number)


def test_foreign_keys_alone_are_no_circle():
    order = RemovalOrder([Tie(resource(1))], [(name("a"), name("b")), (name("b"), name("a"))])
    assert order.circles == []


def test_what_waits_waits_through_foreign_keys():
    first = resource(1)
    order = RemovalOrder(
        [Tie(first, before=(name("a"),))], [(name("a"), name("b")), (name("b"), name("c"))]
    )
    assert order.later([first]) == {name("a"), name("b"), name("c")}
    assert order.later([]) == set()


def test_a_named_row_waits_without_its_table():
    first, row = resource(1), RowKey(name("a"), (1,))
    order = RemovalOrder([Tie(first, before=(row,))], [(name("a"), name("b"))])
    assert order.later([first]) == {row, name("b")}
    assert order.node(row) == row
    assert order.node(RowKey(name("a"), (2,))) == name("a")


def test_a_table_takes_its_named_rows_along():
    first, second, row = resource(1), resource(2), RowKey(name("a"), (1,))
    order = RemovalOrder([Tie(first, after=(row,)), Tie(second, before=(name("a"),))], [])
    assert order.later([second]) == {name("a"), row, first}


def test_rows_of_a_table_that_references_itself_go_together():
    first, row = resource(1), RowKey(name("a"), (1,))
    order = RemovalOrder([Tie(first, before=(row,))], [(name("a"), name("a"))])
    assert order.later([first]) == {row, name("a")}
    assert order.circles == []


def test_foreign_keys_of_tables_without_tracked_rows_give_way_to_a_tie():
    """Only an application that wrote such rows could make the circle a real one."""
    tie = Tie(resource(1), after=(name("a"),), before=(name("c"),))
    references = [(name("c"), name("b")), (name("b"), name("a"))]
    assert len(RemovalOrder([tie], references).circles) == 1
    assert removal_order([tie], references, [name("a"), name("c")]).circles == []
    assert len(removal_order([tie], references, [name("a"), name("b"), name("c")]).circles) == 1
