"""The commit is the truth (promise 3): what a row's transaction did decides whether it is ours."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from harness import pip_postgresql
from harness.bystanders import Bystanders, snapshot
from harness.ledgers import sweep
from harness.models import Currency, Group, Org, User, zoo_metadata
from harness.targets import DRIVERS, on
from tidyrows import (
    CleanupManager,
    LateCommitWarning,
    ResourceTracker,
    SessionStateError,
    UntrackedRowsWarning,
)


def tracked(tracker: ResourceTracker) -> list[tuple[str, tuple[object, ...]]]:
    return [(row.table.name, row.key) for row in tracker.rows()]


def org(session: Session, name: str = "ours") -> Org:
    made = Org(name=name)
    session.add(made)
    session.flush()
    return made


def test_a_row_is_tracked_when_its_transaction_commits_and_not_before(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), Session(engine) as session:
        made = org(session)
        assert len(tracker) == 0
        session.commit()
        assert tracked(tracker) == [("orgs", (made.id,))]
    assert not snapshot(engine)[_qualified(engine, "orgs")]


def _qualified(engine: sa.Engine, table: str) -> str:
    return next(name for name in snapshot(engine) if name.endswith(f".{table}"))


def test_a_row_that_is_rolled_back_is_not_tracked_even_if_a_stranger_gets_its_key(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with Session(zoo_engine) as session:
            session.add(Currency(code="USD", name="ours"))
            session.flush()
            session.rollback()
        bystanders.insert(Currency, {"code": "USD", "name": "theirs"})
        assert len(tracker) == 0
    bystanders.assert_untouched()


# -- storage engines without transactions: a ROLLBACK does not undo what was written ---------------


def _visits(engine: sa.Engine, storage: str, **key: object) -> sa.Table:
    key = {"primary_key": True, **key}
    table = sa.Table(
        "visits",
        sa.MetaData(),
        sa.Column("id", sa.Integer, **key),  # type: ignore[arg-type]
        sa.Column("page", sa.String(20), comment=") ENGINE=InnoDB"),
        mysql_engine=storage,
    )
    table.metadata.create_all(engine)
    return table


@on(*DRIVERS["mysql"])
@pytest.mark.parametrize("storage", ["MyISAM", "Aria", "MEMORY"])
@pytest.mark.parametrize("end", ["rollback", "close", "savepoint", "raw", "killed"])
def test_a_row_that_a_rollback_does_not_undo_is_tracked(engine, storage, end):
    visits = _visits(engine, storage)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.connect() as connection:
        nested = connection.begin_nested() if end == "savepoint" else None
        connection.execute(sa.insert(visits), {"page": "/"})
        if nested is not None:
            nested.rollback()
            connection.commit()
        elif end == "raw":
            connection.exec_driver_sql("ROLLBACK")
        elif end == "killed":
            with pytest.raises(sa.exc.DBAPIError):
                connection.exec_driver_sql("KILL CONNECTION_ID()")
            connection.invalidate()
        else:
            getattr(connection, end)()
    assert cleanup.report.total_deleted == 1
    with engine.connect() as connection:
        assert connection.execute(sa.select(visits)).all() == []


@on("mysql+pymysql")
def test_a_delete_that_a_rollback_does_not_undo_is_believed(engine):
    """The key is free, so a row that has it later is a stranger's."""
    visits = _visits(engine, "MyISAM", autoincrement=False)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with engine.begin() as connection:
            connection.execute(sa.insert(visits), {"id": 1, "page": "/"})
        with engine.connect() as connection:
            connection.execute(sa.delete(visits).where(visits.c.id == 1))
            connection.rollback()
        tracker.stop()
        with engine.begin() as connection:
            connection.execute(sa.insert(visits), {"id": 1, "page": "theirs"})
    with engine.connect() as connection:
        assert connection.scalars(sa.select(visits.c.page)).all() == ["theirs"]


@on("mysql+pymysql")
def test_a_row_that_a_rollback_does_not_undo_is_swept_after_the_next_commit(
    engine, worker, outside
):
    visits = _visits(outside, "MyISAM")
    with worker:
        with worker.engine.connect() as connection:
            connection.execute(sa.insert(visits), {"page": "/"})
            connection.rollback()
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(visits), {"page": "/next"})
    worker.dies()
    assert sweep(outside).total_deleted == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_transaction_that_begins_with_returning_is_not_taken_for_autocommit(
    any_driver_zoo_engine, rows
):
    """PyMySQL is told no transaction status with rows, so the last one it knows is stale."""
    bystanders = Bystanders(any_driver_zoo_engine)
    codes = ["XXX", "XTS", "XAU"][:rows]
    with any_driver_zoo_engine.connect() as warm:
        warm.execute(sa.select(Org)).all()
        warm.commit()
    tracker = ResourceTracker(any_driver_zoo_engine)
    with CleanupManager(tracker):
        with any_driver_zoo_engine.connect() as connection:
            connection.execute(
                sa.insert(Currency)
                .values([{"code": code, "name": "ours"} for code in codes])
                .returning(Currency.name)
            ).all()
            connection.rollback()
        for code in codes:
            bystanders.insert(Currency, {"code": code, "name": "theirs"})
        assert len(tracker) == 0
    bystanders.assert_untouched()


def test_savepoints_nest_and_only_what_is_released_to_the_top_counts(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    before = snapshot(zoo_engine)
    with CleanupManager(tracker), Session(zoo_engine) as session:
        org(session, "kept")  # a write first: sqlite3 opens no transaction for a SAVEPOINT
        outer = session.begin_nested()
        org(session, "in outer")
        inner = session.begin_nested()
        org(session, "in inner")
        inner.commit()
        dropped = session.begin_nested()
        org(session, "dropped")
        dropped.rollback()
        outer.commit()
        gone = session.begin_nested()
        org(session, "gone with its savepoint")
        session.begin_nested()
        org(session, "gone with its parent")
        gone.rollback()
        session.commit()
        names = session.scalars(sa.select(Org.name).order_by(Org.id)).all()
        assert names == ["kept", "in outer", "in inner"]
        assert len(tracker) == len(names)
        session.rollback()
    assert snapshot(zoo_engine) == before


def test_a_savepoint_set_before_the_block_and_rolled_back_in_it_takes_its_rows_along(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    bystanders = Bystanders(zoo_engine)
    with zoo_engine.connect() as connection:
        connection.execute(sa.insert(Org).values(name="caller's"))
        savepoint = connection.begin_nested()
        tracker.start()
        connection.execute(sa.insert(Currency).values(code="EUR", name="ours"))
        savepoint.rollback()
        tracker.stop()
        connection.rollback()
    bystanders.insert(Currency, {"code": "EUR", "name": "theirs"})
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


def test_the_savepoint_that_sqlite_commits_by_itself_is_believed(zoo_engine):
    """Its driver opens no transaction for SAVEPOINT, so the RELEASE of the outermost commits."""
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), Session(zoo_engine) as session:
        with session.begin_nested():
            org(session)
        session.rollback()
    assert snapshot(zoo_engine) == before


@pytest.mark.parametrize("statement", ["insert", "update", "raw"])
def test_what_sqlite_commits_by_itself_is_believed_before_the_next_statement(zoo_engine, statement):
    before = snapshot(zoo_engine)
    with CleanupManager(ResourceTracker(zoo_engine)), zoo_engine.connect() as connection:
        with connection.begin_nested():
            connection.execute(sa.insert(Org).values(id=-1, name="ours"))
        if statement == "insert":
            connection.execute(sa.insert(Org).values(id=-2, name="rolled back"))
        elif statement == "update":
            connection.execute(sa.update(Group).values(name="nobody's"))
        else:
            connection.execute(
                sa.text(
                    "UPDATE groups SET name = 'nobody''s'"
                    if zoo_engine.dialect.name != "mysql"
                    else "UPDATE `groups` SET name = 'nobody''s'"
                )
            )
        connection.rollback()
    assert snapshot(zoo_engine) == before


def test_a_session_joined_into_an_outer_transaction_commits_when_that_does(zoo_engine):
    before = snapshot(zoo_engine)
    for mode in ("create_savepoint", "rollback_only", "control_fully"):
        tracker = ResourceTracker(zoo_engine)
        with CleanupManager(tracker), zoo_engine.connect() as connection:
            outer = connection.begin()
            connection.execute(sa.insert(Group).values(name="first"))
            with Session(connection, join_transaction_mode=mode) as session:
                org(session)
                session.commit()
            committed = not outer.is_active
            assert len(tracker) == (2 if committed else 0)
            if not committed:
                outer.rollback()
            assert len(tracker) == (2 if committed else 0)
        assert snapshot(zoo_engine) == before


def test_the_outer_commit_of_joined_sessions_is_what_counts(zoo_engine):
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), zoo_engine.connect() as connection, connection.begin():
        connection.execute(sa.insert(Group).values(name="first"))
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            org(session)
            session.commit()
            org(session, "never committed")
        assert len(tracker) == 0
    assert snapshot(zoo_engine) == before


def test_under_autocommit_a_row_is_ours_at_once(any_driver_zoo_engine):
    before = snapshot(any_driver_zoo_engine)
    engine = any_driver_zoo_engine.execution_options(isolation_level="AUTOCOMMIT")
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        connection.execute(sa.insert(Org).values(name="ours"))
        connection.rollback()  # undoes nothing
        assert len(tracker) == 1
    assert snapshot(any_driver_zoo_engine) == before


def test_an_engine_made_with_autocommit_is_cleaned_in_real_transactions(zoo_database):
    engine = zoo_database.engine(isolation_level="AUTOCOMMIT")
    before = snapshot(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup, Session(engine) as session:
        session.add(User(email="a@example.test", org=Org(name="ours")))
        session.commit()
    assert cleanup.report.total_deleted == 2
    assert snapshot(engine) == before


@pytest.fixture(scope="module")
def two_phase_postgresql():
    """A server of our own: most are started with max_prepared_transactions = 0."""
    engine = sa.create_engine(pip_postgresql.start())
    zoo_metadata("postgresql")[0].create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_two_phase_commit_counts_at_its_second_phase(backend, request):
    if backend == "postgresql":
        engine = request.getfixturevalue("two_phase_postgresql")
    else:
        engine = request.getfixturevalue("mysql_engine")
        zoo_metadata("mysql")[0].create_all(engine)
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(sa.insert(Org).values(name="ours"))
        transaction.prepare()
        assert len(tracker) == 0
        transaction.commit()
        assert len(tracker) == 1
        transaction = connection.begin_twophase()
        connection.execute(sa.insert(Org).values(name="rolled back"))
        transaction.prepare()
        transaction.rollback()
        assert len(tracker) == 1
    assert snapshot(engine) == before


def test_a_session_with_several_engines_is_cleaned_on_each(zoo_database, tmp_path):
    first = zoo_database.engine()
    second = sa.create_engine(f"sqlite:///{tmp_path / 'second.db'}")
    Currency.__table__.create(second)
    before = snapshot(first), snapshot(second)
    maker = sessionmaker(binds={Org: first, Currency: second})
    tracker = ResourceTracker(maker)
    with CleanupManager(tracker) as cleanup, maker() as session:
        session.add_all([Org(name="ours"), Currency(code="XTS", name="ours")])
        session.commit()
        assert len(tracker) == 2
    assert cleanup.report.total_deleted == 2
    assert (snapshot(first), snapshot(second)) == before
    second.dispose()


@pytest.mark.parametrize("kind", ["session", "sessionmaker", "scoped_session", "connection"])
def test_bound_to_sessions_a_tracker_hears_them_and_nobody_else(zoo_engine, kind):
    before = snapshot(zoo_engine)
    maker = sessionmaker(zoo_engine)
    connection = zoo_engine.connect()
    bind = {
        "session": maker,
        "sessionmaker": lambda: maker,
        "scoped_session": lambda: scoped_session(maker),
        "connection": lambda: connection,
    }[kind]()
    tracker = ResourceTracker(bind)
    with CleanupManager(tracker):
        with Session(zoo_engine) as other:
            other.add(Org(name="not heard"))
            other.commit()
        if kind == "connection":
            connection.execute(sa.insert(Org).values(name="heard"))
            connection.commit()
        else:
            session = bind() if kind != "session" else bind
            org(session, "heard")
            session.commit()
            session.close()
        assert len(tracker) == 1
    with zoo_engine.begin() as cleaner:
        assert cleaner.scalars(sa.select(Org.name)).all() == ["not heard"]
        cleaner.execute(sa.delete(Org))
    connection.close()
    assert snapshot(zoo_engine) == before


def test_a_commit_that_arrives_after_the_block_stays_tracked_and_warns(zoo_engine):
    if zoo_engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer, and the block's own cleanup would wait for it")
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    session = Session(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        org(session)
    with pytest.warns(LateCommitWarning, match="orgs"):
        session.commit()
    assert len(tracker) == 1
    cleanup.cleanup()
    assert snapshot(zoo_engine) == before
    session.close()


def test_a_warning_that_is_an_error_keeps_nothing_from_being_committed(zoo_engine, monkeypatch):
    """Raised inside the COMMIT it would leave the transaction open in the pool."""
    before = snapshot(zoo_engine)
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told_of: told.append(told_of.exc_value))
    tracker = ResourceTracker(zoo_engine)
    tracker.start()
    with zoo_engine.connect() as connection, warnings.catch_warnings():
        connection.execute(sa.insert(Org).values(name="late"))
        tracker.stop()
        warnings.simplefilter("error", LateCommitWarning)
        connection.commit()
    assert [type(each) for each in told] == [LateCommitWarning]
    assert [rows for rows in snapshot(zoo_engine).added_since(before).values() if rows]
    assert CleanupManager(tracker).cleanup().total_deleted == 1
    assert snapshot(zoo_engine) == before


def test_a_warning_of_rows_past_sqlalchemy_keeps_nothing_from_being_committed(
    zoo_engine, monkeypatch
):
    before = snapshot(zoo_engine)
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told_of: told.append(told_of.exc_value))
    with CleanupManager(ResourceTracker(zoo_engine)), warnings.catch_warnings():
        warnings.simplefilter("error")
        with zoo_engine.connect() as connection:
            connection.connection.cursor().execute("INSERT INTO orgs (name) VALUES ('raw')")
            connection.execute(sa.insert(Org).values(name="tracked"))
            connection.commit()
    assert [type(each) for each in told] == [UntrackedRowsWarning]
    (rows,) = (rows for rows in snapshot(zoo_engine).added_since(before).values() if rows)
    assert len(rows) == 1  # the raw one, committed; the other one was deleted
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Org).where(Org.name == "raw"))


def test_a_bound_session_with_an_open_transaction_from_before_is_the_callers(zoo_engine):
    with Session(zoo_engine) as session:
        session.execute(sa.select(Org)).all()
        tracker = ResourceTracker(session)
        with pytest.raises(SessionStateError, match="began before the block"):
            with CleanupManager(tracker) as cleanup:
                org(session)
        with pytest.warns(LateCommitWarning):
            session.commit()
        assert len(tracker) == 1
        assert cleanup.cleanup().total_deleted == 1


def test_what_a_bound_session_has_open_from_inside_the_block_is_rolled_back_first(zoo_engine):
    before = snapshot(zoo_engine)
    with Session(zoo_engine) as session:
        with CleanupManager(ResourceTracker(session)):
            org(session, "committed")
            session.commit()
            org(session, "left open, and holding locks")
    assert snapshot(zoo_engine) == before


def test_a_commit_announced_by_a_connection_that_is_gone_still_counts(zoo_engine):
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        session = Session(zoo_engine)
        org(session)
        session.commit()
        session.close()
        del session
        gc.collect()
        assert len(tracker) == 1
    assert snapshot(zoo_engine) == before


def test_nested_trackers_own_what_is_made_in_their_own_block(zoo_engine):
    before = snapshot(zoo_engine)
    outer, inner = ResourceTracker(zoo_engine), ResourceTracker(zoo_engine)
    with CleanupManager(outer), Session(zoo_engine) as session:
        org(session, "outer")
        session.commit()
        with CleanupManager(inner):
            org(session, "inner")
            session.commit()
            session.close()
        assert (len(outer), len(inner)) == (1, 0)
        org(session, "outer again")
        session.commit()
        assert len(outer) == 2
    assert snapshot(zoo_engine) == before


def test_an_aborted_postgresql_transaction_commits_nothing_and_says_nothing(zoo_database):
    if zoo_database.backend != "postgresql":
        pytest.skip("only PostgreSQL turns COMMIT into ROLLBACK silently")
    for driver in ("psycopg", "psycopg2"):
        engine = sa.create_engine(zoo_database.url.set(drivername=f"postgresql+{driver}"))
        bystanders = Bystanders(engine)
        tracker = ResourceTracker(engine)
        with CleanupManager(tracker):
            with engine.connect() as connection:
                connection.execute(sa.insert(Currency).values(code="XXX", name="ours"))
                with pytest.raises(sa.exc.DBAPIError):
                    connection.execute(sa.text("SELECT 1/0"))
                connection.commit()
            bystanders.insert(Currency, {"code": "XXX", "name": "theirs"})
            assert len(tracker) == 0
        bystanders.assert_untouched()
        with engine.begin() as connection:
            connection.execute(sa.delete(Currency))
        engine.dispose()


def test_a_lost_answer_to_a_commit_never_deletes_what_may_be_a_strangers(zoo_engine):
    """The COMMIT fails on its way: a natural key is asked for and left alone, whoever has it."""
    if zoo_engine.dialect.name == "sqlite":
        pytest.skip("there is no connection to lose")
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    tracker.start()
    connection = zoo_engine.connect()
    connection.execute(sa.insert(Currency).values(code="XTS", name="ours"))
    kill(zoo_engine, connection)
    with pytest.raises(sa.exc.DBAPIError):
        connection.commit()
    connection.invalidate()
    connection.close()
    tracker.stop()
    bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
    cleanup = CleanupManager(tracker)
    with pytest.raises(Exception, match="answer to its COMMIT was lost"):
        cleanup.cleanup()
    bystanders.assert_untouched()


def kill(engine: sa.Engine, connection: sa.Connection) -> None:
    """End a connection from outside, as a server restart would."""
    if engine.dialect.name == "postgresql":
        victim = connection.connection.driver_connection.info.backend_pid
        statement = f"SELECT pg_terminate_backend({victim})"
    else:
        victim = connection.connection.driver_connection.thread_id()
        statement = f"KILL {victim}"
    with engine.connect() as killer:
        killer.exec_driver_sql(statement)


def test_no_warning_is_given_for_a_commit_inside_the_block(zoo_engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with CleanupManager(ResourceTracker(zoo_engine)), Session(zoo_engine) as session:
            org(session)
            session.commit()
