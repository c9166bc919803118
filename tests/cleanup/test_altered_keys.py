"""A key that nobody has seen in the database is no proof: of its row being ours, or being gone."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from harness.bystanders import snapshot
from harness.targets import on
from tidyrows import CleanupError, CleanupManager, LeftoverKind, ResourceTracker
from tidyrows.dialects import RealTable, dialect_for

ROUNDING = ("postgresql+psycopg", "mysql+pymysql")
SENT = dt.datetime(2024, 5, 6, 7, 8, 9, 654321)
STORED = SENT.replace(microsecond=0)


def readings(engine: sa.Engine) -> sa.Table:
    moment = sa.DateTime().with_variant(postgresql.TIMESTAMP(precision=0), "postgresql")
    columns = [sa.Column("at", moment, primary_key=True), sa.Column("name", sa.String(20))]
    table = sa.Table("readings", sa.MetaData(), *columns)
    table.metadata.create_all(engine)
    return table


@pytest.fixture
def unread(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user may insert rows and not select them, as far as capture knows."""
    dialect = dialect_for(engine)
    asked = dialect.resolve

    def resolve(*given: Any) -> RealTable | None:
        real = asked(*given)
        return real and dataclasses.replace(real, returns=False)

    monkeypatch.setattr(dialect, "resolve", resolve)


def insert(engine: sa.Engine, table: sa.Table, row: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(table.insert(), row)


def leftover_of(tracker: ResourceTracker) -> Any:
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker).cleanup()
    (leftover,) = caught.value.leftovers
    assert leftover.kind is LeftoverKind.ALTERED
    assert not caught.value.report.already_gone
    assert not caught.value.report.deleted
    return leftover


@pytest.mark.usefixtures("unread")
@on(*ROUNDING)
@pytest.mark.parametrize("json", [False, True])
def test_a_rounded_key_that_was_not_read_back_is_left_over(engine, json):
    table = readings(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    insert(engine, table, {"at": SENT, "name": "ours"})
    tracker.stop()
    if json:
        text = tracker.to_json()
        tracker.dismiss_leak_warning()
        tracker = ResourceTracker.from_json(text, engine)
    leftover = leftover_of(tracker)
    assert "no row has it" in leftover.cause
    assert len(tracker) == 1
    tracker.dismiss_leak_warning()


@pytest.mark.usefixtures("unread")
@on(*ROUNDING)
def test_a_key_that_the_column_stores_as_it_is_names_our_row(engine):
    table = readings(engine)
    before = snapshot(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        insert(engine, table, {"at": STORED, "name": "ours"})
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


@on(*ROUNDING)
def test_a_rounded_key_that_the_user_names_is_left_over(engine):
    table = readings(engine)
    with engine.begin() as connection:
        connection.execute(table.insert().values(at=SENT, name="ours"))
    tracker = ResourceTracker(engine)
    tracker.track_rows(table, [SENT])
    assert "no row has it" in leftover_of(tracker).cause
    tracker.dismiss_leak_warning()
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        cleanup.tracker.track_query(sa.select(table))
    assert cleanup.report.total_deleted == 1


@on(*ROUNDING)
def test_a_row_that_was_seen_under_its_key_is_already_gone(engine, outside):
    table = readings(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        with engine.begin() as connection:
            connection.execute(table.insert().values(at=SENT, name="ours"))
        with outside.begin() as application:
            application.execute(table.delete())
    assert sum(cleanup.report.already_gone.values()) == 1


TRIGGERS = {
    "postgresql": [
        """CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.id := NEW.id + 100; RETURN NEW; END $$""",
        "CREATE TRIGGER move BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION move()",
    ],
    "mysql": ["CREATE TRIGGER move BEFORE INSERT ON things FOR EACH ROW SET NEW.id = NEW.id + 100"],
    "sqlite": [
        """CREATE TRIGGER move AFTER INSERT ON things BEGIN
        UPDATE things SET id = id + 100 WHERE id = NEW.id; END"""
    ],
}


def things(engine: sa.Engine, *, trigger: bool = True) -> sa.Table:
    key = sa.Column("id", sa.Integer, primary_key=True, autoincrement=False)
    table = sa.Table("things", sa.MetaData(), key, sa.Column("name", sa.String(20)))
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in TRIGGERS[engine.dialect.name.replace("mariadb", "mysql")] * trigger:
            connection.execute(sa.DDL(statement))
    return table


@pytest.mark.usefixtures("unread")
@on(*ROUNDING)
def test_a_row_under_a_key_that_a_trigger_has_changed_may_be_somebody_elses(engine, outside):
    table = things(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    insert(engine, table, {"id": 5, "name": "ours"})
    tracker.stop()
    with outside.begin() as stranger:
        stranger.execute(table.insert().values(id=-95, name="theirs"))
    before = snapshot(outside)
    leftover = leftover_of(tracker)
    assert "may be somebody else's" in leftover.cause
    assert snapshot(outside) == before
    tracker.dismiss_leak_warning()


@on("sqlite")
@pytest.mark.parametrize("returning", [False, True])
def test_a_key_that_a_trigger_of_sqlite_moves_afterwards_is_left_over(engine, outside, returning):
    """RETURNING tells the row as it was before."""
    table = things(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    with engine.begin() as connection:
        given = table.insert().values(id=5, name="ours")
        connection.execute(given.returning(table.c.name) if returning else given).close()
    tracker.stop()
    with outside.begin() as stranger:
        stranger.execute(table.insert().values(id=-95, name="theirs"))
    before = snapshot(outside)
    assert "may be somebody else's" in leftover_of(tracker).cause
    assert snapshot(outside) == before
    tracker.dismiss_leak_warning()


@on("sqlite")
@pytest.mark.filterwarnings("ignore:A trigger of main.things inserts into others")
@pytest.mark.parametrize(
    "body",
    [
        "UPDATE things SET name = name || id WHERE id = NEW.id",
        "UPDATE others SET id = 5 WHERE id = NEW.id",
        "INSERT INTO others (id) VALUES (NEW.id)",
    ],
)
def test_a_trigger_of_sqlite_that_leaves_the_key_alone(engine, body):
    table = things(engine, trigger=False)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE others (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(f"CREATE TRIGGER t AFTER INSERT ON things BEGIN {body}; END")
    with CleanupManager(ResourceTracker(engine), trust_keys=True) as cleanup:
        insert(engine, table, {"id": 5, "name": "ours"})
    assert cleanup.report.total_deleted == 1


@on("sqlite")
@pytest.mark.parametrize(
    ("declared", "sent"),
    [
        ("INTEGER PRIMARY KEY", "5"),
        ("INTEGER PRIMARY KEY", 5.0),
        ("INT PRIMARY KEY", "5"),
        ("TEXT PRIMARY KEY", 5),
        ("NUMERIC PRIMARY KEY", "1.50"),
        ("REAL PRIMARY KEY", 5),
        ("BLOB PRIMARY KEY", "5"),
    ],
)
@pytest.mark.parametrize("options", ["", "WITHOUT ROWID"])
def test_affinity_of_sqlite_changes_no_key_that_is_compared(engine, declared, sent, options):
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE kinds (name TEXT, id {declared}) {options}")
    table = sa.Table(
        "kinds",
        sa.MetaData(),
        sa.Column("id", sa.types.NullType, primary_key=True),
        sa.Column("name", sa.String),
    )
    before = snapshot(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        with engine.begin() as connection:
            connection.execute(table.insert(), {"id": sent, "name": "ours"})
        with engine.begin() as connection:
            connection.execute(table.delete().where(table.c.id == sent))
            connection.execute(table.insert(), [{"id": sent, "name": "ours again"}])
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before
