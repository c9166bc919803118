"""Transactions that are moved by strings, behind SQLAlchemy's back, and savepoints of all kinds."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.models import Currency, Group, Org, User
from harness.servers import end_elsewhere, prepares
from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    LateCommitWarning,
    LeftoverKind,
    ResourceTracker,
)
from tidyrows.capture.raw_sql import Move, transaction_move
from tidyrows.dialects import dialect_for

CODES = ("AAA", "BBB", "CCC", "DDD")


def insert(source: Any, *codes: str) -> None:
    for code in codes:
        source.execute(sa.insert(Currency.__table__).values(code=code, name="ours"))


def tracked(tracker: ResourceTracker) -> list[Any]:
    return [row.key[0] for row in tracker.rows()]


@pytest.mark.parametrize(
    ("sql", "move"),
    [
        ("COMMIT", (Move.COMMIT, "")),
        (" commit work ; ", (Move.COMMIT, "")),
        ("END TRANSACTION", (Move.COMMIT, "")),
        ("/* a */ ROLLBACK", (Move.UNCLEAR, "")),
        ("ROLLBACK", (Move.ROLLBACK, "")),
        ("ABORT", (Move.ROLLBACK, "")),
        ("rollback to a", (Move.ROLLBACK_TO, "a")),
        ("ROLLBACK WORK TO SAVEPOINT a", (Move.ROLLBACK_TO, "a")),
        ('ROLLBACK TO SAVEPOINT "a b"', (Move.ROLLBACK_TO, "a b")),
        ("SAVEPOINT `a`", (Move.SAVEPOINT, "a")),
        ("RELEASE a", (Move.RELEASE, "a")),
        ("RELEASE SAVEPOINT a;", (Move.RELEASE, "a")),
        ("BEGIN", (Move.BEGIN, "")),
        ("START TRANSACTION", (Move.BEGIN, "")),
        ("BEGIN IMMEDIATE", (Move.UNCLEAR, "")),
        ("COMMIT PREPARED 'a'", (Move.UNCLEAR, "")),
        ("COMMIT AND CHAIN", (Move.UNCLEAR, "")),
        ("ROLLBACK; INSERT INTO t VALUES (1)", (Move.UNCLEAR, "")),
        ("SAVEPOINT a; SELECT 1", (Move.UNCLEAR, "")),
        ("SELECT 1", None),
        ("committed", None),
    ],
)
def test_what_a_string_does_to_the_transaction(sql, move):
    assert transaction_move(sql) == move


def test_savepoints_by_strings_are_followed_exactly(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.connect() as connection:
            insert(connection, "AAA")
            connection.execute(sa.text("SAVEPOINT one"))
            insert(connection, "BBB")
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT one")
            connection.execute(sa.text("SAVEPOINT two"))
            insert(connection, "CCC")
            connection.execute(sa.text("RELEASE SAVEPOINT two"))
            connection.commit()
        assert tracked(tracker) == ["AAA", "CCC"]
        bystanders.insert(Currency, {"code": "BBB", "name": "theirs"})
    assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()


def test_a_savepoint_by_string_around_a_session(any_driver_zoo_engine):
    """As test suites do that roll back to a string's savepoint after each test."""
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection, connection.begin() as outer:
        insert(connection, "AAA")
        connection.execute(sa.text("SAVEPOINT a_test"))
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Currency(code="BBB", name="ours"))
            session.commit()
        connection.execute(sa.text("ROLLBACK TO SAVEPOINT a_test"))
        outer.commit()
        assert tracked(tracker) == ["AAA"]
        bystanders.insert(Currency, {"code": "BBB", "name": "theirs"})
    bystanders.assert_untouched()


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_commit_by_string_makes_rows_ours_whatever_follows(any_driver_zoo_engine, end):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.connect() as connection:
            insert(connection, "AAA")
            connection.exec_driver_sql("COMMIT")
            assert tracked(tracker) == ["AAA"]
            getattr(connection, end)()
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


def test_what_comes_after_a_commit_by_string_has_a_fate_of_its_own(any_driver_zoo_engine):
    """psycopg2 does not notice and begins no new transaction, so there the row is committed."""
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with engine.connect() as connection:
            insert(connection, "AAA")
            connection.execute(sa.text("COMMIT"))
            insert(connection, "BBB")
            connection.rollback()
            there = list(connection.scalars(sa.select(Currency.code)))
        assert tracked(tracker) == sorted(there)
        if "BBB" not in there:
            bystanders.insert(Currency, {"code": "BBB", "name": "theirs"})
    bystanders.assert_untouched()


def test_a_rollback_by_string_takes_what_was_before_it(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.connect() as connection:
            insert(connection, "AAA")
            connection.execute(sa.text("ROLLBACK"))
            insert(connection, "BBB")
            connection.commit()
        assert tracked(tracker) == ["BBB"]
        bystanders.insert(Currency, {"code": "AAA", "name": "theirs"})
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


@on("sqlite", fixture="zoo_database")
def test_a_string_that_nobody_understands_makes_doubtful_what_was_before_it(zoo_engine):
    """SQLite does not tell how it ended; the row is left: rather that than a stranger's harm."""
    tracker = ResourceTracker(zoo_engine)
    tracker.start()
    with zoo_engine.connect() as connection:
        insert(connection, "AAA")
        connection.exec_driver_sql("/* why */ COMMIT")
        insert(connection, "BBB")
        connection.rollback()
    tracker.stop()
    with pytest.raises(CleanupError, match="AAA") as caught:
        CleanupManager(tracker).cleanup()
    assert len(caught.value.leftovers) == 1
    with zoo_engine.connect() as connection:
        assert connection.scalars(sa.select(Currency.code)).all() == ["AAA"]


def test_begin_by_string_under_autocommit(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    if engine.dialect.driver == "mysqldb":
        pytest.skip("mysqlclient does not tell of a transaction that a string began")
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    auto = engine.execution_options(isolation_level="AUTOCOMMIT")
    with CleanupManager(tracker), auto.connect() as connection:
        insert(connection, "AAA")
        assert tracked(tracker) == ["AAA"]
        connection.execute(sa.text("BEGIN"))
        insert(connection, "BBB")
        assert tracked(tracker) == ["AAA"]
        connection.execute(sa.text("ROLLBACK"))
        connection.execute(sa.text("BEGIN"))
        insert(connection, "CCC")
        connection.execute(sa.text("COMMIT"))
        assert tracked(tracker) == ["AAA", "CCC"]
        bystanders.insert(Currency, {"code": "BBB", "name": "theirs"})
    bystanders.assert_untouched()


def test_nested_transactions_around_everything(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(Org, {"name": "theirs"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), Session(engine) as session:
        session.execute(sa.update(Org.__table__).values(name="theirs"))  # SQLite: a real BEGIN
        for number, code in enumerate(CODES):
            with session.begin_nested() as outer:
                with session.begin_nested():
                    session.execute(sa.insert(Currency), [{"code": code, "name": "ours"}])
                    session.add(Org(name=code))
                with session.begin_nested() as inner:
                    session.bulk_save_objects([Org(name="inner"), Org(name="inner")])
                    inner.rollback()
                if number % 2:
                    outer.rollback()
        session.commit()
        kept = [CODES[0], CODES[2]]
        assert sorted(str(key) for key in tracked(tracker) if isinstance(key, str)) == kept
        assert len(tracker) == 4
        bystanders.insert(Currency, {"code": CODES[1], "name": "theirs"})
    bystanders.assert_untouched()


def test_a_two_phase_session(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    if not prepares(engine):
        pytest.skip("this server prepares no transactions")
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with Session(engine, twophase=True) as session:
            session.add(User(email="a@example.test", org=Org(name="ours")))
            with session.begin_nested():
                session.add(Org(name="nested"))
            with session.begin_nested() as dropped:
                session.add(Org(name="dropped"))
                session.flush()
                dropped.rollback()
            session.commit()
            assert len(tracker) == 3
            session.add(Org(name="rolled back"))
            session.flush()
            session.rollback()
            session.add(Org(name="prepared, then rolled back"))
            session.prepare()
            session.rollback()
        assert len(tracker) == 3
    assert cleanup.report.total_deleted == 3
    assert snapshot(engine) == before


PREFIX = f"tidyrows_{uuid.uuid4().hex[:8]}_"


def new_xid():
    return PREFIX + uuid.uuid4().hex


def prepared(engine, xid, statement, *, raw=False):
    """Run a statement in a transaction that is prepared, and belongs to no connection any more."""
    connection = engine.connect()
    if not raw:
        transaction = connection.begin_twophase(xid)
        connection.execute(statement)
        transaction.prepare()
    elif engine.dialect.name == "postgresql":
        connection.execute(statement)
        connection.exec_driver_sql(f"PREPARE TRANSACTION '{xid}'")
    else:
        connection.exec_driver_sql(f"XA START '{xid}'")
        connection.execute(statement)
        connection.exec_driver_sql(f"XA END '{xid}'")
        connection.exec_driver_sql(f"XA PREPARE '{xid}'")
    connection.invalidate()
    connection.close()


@pytest.fixture
def two_phase_engine(any_driver_zoo_engine):
    if not prepares(any_driver_zoo_engine):
        pytest.skip("this server prepares no transactions")
    yield any_driver_zoo_engine
    with any_driver_zoo_engine.connect() as connection:  # what holds locks after a failure
        left = dialect_for(any_driver_zoo_engine).prepared_transactions(connection)
    for xid in left:
        if xid.startswith(PREFIX):
            end_elsewhere(any_driver_zoo_engine, "ROLLBACK", xid)


@pytest.mark.parametrize("raw", [False, True], ids=["sqlalchemy", "raw"])
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_rows_of_a_prepared_transaction_are_said_until_it_has_ended(two_phase_engine, end, raw):
    engine, xid = two_phase_engine, new_xid()
    before = snapshot(engine)
    with pytest.raises(CleanupError, match=xid) as caught:
        with CleanupManager(ResourceTracker(engine)) as cleanup, Session(engine) as session:
            session.add(Org(name="committed"))
            session.commit()
            prepared(engine, xid, sa.insert(Org).values(name="prepared"), raw=raw)
    try:
        (leftover,) = caught.value.leftovers
        assert (leftover.kind, leftover.table.name) == (LeftoverKind.PREPARED, "orgs")
        assert cleanup.report.total_deleted == 1
    finally:
        end_elsewhere(engine, end, xid)
    assert cleanup.cleanup().total_deleted == (end == "COMMIT")
    assert snapshot(engine) == before


@pytest.mark.parametrize("raw", [False, True], ids=["sqlalchemy", "raw"])
def test_rows_of_a_transaction_that_was_prepared_and_committed_elsewhere_go(two_phase_engine, raw):
    engine, xid = two_phase_engine, new_xid()
    before = snapshot(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        prepared(engine, xid, sa.insert(Org).values(name="prepared"), raw=raw)
        end_elsewhere(engine, "COMMIT", xid)
    assert cleanup.report.total_deleted == 1
    assert snapshot(engine) == before


def test_a_transaction_that_was_prepared_in_the_block_and_committed_after_it(two_phase_engine):
    engine = two_phase_engine
    before = snapshot(engine)
    with engine.connect() as connection:
        transaction = connection.begin_twophase(new_xid())
        with pytest.raises(CleanupError, match=str(transaction.xid)):
            with CleanupManager(ResourceTracker(engine)) as cleanup:
                connection.execute(sa.insert(Org).values(name="prepared"))
                transaction.prepare()
        with pytest.warns(LateCommitWarning):
            transaction.commit()
    assert cleanup.cleanup().total_deleted == 1
    assert snapshot(engine) == before


def test_a_prepared_transaction_whose_commit_fails_is_prepared_yet(two_phase_engine):
    engine, xid = two_phase_engine, new_xid()
    bystanders = Bystanders(engine)
    with pytest.raises(CleanupError, match=xid):
        with CleanupManager(ResourceTracker(engine)) as cleanup, engine.connect() as connection:
            transaction = connection.begin_twophase(xid)
            connection.execute(sa.insert(Currency).values(code="XTS", name="ours"))
            transaction.prepare()
            dialect = dialect_for(engine)
            number = dialect.server_id(connection.connection.dbapi_connection)
            kill = {"postgresql": "SELECT pg_terminate_backend({})"}.get(dialect.name, "KILL {}")
            with engine.connect() as other:
                other.exec_driver_sql(kill.format(number))
            with pytest.raises(sa.exc.DBAPIError):
                transaction.commit()
    end_elsewhere(engine, "ROLLBACK", xid)
    bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
    with pytest.raises(CleanupError, match="may as well be somebody else's"):
        cleanup.cleanup()
    bystanders.assert_untouched()


def test_a_stranger_under_the_key_of_a_prepared_row_that_was_rolled_back(two_phase_engine):
    engine, xid = two_phase_engine, new_xid()
    bystanders = Bystanders(engine)
    with pytest.raises(CleanupError, match="may as well be somebody else's"):
        with CleanupManager(ResourceTracker(engine)):
            prepared(engine, xid, sa.insert(Currency).values(code="XTS", name="ours"))
            end_elsewhere(engine, "ROLLBACK", xid)
            bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
    bystanders.assert_untouched()


def test_merge_refresh_and_bulk_updates(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(Currency, {"code": "USD", "name": "theirs"})
    bystanders.insert(Group, {"name": "theirs"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with Session(engine) as session:
            session.merge(Currency(code="USD", name="theirs"))
            made = session.merge(Currency(code="XXX", name="made by merge"))
            org = session.merge(Org(name="made by merge"))
            session.commit()
            session.refresh(made)
            session.bulk_update_mappings(sa.inspect(Org), [{"id": org.id, "name": "updated"}])
            session.execute(sa.update(Org), [{"id": org.id, "name": "updated again"}])
            session.execute(sa.update(Currency).where(Currency.code == "XXX").values(name="n"))
            session.commit()
            assert sorted(map(str, tracked(tracker))) == sorted([str(org.id), "XXX"])
    assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()
