"""A block in which rows are made, after which exactly those are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from harness.bystanders import snapshot
from tidyrows import CleanupManager, ResourceTracker


@contextmanager
def exactly_ours(engine: sa.Engine, rows: int) -> Iterator[sa.Connection]:
    """Make rows on the connection, which is committed; they are tracked, and then cleaned.

    Args:
        engine: where; everything else in its database must be as before.
        rows: how many rows the block makes.
    """
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.connect() as connection:
            yield connection
            connection.commit()
        assert len(tracker) == rows
        made = snapshot(engine).added_since(before)
        assert sum(map(len, made.values())) == rows
    assert cleanup.report.total_deleted == rows
    assert snapshot(engine) == before
