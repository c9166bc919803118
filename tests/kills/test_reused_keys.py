"""SQLite gives keys again: what has one of ours by the time of the sweep may be a stranger's."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.bystanders import Bystanders
from kills.children import Stepper
from kills.owners import entries
from kills.tables import Base, Currency, Note
from tidyrows import CleanupError, CleanupManager, Ledger, ResourceTracker, sweep

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(sqlite_engine):
    Base.metadata.create_all(sqlite_engine)
    Ledger(sqlite_engine).install()
    return sqlite_engine


@pytest.fixture
def bystanders(engine):
    return Bystanders(engine)


@pytest.fixture
def worker(engine, bystanders):
    """It has rows that stay below the keys that come back."""
    made = Stepper(engine.url)
    made("create")
    yield made
    made.end()


def strangers(bystanders, keys):
    """They take keys, and SQLite gives them the same ones as ours were."""
    bystanders.insert(Currency, {"code": "EUR", "text": "theirs"})
    bystanders.insert(Note, *({"text": "theirs"} for _ in keys))
    theirs = [row[0] for row in bystanders.expected["main.notes"] if row[1] == "theirs"]
    assert theirs == keys


def test_a_key_that_came_back_after_a_kill_is_not_swept(engine, worker, bystanders):
    keys = worker("flush", "EUR")
    worker.end()
    strangers(bystanders, keys)
    sweep(engine.url)
    bystanders.assert_untouched()


def test_a_key_that_came_back_after_a_rollback_is_not_swept(engine, worker, bystanders):
    keys = worker("flush", "EUR")
    worker("roll_back")
    worker("create", "USD")  # entered, and its notes have the keys
    worker("delete", "USD")
    worker.end()
    with engine.connect() as connection:
        assert connection.scalars(sa.select(Note.id)).all() == []
    strangers(bystanders, [1, 2, 3])
    assert keys == [4, 5, 6]
    sweep(engine.url)
    bystanders.assert_untouched()


def test_a_key_that_came_back_after_an_ordinary_cleanup_is_not_swept(engine, worker, bystanders):
    worker("create", "EUR")
    assert worker("cleanup")["deleted"] == 9
    worker.end()
    strangers(bystanders, [1, 2, 3])
    sweep(engine.url)
    bystanders.assert_untouched()


def test_a_key_that_came_back_behind_the_worker_is_not_swept_and_said(engine, worker, bystanders):
    """The ledger knows what our rows looked like."""
    keys = worker("create", "EUR")
    outside = sa.create_engine(engine.url)
    with outside.begin() as connection:  # the application deletes our rows
        connection.execute(sa.delete(Note).where(Note.id.in_(keys)))
        connection.execute(sa.delete(Currency))
    strangers(bystanders, keys)
    worker.end()
    with pytest.raises(CleanupError, match="identity uncertain") as caught:
        sweep(engine.url)
    assert sorted(str(each.row.key[0]) for each in caught.value.leftovers) == ["4", "5", "6", "EUR"]
    with engine.connect() as connection:
        assert connection.scalars(sa.select(Note.text)).all() == ["theirs"] * 3
        assert connection.scalars(sa.select(Currency.text)).all() == ["theirs"]
    with outside.begin() as connection:
        connection.execute(sa.delete(Note))
        connection.execute(sa.delete(Currency))
    outside.dispose()
    sweep(engine.url, patience=0)
    assert entries(engine) == []


def test_what_a_sweep_could_not_delete_is_the_next_ones_at_once(engine, worker, bystanders):
    """The first has ended in order: nobody need wait for its heart to have stopped."""
    (key, *_rest) = worker("create")
    with engine.begin() as connection:
        connection.execute(sa.delete(Note).where(Note.id == key))
    bystanders.insert(Note, {"id": key, "text": "theirs"})
    worker.end()
    with pytest.raises(CleanupError):
        sweep(engine.url)
    with engine.begin() as connection:
        connection.execute(sa.delete(Note).where(Note.id == key))
    sweep(engine.url)
    assert entries(engine) == []


def test_rows_that_were_told_are_ours_under_keys_that_came_back(engine):
    """A delete through the session, which nobody has looked at since, does not hide them."""
    outside = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine, ledger=Ledger(engine))
    with CleanupManager(tracker) as cleanup:
        with orm.Session(engine) as session:
            mine = [Note(text="ours") for _ in range(4)]
            session.add_all(mine)
            session.commit()
            for each in mine[2:]:
                session.delete(each)
            session.commit()
        with outside.begin() as connection:
            connection.execute(sa.insert(Note), [{"text": "told"}] * 2)
        tracker.track_rows(Note, [3, 4])
    assert cleanup.report.total_deleted == 4
    with outside.connect() as connection:
        assert connection.scalars(sa.select(Note.text)).all() == []
    outside.dispose()
