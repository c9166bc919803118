"""Whose is a row? The context decides; in a thread without one, it depends on who listens."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness.bystanders import snapshot
from harness.models import Currency, Group, Org
from tidyrows import CleanupManager, ResourceTracker, TrackedFactory, UntrackedRowsWarning
from tidyrows.capture.changes import Inserted
from tidyrows.capture.ownership import entered

WAIT = 20
"""Seconds after which a thread that has not come back is a failure, never a hang."""


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Sequence(lambda n: f"org {n}")


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(WAIT)


def insert_one(engine: sa.Engine, name: str = "ours") -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Org).values(name=name))


def test_a_thread_without_a_context_belongs_to_the_only_tracker(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        in_thread(lambda: insert_one(engine))
        assert len(tracker) == 1
    assert snapshot(engine) == before


def test_with_two_trackers_nobody_owns_it_and_that_is_said(zoo_engine):
    outer, inner = ResourceTracker(zoo_engine), ResourceTracker(zoo_engine)
    with pytest.warns(UntrackedRowsWarning, match="scoped_to"):
        with CleanupManager(outer), CleanupManager(inner):
            in_thread(lambda: insert_one(zoo_engine))
            assert (len(outer), len(inner)) == (0, 0)
    with zoo_engine.begin() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Org)) == 1
        connection.execute(sa.delete(Org))


def test_scoped_to_says_whose_it_is(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    outer, inner = ResourceTracker(engine), ResourceTracker(engine)
    with CleanupManager(outer), CleanupManager(inner):
        in_thread(lambda: OrgFactory.scoped_to(outer).create_batch(2))
        in_thread(lambda: OrgFactory.scoped_to(inner).create())
        assert (len(outer), len(inner)) == (2, 1)
    assert snapshot(engine) == before


def test_factories_in_eight_threads_at_once(any_driver_zoo_engine):
    """Each thread has a session of its own: a Session is no thing for two threads."""
    engine = any_driver_zoo_engine
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    together = threading.Barrier(8)

    def work() -> None:
        together.wait(WAIT)
        for _ in range(5):
            OrgFactory.scoped_to(tracker).create()

    with CleanupManager(tracker) as cleanup:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work) for _ in range(8)]:
                future.result(WAIT)
        assert len(tracker) == 40
    assert cleanup.report.total_deleted == 40
    assert snapshot(engine) == before


def test_eight_threads_insert_while_another_one_counts(zoo_database):
    """Counting sorts the keys and believes COMMITs: neither may lose what comes in meanwhile."""
    engine = zoo_database.engine(pool_size=9)
    if zoo_database.backend == "sqlite":
        pytest.skip("SQLite has one writer; the keys themselves are tried below")
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    done = threading.Event()

    def work(number: int) -> None:
        with engine.connect() as connection:
            for n in range(20):
                connection.execute(sa.insert(Org).values(id=1_000_000 - 100 * n - number, name="x"))
                connection.commit() if n % 4 else connection.rollback()

    def count() -> None:
        while not done.is_set():
            assert 0 <= len(tracker) <= 120
            list(tracker.rows())
            repr(tracker)

    with CleanupManager(tracker) as cleanup:
        with ThreadPoolExecutor(9) as pool:
            counting = pool.submit(count)
            inserting = [pool.submit(work, number) for number in range(8)]
            try:
                for future in inserting:
                    future.result(WAIT)
            finally:
                done.set()
            counting.result(WAIT)
        assert len(tracker) == 8 * 15
    assert cleanup.report.total_deleted == 8 * 15
    assert snapshot(engine) == before


def test_keys_that_come_in_while_others_are_counted_are_not_lost(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    Org.__table__.create(sqlite_engine)
    with sqlite_engine.connect() as connection:
        capture = tracker.engines.capture(sqlite_engine)
        found = capture.tables.find(connection, {}, sa.insert(Org), {})
    assert found is not None
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            len(tracker)

    with ThreadPoolExecutor(5) as pool:
        counting = pool.submit(count)
        adding = [
            pool.submit(
                lambda start: [
                    tracker.store.apply(Inserted(found[0], [start - n])) for n in range(2000)
                ],
                start,
            )
            for start in (10_000, 20_000, 30_000, 40_000)
        ]
        for future in adding:
            future.result(WAIT)
        done.set()
        counting.result(WAIT)
    assert len(tracker) == 8000


def test_a_commit_under_way_is_not_believed_by_another_thread(any_driver_zoo_engine, monkeypatch):
    """The event fires before the COMMIT; until the answer is there, the row is nobody's."""
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    sending, go_on = threading.Event(), threading.Event()
    send = engine.dialect.do_commit

    def slow(dbapi_connection: Any) -> None:
        sending.set()
        assert go_on.wait(WAIT)
        send(dbapi_connection)

    with CleanupManager(tracker):
        with ThreadPoolExecutor(1) as pool:
            monkeypatch.setattr(engine.dialect, "do_commit", slow)
            committing = pool.submit(insert_one, engine)
            assert sending.wait(WAIT)
            seen = len(tracker)
            go_on.set()
            committing.result(WAIT)
            monkeypatch.undo()
        assert seen == 0
        assert len(tracker) == 1
    assert snapshot(engine) == before


def test_a_commit_on_a_connection_that_stays_open_in_another_thread_is_believed(
    any_driver_zoo_engine,
):
    """Nothing else happens on it before the cleanup, which must know of the row."""
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    committed, finished = threading.Event(), threading.Event()

    def work() -> None:
        with engine.connect() as connection:
            connection.execute(sa.insert(Org).values(name="ours"))
            connection.commit()
            committed.set()
            assert finished.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        working = None
        try:
            with CleanupManager(tracker) as cleanup:
                working = pool.submit(work)
                assert committed.wait(WAIT)
        finally:
            finished.set()
        working.result(WAIT)
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


def test_to_thread_and_tasks_inherit_the_context(zoo_engine):
    before = snapshot(zoo_engine)
    outer, inner = ResourceTracker(zoo_engine), ResourceTracker(zoo_engine)

    async def main() -> None:
        await asyncio.to_thread(insert_one, zoo_engine, "to_thread")

        async def task() -> None:
            insert_one(zoo_engine, "task")

        await asyncio.gather(task(), task())

    with CleanupManager(outer):
        with CleanupManager(inner):
            asyncio.run(main())
            assert (len(outer), len(inner)) == (0, 3)
    assert snapshot(zoo_engine) == before


def test_tasks_with_a_tracker_each_do_not_mix(zoo_engine):
    before = snapshot(zoo_engine)

    async def test_of_its_own(count: int) -> int:
        tracker = ResourceTracker(zoo_engine)
        with CleanupManager(tracker):
            for _ in range(count):
                insert_one(zoo_engine)
                await asyncio.sleep(0)
            return len(tracker)

    async def main() -> list[int]:
        return await asyncio.gather(*(test_of_its_own(count) for count in (1, 2, 3)))

    assert asyncio.run(main()) == [1, 2, 3]
    assert snapshot(zoo_engine) == before


def test_a_copied_context_owns_in_its_thread(zoo_engine):
    before = snapshot(zoo_engine)
    outer, inner = ResourceTracker(zoo_engine), ResourceTracker(zoo_engine)
    with CleanupManager(outer), CleanupManager(inner):
        context = copy_context()
        in_thread(lambda: context.run(insert_one, zoo_engine))
        with entered(outer):
            context = copy_context()
        in_thread(lambda: context.run(insert_one, zoo_engine))
        assert (len(outer), len(inner)) == (1, 1)
    assert snapshot(zoo_engine) == before


def test_a_session_in_a_thread_belongs_to_the_tracker_of_its_maker(zoo_engine):
    """Whoever else listens on the engine: the session says whose it is."""
    before = snapshot(zoo_engine)
    mine = sessionmaker(zoo_engine)
    everywhere, of_maker = ResourceTracker(zoo_engine), ResourceTracker(mine)

    def work() -> None:
        with mine() as session:
            session.add(Group(name="of the maker"))
            session.commit()

    with CleanupManager(of_maker), CleanupManager(everywhere):
        in_thread(work)
        assert (len(everywhere), len(of_maker)) == (0, 1)
    assert snapshot(zoo_engine) == before


def test_a_tracker_that_stops_in_the_middle_of_a_statement_changes_nothing_for_its_caller(
    zoo_engine,
):
    """What was added to the statement is hidden from its caller, and the rows count."""
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine).start()

    @sa.event.listens_for(zoo_engine, "before_cursor_execute", once=True)
    def stop(*_arguments: Any) -> None:
        tracker.stop()

    with zoo_engine.connect() as connection:
        result = connection.execute(
            sa.insert(Currency).returning(Currency.name),
            [{"code": "XXX", "name": "a"}, {"code": "XTS", "name": "b"}],
        )
        assert not tracker.active
        assert sorted(result.all()) == [("a",), ("b",)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            connection.commit()
    assert len(tracker) == 2
    CleanupManager(tracker).cleanup()
    assert snapshot(zoo_engine) == before


def test_trackers_that_come_and_go_while_others_commit(zoo_database):
    engine = zoo_database.engine(pool_size=6)
    if zoo_database.backend == "sqlite":
        pytest.skip("SQLite has one writer")
    before = snapshot(engine)
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            ResourceTracker(sessionmaker(engine)).start().stop()
            gc.collect(0)

    def work() -> int:
        tracker = ResourceTracker(sessionmaker(engine))
        with CleanupManager(tracker) as cleanup:
            for n in range(10):
                with tracker.session.begin():
                    tracker.session.add(Org(name=str(n)))
                with Session(engine) as other:
                    other.execute(sa.update(Group).values(name="nobody's"))
        return cleanup.report.total_deleted

    with ThreadPoolExecutor(5) as pool:
        coming = pool.submit(come_and_go)
        try:
            working = [pool.submit(work) for _ in range(4)]
            assert [future.result(WAIT) for future in working] == [10] * 4
        finally:
            done.set()
        coming.result(WAIT)
    assert snapshot(engine) == before


# -- a session that a Meta names, and its engines --------------------------------------------------


class Routing(Session):
    """Finds its engines by code of its own, as Flask-SQLAlchemy's session does."""

    engines: dict[Any, sa.Engine]

    def get_bind(self, mapper: Any = None, **_: Any) -> sa.Engine:
        return self.engines[None if mapper is None else mapper.class_]


def session_with_engines(kind: str, first: sa.Engine, second: sa.Engine) -> Any:
    if kind == "get_bind":
        own = type("Own", (Routing,), {"engines": {Org: first, Group: second, None: first}})
        return scoped_session(sessionmaker(class_=own))
    binds = {Org: first, Group: second}
    return scoped_session(sessionmaker(first, binds=binds, twophase=kind == "twophase"))


@pytest.mark.parametrize("kind", ["binds", "get_bind", "twophase", "begun"])
@pytest.mark.parametrize("way", ["named", "made"])
def test_rows_of_each_engine_of_a_session_are_the_trackers(zoo_database, kind, way):
    """The tracker is bound to one of them: which others there are shows when they are used."""
    if kind == "twophase" and zoo_database.backend != "mysql":
        pytest.skip("prepared transactions are off")
    first, second = zoo_database.engine(), zoo_database.engine()
    session = session_with_engines(kind, first, second)

    class ByMeta(TrackedFactory):
        class Meta:
            sqlalchemy_session = session if way == "named" else None
            sqlalchemy_session_factory = None if way == "named" else session
            sqlalchemy_session_persistence = "commit"
            abstract = True

        name = factory.Sequence(lambda n: f"name {n}")

    class OfFirst(ByMeta):
        class Meta:
            model = Org

    class OfSecond(ByMeta):
        class Meta:
            model = Group

    before = snapshot(first)
    if kind == "begun":
        session.connection(bind_arguments={"mapper": sa.inspect(Group)})
    for bind in (first, second, session):
        if kind == "begun" and bind is session:
            continue  # its transaction is the caller's
        with CleanupManager(ResourceTracker(bind)) as cleanup:
            OfSecond()
            OfFirst()
        session.remove()
        assert cleanup.report.total_deleted == 2
        assert snapshot(first) == before
