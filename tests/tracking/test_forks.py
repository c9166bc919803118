"""After a fork the child owns nothing and cleans nothing; what it starts anew works."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.models import Currency, Org
from tidyrows import CleanupManager, NoSessionError, ResourceTracker, TrackedFactory
from tidyrows.tracking.tracker import current_tracker

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]
WAIT = 30


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = "ours"


def in_child(work: Callable[[], Any]) -> None:
    """Run something in a forked child; what it raises fails the test here."""
    pid = os.fork()
    if pid == 0:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                work()
        except BaseException:  # noqa: BLE001 -- the child must not go on as a second pytest
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _pid, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed; its traceback is in stderr"


def insert_one(engine: sa.Engine, name: str = "ours") -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Org).values(name=name))


def test_a_child_owns_nothing_and_cleans_nothing(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert_one(engine)
        tracker.track_rows(Org, [])
        assert len(tracker) == 1
        (row,) = tracker.rows()
        there = snapshot(engine)
        engine.dispose()  # mysqlclient says goodbye on the parent's socket, close=False or not

        def child() -> None:
            assert (len(tracker), bool(tracker), tracker.active) == (0, True, False)
            assert list(tracker.rows()) == []
            assert "not ours" in tracker.explain(row)
            assert current_tracker() is None
            with pytest.raises(NoSessionError):
                OrgFactory()
            assert cleanup.cleanup().total_deleted == 0
            tracker.stop()
            cleanup.__exit__(None, None, None)
            insert_one(engine, "the child's")
            with Session(engine) as session:
                assert session.scalars(sa.select(Org.name).order_by(Org.id)).all()[0] == "ours"
                session.execute(sa.delete(Org).where(Org.name == "the child's"))
                session.commit()
            engine.dispose()

        in_child(child)
        assert snapshot(engine) == there
        insert_one(engine)
        assert len(tracker) == 2
    assert cleanup.report.total_deleted == 2
    assert snapshot(engine) == before


def test_a_new_tracker_in_the_child_works_and_the_parents_rows_stay(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert_one(engine)
        there = snapshot(engine)
        engine.dispose()

        def child() -> None:
            own = ResourceTracker(engine)
            with CleanupManager(own) as of_child:
                insert_one(engine)
                OrgFactory()
                assert len(own) == 2
            assert of_child.report.total_deleted == 2
            engine.dispose()

        in_child(child)
        assert snapshot(engine) == there
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


@pytest.mark.parametrize("started", [True, False], ids=["started", "not started"])
def test_the_parents_tracker_started_anew_in_the_child_forgets_the_parents_rows(
    zoo_engine, started
):
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        insert_one(zoo_engine)
        assert len(tracker) == 1
        if not started:
            tracker.stop()
        there = snapshot(zoo_engine)

        def child() -> None:
            zoo_engine.dispose(close=False)
            with CleanupManager(tracker) as of_child:
                assert len(tracker) == 0
                insert_one(zoo_engine)
                assert len(tracker) == 1
            assert of_child.report.total_deleted == 1
            zoo_engine.dispose()

        in_child(child)
        assert snapshot(zoo_engine) == there
    assert cleanup.report.total_deleted == 1
    assert snapshot(zoo_engine) == before


def test_what_is_pending_at_the_fork_stays_the_parents(zoo_engine):
    """A COMMIT announced, a transaction open: the child must not believe either of them."""
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with Session(zoo_engine) as session:
            session.add(Currency(code="XTS", name="ours"))
            session.flush()

            def child() -> None:
                zoo_engine.dispose(close=False)
                own = ResourceTracker(zoo_engine)
                with CleanupManager(own) as of_child:
                    assert len(own) == 0
                assert of_child.report.total_deleted == 0
                zoo_engine.dispose()

            in_child(child)
            session.rollback()
        bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
        assert len(tracker) == 0
    bystanders.assert_untouched()


def _in_process(url: str, queue: Any) -> None:
    engine = sa.create_engine(url)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert_one(engine)
        count = len(tracker)
    queue.put((count, cleanup.report.total_deleted))
    engine.dispose()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_have_trackers_of_their_own(zoo_engine, method):
    before = snapshot(zoo_engine)
    context = multiprocessing.get_context(method)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        insert_one(zoo_engine)
        queue = context.Queue()
        url = zoo_engine.url.render_as_string(hide_password=False)
        processes = [context.Process(target=_in_process, args=(url, queue)) for _ in range(2)]
        for process in processes:
            process.start()
        results = [queue.get(timeout=WAIT) for _ in processes]
        for process in processes:
            process.join(WAIT)
        queue.close()
        assert results == [(1, 1), (1, 1)]
        assert len(tracker) == 1
    assert snapshot(zoo_engine) == before
