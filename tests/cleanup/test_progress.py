"""How far a cleanup is: who listens is told of every transaction, and never in its way."""

from __future__ import annotations

import io
import sys
from itertools import pairwise

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.blocks import FORBIDDEN, insert, left_over, reference, refuse_deletes, table, tracked
from harness.bystanders import Bystanders
from tidyrows import CleanupError, CleanupManager, Progress, ResourceTracker, progress_bar


@pytest.fixture
def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child


def ours(parent, child, numbers=range(2, 37)):
    return (
        (parent, [{"id": n} for n in numbers]),
        (child, [{"id": n, "parent_id": n} for n in numbers]),
    )


def in_steps(tracker, listener, **options):
    return CleanupManager(tracker, rows_per_transaction=10, on_progress=listener, **options)


def assert_rises(told, total):
    """From nothing to everything, in steps of at most a transaction, and finished once."""
    assert (told[0], told[-1]) == (Progress(0, total), Progress(total, total, finished=True))
    assert {each.total for each in told} == {total}
    assert [each.finished for each in told] == [*[False] * (len(told) - 1), True]
    steps = [later.done - earlier.done for earlier, later in pairwise(told[:-1])]
    assert all(0 < step <= 10 for step in steps)
    assert sum(steps) == total


def test_progress_rises_from_nothing_to_all_rows_one_transaction_at_a_time(engine, family):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    told = []
    report = in_steps(tracker, told.append).cleanup()
    assert report.total_deleted == 70
    assert_rises(told, 70)
    assert len(told) == 2 + 7
    bystanders.assert_untouched()


def test_each_step_is_told_after_its_commit(database, engine, family):
    """A listener that looks, on a connection of its own, finds the rows gone."""
    tracker = tracked(engine, *ours(*family))
    outside = database.engine()
    left = []

    def look(progress):
        with outside.connect() as connection:
            rows = sum(
                connection.scalar(sa.select(sa.func.count()).select_from(each)) for each in family
            )
        left.append((progress.total - progress.done, rows - 2))

    in_steps(tracker, look).cleanup()
    assert len(left) == 9
    assert all(said == there for said, there in left)


def test_rows_that_are_given_up_count_as_done(engine, family):
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    refuse_deletes(engine, child, [7, 20])
    told = []
    left = left_over(in_steps(tracker, told.append))
    assert set(left) == {(name, n) for name in ("parents", "children") for n in (7, 20)}
    assert_rises(told, 70)
    told.clear()
    left_over(in_steps(tracker, told.append))
    assert_rises(told, 4)


def test_the_same_listener_is_told_of_each_cleanup_anew(engine, family):
    told = []
    tracker = tracked(engine, *ours(*family, range(2, 6)))
    manager = in_steps(tracker, told.append)
    manager.cleanup()
    assert told == [Progress(0, 8), Progress(8, 8), Progress(8, 8, finished=True)]
    told.clear()
    manager.cleanup()
    assert told == [Progress(0, 0), Progress(0, 0, finished=True)]


def test_nothing_to_do_begins_and_finishes(engine):
    told = []
    in_steps(ResourceTracker(engine), told.append).cleanup()
    assert told == [Progress(0, 0), Progress(0, 0, finished=True)]


def test_the_rows_of_all_databases_are_counted_together(engine, family, tmp_path):
    parent, child = family
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    metadata = sa.MetaData()
    elsewhere = table(metadata, "elsewhere")
    metadata.create_all(other)
    told = []
    with orm.Session(binds={parent: engine, child: engine, elsewhere: other}) as session:
        tracker = ResourceTracker(session)
        tracker.start()
        for each, rows in (*ours(parent, child), (elsewhere, [{"id": n} for n in range(25)])):
            session.execute(sa.insert(each), rows)
        session.commit()
        tracker.stop()
        assert len(tracker) == 95
        assert in_steps(tracker, told.append).cleanup().total_deleted == 95
    other.dispose()
    assert_rises(told, 95)


class BrokenListenerError(Exception):
    """What goes wrong in a test's own listener."""


def breaks_at(number, error=BrokenListenerError):
    """A listener that raises the so-manieth time, and what it was told."""
    told = []

    def listener(progress):
        told.append(progress)
        if len(told) == number:
            raise error("the screen is gone")

    return listener, told


@pytest.mark.parametrize("number", [1, 3, 9], ids=["at once", "midway", "at the end"])
def test_a_listener_that_breaks_stops_no_delete_and_its_error_surfaces(engine, family, number):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    listener, told = breaks_at(number)
    manager = in_steps(tracker, listener)
    with pytest.raises(BrokenListenerError, match="the screen is gone"):
        manager.cleanup()
    assert len(told) == number
    assert manager.report.total_deleted == 70
    assert len(tracker) == 0
    bystanders.assert_untouched()


def test_the_error_of_a_listener_is_a_note_where_rows_are_left_over(engine, family):
    parent, child = family
    tracker = tracked(engine, *ours(parent, child))
    refuse_deletes(engine, child, [7])
    listener, told = breaks_at(2)
    with pytest.raises(CleanupError, match=FORBIDDEN) as caught:
        in_steps(tracker, listener).cleanup()
    assert len(caught.value.leftovers) == len(tracker) == 2
    assert [note for note in caught.value.__notes__ if "the screen is gone" in note]
    assert len(told) == 2


@pytest.mark.parametrize("number", [1, 3, 9], ids=["at once", "midway", "at the end"])
def test_an_interrupt_in_a_listener_passes_through(engine, family, number):
    """What is not deleted by then stays tracked: the next cleanup goes on."""
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *ours(*family))
    listener, told = breaks_at(number, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        in_steps(tracker, listener).cleanup()
    assert len(told) == number
    assert len(tracker) == {1: 70, 3: 50, 9: 0}[number]
    CleanupManager(tracker).cleanup()
    assert len(tracker) == 0
    bystanders.assert_untouched()


# --- the bar


def test_a_bar_is_drawn_from_the_first_transaction_to_the_last(engine, family):
    screen = io.StringIO()
    tracker = tracked(engine, *ours(*family))
    bar = progress_bar(file=screen, mininterval=0, leave=True)
    in_steps(tracker, bar).cleanup()
    drawn = screen.getvalue()
    assert "cleanup" in drawn
    assert "10/70" in drawn
    assert "70/70" in drawn
    assert drawn.endswith("\n")  # closed: what is printed next has a line of its own


def test_a_bar_goes_when_the_cleanup_ends_unless_it_shall_stay(engine, family):
    screen = io.StringIO()
    tracker = tracked(engine, *ours(*family))
    in_steps(tracker, progress_bar(file=screen, mininterval=0)).cleanup()
    *_, wiped, end = screen.getvalue().split("\r")
    assert not wiped.strip()
    assert not end


def test_a_bar_serves_one_cleanup_after_the_other():
    screen = io.StringIO()
    bar = progress_bar(file=screen, mininterval=0, leave=True, desc="tidying")
    for total in (30, 50):
        for done in range(0, total, 10):
            bar(Progress(done, total))
        bar(Progress(total, total, finished=True))
    drawn = screen.getvalue()
    assert drawn.count("\n") == 2
    assert "tidying: 100%" in drawn
    assert "30/30" in drawn
    assert "50/50" in drawn


def test_a_bar_follows_a_total_that_grows():
    screen = io.StringIO()
    bar = progress_bar(file=screen, mininterval=0, leave=True)
    for progress in (Progress(10, 20), Progress(30, 30), Progress(30, 30, finished=True)):
        bar(progress)
    assert "30/30" in screen.getvalue()


def test_a_cleanup_of_one_transaction_draws_nothing(engine, family):
    screen = io.StringIO()
    tracker = tracked(engine, *ours(*family))
    bar = progress_bar(file=screen, mininterval=0)
    CleanupManager(tracker, on_progress=bar).cleanup()
    CleanupManager(tracker, on_progress=bar).cleanup()  # nothing is left
    assert screen.getvalue() == ""


def test_without_tqdm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        progress_bar()
    assert 'pip install "tidyrows[progress]"' in str(raised.value)
    assert raised.value.name.partition(".")[0] == "tqdm"
