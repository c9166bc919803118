"""Others write while we look and delete: nothing of theirs goes unseen, nothing of ours stays."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from harness.blocks import left_over, reference, table
from harness.pairs import pairwise
from harness.races import Doing, at_statement
from harness.scene import Scene, told
from harness.targets import DEFAULT, on
from tidyrows import CleanupManager, RetryPolicy

SERVERS = ("postgresql+psycopg", "mysql+pymysql")
servers = on(*SERVERS)
everywhere = on(*DEFAULT)
ACTIONS = ["NO ACTION", "CASCADE", "SET NULL"]
DELETE_PARENT = r"DELETE.*parents"
DELETE_CHILD = r"DELETE.*children"


def family(ondelete, **options):
    metadata = sa.MetaData()
    parents = table(metadata, "parents", sa.Column("note", sa.Integer))
    children = table(
        metadata,
        "children",
        reference(
            "parent_id", "parents.id", ondelete=ondelete, nullable=ondelete == "SET NULL", **options
        ),
        sa.Column("note", sa.Integer),
    )
    grand = table(metadata, "grand", reference("child_id", "children.id", ondelete="CASCADE"))
    return metadata, parents, children, grand


@pytest.fixture(params=ACTIONS)
def house(request, database):
    metadata, parents, children, grand = family(request.param)
    scene = Scene(database, metadata)
    scene.strangers((parents, [{"id": 1}]), (children, [{"id": 1, "parent_id": 1}]))
    scene.tracker = scene.ours((parents, [{"id": 2}, {"id": 3}]))
    scene.action, scene.parents, scene.children, scene.grand = (
        request.param, parents, children, grand,
    )  # fmt: skip  # in one look
    return scene


def manager_of(scene, **options):
    manager = CleanupManager(scene.tracker, retry=RetryPolicy(base=0.01), **options)
    manager.plan()  # the schema is known, so that what is hooked is the cleanup itself
    return manager


def said(report):
    """Keys of children that the report knows, deleted or detached."""
    found = told(report.dependents).get("children", []) + told(report.detached).get("children", [])
    return sorted(found)


def assert_all_seen(scene, report, *numbers):
    """Our parents are gone, and these children with them, or detached; nothing went unseen."""
    assert report.total_deleted + sum(report.already_gone.values()) == 2
    assert said(report) == sorted(numbers)
    detached = scene.action == "SET NULL"
    scene.assert_left((scene.children, [{"id": n} for n in numbers] if detached else []))


def waiting_for(scene, manager):
    """A cleanup in a thread, which by now waits for somebody."""
    if scene.database.backend != "sqlite":
        cleaning = Doing(manager.cleanup)
        cleaning.settle(scene.outside)
        return cleaning
    # SQLite shows nobody who waits; that it asks for the write lock must do.
    asked = threading.Event()
    at_statement(scene.engine, "BEGIN IMMEDIATE", asked.set)
    cleaning = Doing(manager.cleanup)
    assert asked.wait(20)
    return cleaning


# --- written, and not committed when we look


@pairwise(database=DEFAULT, house=ACTIONS, ends=["commit", "rollback"], by=["insert", "update"])
def test_a_child_that_is_not_committed_yet_is_waited_for(house, ends, by):
    if by == "update":
        house.application((house.children, [{"id": 7, "parent_id": 1}]))
    with house.outside.connect() as connection:
        if by == "insert":
            connection.execute(sa.insert(house.children).values(id=7, parent_id=2))
        else:
            connection.execute(sa.update(house.children).where(house.children.c.id == 7)
                               .values(parent_id=2))  # fmt: skip  # in one look
        cleaning = waiting_for(house, manager_of(house))
        assert not cleaning.over
        getattr(connection, ends)()
    report = cleaning.outcome()
    if ends == "commit":
        assert_all_seen(house, report, 7)
    else:
        assert said(report) == []
        assert report.total_deleted == 2
        kept = [{"id": 7, "parent_id": 1}] if by == "update" else []
        house.assert_left((house.children, kept))


@servers
def test_a_grandchild_that_is_not_committed_yet_is_waited_for(house):
    """It references a row that nobody tracked, and a CASCADE would take it."""
    if house.action == "SET NULL":
        pytest.skip("the child stays")
    house.application((house.children, [{"id": 7, "parent_id": 2}]))
    with house.outside.connect() as connection:
        connection.execute(sa.insert(house.grand).values(id=9, child_id=7))
        cleaning = waiting_for(house, manager_of(house))
        assert not cleaning.over
        connection.commit()
    report = cleaning.outcome()
    assert told(report.dependents)["grand"] == [9]
    assert_all_seen(house, report, 7)


@servers
def test_somebody_who_does_not_commit_at_all_is_not_waited_for_for_ever(house):
    with house.outside.connect() as connection:
        connection.execute(sa.insert(house.children).values(id=7, parent_id=2))
        manager = CleanupManager(
            house.tracker, lock_timeout=0.3, retry=RetryPolicy(attempts=2, base=0.0)
        )
        left = left_over(manager)
        connection.rollback()
    assert set(left) == {("parents", 2)}  # the other one has nobody's lock on it
    assert "gave up" in left["parents", 2]
    assert len(house.tracker) == 1
    report = manager.cleanup()
    assert report.total_deleted == 1
    assert said(report) == []
    house.assert_left()


# --- written between a look and the DELETE


def inserting(scene, number=7, target=None, **values):
    """Insert and commit; whether that was possible."""
    target = scene.children if target is None else target
    values = values or {"parent_id": 2}

    def insert():
        try:
            with scene.outside.begin() as connection:
                connection.execute(sa.insert(target).values(id=number, **values))
        except sa.exc.DBAPIError:
            return False
        return True

    return insert


@pairwise(database=SERVERS, house=ACTIONS, at=[DELETE_PARENT, r"SELECT.*children"], others=[0, 1])
def test_a_child_that_comes_in_between_is_kept_out_or_seen(house, at, others):
    if others:
        house.application((house.children, [{"id": 5, "parent_id": 2}]))
    elif at != DELETE_PARENT and house.action == "NO ACTION":
        pytest.skip("nobody looks")
    writers = []

    def write():
        writers.append(Doing(inserting(house)))
        writers[0].settle(house.outside)

    manager = manager_of(house)
    reached = at_statement(house.engine, at, write)
    report = manager.cleanup()
    assert reached()
    came = writers[0].outcome()
    assert_all_seen(house, report, *[5][:others], *([7] if came else []))
    if house.action != "NO ACTION" and (at == DELETE_PARENT or not others):
        assert not came  # the parent was locked: who came too late is told so


@servers
def test_a_grandchild_that_comes_in_between_is_kept_out_or_seen(house):
    if house.action == "SET NULL":
        pytest.skip("the child stays")
    house.application((house.children, [{"id": 7, "parent_id": 2}]))
    writers = []

    def write():
        writers.append(Doing(inserting(house, 9, house.grand, child_id=7)))
        writers[0].settle(house.outside)

    manager = manager_of(house)
    reached = at_statement(house.engine, DELETE_CHILD, write)
    report = manager.cleanup()
    assert reached()
    came = writers[0].outcome()
    assert told(report.dependents).get("grand", []) == ([9] if came else [])
    assert_all_seen(house, report, 7)


@servers
@pytest.mark.parametrize("kind", ["unique key", "primary key"])
def test_a_child_by_another_unique_key_that_comes_in_between_is_kept_out(database, kind):
    """Its insert locks the referenced index entry, which is not the primary key's."""
    metadata = sa.MetaData()
    parents = table(metadata, "parents", sa.Column("code", sa.Integer, unique=True))
    target = "parents.code" if kind == "unique key" else "parents.id"
    children = table(metadata, "children", reference("parent_id", target, ondelete="CASCADE"))
    scene = Scene(database, metadata)
    scene.tracker = scene.ours((parents, [{"id": 2, "code": 2}]))
    scene.children, writers = children, []

    def write():
        writers.append(Doing(inserting(scene)))
        writers[0].settle(scene.outside)

    manager = manager_of(scene)
    reached = at_statement(scene.engine, DELETE_PARENT, write)
    report = manager.cleanup()
    assert reached()
    came = writers[0].outcome()
    assert told(report.dependents) == ({"children": [7]} if came else {})
    assert not came
    scene.assert_left()


@servers
def test_who_inserts_all_the_time_is_kept_out_or_seen(house):
    """Every child whose COMMIT succeeded is in the report."""
    committed = []
    begun, refused = threading.Event(), threading.Event()

    def write():
        for number in range(10, 5000):
            if not inserting(house, number)():
                refused.set()
                return
            committed.append(number)
            if number == 12:
                begun.set()

    writer = Doing(write)
    assert begun.wait(20)
    report = manager_of(house).cleanup()
    writer.outcome()
    assert refused.is_set()
    assert_all_seen(house, report, *committed)


@on("sqlite")
def test_on_sqlite_nobody_writes_in_between(house):
    outside = house.database.engine(connect_args={"timeout": 0})
    came = []
    house.application((house.children, [{"id": 5, "parent_id": 2}]))

    def write():
        with pytest.raises(sa.exc.OperationalError, match="locked"):
            with outside.begin() as connection:
                connection.execute(sa.insert(house.children).values(id=7, parent_id=2))
        came.append(7)

    manager = manager_of(house)
    reached = at_statement(house.engine, DELETE_PARENT, write)
    assert_all_seen(house, manager.cleanup(), 5)
    assert reached()
    assert came == [7]


# --- a dependent that is somebody else's by the time we would take it


@servers
@pytest.mark.parametrize("nullable", [True, False], ids=["to be detached", "to be deleted"])
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_a_child_that_moves_to_a_strangers_row_in_between_is_let_be_or_waits(
    database, ondelete, nullable
):
    """Found as a dependent, then pointed elsewhere: it is no dependent of ours any more."""
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    children = table(
        metadata, "children",
        reference("parent_id", "parents.id", nullable=nullable, ondelete=ondelete),
    )  # fmt: skip  # a table in one look
    scene = Scene(database, metadata)
    scene.strangers((parents, [{"id": 1}]))
    scene.tracker = scene.ours((parents, [{"id": 2}]))
    scene.application((children, [{"id": 7, "parent_id": 2}]))
    movers = []

    def move():
        try:
            with scene.outside.begin() as connection:
                moved = connection.execute(
                    sa.update(children).where(children.c.id == 7).values(parent_id=1)
                )
        except sa.exc.DBAPIError:
            return False
        return bool(moved.rowcount)

    def start():
        movers.append(Doing(move))
        movers[0].settle(scene.outside)

    manager = manager_of(scene)
    reached = at_statement(scene.engine, r"^(DELETE|UPDATE).*children", start)
    report = manager.cleanup()
    assert reached()
    moved = movers[0].outcome()
    if moved:
        scene.assert_left((children, [{"id": 7, "parent_id": 1}]))
        if not nullable or ondelete == "CASCADE":
            assert told(report.dependents) == {}
    else:
        assert told(report.dependents) == {"children": [7]}
        scene.assert_left()


# --- the application deletes our rows


@everywhere
def test_rows_that_the_application_deleted_before_are_already_gone(house):
    house.application((house.children, [{"id": 7, "parent_id": 3}]))
    house.run("DELETE FROM parents WHERE id = 2")
    report = manager_of(house).cleanup()
    assert sum(report.already_gone.values()) == 1
    assert report.total_deleted == 1
    assert_all_seen(house, report, 7)


@pairwise(
    database=SERVERS,
    house=ACTIONS,
    at=[DELETE_PARENT, r"SELECT.*(children|parents)"],
    childless=[True, False],
)
def test_a_row_that_the_application_deletes_in_between_is_no_error(house, at, childless):
    if at != DELETE_PARENT and house.action == "NO ACTION" and childless:
        pytest.skip("nobody looks")
    if not childless:
        house.application((house.children, [{"id": 7, "parent_id": 2}, {"id": 8, "parent_id": 3}]))
    doers = []

    def delete():
        try:
            with house.outside.begin() as connection:
                connection.exec_driver_sql("DELETE FROM children WHERE parent_id = 2")
                return connection.exec_driver_sql("DELETE FROM parents WHERE id = 2").rowcount
        except sa.exc.DBAPIError:  # a deadlock, of which the application was the victim
            return 0

    def start():
        doers.append(Doing(delete))
        doers[0].settle(house.outside)

    manager = manager_of(house)
    reached = at_statement(house.engine, at, start)
    report = manager.cleanup()
    assert reached()
    doers[0].outcome()
    assert report.total_deleted + sum(report.already_gone.values()) == 2
    assert len(house.tracker) == 0
    detached = said(report) if house.action == "SET NULL" else []
    house.assert_left((house.children, [{"id": n} for n in detached]))


@pairwise(database=DEFAULT, house=ACTIONS, ends=["commit", "rollback"])
def test_a_row_that_the_application_is_deleting_is_waited_for(house, ends):
    house.application((house.children, [{"id": 7, "parent_id": 2}, {"id": 8, "parent_id": 3}]))
    with house.outside.connect() as connection:
        connection.exec_driver_sql("DELETE FROM children WHERE parent_id = 2")
        connection.exec_driver_sql("DELETE FROM parents WHERE id = 2")
        cleaning = waiting_for(house, manager_of(house))
        assert not cleaning.over
        getattr(connection, ends)()
    report = cleaning.outcome()
    committed = ends == "commit"
    assert sum(report.already_gone.values()) == committed
    assert_all_seen(house, report, *([8] if committed else [7, 8]))


# --- two cleanups at once, each with dependents that the other could take too


@everywhere
def test_two_cleanups_whose_dependents_are_the_same_rows_both_end_well(database):
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    children = table(
        metadata,
        "children",
        reference("one", "parents.id"),
        reference("two", "parents.id", ondelete="CASCADE"),
    )
    scene = Scene(database, metadata)
    scene.strangers((parents, [{"id": 1}]), (children, [{"id": 900, "one": 1, "two": 1}]))
    numbers = range(2, 42)
    trackers = [
        scene.ours((parents, [{"id": n} for n in numbers if n % 2 == half])) for half in (0, 1)
    ]
    scene.application((
        children,
        [{"id": n, "one": n, "two": 43 - n} for n in numbers],
    ))  # fmt: skip  # a batch in one look
    managers = [CleanupManager(each, retry=RetryPolicy(base=0.01)) for each in trackers]
    for doing in [Doing(manager.cleanup) for manager in managers]:
        doing.outcome()
    assert [manager.report.total_deleted for manager in managers] == [20, 20]
    found = [told(manager.report.dependents).get("children", []) for manager in managers]
    assert sorted(found[0] + found[1]) == list(numbers)
    scene.assert_left()


@servers
def test_a_child_that_comes_back_each_time_is_given_up_at_last(database):
    """Looking again has an end."""
    metadata, parents, children, _grand = family("NO ACTION")
    scene = Scene(database, metadata)
    scene.tracker = scene.ours((parents, [{"id": 2}]))
    scene.application((children, [{"id": 7, "parent_id": 2}]))
    times = []
    manager = manager_of(scene)

    @sa.event.listens_for(scene.engine, "before_cursor_execute")
    def again(connection, cursor, statement, *_):
        if statement.startswith("DELETE") and "parents" in statement:
            times.append(statement)
            assert len(times) < 100
            # In the very transaction, as a trigger would.
            connection.connection.cursor().execute(
                f"INSERT INTO children (id, parent_id) VALUES ({100 + len(times)}, 2)"
            )

    assert set(left_over(manager)) == {("parents", 2)}
    sa.event.remove(scene.engine, "before_cursor_execute", again)
    assert len(times) > 2
    assert said(manager.cleanup()) == [7]
    scene.assert_left()
