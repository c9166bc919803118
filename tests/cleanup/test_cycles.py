"""Tables and rows that reference each other in a circle, on each database in its own best way."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import (
    FORBIDDEN,
    insert,
    left_over,
    reference,
    refuse_deletes,
    table,
    tracked,
)
from harness.bystanders import Bystanders, snapshot
from harness.loops import insert_loop
from harness.pairs import pairwise
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from tidyrows import CleanupManager, Dependents, ResourceTracker

EVERYWHERE = ("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
everywhere = on(*EVERYWHERE)
only_mysql = on("mysql+pymysql")
ACTIONS = (None, "RESTRICT", "CASCADE")


def tree(engine, *, nullable=True, ondelete=None, **options):
    metadata = sa.MetaData()
    nodes = table(
        metadata, "nodes", reference("parent_id", "nodes.id", nullable=nullable, ondelete=ondelete),
        **options,
    )  # fmt: skip  # a table in one look
    metadata.create_all(engine)
    return nodes


def is_mysql(engine):
    return engine.dialect.name in {"mysql", "mariadb"}


def insert_circle(engine, *batches):
    """Rows of a circle, in one transaction, whatever the order."""
    with engine.begin() as connection:
        insert_loop(connection, *batches)


def tracked_circle(engine, *batches):
    """The same, tracked: told to the tracker, which a foreign key's trouble does not concern."""
    insert_circle(engine, *batches)
    tracker = ResourceTracker(engine)
    for each, rows in batches:
        columns = [column.name for column in each.primary_key]
        tracker.track_rows(
            each, [tuple(row[column] for column in columns) if len(columns) > 1 else row["id"]
                   for row in rows]
        )  # fmt: skip  # a list in one look
    return tracker


# --- self-references


@pairwise(database=EVERYWHERE, ondelete=ACTIONS, nullable=[True, False])
def test_a_tree_goes_and_the_strangers_tree_stays(engine, nullable, ondelete):
    nodes = tree(engine, nullable=nullable, ondelete=ondelete)
    root = {} if nullable else {"parent_id": 900}
    insert(engine, (nodes, [{"id": 900, **({} if nullable else {"parent_id": 900})}]))
    insert(engine, (nodes, [{"id": 901, "parent_id": 900}]))
    bystanders = Bystanders(engine)
    # Keys run against the tree: an order by key alone would be wrong on MariaDB.
    rows = [{"id": 50, **root}, {"id": 40, "parent_id": 50}, {"id": 60, "parent_id": 40}]
    rows += [{"id": 30, "parent_id": 60}, {"id": 70, "parent_id": 50}, {"id": 20, "parent_id": 901}]
    tracker = tracked(engine, (nodes, rows))
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted == len(rows)
    assert not report.already_gone
    bystanders.assert_untouched()


@everywhere
@pytest.mark.parametrize("nullable", [True, False])
def test_a_chain_of_a_thousand_rows_goes(engine, nullable):
    nodes = tree(engine, nullable=nullable)
    insert(engine, (nodes, [{"id": 9000, "parent_id": 9000}]))
    bystanders = Bystanders(engine)
    first = {"id": 0, "parent_id": None if nullable else 9000}
    tracker = ResourceTracker(engine)
    tracker.start()
    with engine.begin() as connection:
        connection.execute(sa.insert(nodes).values(**first))
        for number in range(1, 1000):
            connection.execute(sa.insert(nodes).values(id=number, parent_id=number - 1))
    tracker.stop()
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted == 1000
    assert not report.retries
    bystanders.assert_untouched()


@everywhere
def test_a_row_that_points_at_itself_goes_where_the_key_is_nullable(engine):
    nodes = tree(engine)
    insert(engine, (nodes, [{"id": 1, "parent_id": 1}, {"id": 2, "parent_id": 1}]))
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (nodes, [{"id": 3, "parent_id": 3}, {"id": 4, "parent_id": 3}]))
    assert CleanupManager(tracker).cleanup().total_deleted == 2
    bystanders.assert_untouched()


@on("sqlite", "postgresql+psycopg")
def test_a_row_that_points_at_itself_goes_where_the_key_is_not_null(engine):
    nodes = tree(engine, nullable=False, ondelete="RESTRICT")
    insert(engine, (nodes, [{"id": 1, "parent_id": 1}]))
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (nodes, [{"id": 3, "parent_id": 3}, {"id": 4, "parent_id": 3}]))
    assert CleanupManager(tracker).cleanup().total_deleted == 2
    bystanders.assert_untouched()


@everywhere
def test_a_self_reference_that_the_model_does_not_have_is_followed(engine):
    tree(engine)
    model = table(sa.MetaData(), "nodes")
    nodes = table(sa.MetaData(), "nodes", sa.Column("parent_id", sa.Integer))
    insert(engine, (nodes, [{"id": 1}]))
    bystanders = Bystanders(engine)
    insert(engine, (nodes, [{"id": 10}, {"id": 5, "parent_id": 10}, {"id": 20, "parent_id": 5}]))
    tracker = ResourceTracker(engine)
    tracker.track_rows(model, [5, 10, 20])
    assert CleanupManager(tracker).cleanup().total_deleted == 3
    bystanders.assert_untouched()


@everywhere
def test_two_self_references_of_one_table_cross(engine):
    metadata = sa.MetaData()
    nodes = table(
        metadata,
        "nodes",
        reference("left_id", "nodes.id", nullable=True),
        sa.Column("right_id", sa.ForeignKey("nodes.id", name="fk_right")),
    )
    metadata.create_all(engine)
    insert(engine, (nodes, [{"id": 1}]))
    bystanders = Bystanders(engine)
    tracker = tracked_circle(
        engine,
        (nodes, [{"id": 2, "left_id": 3, "right_id": 2}, {"id": 3, "left_id": 1, "right_id": 2}]),
    )
    assert CleanupManager(tracker).cleanup().total_deleted == 2
    bystanders.assert_untouched()


# --- circles of tables


def ring(engine, size, *, nullable, **options):
    """Tables a0 -> a1 -> ... -> a0; the last key is nullable or not."""
    metadata = sa.MetaData()
    tables = [
        table(
            metadata,
            f"a{number}",
            reference(
                "next_id",
                f"a{(number + 1) % size}.id",
                nullable=nullable and number == size - 1,
                use_alter=number == size - 1 and engine.dialect.name != "sqlite",
                **options,
            ),
        )
        for number in range(size)
    ]
    metadata.create_all(engine)
    return tables


def circle(tables, *ids):
    return [(each, [{"id": number, "next_id": number} for number in ids]) for each in tables]


@pairwise(database=EVERYWHERE, ondelete=[None, "RESTRICT"], size=[2, 3])
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_a_circle_of_tables_with_one_nullable_key_goes(engine, size, ondelete):
    tables = ring(engine, size, nullable=True, ondelete=ondelete)
    insert_circle(engine, *circle(tables, 1))
    bystanders = Bystanders(engine)
    report = CleanupManager(tracked_circle(engine, *circle(tables, 2, 3))).cleanup()
    assert report.total_deleted == 2 * size
    bystanders.assert_untouched()


KEYS = {
    "no action": {},
    "RESTRICT": {"ondelete": "RESTRICT"},
    "CASCADE": {"ondelete": "CASCADE"},
    "deferrable": {"deferrable": True},
    "deferred": {"deferrable": True, "initially": "DEFERRED"},
}


@pairwise(
    database=["sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg"],
    key=tuple(KEYS),
    size=[2, 3],
)
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_a_circle_of_not_null_keys_goes(engine, size, key):
    tables = ring(engine, size, nullable=False, **KEYS[key])
    insert_circle(engine, *circle(tables, 1))
    bystanders = Bystanders(engine)
    report = CleanupManager(tracked_circle(engine, *circle(tables, 2, 3))).cleanup()
    assert report.total_deleted == 2 * size
    assert not report.already_gone
    bystanders.assert_untouched()


@everywhere
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_a_circle_of_tables_that_holds_no_circle_of_rows_goes(engine):
    """a1 -> a0 twice over: the tables form a circle, the rows a line."""
    tables = ring(engine, 2, nullable=True)
    a0, a1 = tables
    insert_circle(engine, *circle(tables, 1))
    bystanders = Bystanders(engine)
    tracker = tracked(
        engine,
        (a1, [{"id": 10, "next_id": None}]),
        (a0, [{"id": 10, "next_id": 10}]),
        (a1, [{"id": 5, "next_id": 10}]),
        (a0, [{"id": 5, "next_id": 5}]),
        (a1, [{"id": 20, "next_id": 1}]),
    )
    assert CleanupManager(tracker).cleanup().total_deleted == 5
    bystanders.assert_untouched()


@everywhere
@pytest.mark.parametrize("nullable", [True, False])
def test_a_circle_of_composite_keys_goes(engine, nullable):
    """The nullable key shares a column with the primary key, which cannot become NULL."""
    metadata = sa.MetaData()
    nodes = sa.Table(
        "nodes",
        metadata,
        sa.Column("org", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("no", sa.String(5), primary_key=True),
        sa.Column("parent_no", sa.String(5), nullable=nullable),
        sa.ForeignKeyConstraint(["org", "parent_no"], ["nodes.org", "nodes.no"], name="fk_parent"),
    )
    metadata.create_all(engine)

    def row(org, no, parent):
        return {"org": org, "no": no, "parent_no": parent}

    insert_circle(engine, (nodes, [row(1, "a", "b"), row(1, "b", "a")]))
    bystanders = Bystanders(engine)
    rows = [
        row(2, "a", "b"),
        row(2, "b", "a"),
        row(2, "c", "a"),
        row(1, "z", "a"),
        row(2, "s", "s"),
    ]
    tracker = tracked_circle(engine, (nodes, rows))
    without = is_mysql(engine) and not nullable
    report = CleanupManager(tracker, allow_foreign_keys_off=without).cleanup()
    assert report.total_deleted == len(rows)
    bystanders.assert_untouched()


# --- circles that only foreign keys switched off can open


@only_mysql
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_circle_of_not_null_keys_is_a_clear_leftover(engine, size):
    tables = ring(engine, size, nullable=False)
    insert_circle(engine, *circle(tables, 1))
    bystanders = Bystanders(engine)
    first = tables[0]
    tracker = tracked_circle(engine, *circle(tables, 2))
    with_a_tail = Bystanders(engine)
    insert(engine, (first, [{"id": 3, "next_id": 2}]))
    tracker.track_rows(first, [3])
    left = left_over(CleanupManager(tracker))
    assert set(left) == {(each.name, 2) for each in tables}  # the row outside the circle is gone
    assert all("allow_foreign_keys_off=True" in cause for cause in left.values())
    with_a_tail.assert_untouched()
    report = CleanupManager(tracker, allow_foreign_keys_off=True).cleanup()
    assert report.total_deleted == size
    assert len(tracker) == 0
    bystanders.assert_untouched()


@only_mysql
@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_foreign_keys_switched_off_never_leak_through_the_pool(database, ends):
    engine = database.engine(pool_size=2)
    tables = ring(engine, 2, nullable=False)
    tracker = tracked_circle(engine, *circle(tables, 2))
    seen: list[int] = []

    def threads():
        connections = [engine.connect() for _ in range(3)]
        found = [
            connection.exec_driver_sql("SELECT connection_id(), @@foreign_key_checks").one()
            for connection in connections
        ]
        for connection in connections:
            connection.close()
        return {row[0] for row in found}, {row[1] for row in found}

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection, cursor, statement, *_):
        if "foreign_key_checks = 0" in statement:
            seen.append(connection.connection.driver_connection.thread_id())
        if ends != "well" and seen and statement.startswith("DELETE"):
            raise RuntimeError("in the middle")

    manager = CleanupManager(tracker, allow_foreign_keys_off=True)
    if ends == "well":
        manager.cleanup()
    else:
        assert "in the middle" in str(left_over(manager))
    assert seen
    pooled, checks = threads()
    assert checks == {1}
    assert not pooled & set(seen)  # thrown away


@only_mysql
@pytest.mark.parametrize("ondelete", ACTIONS)
def test_foreign_keys_switched_off_leave_no_orphans_of_strangers(database, ondelete):
    """A stranger's row in a table outside the circle, and in another database of the server."""
    engine = database.engine()
    other = database.extra_schema()
    tables = ring(engine, 2, nullable=False)
    here = engine.url.database
    metadata = sa.MetaData()
    near = table(metadata, "near", reference("a_id", "a0.id", ondelete=ondelete))
    sa.Table("a0", metadata, sa.Column("id", sa.Integer, primary_key=True))
    near.create(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {other}.far (id INTEGER PRIMARY KEY, a_id INTEGER NOT NULL, FOREIGN KEY"
            f" (a_id) REFERENCES {here}.a1 (id) ON DELETE {ondelete or 'NO ACTION'})"
        )
    tracker = tracked_circle(engine, *circle(tables, 2, 3, 4))
    insert(engine, (near, [{"id": 1, "a_id": 2}]))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO {other}.far VALUES (1, 3)")
    manager = CleanupManager(tracker, allow_foreign_keys_off=True, dependents=Dependents.ERROR)
    left = left_over(manager)
    assert set(left) == {(each.name, number) for each in tables for number in (2, 3)}
    assert "near" in left["a0", 2]
    assert "far" in left["a1", 3]
    now = snapshot(engine)
    assert now[f"{here}.near"] == [(1, 2)]
    assert now[f"{other}.far"] == [(1, 3)]
    assert sorted(now[f"{here}.a0"]) == [(2, 2), (3, 3)]


@only_mysql
def test_a_strangers_row_of_the_circles_own_tables_is_no_orphan_either(engine):
    nodes = tree(engine, nullable=False)
    tracker = tracked_circle(engine, (nodes, [{"id": 2, "parent_id": 2}]))
    insert(engine, (nodes, [{"id": 3, "parent_id": 2}]))
    bystanders = Bystanders(engine)
    manager = CleanupManager(tracker, allow_foreign_keys_off=True, dependents=Dependents.ERROR)
    assert set(left_over(manager)) == {("nodes", 2)}
    bystanders.assert_untouched()


@only_mysql
def test_no_reference_can_come_between_the_look_and_the_delete(database):
    """The rows are locked first; with foreign keys off the DELETE itself would not notice."""
    engine = database.engine()
    nodes = tree(engine, nullable=False)
    metadata = sa.MetaData()
    holder = table(metadata, "holders", reference("node_id", "nodes.id"))
    table(metadata, "nodes")
    holder.create(engine)
    tracker = tracked_circle(engine, (nodes, [{"id": 2, "parent_id": 2}]))
    outside = database.engine()
    refused = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def meanwhile(connection, cursor, statement, *_):
        if "foreign_key_checks = 0" in statement:
            with outside.connect() as stranger:
                stranger.exec_driver_sql("SET innodb_lock_wait_timeout = 1")
                try:
                    stranger.execute(sa.insert(holder).values(id=1, node_id=2))
                    stranger.commit()
                except sa.exc.OperationalError as error:
                    refused.append(error.orig.args[0])

    report = CleanupManager(tracker, allow_foreign_keys_off=True).cleanup()
    assert refused == [1205]
    assert report.total_deleted == 1
    assert not any(snapshot(engine).values())


# --- a circle with a row that cannot go


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("by", ["stranger", "trigger"])
@pytest.mark.parametrize("nullable", [True, False])
def test_around_a_blocked_row_of_a_tree_all_others_go(engine, nullable, by):
    nodes = tree(engine, nullable=nullable)
    insert(engine, (nodes, [{"id": 900, "parent_id": None if nullable else 900}]))
    top = None if nullable else 900
    rows = [{"id": 10, "parent_id": top}]
    rows += [{"id": number, "parent_id": 10} for number in (11, 12, 13)]
    rows += [{"id": number, "parent_id": 12} for number in (121, 122)]
    rows += [{"id": 20, "parent_id": top}, {"id": 21, "parent_id": 20}]
    tracker = tracked(engine, (nodes, rows))
    if by == "stranger":
        insert(engine, (nodes, [{"id": 901, "parent_id": 121}]))
    else:
        refuse_deletes(engine, nodes, [121])
    left = left_over(CleanupManager(tracker, dependents=Dependents.ERROR))
    assert set(left) == {("nodes", 121), ("nodes", 12), ("nodes", 10)}
    parents = {row[0]: row[1] for rows in snapshot(engine).values() for row in rows}
    kept = {121: 12, 12: 10, 10: top}  # nothing about them has changed either
    if by == "trigger":
        assert parents == {**kept, 900: top}
        return
    assert parents == {**kept, 901: 121, 900: top}
    delete_the_strangers_row(engine, nodes, 901)
    assert CleanupManager(tracker).cleanup().total_deleted == 3


def delete_the_strangers_row(engine, nodes, key):
    with engine.begin() as connection:
        connection.execute(sa.delete(nodes).where(nodes.c.id == key))


@pytest.mark.parametrize("by", ["stranger", "trigger"])
@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_around_a_blocked_circle_all_other_circles_go(engine, by):
    tables = ring(engine, 2, nullable=True)
    metadata = sa.MetaData()
    holder = table(metadata, "holders", reference("a_id", "a0.id"))
    table(metadata, "a0")
    holder.create(engine)
    tracker = tracked_circle(engine, *circle(tables, *range(1, 8)))
    held = [(1, 4)] if by == "stranger" else []
    if held:
        insert(engine, (holder, [{"id": 1, "a_id": 4}]))
    else:
        refuse_deletes(engine, tables[0], [4])
    left = left_over(CleanupManager(tracker, dependents=Dependents.ERROR))
    assert set(left) == {("a0", 4), ("a1", 4)}
    now = {name.partition(".")[2]: rows for name, rows in snapshot(engine).items()}
    assert now == {"a0": [(4, 4)], "a1": [(4, 4)], "holders": held}


@pytest.mark.parametrize("by", ["stranger", "trigger"])
@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_a_blocked_loop_inside_one_table_of_a_larger_cycle_is_found(engine, by):
    """The loop holds rows of one table only, while the cycle has two."""
    metadata = sa.MetaData()
    a = table(
        metadata,
        "a",
        reference("b_id", "b.id", nullable=True, use_alter=engine.dialect.name != "sqlite"),
        reference("a_id", "a.id", nullable=True),
    )
    b = table(metadata, "b", sa.Column("a_id", sa.ForeignKey("a.id", name="fk_b_a")))
    holder = table(metadata, "holders", sa.Column("a_id", sa.ForeignKey("a.id", name="fk_held")))
    metadata.create_all(engine)
    tracker = tracked_circle(
        engine,
        (
            a,
            [
                {"id": 1, "a_id": 1},
                {"id": 2, "a_id": 3},
                {"id": 3, "a_id": 2},
                {"id": 4, "a_id": 4},
            ],
        ),
        (b, [{"id": 1, "a_id": 1}]),
    )
    if by == "stranger":
        insert(engine, (holder, [{"id": 1, "a_id": 2}]))
    else:
        refuse_deletes(engine, a, [2])
    left = left_over(CleanupManager(tracker, dependents=Dependents.ERROR))
    assert set(left) == {("a", 2), ("a", 3)}
    assert ("holders(1)" if by == "stranger" else FORBIDDEN) in left["a", 2]
    now = {name.partition(".")[2]: rows for name, rows in snapshot(engine).items()}
    assert [row[0] for row in now["a"]] == [2, 3]
    assert now["b"] == []
