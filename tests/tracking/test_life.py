"""A tracker's life: started or not, stopped in any order, forgotten; it leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness.bystanders import snapshot
from harness.models import Org
from tidyrows import CleanupManager, ResourceTracker, SessionStateError
from tidyrows.capture.ownership import entered_sinks
from tidyrows.tracking.tracker import current_tracker


def insert_one(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Org).values(name="ours"))


def test_a_tracker_that_was_never_started_hears_nothing_and_cleans_what_it_was_told(zoo_engine):
    insert_one(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    insert_one(zoo_engine)
    assert (len(tracker), bool(tracker)) == (0, True)
    assert CleanupManager(tracker).cleanup().total_deleted == 0
    tracker.stop()
    assert tracker.track_query(sa.select(Org)) == 2
    assert CleanupManager(tracker).cleanup().total_deleted == 2


def test_starting_twice_is_an_error_that_says_what_to_do(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with pytest.raises(SessionStateError, match="one ResourceTracker per block"):
            tracker.start()
        insert_one(zoo_engine)
        assert len(tracker) == 1
    assert not tracker.active


def test_stopping_twice_is_harmless_and_it_may_be_started_again(zoo_engine):
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    for rounds in (1, 2):
        tracker.start()
        assert current_tracker() is tracker
        insert_one(zoo_engine)
        tracker.stop()
        tracker.stop()
        assert current_tracker() is None
        assert len(tracker) == rounds
    assert CleanupManager(tracker).cleanup().total_deleted == 2
    assert snapshot(zoo_engine) == before


def test_trackers_may_stop_in_any_order(zoo_engine):
    before = snapshot(zoo_engine)
    first, second, third = (ResourceTracker(zoo_engine) for _ in range(3))
    for tracker in (first, second, third):
        tracker.start()
    second.stop()
    insert_one(zoo_engine)
    third.stop()
    assert current_tracker() is first
    insert_one(zoo_engine)
    first.stop()
    insert_one(zoo_engine)
    assert entered_sinks() == ()
    assert [len(tracker) for tracker in (first, second, third)] == [1, 0, 1]
    for tracker in (first, second, third):
        CleanupManager(tracker).cleanup()
    with zoo_engine.begin() as connection:
        assert connection.execute(sa.delete(Org)).rowcount == 1
    assert snapshot(zoo_engine) == before


def count_listeners(engine: sa.Engine, *sessions: sessionmaker[Session]) -> int:
    """How many functions SQLAlchemy calls for this engine and these makers."""
    owners = (engine.dispatch, engine.dialect.dispatch, engine.pool.dispatch)
    found = sum(
        len(getattr(owner, name))
        for owner in owners
        for name in owner._event_names
        if name != "dispatch"
    )
    return found + sum(len(list(maker().dispatch.after_begin)) for maker in sessions)


def test_a_hundred_trackers_leave_no_listener_and_no_tracker_behind(zoo_engine):
    maker = sessionmaker(zoo_engine)
    registry = scoped_session(sessionmaker(zoo_engine))
    binds = [zoo_engine, maker, registry]
    for bind in binds:
        with CleanupManager(ResourceTracker(bind)):
            insert_one(zoo_engine)
            registry.remove()
    made = count_listeners(zoo_engine, maker, registry.session_factory)
    seen = []
    for number in range(100):
        tracker = ResourceTracker(binds[number % 3])
        with CleanupManager(tracker):
            with tracker.session.begin():
                tracker.session.add(Org(name="ours"))
            registry.remove()
        seen.append(weakref.ref(tracker))
    del tracker
    gc.collect()
    assert count_listeners(zoo_engine, maker, registry.session_factory) == made
    assert [ref for ref in seen if ref() is not None] == []


def test_an_engine_is_forgotten_when_its_trackers_are(zoo_database):
    engine = zoo_database.engine()
    with CleanupManager(ResourceTracker(engine)):
        insert_one(engine)
        engine.dispose()  # its pool is another one now
        insert_one(engine)
    gone = weakref.ref(engine)
    engine.dispose()
    zoo_database._engines.remove(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_a_forgotten_tracker_is_not_heard_of_again(zoo_engine):
    """Nobody holds it, nobody stopped it, and what it would have cleaned stays: no error either."""
    tracker = ResourceTracker(zoo_engine)
    insert_one(zoo_engine)
    gone = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert gone() is None
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        insert_one(zoo_engine)
    assert cleanup.report.total_deleted == 1
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Org))


@pytest.mark.parametrize("kind", ["session", "sessionmaker", "scoped_session"])
def test_sessions_that_have_begun_before_the_tracker_are_heard(zoo_engine, kind):
    """What they write after the start is ours, and commits with what came before it."""
    before = snapshot(zoo_engine)
    maker, stranger = sessionmaker(zoo_engine), sessionmaker(zoo_engine)
    registry = scoped_session(maker)
    session = registry()
    session.execute(sa.select(Org)).all()
    bind = {"session": session, "sessionmaker": maker, "scoped_session": registry}[kind]
    tracker = ResourceTracker(bind).start()
    with stranger() as other:
        other.execute(sa.select(Org)).all()
    session.add(Org(name="ours"))
    session.commit()
    tracker.stop()
    assert len(tracker) == 1
    registry.remove()
    CleanupManager(tracker).cleanup()
    assert snapshot(zoo_engine) == before


def test_sub_engines_are_their_engine(zoo_engine):
    before = snapshot(zoo_engine)
    sub = zoo_engine.execution_options(logging_token="sub")
    for bind in (zoo_engine, sub, sub.execution_options(isolation_level="SERIALIZABLE")):
        tracker = ResourceTracker(bind)
        with CleanupManager(tracker):
            for engine in (zoo_engine, sub):
                insert_one(engine)
            assert len(tracker) == 2
    assert snapshot(zoo_engine) == before


def test_a_pool_without_connections_to_keep(zoo_database):
    engine = zoo_database.engine(poolclass=sa.NullPool)
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with Session(engine) as session:
            for name in ("a", "b"):
                session.add(Org(name=name))
                session.commit()
            session.add(Org(name="rolled back"))
            session.flush()
        assert len(tracker) == 2
    assert snapshot(engine) == before


def test_a_database_in_memory(zoo_database):
    if zoo_database.backend != "sqlite":
        pytest.skip("only SQLite lives in memory")
    engine = sa.create_engine("sqlite://")
    Org.__table__.create(engine)
    insert_one(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        insert_one(engine)
        assert len(tracker) == 1
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Org)) == 1
    engine.dispose()
