"""Rows that the tracker is told of, and what it says when it is told nonsense."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness.bystanders import Bystanders
from harness.models import Currency, Org
from tidyrows import (
    CleanupManager,
    KeyShapeError,
    NotBoundError,
    ResourceTracker,
    SessionStateError,
)


def test_an_object_that_is_tracked_and_then_rolled_back_is_nobodys_row(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with Session(zoo_engine) as session:
            currency = Currency(code="XTS", name="ours")
            session.add(currency)
            session.flush()
            tracker.track(currency)
            session.rollback()
        bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
    bystanders.assert_untouched()


def test_mine_works_on_rows_that_came_by_json(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with tracker_block(tracker), Session(zoo_engine) as session:
        session.add(Org(name="ours"))
        session.commit()
    other = ResourceTracker.from_json(tracker.to_json(), zoo_engine)
    with Session(zoo_engine) as session:
        assert [org.name for org in session.scalars(sa.select(Org).where(other.mine(Org)))] == [
            "ours"
        ]
    assert CleanupManager(other).cleanup().total_deleted == 1


class tracker_block:  # noqa: N801 -- reads as a with statement does
    def __init__(self, tracker):
        self.tracker = tracker

    def __enter__(self):
        return self.tracker.start()

    def __exit__(self, *error):
        self.tracker.stop()


def test_mine_takes_more_rows_than_a_statement_has_parameters(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    tracker.track_rows(Org, range(1, 70_001))
    with zoo_engine.connect() as connection:
        assert connection.scalars(sa.select(Org.id).where(tracker.mine(Org))).all() == []


def test_a_scoped_sessions_transaction_from_before_the_block_is_the_callers(zoo_engine):
    registry = scoped_session(sessionmaker(zoo_engine))
    registry.execute(sa.select(Org)).all()
    tracker = ResourceTracker(registry)
    cleanup = CleanupManager(tracker)
    with pytest.raises(SessionStateError, match="began before the block"), cleanup:
        registry.add(Org(name="ours"))
        registry.flush()
    assert registry.scalars(sa.select(Org.name)).all() == ["ours"]
    registry.rollback()
    registry.remove()
    cleanup.cleanup()


@pytest.mark.parametrize("keys", [5, "12", b"12", None])
def test_one_value_instead_of_a_list_of_keys_is_said(zoo_engine, keys):
    with pytest.raises(KeyShapeError, match="a list of keys"):
        ResourceTracker(zoo_engine).track_rows(Org, keys)


def test_a_manager_of_something_else_than_a_tracker_is_said(sqlite_engine):
    with pytest.raises(NotBoundError, match="ResourceTracker"):
        CleanupManager(sqlite_engine)
