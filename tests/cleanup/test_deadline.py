"""`deadline=` is the longest time, and what can be deleted in that time is deleted.

Each statement takes a second of the policy's clock.
"""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from harness.blocks import left_over, reference, table, tracked
from tidyrows import CleanupManager, RetryPolicy
from tidyrows.cleanup.reasons import LeftoverKind

TABLES = 30
LONGER = 12
"""Statements after the deadline: those of a transaction that has begun before it."""


_CATALOGUE = re.compile("sqlite_master|PRAGMA|information_schema")
"""How a catalogue is read; it takes no time, and is read in few statements for all tables."""


class Clock:
    def __init__(self, engine):
        self.now = 0
        self.sent = []
        sa.event.listen(engine, "before_cursor_execute", self._tick)

    def __call__(self):
        return float(self.now)

    def _tick(self, _connection, _cursor, statement, *_more):
        self.sent.append(statement)
        self.now += not _CATALOGUE.search(statement)

    @property
    def catalogue(self):
        """How often a catalogue was read."""
        return sum(bool(_CATALOGUE.search(statement)) for statement in self.sent)


class Chain:
    """Tables that reference one another, with a row each; the last has a row that is not ours."""

    def __init__(self, engine, *, nullable):
        metadata = sa.MetaData()
        self.tables = [table(metadata, "chain0")]
        for number in range(1, TABLES):
            above = reference("above", f"chain{number - 1}.id")
            self.tables.append(table(metadata, f"chain{number}", above))
        self.foreign = table(
            metadata, "foreign", reference("chain", "chain0.id", nullable=nullable)
        )
        metadata.create_all(engine)
        self.engine = engine
        batches = [(self.tables[0], [{"id": 1}])]
        batches += [(each, [{"id": 1, "above": 1}]) for each in self.tables[1:]]
        self.tracker = tracked(engine, *batches)
        with engine.begin() as connection:
            connection.execute(sa.insert(self.foreign).values(id=1, chain=1))
        CleanupManager(self.tracker).plan()  # reads the schema

    def left(self):
        """How many of our rows are there, and the row that is not ours."""
        with self.engine.connect() as connection:
            counts = [
                connection.execute(sa.select(sa.func.count()).select_from(each)).scalar_one()
                for each in self.tables
            ]
            return sum(counts), connection.execute(sa.select(self.foreign)).all()


@pytest.mark.parametrize("deadline", [25, 40, 60])
@pytest.mark.parametrize("nullable", [True, False], ids=["detached", "deleted"])
def test_what_can_be_deleted_in_time_is_deleted(database, deadline, nullable):
    engine = database.engine()
    chain = Chain(engine, nullable=nullable)
    clock = Clock(engine)
    policy = RetryPolicy(clock=clock, base=0.0)
    manager = CleanupManager(chain.tracker, deadline=float(deadline), retry=policy, trust_keys=True)
    left = left_over(manager)
    assert clock.now <= deadline + LONGER
    assert clock.catalogue <= 2
    sa.event.remove(engine, "before_cursor_execute", clock._tick)
    kinds = {each.kind for each in manager.report.leftovers}
    ours, foreign = chain.left()
    assert kinds <= {LeftoverKind.LATE, LeftoverKind.REFUSED}
    assert ours == len(left) == len(chain.tracker) == TABLES - manager.report.total_deleted
    assert manager.report.total_deleted >= deadline // 10
    assert foreign == [(1, 1)]  # ours that it references is there yet
    assert CleanupManager(chain.tracker).cleanup().total_deleted == ours
    assert chain.left() == (0, [(1, None)] if nullable else [])
