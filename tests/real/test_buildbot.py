"""Buildbot's schema: 42 tables that nobody here wrote, on every database.

Two tables that reference each other, two that reference themselves, texts of fixed length, a JSON
type of its own, ON DELETE CASCADE and SET NULL throughout, and tables without a primary key.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.bystanders import Bystanders
from real.filler import Filler
from real.packages import borrowed
from tidyrows import CleanupManager, ResourceTracker

ROWS = 3


@pytest.fixture(scope="module")
def metadata() -> sa.MetaData:
    found: sa.MetaData = borrowed("buildbot.db.model", "buildbot").Model.metadata
    return found


@pytest.fixture
def keyed(metadata: sa.MetaData) -> list[sa.Table]:
    """The tables with a primary key, parents first."""
    tables = [table for table in metadata.sorted_tables if table.primary_key]
    assert len(tables) > 25, "Buildbot has changed: is this still the schema that we want?"
    return tables


@pytest.fixture
def keyless(metadata: sa.MetaData) -> list[sa.Table]:
    """The tables without one: what a build, a change or a user has many of."""
    tables = [table for table in metadata.sorted_tables if not table.primary_key]
    assert len(tables) > 5, "Buildbot has changed: is this still the schema that we want?"
    return tables


@pytest.fixture
def bystanders(
    engine: sa.Engine, metadata: sa.MetaData, keyed: list[sa.Table], keyless: list[sa.Table]
) -> Bystanders:
    """Strangers' rows in every table."""
    metadata.create_all(engine)
    theirs = Filler(1_000, rows=ROWS)
    with engine.begin() as connection:
        theirs.fill(connection, keyed)
        theirs.close_circles(connection)
        theirs.fill(connection, keyless)
    return Bystanders(engine)


def test_exactly_our_rows_go(engine, bystanders, keyed, keyless):
    """The rows without a key are the application's: the schema says that they go with ours."""
    application = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine)
    ours = Filler(5_000, rows=ROWS)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            ours.fill(connection, keyed)
        with engine.begin() as connection:
            ours.close_circles(connection)
        with application.begin() as connection:
            ours.fill(connection, keyless)
        tracked = {(row.table.name, row.key) for row in tracker.rows()}
        assert len(tracked) == ROWS * len(keyed)
    application.dispose()
    bystanders.assert_untouched()
    # Were a parent deleted before its children, the CASCADE would take them, uncounted.
    assert cleanup.report.already_gone == {}
    deleted = {table.name: count for table, count in cleanup.report.deleted.items()}
    assert deleted == {table.name: ROWS for table in keyed}


def test_a_rollback_leaves_nothing_to_do(engine, bystanders, keyed):
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.connect() as connection:
            Filler(5_000, rows=ROWS).fill(connection, keyed)
            connection.rollback()
        assert list(tracker.rows()) == []
    assert cleanup.report.total_deleted == 0
    bystanders.assert_untouched()


def test_rows_without_a_key_go_by_all_their_columns(engine, bystanders, keyed, keyless):
    """Those that a CASCADE has not taken already."""
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        ours = Filler(5_000, rows=ROWS)
        ours.fill(connection, keyed)
        ours.fill(connection, keyless)
    gone = {
        table.name: cleanup.report.deleted.get(table, 0) + cleanup.report.already_gone.get(table, 0)
        for table in {*cleanup.report.deleted, *cleanup.report.already_gone}
    }
    assert gone == {table.name: ROWS for table in (*keyed, *keyless)}
    bystanders.assert_untouched()
