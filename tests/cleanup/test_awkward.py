"""Tables as they are in the world: partitions, no rowid, views, generated columns."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import left_over, tracked
from harness.bystanders import snapshot
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker


def told(rows):
    return {table.name: sorted(row.key for row in each) for table, each in rows.items()}


def run(engine, *statements):
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@on("sqlite", "sqlite-nofk")
def test_tables_without_rowid(engine):
    run(
        engine,
        "CREATE TABLE codes (code TEXT PRIMARY KEY, note TEXT) WITHOUT ROWID",
        "CREATE TABLE uses (code TEXT NOT NULL REFERENCES codes, n INTEGER, PRIMARY KEY (code, n)) "
        "WITHOUT ROWID",
        "INSERT INTO codes VALUES ('theirs', '')",
        "INSERT INTO uses VALUES ('theirs', 1)",
    )
    before = snapshot(engine)
    codes = sa.Table("codes", sa.MetaData(), autoload_with=engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(codes), [{"code": "ours", "note": "x"}])
        tracker.stop()
        run(engine, "INSERT INTO uses VALUES ('ours', 1), ('ours', 2)")
    assert told(cleanup.report.dependents) == {"uses": [("ours", 1), ("ours", 2)]}
    assert snapshot(engine) == before


@on("postgresql+psycopg", "postgresql+psycopg2")
@pytest.mark.parametrize("action", ["", "ON DELETE CASCADE"])
@pytest.mark.parametrize("inserted_into", ["events", "events_1"])
def test_rows_in_partitions_are_found_and_counted_once(engine, action, inserted_into):
    """The partition has the key of its table too: the same row must not be two."""
    run(
        engine,
        "CREATE TABLE users (id integer PRIMARY KEY)",
        "CREATE TABLE events (id integer, day integer, user_id integer NOT NULL REFERENCES users "
        f"{action}, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20)",
        "INSERT INTO users VALUES (1)",
        "INSERT INTO events VALUES (1, 1, 1), (2, 11, 1)",
    )
    before = snapshot(engine)
    metadata = sa.MetaData()
    metadata.reflect(engine, resolve_fks=False)
    users = metadata.tables["users"]
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(users), [{"id": 2}])
        tracker.stop()
        run(engine, f"INSERT INTO {inserted_into} VALUES (3, 2, 2)")
        run(engine, "INSERT INTO events VALUES (4, 12, 2)")
    assert told(cleanup.report.dependents) == {"events": [(3, 2), (4, 12)]}
    assert snapshot(engine) == before


@on("postgresql+psycopg")
@pytest.mark.parametrize("action", ["", "ON DELETE CASCADE", "ON DELETE SET NULL"])
def test_a_partitioned_parent_and_its_partition_as_a_model(engine, action):
    run(
        engine,
        "CREATE TABLE days (id integer PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (0) TO (10)",
        f"CREATE TABLE notes (id integer PRIMARY KEY, day integer REFERENCES days {action})",
        "INSERT INTO days VALUES (1)",
        "INSERT INTO notes VALUES (1, 1)",
    )
    before = snapshot(engine)
    partition = sa.Table("days_1", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(partition), [{"id": 2}])
        tracker.stop()
        run(engine, "INSERT INTO notes VALUES (2, 2)")
    if "CASCADE" in action:
        assert told(cleanup.report.dependents) == {"notes": [(2,)]}
    else:
        assert told(cleanup.report.detached) == {"notes": [(2,)]}
        run(engine, "DELETE FROM notes WHERE id = 2")
    assert snapshot(engine) == before


@on("postgresql+psycopg")
@pytest.mark.parametrize("action", ["", "ON DELETE SET NULL"])
def test_a_row_of_a_partition_that_stays_keeps_what_it_references(engine, action):
    """It is tracked by the name of the partition, and found by the name of its table."""
    run(
        engine,
        "CREATE TABLE users (id integer PRIMARY KEY)",
        f"CREATE TABLE days (id integer PRIMARY KEY, user_id integer REFERENCES users {action})"
        " PARTITION BY RANGE (id)",
        "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE notes (id integer PRIMARY KEY, day integer REFERENCES days_1)",
    )
    metadata = sa.MetaData()
    metadata.reflect(engine, resolve_fks=False, only=["users", "days_1"])
    tracker = tracked(
        engine,
        (metadata.tables["users"], [{"id": 1}]),
        (metadata.tables["days_1"], [{"id": 1, "user_id": 1}]),
    )
    run(engine, "INSERT INTO notes VALUES (1, 1)")
    before = snapshot(engine)
    manager = CleanupManager(tracker, protect=["notes"])
    assert left_over(manager).keys() == {("users", 1), ("days_1", 1)}
    assert snapshot(engine) == before


def test_views_and_generated_columns(engine):
    """A view that the models know is no table to clean; a generated column is nobody's value."""
    backend = engine.dialect.name
    word = "STORED" if backend != "mysql" else "PERSISTENT"
    run(
        engine,
        "CREATE TABLE people (id INTEGER PRIMARY KEY, first VARCHAR(20), "
        f"loud VARCHAR(20) GENERATED ALWAYS AS (upper(first)) {word})",
        "CREATE TABLE pets (id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, "
        f"twice INTEGER GENERATED ALWAYS AS (id * 2) {word}, "
        "FOREIGN KEY (owner) REFERENCES people (id))",
        "CREATE VIEW everybody AS SELECT id, first FROM people",
        "INSERT INTO people (id, first) VALUES (1, 'theirs')",
        "INSERT INTO pets (id, owner) VALUES (1, 1)",
    )
    before = snapshot(engine)
    metadata = sa.MetaData()
    people = sa.Table(
        "people",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("first", sa.String(20)),
        sa.Column("loud", sa.String(20), sa.Computed("upper(first)")),
    )
    sa.Table(
        "everybody",
        metadata,
        sa.Column("id", sa.ForeignKey("people.id"), primary_key=True),
        sa.Column("first", sa.String(20)),
    )
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(people), [{"id": 2, "first": "ours"}])
        tracker.stop()
        run(engine, "INSERT INTO pets (id, owner) VALUES (2, 2)")
    assert told(cleanup.report.dependents) == {"pets": [(2,)]}
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
def test_a_key_that_changes_by_cascade_takes_its_lines_along(engine):
    """The session changes a parent's key; the database changes the keys of the lines."""
    run(
        engine,
        "CREATE TABLE products (code VARCHAR(20) PRIMARY KEY)",
        "CREATE TABLE stock (product VARCHAR(20) NOT NULL, site INTEGER NOT NULL, "
        "PRIMARY KEY (product, site), "
        "FOREIGN KEY (product) REFERENCES products (code) ON UPDATE CASCADE)",
        "INSERT INTO products VALUES ('theirs')",
        "INSERT INTO stock VALUES ('theirs', 1)",
    )
    before = snapshot(engine)
    metadata = sa.MetaData()
    metadata.reflect(engine)
    products, stock = metadata.tables["products"], metadata.tables["stock"]
    with CleanupManager(ResourceTracker(engine)):
        with engine.begin() as connection:
            connection.execute(sa.insert(products), [{"code": "ours"}])
            connection.execute(sa.insert(stock), [{"product": "ours", "site": 1}])
        with engine.begin() as connection:
            connection.execute(
                sa.update(products).where(products.c.code == "ours").values(code="renamed")
            )
    assert snapshot(engine) == before


def test_a_table_that_was_dropped_is_not_asked_for_its_rows(engine):
    """A suite that makes and drops its tables in every test has to pay for nothing more."""
    items = sa.Table("items", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    items.create(engine)
    tracker = ResourceTracker(engine)
    sent = []
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(items), [{"id": number} for number in range(1, 101)])
        items.drop(engine)
        sa.event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    assert cleanup.report.already_gone == dict.fromkeys(cleanup.report.already_gone, 100)
    assert sum(cleanup.report.already_gone.values()) == 100
    assert len(tracker) == 0
    assert not [sql for sql in sent if "DELETE" in sql]
