"""A cleanup in transactions of bounded size: no lock is held for long, no key ever broken."""

from __future__ import annotations

from collections import Counter

import pytest
import sqlalchemy as sa

from harness.blocks import left_over, reference, refuse_deletes, table, tracked
from harness.commits import deleting
from harness.loops import insert_loop
from harness.scene import Scene, told
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from tidyrows import CleanupManager, Dependents, RetryPolicy
from tidyrows.cleanup.plan import Batch, Step, transactions_of
from tidyrows.keys import KeyedTable, TableName

everywhere = on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")


# --- how rows are parted


def step(*batches, cycle=False):
    made = []
    for name, keys in batches:
        column = sa.Column("id", sa.Integer, primary_key=True)
        real = sa.Table(name, sa.MetaData(), column)
        made.append(Batch(KeyedTable(TableName("db", "main", name), real), keys))
    return Step(tuple(made), ("a key",) if cycle else ())


def parted(steps, limit, apart=lambda _step: pytest.fail("nothing is to be taken apart")):
    return [
        [(place[1], list(keys)) for place, (_table, keys) in share.items()]
        for share in transactions_of(steps, limit, apart=apart)
    ]


def test_what_fits_goes_together():
    assert parted([step(("b", [1, 2])), step(("a", [1]))], 3) == [[("b", [1, 2]), ("a", [1])]]


def test_nothing_makes_no_transaction():
    assert parted([], 3) == []
    assert parted([step(("a", []))], 3) == []


def test_a_table_is_parted_where_a_share_is_full_and_the_next_one_fills_it():
    steps = [step(("b", [1, 2, 3, 4, 5])), step(("a", [1, 2]))]
    assert parted(steps, 3) == [[("b", [1, 2, 3])], [("b", [4, 5]), ("a", [1])], [("a", [2])]]


def test_a_cycle_that_fits_is_not_parted_and_begins_a_share_where_it_must():
    steps = [step(("c", [1])), step(("a", [1]), ("b", [1]), cycle=True), step(("d", [1]))]
    assert parted(steps, 2) == [[("c", [1])], [("a", [1]), ("b", [1])], [("d", [1])]]


def test_a_cycle_that_does_not_fit_is_taken_apart_and_its_circles_stay_whole():
    def apart(_step):
        yield step(("a", [5, 2]))
        yield step(("a", [1]), ("b", [1]), cycle=True)
        yield step(("a", [3]))

    steps = [step(("a", [1, 2, 3, 5]), ("b", [1]), cycle=True)]
    assert parted(steps, 4, apart) == [[("a", [1, 2, 5]), ("b", [1])], [("a", [3])]]
    assert parted(steps, 1, apart) == [
        [("a", [5])],
        [("a", [2])],
        [("a", [1]), ("b", [1])],
        [("a", [3])],
    ]


# --- what it does in a database


@pytest.fixture
def family(database):
    metadata = sa.MetaData()
    a = table(metadata, "a_parents")
    b = table(metadata, "b_children", reference("a_id", "a_parents.id"))
    c = table(metadata, "c_notes", reference("b_id", "b_children.id", ondelete="CASCADE"))
    scene = Scene(database, metadata)
    scene.a, scene.b, scene.c = a, b, c
    scene.strangers((a, [{"id": 1}]), (b, [{"id": 1, "a_id": 1}]), (c, [{"id": 1, "b_id": 1}]))
    return scene


def rows(numbers, **values):
    return [{"id": n, **{name: value(n) for name, value in values.items()}} for n in numbers]


def ours(scene, numbers):
    return scene.ours(
        (scene.a, rows(numbers)),
        (scene.b, rows(numbers, a_id=int)),
        (scene.c, rows(numbers, b_id=int)),
    )


def sizes(engine):
    """How many rows each committed transaction has deleted."""
    deleted: Counter[int] = Counter()
    committed: list[int] = []

    @sa.event.listens_for(engine, "after_cursor_execute")
    def count(connection, cursor, statement, *_):
        if statement.startswith("DELETE"):
            deleted[id(connection)] += cursor.rowcount

    @sa.event.listens_for(engine, "commit")
    def note(connection):
        committed.append(deleted.pop(id(connection), 0))

    @sa.event.listens_for(engine, "rollback")
    def forget(connection):
        deleted.pop(id(connection), None)

    return committed


@everywhere
def test_no_transaction_deletes_more_rows_than_said(family):
    tracker = ours(family, range(2, 32))
    committed = sizes(family.engine)
    report = CleanupManager(tracker, rows_per_transaction=7).cleanup()
    assert report.total_deleted == 90
    assert [size for size in committed if size] == [7] * 12 + [6]
    family.assert_left()


@everywhere
def test_whoever_looks_between_the_transactions_finds_every_key_whole(family):
    tracker = ours(family, range(2, 32))
    orphans = []

    @sa.event.listens_for(family.engine, "begin")
    def look(_connection):
        with family.outside.connect() as connection:
            for child, parent in (("b_children", "a"), ("c_notes", "b")):
                target = {"a": "a_parents", "b": "b_children"}[parent]
                orphans.extend(
                    connection.exec_driver_sql(
                        f"SELECT id FROM {child} WHERE {parent}_id NOT IN (SELECT id FROM {target})"
                    )
                )

    assert CleanupManager(tracker, rows_per_transaction=7).cleanup().total_deleted == 90
    assert orphans == []
    family.assert_left()


@everywhere
def test_what_cannot_go_keeps_its_parents_in_later_transactions_and_nothing_else(family):
    tracker = ours(family, range(2, 32))
    refuse_deletes(family.outside, family.b, [9])
    left = left_over(CleanupManager(tracker, rows_per_transaction=7))
    assert set(left) == {("b_children", 9), ("a_parents", 9)}
    assert "b_children(9)" in left["a_parents", 9]
    family.assert_left((family.a, rows([9])), (family.b, rows([9], a_id=int)))


@on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg")
def test_a_row_that_stays_in_silence_keeps_what_it_references_in_later_transactions(family):
    """PostgreSQL would let a CASCADE pass over it, and leave it an orphan."""
    tracker = ours(family, range(2, 32))
    swallow_deletes(family, family.c, 9)
    left = left_over(CleanupManager(tracker, rows_per_transaction=7))
    assert set(left) == {("c_notes", 9), ("b_children", 9), ("a_parents", 9)}
    assert "c_notes(9)" in left["b_children", 9]
    family.assert_left(
        (family.a, rows([9])), (family.b, rows([9], a_id=int)), (family.c, rows([9], b_id=int))
    )


def swallow_deletes(scene, guarded, number):
    """A DELETE of this row does nothing and says nothing."""
    name = guarded.name
    if scene.database.backend == "sqlite":
        scene.run(
            f"CREATE TRIGGER swallow BEFORE DELETE ON {name} WHEN OLD.id = {number}"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    else:
        scene.run(
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF OLD.id = {number} THEN RETURN NULL; END IF; RETURN OLD; END $$",
            f"CREATE TRIGGER swallow BEFORE DELETE ON {name} FOR EACH ROW"
            " EXECUTE FUNCTION swallow()",
        )


@everywhere
def test_a_row_that_many_reference_is_deleted_with_all_of_them(family):
    """They are found in the transaction that deletes it, and no CASCADE may take one unseen."""
    tracker = ours(family, [2])
    family.application((family.c, rows(range(100, 150), b_id=lambda _n: 2)))
    report = CleanupManager(tracker, rows_per_transaction=7).cleanup()
    assert told(report.dependents) == {"c_notes": list(range(100, 150))}
    family.assert_left()


@everywhere
def test_rows_that_many_reference_go_in_smaller_transactions(family):
    tracker = ours(family, range(2, 12))
    family.application((family.c, rows(range(100, 150), b_id=lambda n: 2 + n % 10)))
    committed = sizes(family.engine)
    report = CleanupManager(tracker, rows_per_transaction=12).cleanup()
    assert report.total_deleted == 30
    assert told(report.dependents) == {"c_notes": list(range(100, 150))}
    assert max(committed) <= 2 * 12
    family.assert_left()


@everywhere
def test_rows_to_be_deleted_one_by_one_take_all_kinds_of_dependents_along(family):
    tracker = ours(family, range(2, 6))
    family.application(
        (family.b, rows([50], a_id=lambda _n: 3)), (family.c, rows([60], b_id=lambda _n: 50))
    )
    report = CleanupManager(
        tracker, rows_per_transaction=1, dependents=Dependents.FOLLOW_SCHEMA
    ).cleanup()
    assert told(report.dependents) == {"b_children": [50], "c_notes": [60]}
    assert report.total_deleted == 12
    family.assert_left()


@pytest.fixture
def tree(database):
    metadata = sa.MetaData()
    node = table(metadata, "nodes", reference("parent_id", "nodes.id", nullable=True))
    scene = Scene(database, metadata)
    scene.node = node
    scene.strangers((node, [{"id": 1, "parent_id": None}]))
    return scene


@everywhere
def test_a_tree_is_parted_leaves_first(tree):
    nodes = [{"id": n, "parent_id": n // 2 or None} for n in range(2, 66)]
    tracker = tree.ours(
        (
            tree.node,
            [
                {**each, "parent_id": None if each["id"] < 4 else each["parent_id"]}
                for each in nodes
            ],
        )
    )
    committed = sizes(tree.engine)
    assert CleanupManager(tracker, rows_per_transaction=10).cleanup().total_deleted == 64
    assert max(committed) <= 10
    tree.assert_left()


@everywhere
def test_a_circle_of_rows_larger_than_a_transaction_goes_whole(tree):
    numbers = list(range(10, 20))
    circle = [{"id": n, "parent_id": 10 + (n - 9) % 10} for n in numbers]
    tracker = tracked(tree.engine, (tree.node, rows([5], parent_id=lambda _n: None)))
    with tree.outside.begin() as connection:
        insert_loop(connection, (tree.node, circle))
    tracker.track_rows(tree.node, numbers)
    assert CleanupManager(tracker, rows_per_transaction=3).cleanup().total_deleted == 11
    tree.assert_left()


@everywhere
def test_an_interrupt_between_two_transactions_leaves_tracked_what_is_there(family):
    """A key that is free may be a stranger's by the next cleanup."""
    tracker = ours(family, range(2, 32))
    commits = []

    @sa.event.listens_for(family.engine, "begin")
    def interrupt(_connection):
        commits.append(1)
        if len(commits) == 7:
            raise KeyboardInterrupt

    manager = CleanupManager(tracker, rows_per_transaction=7)
    with pytest.raises(KeyboardInterrupt):
        manager.cleanup()
    sa.event.remove(family.engine, "begin", interrupt)
    there = {
        (name, key)
        for name in ("a_parents", "b_children", "c_notes")
        for (key,) in read(family, f"SELECT id FROM {name} WHERE id > 1")
    }
    assert {(row.table.name, row.key[0]) for row in tracker.rows()} == there
    assert 0 < len(there) < 90
    assert CleanupManager(tracker).cleanup().total_deleted == len(there)
    family.assert_left()


def read(scene, sql):
    with scene.outside.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def test_no_rows_at_all_are_no_size(sqlite_engine):
    tracker = tracked(sqlite_engine)
    with pytest.raises(ValueError, match=r"rows_per_transaction=0.*at least 1"):
        CleanupManager(tracker, rows_per_transaction=0)


@everywhere
def test_the_deadline_holds_between_two_transactions(family):
    now = [0.0]
    tracker = ours(family, range(2, 32))

    def tick():
        now[0] += 10.0

    manager = CleanupManager(
        tracker, rows_per_transaction=7, deadline=35.0, retry=RetryPolicy(clock=lambda: now[0])
    )
    with deleting(family.engine, tick):
        left = left_over(manager)
    assert len(left) == len(tracker) == 90 - 4 * 7
    assert all("deadline" in cause for cause in left.values())
    assert CleanupManager(tracker).cleanup().total_deleted == len(left)
    family.assert_left()
