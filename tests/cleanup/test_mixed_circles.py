"""Circles of rows whose foreign keys have different ON DELETE actions.

Found by the property tests: a CASCADE around a circle comes back to a row that another key of the
circle still needs, and then the MySQL family refuses the whole DELETE.
"""

from __future__ import annotations

import sqlalchemy as sa

from harness.blocks import reference, table
from harness.bystanders import Bystanders
from harness.loops import insert_loop
from harness.pairs import pairwise
from harness.targets import DEFAULT
from tidyrows import CleanupManager, ResourceTracker


def a_and_b(engine: sa.Engine, to_b: str | None, to_a: str | None) -> tuple[sa.Table, sa.Table]:
    """Two tables that reference each other; what a table ``b`` holds may be NULL."""
    metadata = sa.MetaData()
    a = table(metadata, "a", reference("b_id", "b.id", ondelete=to_b, use_alter=True))
    b = table(metadata, "b", reference("a_id", "a.id", nullable=True, ondelete=to_a))
    metadata.create_all(engine)
    return a, b


@pairwise(
    database=DEFAULT,
    to_a=[None, "RESTRICT", "CASCADE", "SET NULL"],
    to_b=[None, "RESTRICT", "CASCADE"],
)
def test_a_circle_goes_whatever_its_actions_and_every_row_is_counted(engine, to_b, to_a):
    a, b = a_and_b(engine, to_b, to_a)
    with engine.begin() as connection:
        insert_loop(connection, (a, [{"id": 1, "b_id": 1}]), (b, [{"id": 1, "a_id": 1}]))
    bystanders = Bystanders(engine)
    with engine.begin() as connection:
        insert_loop(connection, (a, [{"id": 2, "b_id": 2}]), (b, [{"id": 2, "a_id": 2}]))
    with engine.begin() as connection:  # one more row that needs the circle
        connection.execute(sa.insert(a).values(id=3, b_id=2))
    tracker = ResourceTracker(engine)
    tracker.track_rows(a, [2, 3])
    tracker.track_rows(b, [2])
    report = CleanupManager(tracker).cleanup()
    assert {name.name: count for name, count in report.deleted.items()} == {"a": 2, "b": 1}
    assert report.already_gone == {}
    bystanders.assert_untouched()


def test_a_circle_of_cascades_that_cannot_be_opened_goes_by_its_cascade(engine):
    """NOT NULL all around: on the MySQL family one DELETE takes it whole, uncounted."""
    metadata = sa.MetaData()
    nodes = table(metadata, "nodes", reference("next_id", "nodes.id", ondelete="CASCADE"))
    metadata.create_all(engine)
    with engine.begin() as connection:
        insert_loop(connection, (nodes, [{"id": 1, "next_id": 1}]))
    bystanders = Bystanders(engine)
    with engine.begin() as connection:
        insert_loop(connection, (nodes, [{"id": 2, "next_id": 3}, {"id": 3, "next_id": 2}]))
    tracker = ResourceTracker(engine)
    tracker.track_rows(nodes, [2, 3])
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted + sum(report.already_gone.values()) == 2
    bystanders.assert_untouched()
