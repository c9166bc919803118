"""COMMITs that fail, lose their answer, are never sent or persist nothing (promise 3).

A row that is not there must not be a target, since its key may be a stranger's by then; one that
is there must not be forgotten without a word.
"""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.models import Currency, Document, Group, Org, Ticket
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS, on
from tidyrows import CleanupError, CleanupManager, ResourceTracker

EVERY_DRIVER = True  # drivers differ here

WAIT = 20
XXX = {"code": "XXX", "name": "ours"}
THEIRS = {"code": "XXX", "name": "theirs"}


def tracked(tracker: ResourceTracker) -> list[Any]:
    return sorted(row.key[0] for row in tracker.rows())


def insert(source: Any, *names: str) -> None:
    for name in names:
        source.execute(sa.insert(Currency.__table__).values(code=name, name="ours"))


# --- the answer is lost: the COMMIT was carried out, or it was not


class Line:
    """Cuts the line at the next COMMIT, before the server has carried it out or after."""

    def __init__(self, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._dialect = engine.dialect
        self._commit = engine.dialect.do_commit
        self._monkeypatch = monkeypatch

    def cut(self, *, carried_out: bool) -> None:
        self._monkeypatch.setattr(
            self._dialect, "do_commit", self._carry_out if carried_out else self._drop
        )

    def _carry_out(self, connection: Any) -> None:
        self._commit(connection)
        self._lose(connection)

    def _drop(self, connection: Any) -> None:
        connection.rollback()
        self._lose(connection)

    def _lose(self, connection: Any) -> None:
        self._monkeypatch.setattr(self._dialect, "do_commit", self._commit)
        if self._dialect.name != "sqlite":
            connection.driver_connection.close()
        raise self._dialect.loaded_dbapi.OperationalError(2013, "the connection was lost")


@pytest.fixture
def line(any_driver_zoo_engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(any_driver_zoo_engine, monkeypatch)


GENERATED = {
    "by a flush": lambda s: s.add(Org(name="ours")),
    "by a single insert": lambda s: s.execute(sa.insert(Org.__table__).values(name="ours")),
    "by many inserts": lambda s: s.execute(sa.insert(Org), [{"name": "a"}, {"name": "b"}]),
    "with returning": lambda s: s.execute(sa.insert(Org).values(name="a").returning(Org.name)),
    "of a decorated type": lambda s: s.add(Ticket(title="ours")),
}


@pairwise(any_driver_zoo_engine=ALL_DRIVERS, made=tuple(GENERATED), carried_out=[True, False])
def test_a_lost_answer_for_keys_that_nobody_else_can_have_is_settled_by_asking(
    any_driver_zoo_engine, line, made, carried_out
):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with pytest.raises(sa.exc.DBAPIError):
        with tracker.start().session as session:
            GENERATED[made](session)
            session.flush()
            line.cut(carried_out=carried_out)
            session.commit()
    tracker.stop()
    assert len(tracker) == 0
    manager = CleanupManager(tracker)
    if engine.dialect.name == "sqlite" and carried_out:  # its numbers come again
        with pytest.raises(CleanupError, match="answer to its COMMIT was lost"):
            manager.cleanup()
        with engine.begin() as connection:
            connection.execute(sa.delete(Org))
            connection.execute(sa.delete(Ticket))
        manager.cleanup()
    else:
        report = manager.cleanup()
        assert bool(report.total_deleted) is carried_out
    assert snapshot(engine) == before
    assert CleanupManager(tracker).cleanup().total_deleted == 0


NATURAL = {
    "given": lambda s: s.add(Currency(**XXX)),
    "given to many": lambda s: s.execute(sa.insert(Currency), [XXX]),
    "computed": lambda s: s.execute(
        sa.insert(Currency).values(code=sa.func.upper("xxx"), name="ours")
    ),
    "selected": lambda s: s.execute(
        sa.insert(Currency).from_select(
            ["code", "name"], sa.select(sa.literal("XXX"), sa.literal("ours"))
        )
    ),
}


@pytest.mark.parametrize("made", NATURAL)
def test_a_lost_answer_for_a_natural_key_leaves_the_row_and_says_so(
    any_driver_zoo_engine, line, made
):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with pytest.raises(sa.exc.DBAPIError):
        with tracker.start().session as session:
            NATURAL[made](session)
            session.flush()
            line.cut(carried_out=False)
            session.commit()
    tracker.stop()
    manager = CleanupManager(tracker)
    bystanders.insert(Currency, THEIRS)
    with pytest.raises(CleanupError, match="answer to its COMMIT was lost") as caught:
        manager.cleanup()
    assert [leftover.row.key for leftover in caught.value.leftovers] == [("XXX",)]
    bystanders.assert_untouched()
    with engine.begin() as connection:  # the stranger cleans up, and the doubt is over
        connection.execute(sa.delete(Currency))
    manager.cleanup()


def test_a_lost_answer_for_a_random_uuid_is_settled_by_asking(any_driver_zoo_engine, line):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    for carried_out in (True, False):
        with pytest.raises(sa.exc.DBAPIError):
            with CleanupManager(tracker), tracker.session as session:
                session.add(Document(title="ours"))
                session.execute(
                    sa.insert(Document), [{"id": uuid.uuid4(), "title": "x"} for _ in range(3)]
                )
                line.cut(carried_out=carried_out)
                session.commit()
        assert snapshot(engine) == before


def test_what_is_told_after_a_lost_answer_is_ours(any_driver_zoo_engine, line):
    """What the error says to do next is what helps."""
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with pytest.raises(sa.exc.DBAPIError), tracker.start().session as session:
        session.add(Currency(**XXX))
        session.flush()
        line.cut(carried_out=True)
        session.commit()
    tracker.stop()
    manager = CleanupManager(tracker)
    with pytest.raises(CleanupError, match="track_rows"):
        manager.cleanup()
    tracker.track_rows(Currency, ["XXX"])
    assert manager.cleanup().total_deleted == 1
    assert snapshot(engine) == before


# --- the COMMIT fails, or is never sent


def test_a_commit_that_a_deferred_constraint_refuses(any_driver_engine):
    """PostgreSQL has rolled back by then; SQLite has not, and the transaction goes on."""
    engine = any_driver_engine
    if engine.dialect.name == "mysql":
        pytest.skip("the MySQL family has no deferred constraints")
    metadata = sa.MetaData()
    code = sa.Table("codes", metadata, sa.Column("code", sa.String(3), primary_key=True))
    part = sa.Table(
        "parts",
        metadata,
        sa.Column("name", sa.String(3), primary_key=True),
        sa.Column("code", sa.ForeignKey("codes.code", deferrable=True, initially="DEFERRED")),
    )
    metadata.create_all(engine)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda c, _r: c.execute("PRAGMA foreign_keys = ON"))
        engine.dispose()
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.connect() as connection:
        connection.execute(sa.insert(part).values(name="a", code="XXX"))
        with pytest.raises(sa.exc.IntegrityError):
            connection.commit()
        connection.rollback()
        assert len(tracker) == 0
        if engine.dialect.name == "sqlite":
            # SQLAlchemy believes the transaction over, the driver does not: what comes now mends
            # it, and the next COMMIT takes all
            connection.execute(sa.insert(code).values(code="XXX"))
            connection.commit()
            assert tracked(tracker) == ["XXX", "a"]
    bystanders.insert(part, {"name": "a", "code": None})
    bystanders.insert(code, {"code": "XXX"})
    cleanup.cleanup()
    bystanders.assert_untouched()


@on("sqlite", fixture="zoo_database")
@pytest.mark.parametrize("then", ["rollback", "close", "commit again", "session", "begin"])
def test_a_commit_that_finds_the_database_busy(zoo_database, then):
    engine = zoo_database.engine(connect_args={"timeout": 0.02})
    bystanders = Bystanders(engine)
    bystanders.insert(Group, {"name": "theirs"})
    tracker = ResourceTracker(engine)
    tracker.start()
    reader = engine.connect()
    reader.exec_driver_sql("BEGIN")
    reader.execute(sa.select(Group)).all()
    source: Any = Session(engine) if then == "session" else engine.connect()
    if then == "begin":
        with pytest.raises(sa.exc.OperationalError), source.begin():
            insert(source, "XXX")
    else:
        insert(source, "XXX")
        with pytest.raises(sa.exc.OperationalError):
            source.commit()
        if then in {"rollback", "session"}:
            source.rollback()
    reader.rollback()
    reader.close()
    if then == "commit again":
        source.rollback()  # for SQLAlchemy; the driver does not hear of it
        insert(source, "XTS")
        source.commit()
        assert tracked(tracker) == ["XTS", "XXX"]
    source.close()
    tracker.stop()
    if then != "commit again":
        assert len(tracker) == 0
        bystanders.insert(Currency, THEIRS)
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


@pytest.mark.parametrize("then", ["rollback", "close", "go on"])
def test_a_commit_listener_that_raises_keeps_the_commit_from_being_sent(zoo_engine, then):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    tracker.start()

    @sa.event.listens_for(zoo_engine, "commit")
    def refuse(_connection: Any) -> None:
        raise ValueError("not now")

    connection = zoo_engine.connect()
    insert(connection, "XXX")
    with pytest.raises(ValueError, match="not now"):
        connection.commit()
    sa.event.remove(zoo_engine, "commit", refuse)
    assert len(tracker) == 0
    if then == "rollback":
        connection.rollback()
    if then == "go on":
        connection.rollback()
        connection.execute(sa.select(Currency)).all()
        connection.connection.rollback()
        connection.rollback()
    connection.close()
    tracker.stop()
    bystanders.insert(Currency, THEIRS)
    if then == "go on":  # on the way an open transaction was seen that may as well be a later one
        with pytest.raises(CleanupError, match="XXX"):
            CleanupManager(tracker).cleanup()
    else:
        CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


@pytest.mark.parametrize("when", ["in a statement", "before the commit", "after the commit"])
def test_an_interrupt(any_driver_zoo_engine, monkeypatch, when):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    execute, commit = engine.dialect.do_execute, engine.dialect.do_commit

    def interrupted_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        execute(cursor, statement, parameters, context)
        raise KeyboardInterrupt

    def interrupted_commit(connection: Any) -> None:
        if when == "after the commit":
            commit(connection)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with engine.connect() as connection:
            insert(connection, "XXX")
            if when == "in a statement":
                monkeypatch.setattr(engine.dialect, "do_execute", interrupted_execute)
                insert(connection, "XTS")
            monkeypatch.setattr(engine.dialect, "do_commit", interrupted_commit)
            connection.commit()
    monkeypatch.undo()
    tracker.stop()
    assert len(tracker) == 0
    manager = CleanupManager(tracker)
    if when == "in a statement":
        bystanders.insert(Currency, THEIRS, {"code": "XTS", "name": "theirs"})
        manager.cleanup()
        bystanders.assert_untouched()
        return
    if when == "before the commit":
        bystanders.insert(Currency, THEIRS)
    with pytest.raises(CleanupError, match="answer to its COMMIT was lost"):
        manager.cleanup()
    with engine.begin() as connection:
        assert connection.execute(sa.delete(Currency)).rowcount == 1
    manager.cleanup()


# --- the transaction is over, or void, and nobody said so


@on("postgresql+psycopg", "postgresql+psycopg2", fixture="zoo_database")
def test_an_aborted_transaction_that_a_savepoint_saved_commits_the_rest(zoo_database):
    engine = zoo_database.engine()
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        insert(connection, "XXX")
        with pytest.raises(sa.exc.IntegrityError), connection.begin_nested():
            insert(connection, "XTS", "XXX")
        insert(connection, "XTT")
        connection.commit()
        assert tracked(tracker) == ["XTT", "XXX"]
    assert snapshot(engine) == before


@on("postgresql+psycopg", "postgresql+psycopg2", fixture="zoo_database")
def test_a_void_commit_of_a_two_phase_transaction(zoo_database):
    engine = zoo_database.engine()
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        transaction = connection.begin_twophase()
        insert(connection, "XXX")
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("SELECT 1/0")
        transaction.commit()  # not prepared: then it is an ordinary COMMIT
        bystanders.insert(Currency, THEIRS)
        assert len(tracker) == 0
    bystanders.assert_untouched()


@on("mysql+pymysql", "mysql+mysqldb", fixture="zoo_database")
def test_a_deadlock_takes_the_whole_transaction_and_what_follows_counts(zoo_database):
    """MariaDB raises 1213, and the next statements and the COMMIT succeed as if nothing was."""
    engine = zoo_database.engine()
    other = zoo_database.engine()  # nobody listens there
    bystanders = Bystanders(engine)
    bystanders.insert(Group, *({"name": str(n)} for n in range(40)))
    with engine.connect() as connection:
        first, last = connection.execute(
            sa.select(sa.func.min(Group.id), sa.func.max(Group.id))
        ).one()
    holding = threading.Event()

    def heavier() -> None:
        with other.connect() as connection:
            touch = sa.update(Group.__table__).values(name=Group.__table__.c.name + "!")
            connection.execute(touch.where(Group.__table__.c.id > first))
            holding.set()
            connection.execute(touch.where(Group.__table__.c.id == first))
            connection.rollback()

    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        insert(connection, "XXX")
        lock = sa.select(Group.__table__.c.id).with_for_update()
        connection.execute(lock.where(Group.__table__.c.id == first)).all()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(heavier)
            assert holding.wait(WAIT)
            with pytest.raises(sa.exc.OperationalError, match="1213"):
                connection.execute(lock.where(Group.__table__.c.id == last)).all()
            waiting.result(WAIT)
        insert(connection, "XTS")
        connection.commit()
        bystanders.insert(Currency, THEIRS)
        assert tracked(tracker) == ["XTS"]
    other.dispose()
    bystanders.assert_untouched()


def test_a_connection_that_its_user_invalidates(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        insert(connection, "XXX")
        connection.invalidate()
        connection.rollback()
        insert(connection, "XTS")
        connection.commit()
        bystanders.insert(Currency, THEIRS)
        assert tracked(tracker) == ["XTS"]
    bystanders.assert_untouched()


def test_a_flush_that_fails_in_its_middle(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(Currency, THEIRS)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), Session(engine) as session:
        session.add_all([Org(name="rolled back"), Currency(**XXX)])
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        assert len(tracker) == 0
        session.add(Org(name="ours"))
        session.flush()
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            session.add_all([Org(name="rolled back"), Currency(**XXX)])
        session.add(Currency(code="XTS", name="ours"))
        session.commit()
        assert len(tracker) == 2
    bystanders.assert_untouched()
