"""``assert_no_leaks``: rows of ours that are there are named with their makers, and no others."""

from __future__ import annotations

from contextlib import suppress

import pytest
import sqlalchemy as sa

from harness.blocks import insert
from harness.bystanders import Bystanders, snapshot
from harness.ledgers import dead_worker, family, ids, numbered, sweep
from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    LeakedRowsError,
    Ledger,
    LedgerError,
    ResourceTracker,
    ScopeError,
    WorkerContext,
    assert_no_leaks,
    configure,
)
from tidyrows import sweep as swept
from tidyrows.ledger.process import OwnerKind


def leaks(place, **options):
    with pytest.raises(LeakedRowsError) as caught:
        assert_no_leaks(place, **options)
    assert isinstance(caught.value, AssertionError)
    found = {
        (each.table and each.table.name, each.keys, each.run, each.worker, each.test)
        for each in caught.value.leaks
    }
    for each in caught.value.leaks:
        assert str(each) in str(caught.value)
        assert each.certain
    return found


def test_rows_that_the_ledger_names_and_that_are_there_are_told_with_their_maker(
    database, outside, ledgers
):
    parents, _children = family(outside)
    ledgers.installed(outside)
    bystanders = Bystanders(outside)
    bystanders.insert(parents, *numbered([900]))
    made = [("monday", "gw0", "test_a", [1, 2]), ("monday", "gw71", "test_b", [3, 4, 5])]
    made += [("tuesday", "gw0", "test_a", [6])]
    for run, worker, test, keys in made:
        dead_worker(database, ledgers, (parents, numbered(keys)), run=run, name=worker, test=test)
    with outside.begin() as connection:  # somebody has deleted these
        connection.execute(sa.delete(parents).where(parents.c.id.in_([4])))
    before = snapshot(outside)
    monday = {("parents", (1, 2), "monday", "gw0", "test_a")}
    second = {("parents", (3, 5), "monday", "gw71", "test_b")}
    tuesday = {("parents", (6,), "tuesday", "gw0", "test_a")}
    assert leaks(outside) == monday | second | tuesday
    assert leaks(database.engine(), run="monday") == monday | second
    assert leaks(Ledger(outside), worker="gw71") == second
    assert leaks(outside, test="test_a") == monday | tuesday
    assert leaks(outside, test="test_a", run="tuesday", worker="gw0") == tuesday
    assert_no_leaks(outside, test="test_c")
    assert_no_leaks(outside, run="wednesday")
    assert snapshot(outside) == before
    assert sweep(outside, test="test_a", run="monday").total_deleted == 2
    assert sweep(outside, test="test_a").total_deleted == 1
    assert ids(outside, parents) == [3, 5, 900]
    assert sweep(outside).total_deleted == 2
    assert_no_leaks(outside)
    bystanders.assert_untouched()


def test_rows_of_live_workers_and_kept_ones_are_told_and_stay(database, outside, ledgers):
    parents, _children = family(outside)
    ledger = ledgers.installed(outside)
    context = WorkerContext("monday", "gw0", 0, "test_a")
    tracker = ResourceTracker(outside, context=context, ledger=ledger)
    with CleanupManager(tracker):
        insert(outside, (parents, numbered([1])))
        assert leaks(outside) == {("parents", (1,), "monday", "gw0", "test_a")}
        assert swept(outside, test="test_a").total_deleted == 0  # its worker lives
        assert swept(outside, test="test_a", run="monday", worker="gw0").total_deleted == 0
        assert ids(outside, parents) == [1]
    assert_no_leaks(outside)
    dead_worker(database, ledgers, (parents, numbered([2])), test="test_b")
    with outside.begin() as connection:
        kept = OwnerKind.KEPT.new_id()
        connection.exec_driver_sql(f"UPDATE tidyrows_ledger SET owner = '{kept}' WHERE scope > 0")
    assert leaks(outside) == {("parents", (2,), "run-1", "gw0", "test_b")}
    assert sweep(outside, kept=True).total_deleted == 1


def test_rows_of_trackers_of_this_process_are_told_without_a_ledger_too(engine):
    table = sa.Table(
        "things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(60)),
    )  # fmt: skip
    table.create(engine)
    with pytest.raises(LedgerError, match="has no ledger"):
        assert_no_leaks(engine)
    Ledger(engine).install()
    context = WorkerContext("monday", "gw3", 3, "test_a")
    tracker = ResourceTracker(engine, context=context)
    with CleanupManager(tracker):
        connection = engine.connect()
        connection.execute(sa.insert(table).values(id=1))
    with pytest.warns(match="are committed after their tracker has stopped"):
        connection.commit()
    connection.close()
    assert leaks(engine) == {("things", (1,), "monday", "gw3", "test_a")}
    assert_no_leaks(engine, worker="gw4")
    CleanupManager(tracker).cleanup()
    assert_no_leaks(engine)


def test_values_with_a_tag_are_told_by_run_and_can_be_removed_in_bulk(engine):
    users = sa.Table(
        "users", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.String(60), unique=True),
    )  # fmt: skip
    users.create(engine)
    monday, other = WorkerContext("monday", "gw1", 1), WorkerContext("monday", "gw2", 2)
    tuesday = WorkerContext("tuesday", "gw1", 1).for_test("test_b")
    template = "user-{tag}@a.test"
    emails = [each.text(template) for each in (monday, other, tuesday)]
    tagged = {users.c.email: template}
    bystanders = Bystanders(engine)
    bystanders.insert(users, {"id": 900, "email": "user-monday@a.test"})
    with engine.begin() as connection:
        connection.execute(
            sa.insert(users), [{"id": n, "email": each} for n, each in enumerate(emails, 1)]
        )

    def keys(**options):
        return sorted(k for _, ks, *_ in leaks(engine, tagged=tagged, **options) for k in ks)

    assert keys() == [1, 2, 3]
    assert keys(run="monday") == [1, 2]
    assert_no_leaks(engine, tagged=tagged, run="wednesday")
    # TIDYROWS_WORKER_INDEX may have given gw1 another number
    for wrong in ({"test": "test_b"}, {"worker": "gw1"}, {"worker": "gw1", "run": "monday"}):
        with pytest.raises(ScopeError, match="A tag tells to another process neither"):
            assert_no_leaks(engine, tagged=tagged, **wrong)
    for whose in (tuesday.tag, monday.tag[:9], monday.tag[:7]):
        tracker = ResourceTracker(engine)
        with CleanupManager(tracker) as cleanup:
            assert tracker.track_tagged(users.c.email, template, whose=whose) == 1
        assert cleanup.report.total_deleted == 1
    assert_no_leaks(engine, tagged=tagged)
    for wrong in ("gw1", "Monday!", "monday"):
        with pytest.raises(ScopeError, match="is nobody"):
            ResourceTracker(engine).track_tagged(users.c.email, template, whose=wrong)
    bystanders.assert_untouched()


@on("sqlite")
def test_a_row_that_may_be_somebody_elses_is_told_as_such(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, [{"id": 1, "name": "ours"}]))
    with outside.begin() as connection:
        connection.execute(sa.delete(parents))
        connection.execute(sa.insert(parents).values(id=1, name="another"))
    with pytest.raises(LeakedRowsError, match="perhaps somebody else's"):
        assert_no_leaks(outside)


@on("sqlite")
def test_a_sweep_takes_what_is_configured_for_the_process(database, outside, ledgers):
    parents, children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])))
    insert(outside, (children, [{"id": 1, "parent_id": 1}]))
    with configure(own=["children"]):
        report = sweep(outside)
    assert [len(rows) for rows in report.dependents.values()] == [1]
    assert ids(outside, children) == []


@on("sqlite")
def test_a_tracker_with_another_ledger_and_equal_rows_of_two_workers_are_told(outside, ledgers):
    parents, _children = family(outside)
    ledger = ledgers.installed(outside)
    things = sa.Table("things", sa.MetaData(), sa.Column("name", sa.String(9)))
    things.create(outside)
    Ledger(outside, name="another_ledger").install()
    another = Ledger(outside, name="another_ledger")
    trackers = [
        ResourceTracker(outside, ledger=another, context=WorkerContext("monday", "gw0", 0)),
        ResourceTracker(outside, ledger=ledger, context=WorkerContext("monday", "gw1", 1)),
        ResourceTracker(outside, ledger=ledger, context=WorkerContext("monday", "gw2", 2)),
    ]
    equals = (things, [{"name": "a"}])
    for tracker, rows in zip(trackers, [(parents, numbered([1])), equals, equals], strict=True):
        tracker.start()
        insert(outside, rows)
        tracker.stop()
    its = ("parents", (1,), "monday", "gw0", None)
    equal = {("things", (("a",),), "monday", worker, None) for worker in ("gw1", "gw2")}
    assert leaks(outside) == {its} | equal
    with sa.create_engine(outside.url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.delete(things))
        connection.execute(sa.insert(things).values(name="a"))
    assert len(leaks(outside)) == 2  # there is one such row now
    for tracker in trackers:
        CleanupManager(tracker).cleanup()
    another.close()
    things.drop(outside)
    assert_no_leaks(outside)


@on("sqlite")
def test_a_long_id_of_a_test_is_not_that_of_another_with_the_same_beginning(
    database, outside, ledgers
):
    parents, _children = family(outside)
    ledgers.installed(outside)
    first, second = (f"tests/test_it.py::test[{'x' * 250}{each}]" for each in "ab")
    dead_worker(database, ledgers, (parents, numbered([1])), name="gw0", test=first)
    dead_worker(database, ledgers, (parents, numbered([2])), name="gw1", test=second)
    assert sweep(outside, test=first).total_deleted == 1
    assert ids(outside, parents) == [2]
    assert_no_leaks(outside, test=first)
    assert len(leaks(outside, test=second)) == 1
    assert sweep(outside, test=second).total_deleted == 1


def test_a_row_of_the_next_life_of_a_table_is_not_said_to_be_ours_for_sure(
    database, outside, ledgers
):
    parents, _children = family(outside)
    ledgers.installed(outside)
    things = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(9)),
    )
    things.create(outside)
    dead_worker(database, ledgers, (parents, numbered([1])), name="gw0")
    tracker = ResourceTracker(outside)
    tracker.start()
    insert(outside, (things, [{"id": 1, "name": "ours"}]))
    tracker.stop()
    somebody = sa.create_engine(outside.url, poolclass=sa.NullPool)
    things.drop(somebody)
    things.create(somebody)
    bystanders = Bystanders(outside)
    bystanders.insert(things, {"id": 1, "name": "theirs"})
    with pytest.raises(LeakedRowsError) as caught:
        assert_no_leaks(outside)
    told = {each.table.name: each.certain for each in caught.value.leaks}
    assert told.pop("parents")
    assert not any(told.values())
    with suppress(CleanupError):
        CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()
