"""Rows that the application made and that reference ours: each goes, or is let be, as is said."""

from __future__ import annotations

import re
import uuid
from functools import partial

import pytest
import sqlalchemy as sa

from harness.blocks import INTEGER, left_over, reference, table
from harness.bystanders import snapshot
from harness.loops import insert_loop
from harness.models import (
    Currency,
    Document,
    Group,
    Order,
    OrderLine,
    Org,
    Ticket,
    User,
    user_groups,
)
from harness.pairs import pairwise
from harness.scene import Scene, told
from harness.strangers import strangers
from harness.targets import DEFAULT, WITHOUT_FOREIGN_KEYS, on
from tidyrows import (
    CleanupError,
    CleanupManager,
    Dependents,
    ResourceTracker,
    RetryPolicy,
    UnknownTableError,
)

EVERYWHERE = ("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
everywhere = on(*EVERYWHERE)
servers = on("postgresql+psycopg", "mysql+pymysql")
DEFERRING = ("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg")
ACTIONS = (None, "SET NULL", "CASCADE", "RESTRICT")
DELETED, DETACHED = "deleted", "detached"
every_key = pairwise(
    database=EVERYWHERE,
    ondelete=ACTIONS,
    nullable=[True, False],
    allowed=lambda _database, ondelete, nullable: nullable or ondelete != "SET NULL",
)


def family(**options):
    """Parents, and children by one foreign key."""
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    children = table(metadata, "children", reference("parent_id", "parents.id", **options))
    return metadata, parents, children


def numbered(*numbers, **values):
    return [{"id": number, **values} for number in numbers]


def links(*pairs, column="parent_id"):
    """Rows by id and what they reference."""
    return [{"id": number, column: parent} for number, parent in pairs]


# --- the table: one key, one row


@everywhere
@pytest.mark.parametrize(
    ("ondelete", "nullable", "fate"),
    [
        ("CASCADE", False, DELETED),
        ("CASCADE", True, DELETED),
        ("SET NULL", True, DETACHED),
        ("RESTRICT", False, DELETED),
        ("RESTRICT", True, DETACHED),
        ("NO ACTION", False, DELETED),
        ("NO ACTION", True, DETACHED),
        (None, False, DELETED),
        (None, True, DETACHED),
    ],
)
def test_the_schema_decides_what_becomes_of_a_row(database, ondelete, nullable, fate):
    metadata, parents, children = family(ondelete=ondelete, nullable=nullable)
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((children, links((2, 2), (3, 2), (4, 1))))
    report = scene.clean(tracker)
    assert report.total_deleted == 2
    assert not report.already_gone
    kept = links((4, 1))
    if fate == DELETED:
        assert told(report.dependents) == {"children": [2, 3]}
        assert not report.detached
        assert "2 deleted (not tracked)" in str(report)
    else:
        assert told(report.detached) == {"children": [2, 3]}
        assert not report.dependents
        assert "2 detached" in str(report)
        kept += links((2, None), (3, None))
    assert len(tracker) == 0
    scene.assert_left((children, kept))


@everywhere
def test_where_dependents_were_found_the_next_cleanup_looks_for_them_at_once(database):
    metadata, parents, children = family(nullable=False)
    scene = Scene(database, metadata)
    rolled_back: list[sa.Connection] = []
    sa.event.listen(scene.engine, "rollback", rolled_back.append)
    for dependents, failures in ((1, True), (1, False), (0, False), (0, False), (1, True)):
        tracker = scene.ours((parents, numbered(2)))
        scene.application((children, links((2, 2))[:dependents]))
        rolled_back.clear()
        report = scene.clean(tracker)
        assert sum(map(len, report.dependents.values())) == dependents
        assert bool(rolled_back) is failures


@on(*DEFERRING)  # the MySQL family has no SET DEFAULT
@pytest.mark.parametrize("nullable", [True, False])
def test_set_default_is_left_to_the_schema(database, nullable):
    metadata, parents, children = family(
        ondelete="SET DEFAULT", nullable=nullable, server_default="1"
    )
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    report = scene.clean(tracker)
    assert told(report.detached) == {"children": [2]}
    assert not report.dependents
    scene.assert_left((children, links((2, 1))))


@everywhere
def test_nothing_is_said_where_nothing_references_ours(database):
    metadata, parents, children = family(ondelete="CASCADE")
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)), (children, links((2, 2), (3, 1))))
    report = scene.clean(tracker)
    assert (report.total_deleted, report.dependents, report.detached) == (3, {}, {})
    assert not report.retries
    scene.assert_left()


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_tracked_rows_are_counted_as_tracked_and_others_as_others(database, ondelete):
    """Also where a CASCADE would take both at once."""
    metadata, parents, children = family(ondelete=ondelete)
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2, 3)), (children, links((2, 2), (3, 2))))
    scene.application((children, links((4, 2), (5, 3))))
    report = scene.clean(tracker)
    assert {name.name: count for name, count in report.deleted.items()} == {
        "parents": 2,
        "children": 2,
    }
    assert told(report.dependents) == {"children": [4, 5]}
    assert not report.already_gone
    scene.assert_left()


@everywhere
def test_rows_are_treated_so_whichever_way_ours_came_to_be_known(database):
    metadata, parents, children = family()
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)))
    scene.application((parents, numbered(2)), (children, links((2, 2))))
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(parents, [2])
    assert told(scene.clean(tracker).dependents) == {"children": [2]}
    scene.assert_left()


@everywhere
def test_a_second_cleanup_has_nothing_to_say(database):
    metadata, parents, children = family()
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    manager = CleanupManager(tracker)
    manager.cleanup()
    report = manager.cleanup()
    assert (report.total_deleted, report.dependents) == (0, {})
    scene.assert_left()


# --- chains and trees


@everywhere
def test_a_chain_of_mixed_keys_goes_as_far_as_the_schema_says(database):
    metadata = sa.MetaData()
    a = table(metadata, "a")
    b = table(metadata, "b", reference("a_id", "a.id"))
    c = table(metadata, "c", reference("b_id", "b.id", nullable=True, ondelete="CASCADE"))
    d = table(metadata, "d", reference("c_id", "c.id", ondelete="RESTRICT"))
    e = table(metadata, "e", reference("d_id", "d.id", nullable=True))
    f = table(metadata, "f", reference("e_id", "e.id"))
    g = table(metadata, "g", reference("c_id", "c.id", nullable=True, ondelete="SET NULL"))
    scene = Scene(database, metadata)
    chain = (
        (a, "a"), (b, "a_id"), (c, "b_id"), (d, "c_id"), (e, "d_id"), (f, "e_id"), (g, "c_id"),
    )  # fmt: skip  # in one look
    scene.strangers((a, numbered(1)), *((t, links((1, 1), column=name)) for t, name in chain[1:]))
    tracker = scene.ours((a, numbered(2)))
    scene.application(*((t, links((2, 2), (3, 2), column=name)) for t, name in chain[1:]))
    report = scene.clean(tracker)
    assert told(report.dependents) == {"b": [2, 3], "c": [2, 3], "d": [2, 3]}
    assert told(report.detached) == {"e": [2, 3], "g": [2, 3]}
    scene.assert_left(
        (e, links((2, None), (3, None), column="d_id")),
        (f, links((2, 2), (3, 2), column="e_id")),
        (g, links((2, None), (3, None), column="c_id")),
    )


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE", "RESTRICT"])
def test_an_untracked_tree_below_a_tracked_root_goes_where_it_cannot_be_alone(database, ondelete):
    metadata = sa.MetaData()
    nodes = table(metadata, "nodes", reference("parent_id", "nodes.id", ondelete=ondelete))
    scene = Scene(database, metadata)
    scene.strangers((nodes, links((900, 900), (901, 900))))
    tracker = scene.ours((nodes, links((50, 901))))
    # Keys run against the tree.
    below = links((40, 50), (60, 40), (30, 60), (20, 30), (70, 50), (10, 20))
    scene.application((nodes, below))
    report = scene.clean(tracker)
    assert report.total_deleted == 1
    assert told(report.dependents) == {"nodes": [10, 20, 30, 40, 60, 70]}
    assert not report.already_gone
    scene.assert_left()


@everywhere
@pytest.mark.parametrize("ondelete", [None, "SET NULL", "RESTRICT"])
def test_only_the_first_row_of_a_chain_that_can_be_alone_is_detached(database, ondelete):
    metadata = sa.MetaData()
    nodes = table(
        metadata, "nodes", reference("parent_id", "nodes.id", nullable=True, ondelete=ondelete)
    )
    scene = Scene(database, metadata)
    scene.strangers((nodes, links((900, None), (901, 900))))
    tracker = scene.ours((nodes, links((50, 901), (51, 50))))
    scene.application((nodes, links((40, 51), (60, 40), (30, 60), (70, 50))))
    report = scene.clean(tracker)
    assert told(report.detached) == {"nodes": [40, 70]}
    scene.assert_left((nodes, links((40, None), (60, 40), (30, 60), (70, None))))


@everywhere
def test_a_cascading_chain_of_five_hundred_untracked_rows_goes_and_is_counted(database):
    metadata = sa.MetaData()
    nodes = table(
        metadata, "nodes", reference("parent_id", "nodes.id", nullable=True, ondelete="CASCADE")
    )
    scene = Scene(database, metadata)
    scene.strangers((nodes, links((900, None), (901, 900))))
    tracker = scene.ours((nodes, links((1, None))))
    scene.application((nodes, links(*((n + 1, n) for n in range(1, 500)))))
    report = scene.clean(tracker)
    assert told(report.dependents) == {"nodes": sorted(range(2, 501), key=repr)}
    scene.assert_left()


# --- circles


@everywhere
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_untracked_rows_in_a_circle_of_tables_go_or_are_detached(database):
    metadata = sa.MetaData()
    alter = database.backend != "sqlite"
    teams = table(
        metadata, "teams", reference("captain_id", "players.id", nullable=True, use_alter=alter)
    )
    players = table(metadata, "players", reference("team_id", "teams.id"))
    scene = Scene(database, metadata)
    scene.strangers((teams, numbered(1)), (players, links((1, 1), column="team_id")))
    tracker = scene.ours((teams, numbered(2)))
    scene.application(
        (players, links((2, 2), (3, 2), column="team_id")),
        (teams, [{"id": 4, "captain_id": 3}]),
        (players, links((5, 4), column="team_id")),
    )
    scene.run("UPDATE teams SET captain_id = 2 WHERE id = 2")  # and now a circle of rows
    report = scene.clean(tracker)
    assert report.total_deleted + sum(map(len, report.dependents.values())) == 3
    assert told(report.dependents) == {"players": [2, 3]}
    assert told(report.detached) == {"teams": [4]}
    scene.assert_left((teams, numbered(4)), (players, links((5, 4), column="team_id")))


@pairwise(database=EVERYWHERE, ondelete=[None, "CASCADE"], size=[2, 3])
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_a_not_null_circle_of_which_one_row_is_tracked_goes_whole(database, size, ondelete):
    metadata = sa.MetaData()
    ring = [
        table(
            metadata,
            f"a{number}",
            reference(
                "next_id",
                f"a{(number + 1) % size}.id",
                ondelete=ondelete,
                use_alter=number == size - 1 and database.backend != "sqlite",
            ),
        )
        for number in range(size)
    ]
    scene = Scene(database, metadata)

    def circle(*ids):
        with scene.outside.begin() as connection:
            insert_loop(
                connection,
                *((each, links(*((n, n) for n in ids), column="next_id")) for each in ring),
            )

    circle(1)
    scene.strangers()
    circle(2, 3)
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(ring[0], [2, 3])
    report = scene.clean(tracker, allow_foreign_keys_off=database.backend == "mysql")
    assert report.total_deleted == 2
    assert told(report.dependents) == {f"a{number}": [2, 3] for number in range(1, size)}
    scene.assert_left()


# --- several columns, several keys


def composite(first, second, **options):
    metadata = sa.MetaData()
    parents = sa.Table(
        "parents",
        metadata,
        sa.Column("x", sa.Integer, **INTEGER),
        sa.Column("y", sa.Integer, **INTEGER),
    )
    children = table(
        metadata,
        "children",
        sa.Column("py", sa.Integer, nullable=second),
        sa.Column("px", sa.Integer, nullable=first),
        sa.ForeignKeyConstraint(["px", "py"], ["parents.x", "parents.y"], name="fk_c", **options),
    )
    return metadata, parents, children


@everywhere
@pytest.mark.parametrize("nullable", [(True, True), (False, True), (True, False), (False, False)])
def test_a_composite_key_is_detached_by_the_columns_that_can_be_null(database, nullable):
    metadata, parents, children = composite(*nullable)
    scene = Scene(database, metadata)
    scene.strangers(
        (parents, [{"x": 1, "y": 1}, {"x": 1, "y": 2}, {"x": 2, "y": 2}]),
        (children, [{"id": 1, "px": 1, "py": 1}, {"id": 2, "px": 2, "py": 2}]),
    )
    tracker = scene.ours((parents, [{"x": 2, "y": 1}, {"x": 3, "y": 1}]))
    scene.application((
        children,
        [{"id": 3, "px": 2, "py": 1}, {"id": 4, "px": 3, "py": 1}, {"id": 5, "px": 1, "py": 1}],
    ))  # fmt: skip  # a batch in one look
    report = scene.clean(tracker)
    kept = [{"id": 5, "px": 1, "py": 1}]
    if nullable == (False, False):
        assert told(report.dependents) == {"children": [3, 4]}
    else:
        assert told(report.detached) == {"children": [3, 4]}
        x, y = nullable
        kept += [
            {"id": 3, "px": None if x else 2, "py": None if y else 1},
            {"id": 4, "px": None if x else 3, "py": None if y else 1},
        ]
    scene.assert_left((children, kept))


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_a_row_with_half_a_composite_key_references_nothing(database, ondelete):
    metadata, parents, children = composite(first=True, second=True, ondelete=ondelete)
    scene = Scene(database, metadata)
    scene.strangers((parents, [{"x": 1, "y": 1}]))
    tracker = scene.ours((parents, [{"x": 2, "y": 1}]))
    halves = [{"id": 3, "px": 2}, {"id": 4, "py": 1}, {"id": 5}]
    scene.application((children, halves))
    report = scene.clean(tracker)
    assert (report.dependents, report.detached) == ({}, {})
    scene.assert_left((children, halves))


@everywhere
def test_a_column_that_another_key_needs_is_not_detached_with_it(database):
    """The tenant's id belongs to two composite keys: only one of them leads to our row."""
    metadata = sa.MetaData()
    pair = [("users", "user_id"), ("places", "place_id")]
    users, places = (
        sa.Table(
            name,
            metadata,
            sa.Column("tenant", sa.Integer, **INTEGER),
            sa.Column("id", sa.Integer, **INTEGER),
        )
        for name, _column in pair
    )
    visits = table(
        metadata,
        "visits",
        sa.Column("tenant", sa.Integer),
        sa.Column("user_id", sa.Integer),
        sa.Column("place_id", sa.Integer),
        *(
            sa.ForeignKeyConstraint(
                ["tenant", column], [f"{name}.tenant", f"{name}.id"], name=f"fk_v_{name}"
            )
            for name, column in pair
        ),
    )
    scene = Scene(database, metadata)
    scene.strangers((users, [{"tenant": 1, "id": 1}]), (places, [{"tenant": 1, "id": 1}]))
    tracker = scene.ours((users, [{"tenant": 1, "id": 2}]))
    scene.application((visits, [{"id": 1, "tenant": 1, "user_id": 2, "place_id": 1}]))
    assert told(scene.clean(tracker).detached) == {"visits": [1]}
    scene.assert_left((visits, [{"id": 1, "tenant": 1, "place_id": 1}]))


def four_keys():
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    children = table(
        metadata,
        "children",
        reference("taken", "parents.id", nullable=True, ondelete="CASCADE"),
        reference("nulled", "parents.id", nullable=True, ondelete="SET NULL"),
        reference("free", "parents.id", nullable=True),
        reference("bound", "parents.id"),
    )
    return metadata, parents, children


@everywhere
def test_each_of_several_keys_between_two_tables_is_followed(database):
    metadata, parents, children = four_keys()
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, [{"id": 1, "bound": 1, "free": 1}]))
    tracker = scene.ours((parents, numbered(2, 3)))
    made = [
        {"id": 2, "bound": 1, "taken": 2},
        {"id": 3, "bound": 1, "nulled": 2},
        {"id": 4, "bound": 1, "free": 2},
        {"id": 5, "bound": 2},
        {"id": 6, "bound": 1, "nulled": 2, "free": 3},
        {"id": 7, "bound": 1, "nulled": 1, "free": 3},
    ]
    scene.application((children, made))
    report = scene.clean(tracker)
    assert told(report.dependents) == {"children": [2, 5]}
    assert told(report.detached) == {"children": [3, 4, 6, 7]}
    left = [{"id": number, "bound": 1} for number in (3, 4, 6)]
    scene.assert_left((children, [*left, {"id": 7, "bound": 1, "nulled": 1}]))


@everywhere
def test_a_row_that_one_key_deletes_and_another_detaches_is_deleted(database):
    metadata, parents, children = four_keys()
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)))
    tracker = scene.ours((parents, numbered(2, 3)))
    made = [
        {"id": 2, "bound": 1, "taken": 2, "nulled": 3},
        {"id": 3, "bound": 1, "taken": 3, "free": 2},
        {"id": 4, "bound": 2, "nulled": 3, "free": 2},
        {"id": 5, "bound": 2, "nulled": 2, "free": 2, "taken": 2},
        {"id": 6, "bound": 3, "nulled": 1, "free": 1, "taken": 1},
    ]
    scene.application((children, made))
    report = scene.clean(tracker)
    assert told(report.dependents) == {"children": [2, 3, 4, 5, 6]}
    assert not report.detached
    scene.assert_left()


@pairwise(database=EVERYWHERE, ondelete=[None, "CASCADE", "SET NULL"], in_model=[True, False])
def test_a_key_that_references_another_unique_key_is_followed(database, ondelete, in_model):
    metadata = sa.MetaData()
    parents = table(metadata, "parents", sa.Column("code", sa.String(10), unique=True))
    children = table(
        metadata,
        "children",
        sa.Column(
            "code", sa.ForeignKey("parents.code", name="fk_code", ondelete=ondelete)
        ),
    )  # fmt: skip  # a column in one look
    scene = Scene(database, metadata)
    scene.strangers((parents, [{"id": 2, "code": "A"}, {"id": 3}]), (children, [{"id": 1}]))
    scene.strangers((children, [{"id": 2, "code": "A"}]))
    scene.application((parents, [{"id": 1, "code": "B"}, {"id": 4}, {"id": 5, "code": "C"}]))
    scene.application((children, [{"id": 3, "code": "B"}, {"id": 4}]))
    tracker = ResourceTracker(scene.engine)
    tracker.track_rows(parents if in_model else table(sa.MetaData(), "parents"), [1, 4, 5])
    report = scene.clean(tracker)
    if ondelete == "CASCADE":
        assert told(report.dependents) == {"children": [3]}
        scene.assert_left((children, [{"id": 4}]))
    else:
        assert told(report.detached) == {"children": [3]}
        scene.assert_left((children, [{"id": 3}, {"id": 4}]))


@everywhere
def test_a_key_to_a_unique_pair_of_columns_is_followed(database):
    metadata = sa.MetaData()
    parents = table(
        metadata,
        "parents",
        sa.Column("shop", sa.Integer),
        sa.Column("number", sa.Integer),
        sa.UniqueConstraint("shop", "number", name="uq_shop"),
    )
    children = table(
        metadata,
        "children",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("shop", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(
            ["shop", "number"], ["parents.shop", "parents.number"], name="fk_shop"
        ),
    )
    scene = Scene(database, metadata)
    scene.strangers(
        (parents, [{"id": 1, "shop": 1, "number": 2}]),
        (children, [{"id": 1, "shop": 1, "number": 2}]),
    )
    tracker = scene.ours((parents, [{"id": 2, "shop": 2, "number": 1}, {"id": 3, "shop": 1}]))
    scene.application((children, [{"id": 2, "shop": 2, "number": 1}]))
    assert told(scene.clean(tracker).dependents) == {"children": [2]}
    scene.assert_left()


# --- tables that no model knows, elsewhere, and with awkward names


@everywhere
@pytest.mark.parametrize("null", ["NULL", "NOT NULL"])
def test_a_table_that_only_the_database_knows_is_followed(database, null):
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    scene = Scene(database, metadata)
    scene.run(
        f"CREATE TABLE unknown (a INTEGER NOT NULL, b INTEGER NOT NULL, parent_id INTEGER {null},"
        " PRIMARY KEY (b, a), FOREIGN KEY (parent_id) REFERENCES parents (id))",
        "INSERT INTO parents VALUES (1)",
        "INSERT INTO unknown VALUES (1, 1, 1)",
    )
    scene.strangers()
    tracker = scene.ours((parents, numbered(2)))
    scene.run("INSERT INTO unknown VALUES (1, 2, 2), (2, 1, 2)")
    report = scene.clean(tracker)
    if null == "NULL":
        assert told(report.detached) == {"unknown": [(1, 2), (2, 1)]}
        (full,) = (name for name in snapshot(scene.outside) if name.endswith(".unknown"))
        assert snapshot(scene.outside)[full] == [(1, 1, 1), (1, 2, None), (2, 1, None)]
    else:
        assert told(report.dependents) == {"unknown": [(1, 2), (2, 1)]}
        scene.assert_left()


@servers
@pytest.mark.parametrize("modelled", [True, False], ids=["modelled", "only in the database"])
def test_rows_in_another_schema_are_followed(database, modelled):
    other = database.extra_schema()
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    here = sa.inspect(database.engine()).default_schema_name
    theirs = sa.MetaData()
    whole = table(theirs, "parents", schema=here)
    children = table(theirs, "children", reference("parent_id", f"{here}.parents.id"), schema=other)
    free = table(
        theirs, "parents", reference("child_id", f"{other}.children.id", nullable=True),
        schema=other,
    )  # fmt: skip  # a table in one look; its name is the other's too
    theirs.create_all(database.engine())
    scene = Scene(database)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    scene.strangers((free, links((1, 1), (2, None), column="child_id")))
    tracker = scene.ours((whole if modelled else parents, numbered(2)))
    scene.application((children, links((2, 2), (3, 1))), (free, links((3, 2), column="child_id")))
    report = scene.clean(tracker)
    assert {(n.schema, n.name) for n in report.dependents} == {(other, "children")}
    assert {(n.schema, n.name) for n in report.detached} == {(other, "parents")}
    assert told(report.dependents) == {"children": [2]}
    assert told(report.detached) == {"parents": [3]}
    scene.assert_left((children, links((3, 1))), (free, [{"id": 3}]))


@everywhere
@pytest.mark.parametrize("fate", [DELETED, DETACHED])
def test_names_that_need_quoting_are_quoted(database, fate):
    metadata = sa.MetaData()
    parents = sa.Table(
        'Order "x" 100% a.b',
        metadata,
        sa.Column("per%cent (key)", sa.Integer, **INTEGER),
    )
    children = sa.Table(
        "it's :group `y`",
        metadata,
        sa.Column("Select", sa.Integer, **INTEGER),
        sa.Column("two words", sa.Integer, **INTEGER),
        sa.Column("a.b %s", sa.Integer, nullable=fate == DETACHED),
        sa.ForeignKeyConstraint(
            ["a.b %s"], [parents.c["per%cent (key)"]], name="fk 100% :x"
        ),
    )  # fmt: skip  # a key in one look
    scene = Scene(database, metadata)

    def child(first, second, parent):
        return {"Select": first, "two words": second, "a.b %s": parent}

    scene.strangers((parents, [{"per%cent (key)": 1}]), (children, [child(1, 1, 1)]))
    tracker = scene.ours((parents, [{"per%cent (key)": 2}]))
    scene.application((children, [child(1, 2, 2), child(2, 1, 1)]))
    report = scene.clean(tracker)
    if fate == DELETED:
        assert told(report.dependents) == {children.name: [(1, 2)]}
        scene.assert_left((children, [child(2, 1, 1)]))
    else:
        assert told(report.detached) == {children.name: [(1, 2)]}
        scene.assert_left((children, [child(2, 1, 1), child(1, 2, None)]))


@pairwise(
    database=DEFERRING,
    initially=["IMMEDIATE", "DEFERRED"],
    key=[(True, None, DETACHED), (False, None, DELETED), (False, "CASCADE", DELETED)],
)
def test_a_deferrable_key_is_followed_and_not_left_to_the_commit(database, initially, key):
    nullable, ondelete, fate = key
    metadata, parents, children = family(
        deferrable=True, initially=initially, nullable=nullable, ondelete=ondelete
    )
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    report = scene.clean(tracker)
    if fate == DELETED:
        assert told(report.dependents) == {"children": [2]}
        scene.assert_left()
    else:
        assert told(report.detached) == {"children": [2]}
        scene.assert_left((children, links((2, None))))


# --- tables without a primary key


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_rows_without_a_name_are_deleted_by_what_they_reference_and_counted(database, ondelete):
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    notes = sa.Table(
        "notes", metadata, reference("parent_id", "parents.id", ondelete=ondelete),
        sa.Column("text", sa.String(10)),
    )  # fmt: skip  # a table in one look
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (notes, [{"parent_id": 1, "text": "same"}] * 2))
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((notes, [{"parent_id": 2, "text": "same"}] * 3))
    report = scene.clean(tracker)
    assert told(report.dependents) == {"notes": [None, None, None]}
    assert report.total_deleted == 2
    scene.assert_left()


@everywhere
@pytest.mark.parametrize("ondelete", [None, "SET NULL"])
def test_rows_without_a_name_are_detached_and_counted(database, ondelete):
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    notes = sa.Table(
        "notes", metadata, reference("parent_id", "parents.id", nullable=True, ondelete=ondelete),
        sa.Column("text", sa.String(10)),
    )  # fmt: skip  # a table in one look
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (notes, [{"parent_id": 1, "text": "same"}, {}]))
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((notes, [{"parent_id": 2, "text": "same"}] * 3))
    report = scene.clean(tracker)
    assert told(report.detached) == {"notes": [None, None, None]}
    scene.assert_left((notes, [{"text": "same"}] * 3))


# --- own= and protect=


@pairwise(database=EVERYWHERE, ondelete=ACTIONS, named=["table", "name", "qualified name", "class"])
def test_rows_of_own_tables_are_deleted_whatever_the_key(database, ondelete, named):
    metadata, parents, children = family(nullable=True, ondelete=ondelete)
    grand = table(metadata, "grand", reference("child_id", "children.id"))
    free = table(metadata, "free", reference("parent_id", "parents.id", nullable=True))
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1), (9, None))))
    tracker = scene.ours((parents, numbered(2)))
    scene.application(
        (children, links((2, 2), (3, 1))),
        (grand, links((1, 2), column="child_id")),
        (free, links((1, 2))),
    )
    registry = sa.orm.registry()
    child_class = type("Child", (), {})
    registry.map_imperatively(child_class, children)
    own = {
        "table": children,
        "name": "children",
        "qualified name": f"{sa.inspect(scene.engine).default_schema_name}.children",
        "class": child_class,
    }[named]
    report = scene.clean(tracker, own=[own])
    registry.dispose()
    assert told(report.dependents) == {"children": [2], "grand": [1]}
    assert told(report.detached) == {"free": [1]}
    scene.assert_left((children, links((3, 1))), (free, links((1, None))))


@every_key
def test_rows_of_protected_tables_keep_what_they_need(database, ondelete, nullable):
    metadata = sa.MetaData()
    orgs = table(metadata, "orgs")
    parents = table(metadata, "parents", reference("org_id", "orgs.id"))
    settings = table(
        metadata, "settings", reference("parent_id", "parents.id", nullable=nullable,
                                        ondelete=ondelete)
    )  # fmt: skip  # a table in one look
    others = table(metadata, "others", reference("parent_id", "parents.id"))
    scene = Scene(database, metadata)
    scene.strangers((orgs, numbered(1)), (parents, links((1, 1), column="org_id")))
    tracker = scene.ours(
        (orgs, numbered(2, 3)), (parents, links((2, 2), (3, 3), (4, 2), column="org_id"))
    )
    scene.application((settings, links((7, 2))), (others, links((2, 2), (3, 3), (4, 4))))
    manager = CleanupManager(tracker, protect=[settings])
    left = left_over(manager)
    assert set(left) == {("parents", 2), ("orgs", 2)}
    assert re.search(r"settings\(7\).*protect", left["parents", 2])
    assert re.search(r"parents\(2\)|settings\(7\)", left["orgs", 2])
    assert told(manager.report.dependents) == {"others": [3, 4]}
    assert not manager.report.detached
    assert manager.report.total_deleted == 3
    assert {row.table.name for row in tracker.rows()} == {"parents", "orgs"}
    kept = (
        (orgs, numbered(2)),
        (parents, links((2, 2), column="org_id")),
        (settings, links((7, 2))),
        (others, links((2, 2))),  # what references a row that stays is no dependent
    )
    scene.assert_left(*kept)
    scene.run("DELETE FROM settings")
    assert manager.cleanup().total_deleted == 2
    scene.assert_left()


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_a_protected_row_keeps_the_dependents_that_it_needs(database, ondelete):
    metadata = sa.MetaData()
    a = table(metadata, "a")
    b = table(metadata, "b", reference("a_id", "a.id", ondelete=ondelete))
    c = table(metadata, "c", reference("b_id", "b.id", ondelete=ondelete))
    d = table(metadata, "d", reference("a_id", "a.id"), reference("b_id", "b.id"))
    scene = Scene(database, metadata)
    scene.strangers((a, numbered(1)), (b, links((1, 1), column="a_id")))
    tracker = scene.ours((a, numbered(2, 3)))
    made = (
        (b, links((2, 2), column="a_id")),
        (c, links((2, 2), column="b_id")),
    )
    scene.application(*made, (b, links((3, 3), column="a_id")), (c, links((3, 3), column="b_id")))
    scene.application((d, [{"id": 1, "a_id": 3, "b_id": 1}]))
    with scene.outside.begin() as connection:
        connection.execute(sa.delete(c).where(c.c.id == 3))
    left = left_over(CleanupManager(tracker, protect=["c"]))
    assert set(left) == {("a", 2)}
    assert "c(2)" in left["a", 2] or "b(2)" in left["a", 2]
    scene.assert_left((a, numbered(2)), *made)


@everywhere
def test_a_row_in_own_that_a_protected_row_needs_stays(database):
    metadata, parents, children = family(nullable=True)
    locks = table(metadata, "locks", reference("child_id", "children.id", ondelete="CASCADE"))
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((children, links((2, 2), (3, 3))), (locks, links((2, 2), column="child_id")))
    manager = CleanupManager(tracker, own=[children], protect=[locks])
    assert set(left_over(manager)) == {("parents", 2)}
    assert told(manager.report.dependents) == {"children": [3]}
    scene.assert_left(
        (parents, numbered(2)),
        (children, links((2, 2))),
        (locks, links((2, 2), column="child_id")),
    )


# --- the other policies


@everywhere
@pytest.mark.parametrize("ondelete", [None, "SET NULL", "CASCADE", "RESTRICT"])
def test_delete_takes_every_row_that_references_ours(database, ondelete):
    metadata, parents, children = family(nullable=True, ondelete=ondelete)
    grand = table(
        metadata, "grand", reference("child_id", "children.id", nullable=True, ondelete=ondelete)
    )
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)))
    scene.application(
        (children, links((2, 2), (3, None), (4, 1))),
        (grand, links((1, 2), (2, 3), column="child_id")),
    )
    report = scene.clean(tracker, dependents=Dependents.DELETE)
    assert told(report.dependents) == {"children": [2], "grand": [1]}
    assert not report.detached
    scene.assert_left(
        (children, links((3, None), (4, 1))), (grand, links((2, 3), column="child_id"))
    )


@every_key
def test_error_lists_dependents_and_harms_nobody(database, ondelete, nullable):
    metadata = sa.MetaData()
    orgs = table(metadata, "orgs")
    parents = table(metadata, "parents", reference("org_id", "orgs.id"))
    children = table(
        metadata, "children", reference("parent_id", "parents.id", nullable=nullable,
                                        ondelete=ondelete)
    )  # fmt: skip  # a table in one look
    scene = Scene(database, metadata)
    scene.strangers((orgs, numbered(1)), (parents, links((1, 1), column="org_id")))
    tracker = scene.ours(
        (orgs, numbered(2, 3)),
        (parents, links((2, 2), (3, 3), (4, 2), column="org_id")),
        (children, links((10, 2), (11, 4))),
    )
    scene.application((children, links((7, 2), (8, 2))))
    manager = CleanupManager(tracker, dependents=Dependents.ERROR)
    left = left_over(manager)
    assert {("parents", 2), ("orgs", 2)} <= set(left) <= {
        ("parents", 2), ("orgs", 2), ("children", 10),
    }  # fmt: skip  # what must, and what may
    assert re.search(r"children\((7|8)\)", left["parents", 2])
    assert not manager.report.dependents
    assert not manager.report.detached
    kept = [(orgs, numbered(2)), (parents, links((2, 2), column="org_id"))]
    scene.assert_left(*kept, (children, links((7, 2), (8, 2))))
    report = scene.clean(tracker)
    assert told(report.detached if nullable and ondelete != "CASCADE" else report.dependents) == {
        "children": [7, 8]
    }


@everywhere
def test_error_is_no_error_where_there_is_nothing(database):
    metadata, parents, children = family(ondelete="CASCADE")
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)), (children, links((2, 2))))
    assert scene.clean(tracker, dependents=Dependents.ERROR).total_deleted == 2
    scene.assert_left()


# --- rows of another tracker


@everywhere
@pytest.mark.parametrize(
    ("ondelete", "nullable"),
    [(None, False), ("CASCADE", False), (None, True), ("SET NULL", True), ("CASCADE", True)],
)
def test_a_row_that_another_tracker_holds_keeps_ours_until_it_has_cleaned(
    database, ondelete, nullable
):
    metadata, parents, children = family(ondelete=ondelete, nullable=nullable)
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    first = scene.ours((parents, numbered(2, 3)))
    second = scene.ours((children, links((2, 2), (4, 1))))
    scene.application((children, links((3, 3))))
    manager = CleanupManager(first)
    report = manager.cleanup()
    (held,) = report.held
    assert (held.row.table.name, held.row.key) == ("parents", (2,))
    assert second.context.tag in held.by
    assert not report.leftovers
    assert report.total_deleted == 1
    assert [row.key for row in first.rows()] == [(2,)]
    assert "1 held" in str(report)
    scene.clean(second)
    report = manager.cleanup()
    assert (report.total_deleted, report.held) == (1, ())
    detached = nullable and ondelete != "CASCADE"
    scene.assert_left((children, links((3, None)) if detached else []))


@everywhere
def test_a_row_of_another_tracker_holds_ours_through_untracked_rows_too(database):
    metadata = sa.MetaData()
    a = table(metadata, "a")
    b = table(metadata, "b", reference("a_id", "a.id"))
    c = table(metadata, "c", reference("b_id", "b.id", ondelete="CASCADE"))
    scene = Scene(database, metadata)
    first = scene.ours((a, numbered(2, 3)))
    scene.application((b, links((2, 2), (3, 3), column="a_id")))
    second = scene.ours((c, links((2, 2), column="b_id")))
    manager = CleanupManager(first)
    report = manager.cleanup()
    assert [held.row.key for held in report.held] == [(2,)]
    assert told(report.dependents) == {"b": [3]}
    scene.clean(second)
    assert told(manager.cleanup().dependents) == {"b": [2]}
    scene.assert_left()


@everywhere
def test_what_another_tracker_has_cleaned_is_nobodys_claim(database):
    metadata, parents, children = family()
    scene = Scene(database, metadata)
    first = scene.ours((parents, numbered(2)))
    second = scene.ours((children, links((2, 2))))
    scene.clean(second)
    scene.application((children, links((5, 2))))
    report = scene.clean(first)
    assert (told(report.dependents), report.held) == ({"children": [5]}, ())
    scene.assert_left()


# --- rows that will not go


def veto(scene, *, loud):
    """A trigger on children: rows with an even key do not go."""
    backend = scene.database.backend
    if backend == "postgresql":
        answer = "RAISE EXCEPTION 'vetoed';" if loud else "RETURN NULL;"
        scene.run(
            "CREATE FUNCTION veto() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF OLD.id %% 2 = 0 THEN {answer} END IF; RETURN OLD; END $$",
            "CREATE TRIGGER veto BEFORE DELETE ON children FOR EACH ROW EXECUTE FUNCTION veto()",
        )
    elif backend == "sqlite":
        answer = "RAISE(ABORT, 'vetoed')" if loud else "RAISE(IGNORE)"
        scene.run(
            "CREATE TRIGGER veto BEFORE DELETE ON children WHEN OLD.id % 2 = 0"
            f" BEGIN SELECT {answer}; END"
        )
    else:
        scene.run(
            "CREATE TRIGGER veto BEFORE DELETE ON children FOR EACH ROW BEGIN NOT ATOMIC"
            " IF OLD.id %% 2 = 0 THEN"
            " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'vetoed'; END IF; END"
        )


@pairwise(
    database=EVERYWHERE,
    ondelete=[None, "CASCADE"],
    loud=[True, False],
    keyed=[True, False],
    # MariaDB's triggers cannot veto in silence, and a CASCADE does not fire them.
    allowed=lambda target, ondelete, loud, _keyed: (
        not target.startswith("mysql") or (loud and not ondelete)
    ),
)
def test_a_dependent_that_a_trigger_keeps_keeps_ours(database, ondelete, loud, keyed):
    metadata = sa.MetaData()
    orgs = table(metadata, "orgs")
    parents = table(metadata, "parents", reference("org_id", "orgs.id"))
    children = sa.Table(
        "children",
        metadata,
        sa.Column("id", sa.Integer, primary_key=keyed, autoincrement=False),
        reference("parent_id", "parents.id", ondelete=ondelete),
    )
    scene = Scene(database, metadata)
    scene.strangers((orgs, numbered(1)), (parents, links((1, 1), column="org_id")))
    scene.strangers((children, links((8, 1))))
    tracker = scene.ours((orgs, numbered(2, 3)), (parents, links((2, 2), (3, 3), column="org_id")))
    scene.application((children, links((2, 2), (3, 3))))
    veto(scene, loud=loud)
    manager = CleanupManager(tracker)
    left = left_over(manager)
    assert set(left) == {("parents", 2), ("orgs", 2)}
    assert told(manager.report.dependents) == {"children": [3] if keyed else [None]}
    scene.assert_left(
        (orgs, numbered(2)), (parents, links((2, 2), column="org_id")), (children, links((2, 2)))
    )


@everywhere
def test_a_row_that_may_not_be_detached_keeps_ours_and_the_others_go(database):
    """The column can be NULL, but a CHECK says that it must not."""
    metadata = sa.MetaData()
    parents = table(metadata, "parents")
    children = table(
        metadata,
        "children",
        reference("parent_id", "parents.id", nullable=True),
        sa.Column("strict", sa.Integer),
        sa.CheckConstraint("strict = 0 OR parent_id IS NOT NULL", name="ck_strict"),
    )
    more = table(metadata, "more", reference("parent_id", "parents.id"))
    scene = Scene(database, metadata)
    scene.strangers((parents, numbered(1)))
    tracker = scene.ours((parents, numbered(*range(2, 12))))
    strict = {"id": 5, "parent_id": 5, "strict": 1}
    scene.application(
        (children, [strict, {"id": 6, "parent_id": 6, "strict": 0}]),
        (more, links((1, 5), (2, 7))),
    )
    manager = CleanupManager(tracker)
    left = left_over(manager)
    assert set(left) == {("parents", 5)}
    assert "ck_strict" in left["parents", 5] or "children" in left["parents", 5]
    assert told(manager.report.detached) == {"children": [6]}
    assert told(manager.report.dependents) == {"more": [2]}
    scene.assert_left(
        (parents, numbered(5)),
        (children, [strict, {"id": 6, "strict": 0}]),
        (more, links((1, 5))),
    )


@pytest.fixture
def few_rights(database):
    """Log in as a role that has been granted this and no more."""
    owner, role = database.engine(), f"few_{uuid.uuid4().hex[:8]}"
    with owner.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")

    def log_in(*grants):
        with owner.begin() as connection:
            for grant in grants:
                connection.exec_driver_sql(f"GRANT {grant} TO {role}")
        engines.append(sa.create_engine(database.url.set(username=role)))
        return engines[-1]

    engines = []
    yield log_in
    for engine in engines:
        engine.dispose()
    with owner.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


@on("postgresql+psycopg")
@pytest.mark.parametrize("ondelete", [None, "CASCADE", "SET NULL"])
def test_a_role_with_few_rights_finds_and_deletes_all_the_same(database, few_rights, ondelete):
    metadata, parents, children = family(ondelete=ondelete, nullable=ondelete == "SET NULL")
    scene = Scene(database, metadata)
    scene.engine = few_rights("SELECT, INSERT, UPDATE, DELETE ON parents, children")
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    report = scene.clean(tracker)
    assert told(report.detached or report.dependents) == {"children": [2]}
    scene.assert_left((children, links((2, None)) if report.detached else []))


@on("postgresql+psycopg")
def test_a_dependent_that_a_role_may_not_delete_keeps_ours(database, few_rights):
    metadata, parents, children = family()
    scene = Scene(database, metadata)
    scene.engine = few_rights("SELECT, INSERT, UPDATE, DELETE ON parents", "SELECT ON children")
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((children, links((2, 2))))
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("parents", 2)}
    assert "children" in left["parents", 2]
    scene.assert_left((parents, numbered(2)), (children, links((2, 2))))


@on("postgresql+psycopg")
@pytest.mark.parametrize("ondelete", [None, "CASCADE"])
def test_a_dependent_that_a_role_may_not_even_see_keeps_ours(database, few_rights, ondelete):
    """PostgreSQL does a CASCADE with the rights of the child's owner: nobody may look away."""
    metadata, parents, children = family(ondelete=ondelete)
    scene = Scene(database, metadata)
    scene.engine = few_rights("SELECT, INSERT, UPDATE, DELETE ON parents")
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    assert set(left_over(CleanupManager(tracker))) == {("parents", 2)}
    scene.assert_left((parents, numbered(2)), (children, links((2, 2))))


# --- keys of every type


@pairwise(zoo_database=DEFAULT, kind=["uuid", "text", "decorated"], known=[True, False])
def test_keys_of_other_types_are_followed(zoo_database, kind, known):
    """What a TypeDecorator shows in Python is not what the child's column holds."""
    model, stranger, mine = {
        "uuid": (Document, {"id": uuid.UUID(int=1), "title": "x"},
                 {"id": uuid.UUID(int=2), "title": "x"}),
        "text": (Currency, {"code": "U'S", "name": "x"}, {"code": "%s:", "name": "x"}),
        "decorated": (Ticket, {"id": "pub_1", "title": "x"}, {"id": "pub_2", "title": "x"}),
    }[kind]  # fmt: skip  # a kind a line
    (key,) = model.__table__.primary_key
    made = sa.MetaData()
    parent = model.__table__.to_metadata(made)
    children = table(
        made, "children", sa.Column("p", key.type, sa.ForeignKey(parent.c[key.name]))
    )  # fmt: skip  # a table in one look
    scene = Scene(zoo_database)
    children.create(scene.outside)
    scene.strangers((parent, [stranger]), (children, [{"id": 1, "p": stranger[key.name]}]))
    tracker = scene.ours(((parent if known else model.__table__), [mine]))
    scene.application((children, [{"id": 2, "p": mine[key.name]}]))
    report = scene.clean(tracker, own=["children"])
    assert told(report.dependents) == {"children": [2]}
    scene.assert_left()


# --- the zoo, with every driver


def test_an_application_that_has_been_busy_in_the_zoo(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = strangers(engine)
    outside = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine)
    tracker.start()
    with sa.orm.Session(engine) as session:
        org, group = Org(name="ours"), Group(name="ours")
        user = User(email="ours@example.test", org=org, groups=[group])
        session.add(user)
        session.commit()
        user_id, group_id, org_id = user.id, group.id, org.id
    tracker.stop()
    with outside.begin() as connection:
        stranger = connection.execute(sa.select(User.id, User.org_id)).mappings()
        stranger = next(row for row in stranger if row["id"] != user_id)
        connection.execute(
            sa.insert(User.__table__),
            [
                {"id": 7001, "email": "a@app.test", "org_id": org_id, "manager_id": user_id},
                {"id": 7002, "email": "b@app.test", "org_id": stranger["org_id"],
                 "manager_id": 7001},
                {"id": 7003, "email": "c@app.test", "org_id": stranger["org_id"],
                 "manager_id": user_id},
            ],
        )  # fmt: skip  # a row a line
        connection.execute(
            sa.insert(Order.__table__),
            [{"id": 7001, "user_id": user_id}, {"id": 7002, "user_id": 7001},
             {"id": 7003, "user_id": 7003}],
        )  # fmt: skip  # as above
        connection.execute(
            sa.insert(OrderLine.__table__),
            [{"order_id": order, "line_no": line, "sku": "S", "quantity": 1}
             for order in (7001, 7002, 7003) for line in (1, 2)],
        )  # fmt: skip  # as above
        connection.execute(
            sa.insert(user_groups),
            [{"user_id": 7003, "group_id": group_id}, {"user_id": 7001, "group_id": group_id}],
        )
    outside.dispose()
    report = CleanupManager(tracker).cleanup()
    assert told(report.dependents) == {
        "users": [7001],
        "orders": [7001, 7002],
        "order_lines": [(7001, 1), (7001, 2), (7002, 1), (7002, 2)],
        "user_groups": sorted([(7001, group_id), (7003, group_id)], key=repr),
    }
    assert told(report.detached) == {"users": [7002, 7003]}
    name = str(next(iter(report.detached)).schema)
    left = [(7002, "b@app.test", None, stranger["org_id"], None),
            (7003, "c@app.test", None, stranger["org_id"], None)]  # fmt: skip  # as above
    expected = bystanders.expected.plus({
        f"{name}.users": left,
        f"{name}.orders": [(7003, 7003, None)],
        f"{name}.order_lines": [(7003, 1, "S", 1), (7003, 2, "S", 1)],
    })  # fmt: skip  # a table a line
    assert snapshot(engine) == expected


# --- how often the database is asked


def statements_of(engine, work):
    seen = []

    def note(connection, cursor, statement, *_):
        seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        work()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return seen


@everywhere
@pytest.mark.parametrize("ondelete", [None, "CASCADE", "SET NULL"])
def test_a_thousand_rows_take_no_more_statements_than_ten(database, ondelete):
    metadata, parents, children = family(ondelete=ondelete, nullable=ondelete == "SET NULL")
    grand = table(metadata, "grand", reference("child_id", "children.id"))
    scene = Scene(database, metadata)
    counts = []
    for width in (1000, 10, 1000):  # the first reads the schema
        numbers = range(1, width + 1)
        with scene.outside.begin() as connection:
            connection.execute(sa.insert(parents), numbered(*numbers))
            connection.execute(sa.insert(children), links(*((n, n) for n in numbers)))
            if ondelete != "SET NULL":
                connection.execute(
                    sa.insert(grand), links(*((n, n) for n in numbers), column="child_id")
                )
        tracker = ResourceTracker(scene.engine)
        tracker.track_rows(parents, list(numbers))
        # Where a DELETE took long, the indexes are read too: the clock stands still.
        manager = CleanupManager(tracker, retry=RetryPolicy(clock=lambda: 0.0))
        seen = statements_of(scene.engine, manager.cleanup)
        # A DELETE takes its keys in the chunks that are fastest.
        counts.append(sum(not each.startswith(("DELETE", "UPDATE")) for each in seen))
        assert manager.report.total_deleted == width
        scene.run("DELETE FROM children")
    assert counts[1] == counts[2]


@everywhere
def test_each_table_of_a_chain_that_stays_costs_the_same_however_long_the_chain(database):
    """What a row that stays needs is followed upwards; dependents are not looked for anew."""
    metadata = sa.MetaData()
    chains = {}
    for length in (4, 8, 16):
        names = [f"chain_{length}_{at}" for at in range(length)]
        chains[length] = [
            table(metadata, name, *([reference("parent_id", f"{above}.id")] if above else []))
            for above, name in zip([None, *names], [*names, f"protected_{length}"], strict=True)
        ]
    scene = Scene(database, metadata)
    counts = {}
    for length, tables in chains.items():
        first, *others = [
            (each, links((1, 1)) if at else numbered(1)) for at, each in enumerate(tables)
        ]
        tracker = scene.ours(first, *others[:-1])
        scene.application(others[-1])
        manager = CleanupManager(
            tracker, protect=[tables[-1]], retry=RetryPolicy(clock=lambda: 0.0)
        )
        manager.plan()  # reads the schema
        counts[length] = len(statements_of(scene.engine, partial(left_over, manager)))
        assert len(manager.report.leftovers) == length
    assert counts[16] - counts[8] == 2 * (counts[8] - counts[4])


def line(metadata, length):
    """Tables of which each references the one before."""
    names = [f"line_{at}" for at in range(length)]
    return [
        table(metadata, name, *([reference("parent_id", f"{above}.id")] if above else []))
        for above, name in zip([None, *names[:-1]], names, strict=True)
    ]


REFUSALS = {
    "postgresql": (
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF NEW.parent_id IS NULL THEN RAISE 'refused'; END IF; RETURN NEW; END $$"
        ),
        "CREATE TRIGGER refuse BEFORE UPDATE ON others FOR EACH ROW EXECUTE FUNCTION refuse()",
    ),
    "mysql": (
        (
            "CREATE TRIGGER refuse BEFORE UPDATE ON others FOR EACH ROW "
            "IF NEW.parent_id IS NULL THEN SIGNAL SQLSTATE '45000'; END IF"
        ),
    ),
    "sqlite": (
        (
            "CREATE TRIGGER refuse BEFORE UPDATE ON others WHEN NEW.parent_id IS NULL "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        ),
    ),
}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("refused_by", ["check", "trigger"])
def test_a_detach_that_is_refused_is_not_tried_for_all_rows_again(database, refused_by):
    """To look for dependents again changes no CHECK: the row is isolated at once."""
    metadata = sa.MetaData()
    tables = line(metadata, 12)
    named = sa.CheckConstraint("parent_id IS NOT NULL OR name IS NOT NULL", name="ck_either")
    others = table(
        metadata,
        "others",
        reference("parent_id", "line_0.id", nullable=True),
        sa.Column("name", sa.String(9)),
        *([named] if refused_by == "check" else []),
    )
    scene = Scene(database, metadata)
    if refused_by == "trigger":
        scene.run(*REFUSALS[scene.engine.dialect.name])
    tracker = scene.ours(
        *((each, links((1, 1)) if at else numbered(1, 2)) for at, each in enumerate(tables))
    )
    scene.application((others, links((1, 1))))
    manager = CleanupManager(tracker, retry=RetryPolicy(clock=lambda: 0.0))
    left: dict[tuple[str, object], str] = {}
    seen = statements_of(scene.engine, lambda: left.update(left_over(manager)))
    assert set(left) == {("line_0", 1)}
    scene.assert_left((tables[0], numbered(1)), (others, links((1, 1))))
    # with all rows, then with the two of its parent's table, then in a transaction of its own
    assert sum(each.startswith("UPDATE") for each in seen) == 3


@everywhere
def test_a_circle_of_cascades_costs_the_other_tables_nothing(database):
    """Only for the rows in the circle dependents are looked for."""
    metadata = sa.MetaData()
    trees = [
        table(metadata, name, reference("up", f"{name}.id", nullable=True, ondelete=ondelete))
        for name, ondelete in (("plain", None), ("tree", "CASCADE"))
    ]
    tables = line(metadata, 12)
    scene = Scene(database, metadata)
    counts = {}
    for _warm in range(2):
        for tree in trees:
            tracker = scene.ours(
                *((each, links((1, 1)) if at else numbered(1)) for at, each in enumerate(tables)),
                (tree, links((1, None), (2, 1), column="up")),
            )
            scene.application(
                (tree, links((3, 2), column="up")) if tree is trees[1] else (tree, [])
            )
            manager = CleanupManager(tracker, retry=RetryPolicy(clock=lambda: 0.0))
            counts[tree.name] = len(statements_of(scene.engine, manager.cleanup))
            assert manager.report.total_deleted == 14
            if tree is trees[1]:
                assert told(manager.report.dependents) == {"tree": [3]}
            scene.assert_left()
    assert counts["tree"] <= counts["plain"] + 12


@everywhere
def test_a_dependent_in_a_table_with_rows_of_ours_is_counted_apart(database):
    """Where only some tables are looked at, a table may have its turn twice."""
    metadata = sa.MetaData()
    tree = table(metadata, "tree", reference("up", "tree.id", nullable=True, ondelete="CASCADE"))
    leaves = table(
        metadata,
        "leaves",
        reference("tree_id", "tree.id", nullable=True, ondelete="SET NULL"),
        reference("stem_id", "tree.id", nullable=True, ondelete="CASCADE"),
    )
    scene = Scene(database, metadata)
    scene.strangers((tree, numbered(9)), (leaves, [{"id": 9, "tree_id": 9, "stem_id": 9}]))
    tracker = scene.ours(
        (tree, links((1, None), (2, 1), column="up")), (leaves, links((1, 1), column="tree_id"))
    )
    scene.application(
        (leaves, links((2, 2), column="stem_id")), (leaves, links((3, 2), column="tree_id"))
    )
    report = scene.clean(tracker)
    assert {name.name: count for name, count in report.deleted.items()} == {"tree": 2, "leaves": 1}
    assert told(report.dependents) == {"leaves": [2]}
    assert told(report.detached) == {"leaves": [3]}
    scene.assert_left((leaves, numbered(3)))


CATALOGUE = re.compile(r"pg_class|pg_attribute|information_schema|SHOW|pragma_|PRAGMA|_master")


@everywhere
def test_the_catalogue_is_read_in_bulk(database):
    """What a cleanup reads of tables that no model knows is read for all of them at once."""
    counts = {}
    for length in (4, 40):
        metadata = sa.MetaData()
        tables = line(metadata, length)
        scene = Scene(database, metadata)
        hidden = sa.MetaData()
        line(hidden, length)
        others = [
            table(
                hidden,
                f"other_{at}",
                reference("parent_id", f"line_{at}.id", nullable=at % 2 == 0),
                reference("line_id", "line_0.id", nullable=True),
            )
            for at in range(length)
        ]
        hidden.create_all(scene.outside)
        tracker = scene.ours(
            *((each, links((1, 1)) if at else numbered(1)) for at, each in enumerate(tables))
        )
        scene.application(*((each, [{"id": 1, "parent_id": 1, "line_id": 1}]) for each in others))
        manager = CleanupManager(tracker, retry=RetryPolicy(clock=lambda: 0.0))
        seen = statements_of(scene.engine, manager.cleanup)
        reads = [each for each in seen if not each.startswith("DELETE")]  # which may be guarded
        counts[length] = sum(bool(CATALOGUE.search(each)) for each in reads)
        assert sum(map(len, manager.report.dependents.values())) == length // 2
        assert sum(map(len, manager.report.detached.values())) == length // 2
        hidden.drop_all(scene.outside)
    assert 0 < counts[40] == counts[4]


def star(actions):
    metadata = sa.MetaData()
    users = table(metadata, "users")
    children = [
        table(
            metadata,
            f"child_{number:02}",
            reference("user_id", "users.id", nullable=True, ondelete=action, index=True),
        )
        for number, action in enumerate(actions)
    ]
    return metadata, users, children


@everywhere
def test_sixty_keys_that_nobody_uses_are_not_asked_one_by_one(database):
    metadata, users, _children = star([None] * 60)
    lone = table(metadata, "lone")
    scene = Scene(database, metadata)
    counts = {}
    for each in (users, users, lone, lone):
        tracker = scene.ours((each, numbered(1)))
        counts[each.name] = len(statements_of(scene.engine, CleanupManager(tracker).cleanup))
    assert counts["users"] <= counts["lone"] + 2
    scene.assert_left()


@everywhere
@pytest.mark.parametrize("rows", [1, 300])
def test_sixty_keys_of_all_kinds_are_all_followed(database, rows):
    actions = [None, "CASCADE", "SET NULL", "RESTRICT"] * 15
    metadata, users, children = star(actions)
    scene = Scene(database, metadata)
    scene.strangers((users, numbered(1000)))
    scene.strangers(*((each, links((1000, 1000), column="user_id")) for each in children))
    tracker = scene.ours((users, numbered(*range(1, rows + 1))))
    used = [0, 1, 2, 3, 30, 31, 56, 57, 58, 59]
    scene.application(*((children[at], links((1, 1), (2, rows), column="user_id")) for at in used))
    manager = CleanupManager(tracker)
    manager.plan()  # reads the foreign keys
    looks = [
        each
        for each in statements_of(scene.engine, manager.cleanup)
        if re.search("SELECT.*child_", each, re.DOTALL)
    ]
    assert len(looks) < 60 * 4
    cascading = [at for at in used if actions[at] == "CASCADE"]
    report = manager.report
    assert told(report.dependents) == {f"child_{at:02}": [1, 2] for at in cascading}
    rest = [at for at in used if at not in cascading]
    assert told(report.detached) == {f"child_{at:02}": [1, 2] for at in rest}
    scene.assert_left(
        *((children[at], links((1, None), (2, None), column="user_id")) for at in rest)
    )


# --- foreign keys that only the models have


def without_constraint(scene_database, *, nullable=True):
    """Children whose model references a parent, in a database that has no such constraint."""
    metadata, parents, children = family(nullable=nullable)
    plain = sa.MetaData()
    table(plain, "parents")
    table(plain, "children", sa.Column("parent_id", sa.Integer, nullable=nullable))
    return Scene(scene_database, plain), metadata, parents, children


@everywhere
@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("options", [{"own": ["children"]}, {"dependents": Dependents.DELETE}])
def test_rows_that_reference_ours_by_a_key_of_the_models_go_where_that_was_asked(
    database, options, nullable
):
    scene, _metadata, parents, children = without_constraint(database, nullable=nullable)
    scene.strangers((parents, numbered(1)), (children, links((1, 1))))
    for _cleanup in range(2):
        tracker = scene.ours((parents, numbered(2)))
        scene.application((children, links((2, 2), (3, 1))))
        report = scene.clean(tracker, **options)
        assert told(report.dependents) == {"children": [2]}
        scene.assert_left((children, links((3, 1))))
        scene.run("DELETE FROM children WHERE id = 3")
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    assert not scene.clean(tracker).dependents, "nobody asked for it"
    scene.assert_left((children, links((2, 2))))


@everywhere
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"protect": ["children"]}, "is protected"),
        ({"dependents": Dependents.ERROR}, "not tracked"),
    ],
)
def test_rows_that_a_row_needs_by_a_key_of_the_models_stay_where_that_was_asked(
    database, options, why
):
    scene, _metadata, parents, children = without_constraint(database)
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((children, links((2, 2))))
    left = left_over(CleanupManager(tracker, **options))
    assert set(left) == {("parents", 2)}
    assert why in left["parents", 2]
    scene.assert_left((parents, numbered(2)), (children, links((2, 2))))


@everywhere
def test_a_key_of_the_models_to_no_table_of_the_database_is_left_out(database):
    metadata, parents, _children = family()
    table(metadata, "elsewhere", reference("parent_id", "parents.id"))
    sa.Table("seen", metadata, sa.Column("id", sa.Integer, sa.ForeignKey("parents.id")))
    plain = sa.MetaData()
    table(plain, "parents")
    table(plain, "children")  # its column parent_id is not there yet
    scene = Scene(database, plain)
    scene.run("CREATE VIEW seen AS SELECT id FROM parents")
    tracker = scene.ours((parents, numbered(2)))
    assert scene.clean(tracker, dependents=Dependents.DELETE).total_deleted == 1
    for argument in ("own", "protect"):
        tracker = scene.ours((parents, numbered(2)))
        asked = {argument: [metadata.tables["elsewhere"]]}
        with pytest.raises(
            CleanupError, match=f"{argument}= names the model of .*elsewhere.*first"
        ):
            CleanupManager(tracker, **asked).cleanup()
        scene.assert_left((parents, numbered(2)))
        assert scene.clean(tracker, own=[metadata.tables["seen"]]).total_deleted == 1
    tracker = scene.ours((parents, numbered(2)))
    scene.run("DROP VIEW seen")
    metadata.tables["elsewhere"].create(scene.engine)
    assert scene.clean(tracker, **asked).total_deleted == 1
    metadata.tables["elsewhere"].drop(scene.engine)
    scene.assert_left()


# --- what a wrong word is told


@everywhere
@pytest.mark.parametrize("argument", ["own", "protect"])
def test_a_name_that_no_table_has_is_refused_at_the_call(database, argument):
    metadata, parents, children = family(nullable=True)
    registry = sa.orm.registry()
    offspring = type("Offspring", (), {})
    registry.map_imperatively(offspring, children)
    scene = Scene(database, metadata)
    schema = sa.inspect(scene.engine).default_schema_name
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    for wrong, proposed in (
        ("pchildren", "'children'"),
        ("Children", "'children'"),
        (offspring.__name__, "'children'"),
        (f"{schema}x.children", f"'{schema}.children'"),
        ("nothing_like_it", "'schema.table'"),
    ):
        with pytest.raises(UnknownTableError, match=f"{argument}=.*{wrong}.*{proposed}") as caught:
            CleanupManager(tracker, **{argument: [wrong]})
        assert caught.value.table == wrong
    registry.dispose()
    assert len(tracker) == 1
    scene.assert_left((parents, numbered(2)), (children, links((2, 2))))
    CleanupManager(tracker, **{argument: ["children", f"{schema}.parents"]})


@everywhere
def test_a_schema_that_vanishes_meanwhile_hides_no_wrong_name(database, monkeypatch):
    """On MariaDB every database of the server is a schema, and others drop theirs."""
    metadata, parents, _children = family(nullable=True)
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2)))
    listed = sa.Inspector.get_schema_names
    calls = []

    def with_a_dropped_one(inspector, **options):
        calls.append(inspector)
        return listed(inspector, **options) + ["dropped"] * (len(calls) == 1)

    monkeypatch.setattr(sa.Inspector, "get_schema_names", with_a_dropped_one)
    with pytest.raises(UnknownTableError, match=r"protect=.*pchildren.*'children'"):
        CleanupManager(tracker, protect=["pchildren"])
    assert calls


@everywhere
def test_a_name_that_no_table_has_any_more_stops_the_cleanup_before_it_deletes(database):
    metadata, parents, children = family(nullable=True)
    lock = table(metadata, "lock")
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2)))
    scene.application((children, links((2, 2))))
    manager = CleanupManager(tracker, protect=["lock"])
    lock.drop(scene.engine)
    with pytest.raises(UnknownTableError, match=r"'lock'.*nothing was deleted"):
        manager.cleanup()
    assert len(tracker) == 1
    lock.create(scene.engine)
    scene.assert_left((parents, numbered(2)), (children, links((2, 2))))
    assert manager.cleanup().total_deleted == 1


@servers
def test_a_name_in_another_schema_than_the_tracked_tables_is_refused_before_it_deletes(database):
    """Without its schema it would protect nothing, and be accepted."""
    other = database.extra_schema()
    here = sa.inspect(database.engine()).default_schema_name
    metadata = sa.MetaData()
    parents = table(metadata, "parents", schema=here)
    far = table(metadata, "far", reference("parent_id", f"{here}.parents.id"), schema=other)
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2)))
    scene.application((far, links((2, 2))))
    manager = CleanupManager(tracker, protect=["far"])
    with pytest.raises(UnknownTableError, match=f"{other}.far"):
        manager.cleanup()
    left = left_over(CleanupManager(tracker, protect=[f"{other}.far"]))
    assert set(left) == {("parents", 2)}


def test_tables_that_are_none_are_refused(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    with pytest.raises(Exception, match=r"own=.*\[AuditLog\]"):
        CleanupManager(tracker, own=[17])
    with pytest.raises(Exception, match="takes a list"):
        CleanupManager(tracker, protect="settings")
    with pytest.raises(ValueError, match="take it out"):
        CleanupManager(tracker, own=["settings"], protect=["settings"])
    with pytest.raises(TypeError, match=r"Dependents\.FOLLOW_SCHEMA"):
        CleanupManager(tracker, dependents="delete")


@everywhere
def test_leftovers_and_dependents_of_one_cleanup_are_in_the_error_too(database):
    metadata, parents, children = family()
    scene = Scene(database, metadata)
    tracker = scene.ours((parents, numbered(2, 3)))
    scene.application((children, links((2, 2), (3, 3))))
    veto(scene, loud=True)
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker).cleanup()
    assert told(caught.value.report.dependents) == {"children": [3]}
