"""A row that stays though its DELETE said nothing: the cause has the name of what keeps it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import insert, left_over, table, tracked
from harness.bystanders import Bystanders
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker

postgresql = on("postgresql+psycopg", "postgresql+psycopg2")
FUNCTION = "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$"


@pytest.fixture
def things(engine):
    metadata = sa.MetaData()
    found = table(metadata, "things", sa.Column("note", sa.String(20)))
    metadata.create_all(engine)
    insert(engine, (found, [{"id": 1, "note": "theirs"}]))
    return found


def run(engine, *statements):
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


KEEPERS = {
    "trigger": (
        FUNCTION.format("RETURN NULL;"),
        'CREATE TRIGGER "keep it" BEFORE DELETE ON things FOR EACH ROW EXECUTE FUNCTION keep()',
        'trigger "keep it"',
    ),
    "soft delete": (
        FUNCTION.format("UPDATE things SET note = 'gone' WHERE id = OLD.id; RETURN NULL;"),
        (
            "CREATE TRIGGER soft BEFORE UPDATE OR DELETE ON things FOR EACH ROW "
            "WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION keep()"
        ),
        'trigger "soft"',
    ),
    "rule": (
        "SELECT 1",
        "CREATE RULE stays AS ON DELETE TO things DO INSTEAD NOTHING",
        'rule "stays"',
    ),
}


@postgresql
@pytest.mark.parametrize("keeper", KEEPERS)
def test_on_postgresql(engine, things, keeper):
    first, second, name = KEEPERS[keeper]
    tracker = tracked(engine, (things, [{"id": 2, "note": "ours"}]))
    run(
        engine,
        FUNCTION.replace("keep()", "other()").format("RETURN OLD;"),
        "CREATE TRIGGER afterwards AFTER DELETE ON things FOR EACH ROW EXECUTE FUNCTION other()",
        first,
        second,
    )
    left = left_over(CleanupManager(tracker))
    assert "raised nothing" in left["things", 2]
    assert left["things", 2].endswith(f"({name})")


@on("sqlite")
def test_on_sqlite(engine, things):
    tracker = tracked(engine, (things, [{"id": 2, "note": "ours"}]))
    bystanders = Bystanders(engine)
    run(
        engine,
        "CREATE TRIGGER later AFTER DELETE ON things BEGIN SELECT 1; END",
        'CREATE TRIGGER "keep it" BEFORE DELETE ON things BEGIN SELECT RAISE(IGNORE); END',
        "CREATE TRIGGER updates BEFORE UPDATE ON things BEGIN SELECT 1; END",
    )
    left = left_over(CleanupManager(tracker))
    assert left["things", 2].endswith('(trigger "keep it")')
    bystanders.assert_untouched()


@postgresql
@pytest.mark.parametrize("by", ["role", "session variable"])
def test_row_level_security_is_named(database, by):
    """The role of the cleanup is shown no row, or no row any more."""
    owner = database.engine()
    metadata = sa.MetaData()
    things = table(metadata, "things", sa.Column("note", sa.String(20)))
    metadata.create_all(owner)
    name = f"reader_{owner.url.database}"[:60]
    policy = "false" if by == "role" else "note = current_setting('app.tenant', true)"
    run(owner, f"CREATE ROLE {name} LOGIN", f"GRANT ALL ON things TO {name}")
    try:
        run(
            owner,
            "ALTER TABLE things ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY tenants ON things USING ({policy})",
        )
        insert(owner, (things, [{"id": 1, "note": "theirs"}, {"id": 2, "note": "ours"}]))
        restricted = sa.create_engine(owner.url.set(username=name), poolclass=sa.NullPool)
        tracker = ResourceTracker(restricted)
        tracker.track_rows(things, [2])
        left = left_over(CleanupManager(tracker))
        assert 'policy "tenants"' in left["things", 2]
        with owner.connect() as connection:
            assert sorted(connection.scalars(sa.select(things.c.id))) == [1, 2]
    finally:
        run(owner, f"DROP OWNED BY {name}", f"DROP ROLE {name}")
