"""The cases that Respawn is tested with, where rows are ours one by one and not all of a table's.

Respawn empties whole databases; here strangers' rows stand in every table, the root rows are
tracked, and the rest was written by an application.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import left_over, reference, table
from harness.loops import insert_loop
from harness.pairs import pairwise
from harness.scene import Scene, told
from harness.targets import DEFAULT, WITHOUT_FOREIGN_KEYS, on
from tidyrows import CleanupManager, Dependents, ResourceTracker

EVERYWHERE = ("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
everywhere = on(*EVERYWHERE)
servers = on("postgresql+psycopg", "mysql+pymysql")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning"
)

OURS, THEIRS = 1, 2
Graph = dict[str, list[str]]

GRAPHS: dict[str, Graph] = {
    "one table": {"a": []},
    "unrelated tables": {"a": [], "b": []},
    "one key": {"a": ["b"], "b": []},
    "a chain": {"a": ["b"], "b": ["c"], "c": []},
    "a chain with a short cut": {"a": ["b", "c"], "b": ["c"], "c": []},
    "two keys between two tables": {"a": ["b", "c", "c"], "b": ["c"], "c": []},
    "two chains": {"a": ["b"], "b": [], "c": ["d"], "d": []},
    "a circle": {"a": ["b"], "b": ["a"]},
    "a self-reference": {"a": ["a"]},
    "two self-references": {"a": ["a", "a"]},
    "a circle beside a chain": {"a": ["b"], "b": ["a"], "c": ["d"], "d": []},
    "a circle below a start": {"a": ["b"], "b": ["c"], "c": ["b"]},
    "a circle at the end": {"a": ["b"], "b": ["c"], "c": ["d"], "d": ["c"]},
    "a circle in a web": {
        "a": ["b"], "b": ["a", "c", "d"], "c": ["d"], "d": [], "e": ["a"], "f": ["b"],
    },
    "circles that share tables": {
        "a": ["b"], "b": ["c"], "c": ["d"], "d": ["b", "e"], "e": ["d", "f"], "f": ["d"],
    },
}  # fmt: skip  # a graph a line


def made(graph, backend, *, nullable, ondelete=None):
    """A table for each node; keys that would make a circle are nullable in any case."""
    metadata = sa.MetaData()
    tables = {}
    for name, targets in graph.items():
        columns = [
            reference(
                f"r{at}",
                f"{target}.id",
                nullable=nullable or target <= name,
                ondelete=ondelete,
                use_alter=target < name and backend != "sqlite",
            )
            for at, target in enumerate(targets)
        ]
        tables[name] = table(metadata, name, *columns)
    return metadata, tables


def rows_of(graph, number):
    """In each table a row that references those of the same number."""
    return {
        name: {"id": number, **{f"r{at}": number for at in range(len(targets))}}
        for name, targets in graph.items()
    }


def write(scene, tables, rows):
    with scene.outside.begin() as connection:
        insert_loop(connection, *((tables[name], [row]) for name, row in rows.items()))


def reaching(graph, root):
    """The tables that reach the root by keys."""
    found = {root}
    while more := {n for n, targets in graph.items() if found & set(targets)} - found:
        found |= more
    return found


@on(*DEFAULT)  # without foreign keys any order would do
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_every_row_tracked_goes_in_an_order_that_the_keys_allow(database, graph):
    metadata, tables = made(graph, database.backend, nullable=False)
    scene = Scene(database, metadata)
    write(scene, tables, rows_of(graph, THEIRS))
    scene.strangers()
    write(scene, tables, rows_of(graph, OURS))
    tracker = ResourceTracker(scene.engine)
    for each in tables.values():
        tracker.track_rows(each, [OURS])
    report = scene.clean(tracker)
    assert report.total_deleted == len(tables)
    assert (report.dependents, report.detached) == ({}, {})
    scene.assert_left()


@pairwise(database=EVERYWHERE, named=tuple(GRAPHS), how=["cascade", "delete"])
def test_every_row_that_leads_to_one_tracked_goes_with_it(database, named, how):
    """The application wrote all but one: they go by CASCADE, or since we are told to delete."""
    graph = GRAPHS[named]
    metadata, tables = made(
        graph, database.backend, nullable=True, ondelete="CASCADE" if how == "cascade" else None
    )
    scene = Scene(database, metadata)
    write(scene, tables, rows_of(graph, THEIRS))
    scene.strangers()
    rows = rows_of(graph, OURS)
    write(scene, tables, rows)
    root = max(tables)
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(tables[root], [OURS])
    policy = Dependents.FOLLOW_SCHEMA if how == "cascade" else Dependents.DELETE
    report = scene.clean(tracker, dependents=policy)
    gone = reaching(graph, root)
    assert told(report.dependents) == {name: [OURS] for name in gone - {root}}
    assert not report.detached
    scene.assert_left(*((tables[name], [rows[name]]) for name in rows.keys() - gone))


@everywhere
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_rows_that_may_be_without_it_are_detached_from_one_tracked(database, graph):
    metadata, tables = made(graph, database.backend, nullable=True)
    scene = Scene(database, metadata)
    write(scene, tables, rows_of(graph, THEIRS))
    scene.strangers()
    rows = rows_of(graph, OURS)
    write(scene, tables, rows)
    root = max(tables)
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(tables[root], [OURS])
    report = scene.clean(tracker)
    detached = {name for name, targets in graph.items() if root in targets and name != root}
    assert told(report.detached) == {name: [OURS] for name in detached}
    assert not report.dependents
    for name in detached:
        rows[name] |= {f"r{at}": None for at, t in enumerate(graph[name]) if t == root}
    del rows[root]
    scene.assert_left(*((tables[name], [row]) for name, row in rows.items()))


@everywhere
@pytest.mark.parametrize("tracked", [1, 50])
def test_a_hundred_parents_and_children_that_all_point_at_one(database, tracked):
    """Two tables in a circle, every row of which references the same row of the other."""
    graph = {"parents": ["children"], "children": ["parents"]}
    metadata, tables = made(graph, database.backend, nullable=True)
    scene = Scene(database, metadata)
    numbers = range(1, 101)
    write(scene, tables, rows_of(graph, 900))
    scene.strangers()
    scene.application(*((each, [{"id": n} for n in numbers]) for each in tables.values()))
    scene.run(
        "UPDATE parents SET r0 = 1 WHERE id < 900", "UPDATE children SET r0 = 2 WHERE id < 900"
    )
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(tables["parents"], list(range(2, 2 + tracked)))
    report = scene.clean(tracker)
    assert len(next(iter(report.detached.values()))) == 100
    left = [n for n in numbers if not 2 <= n < 2 + tracked]
    scene.assert_left(
        (tables["parents"], [{"id": n, "r0": 1} for n in left]),
        (tables["children"], [{"id": n} for n in numbers]),
    )


@everywhere
def test_a_list_of_a_hundred_rows_that_each_need_the_one_before(database):
    graph = {"foo": ["foo"]}
    metadata, tables = made(graph, database.backend, nullable=True, ondelete="CASCADE")
    scene = Scene(database, metadata)
    scene.strangers((tables["foo"], [{"id": 900}, {"id": 901, "r0": 900}]))
    scene.application((tables["foo"], [{"id": 1}]))
    scene.application((tables["foo"], [{"id": n, "r0": n - 1} for n in range(2, 101)]))
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(tables["foo"], [1])
    report = scene.clean(tracker)
    assert len(told(report.dependents)["foo"]) == 99
    scene.assert_left()


@everywhere
def test_a_key_that_is_the_primary_key_too(database):
    """One to one: the child's key is the parent's."""
    metadata = sa.MetaData()
    bob = table(metadata, "bob")
    foo = table(metadata, "foo", reference("bob_id", "bob.id"))
    bar = sa.Table(
        "bar",
        metadata,
        sa.Column("id", sa.ForeignKey("foo.id", name="fk_bar"), primary_key=True),
    )
    scene = Scene(database, metadata)
    scene.strangers((bob, [{"id": 900}]), (foo, [{"id": 900, "bob_id": 900}]), (bar, [{"id": 900}]))
    numbers = range(1, 21)
    tracker = scene.ours((bob, [{"id": n} for n in numbers]))
    scene.application(
        (foo, [{"id": n, "bob_id": n} for n in numbers]), (bar, [{"id": n} for n in numbers])
    )
    report = scene.clean(tracker)
    assert {name.name: len(rows) for name, rows in report.dependents.items()} == {
        "foo": 20,
        "bar": 20,
    }
    scene.assert_left()


@everywhere
def test_a_table_that_is_left_out_is_left_alone(database):
    """Where Respawn would ignore a table, ``protect=`` keeps its rows and what they need."""
    metadata = sa.MetaData()
    foo = table(metadata, "foo")
    bar = table(metadata, "bar", reference("foo_id", "foo.id", ondelete="CASCADE"))
    scene = Scene(database, metadata)
    tracker = scene.ours((foo, [{"id": n} for n in range(1, 11)]))
    kept = [{"id": n, "foo_id": n} for n in (3, 5)]
    scene.application((bar, kept))
    manager = CleanupManager(tracker, protect=["bar"])
    assert set(left_over(manager)) == {("foo", 3), ("foo", 5)}
    assert manager.report.total_deleted == 8
    scene.assert_left((foo, [{"id": 3}, {"id": 5}]), (bar, kept))


@servers
def test_a_table_of_one_schema_is_left_out_and_its_namesake_is_not(database):
    other = database.extra_schema("eggs")
    here = sa.inspect(database.engine()).default_schema_name
    metadata = sa.MetaData()
    foo = table(metadata, "foo", schema=here)
    near, far = (
        table(
            metadata,
            "bar",
            reference("foo_id", f"{here}.foo.id", ondelete="CASCADE"),
            schema=schema,
        )
        for schema in (here, other)
    )
    scene = Scene(database, metadata)
    tracker = scene.ours((foo, [{"id": 1}, {"id": 2}]))
    scene.application(
        (near, [{"id": 1, "foo_id": 1}, {"id": 2, "foo_id": 2}]), (far, [{"id": 2, "foo_id": 2}])
    )
    manager = CleanupManager(tracker, protect=[f"{other}.bar"])
    assert set(left_over(manager)) == {("foo", 2)}
    scene.assert_left(
        (foo, [{"id": 2}]), (near, [{"id": 2, "foo_id": 2}]), (far, [{"id": 2, "foo_id": 2}])
    )


@on("mysql+pymysql")
@pytest.mark.parametrize("null", ["NOT NULL", "NULL"])
def test_a_dependent_with_a_history_goes_and_its_history_stays(database, null):
    """WITH SYSTEM VERSIONING: what a DELETE leaves in the past is nobody's row now."""
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    scene = Scene(database, metadata)
    scene.run(
        f"CREATE TABLE notes (id INT PRIMARY KEY, parent_id INT {null}, note INT,"
        " FOREIGN KEY (parent_id) REFERENCES parents (id)) WITH SYSTEM VERSIONING",
        "INSERT INTO parents VALUES (1)",
        "INSERT INTO notes VALUES (1, 1, 1)",
    )
    scene.strangers()
    tracker = scene.ours((parents, [{"id": 2}]))
    scene.run("INSERT INTO notes VALUES (2, 2, 1)", "UPDATE notes SET note = 2 WHERE id = 2")
    report = scene.clean(tracker)
    if null == "NULL":
        assert told(report.detached) == {"notes": [2]}
        scene.run("DELETE FROM notes WHERE id = 2 AND parent_id IS NULL AND note = 2")
    else:
        assert told(report.dependents) == {"notes": [2]}
    scene.assert_left()


@on("postgresql+psycopg")
@pytest.mark.parametrize("always", ["ALWAYS", "BY DEFAULT"])
def test_identity_columns_count_on(database, always):
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    scene = Scene(database, metadata)
    scene.run(
        f"CREATE TABLE notes (id INT GENERATED {always} AS IDENTITY PRIMARY KEY,"
        " parent_id INT NOT NULL REFERENCES parents)"
    )
    scene.strangers()
    tracker = scene.ours((parents, [{"id": 2}]))
    scene.run("INSERT INTO notes (parent_id) VALUES (2), (2)")
    assert told(scene.clean(tracker).dependents) == {"notes": [1, 2]}
    scene.assert_left()
    with scene.outside.connect() as connection:
        count = connection.exec_driver_sql("SELECT nextval('notes_id_seq')").scalar()
    assert count == 3  # what other workers read from it must not come twice
