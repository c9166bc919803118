"""The rows of a suite that knows nothing of tidyrows, in this process."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.targets import on
from tidyrows.suite.spare_engine import spare_engine_of
from tidyrows.suite.suite import WholeSuite
from tidyrows.testing.summary import SuiteSummary

METADATA = sa.MetaData()
ORGS = sa.Table(
    "orgs", METADATA, sa.Column("id", sa.Integer, primary_key=True), sqlite_autoincrement=True
)

USERS = sa.Table(
    "users",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("org_id", sa.ForeignKey("orgs.id"), nullable=False),
)


@contextmanager
def listening(ledgers=None):
    suite = WholeSuite(
        lambda _said: None,
        with_ledger=ledgers is not None,
        on_ledger=lambda ledger, _whose: ledgers.append(ledger),
    )
    suite.start()
    try:
        with suite.test("a test", {}, lambda: False, print):
            yield suite
    finally:
        suite.end()


def insert(engine):
    with engine.begin() as connection:
        connection.execute(sa.insert(ORGS).values())


def count(engine):
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(ORGS))


@pytest.fixture
def orgs(engine):
    METADATA.create_all(engine)
    return engine


@on("sqlite")
def test_a_run_within_a_run_leaves_the_outer_one_listening(orgs):
    """Tests of pytest's plugins run pytest in their own process."""
    with listening():
        insert(orgs)
        with listening():
            insert(orgs)
        assert count(orgs) == 1
        insert(orgs)
    assert count(orgs) == 0


@on("postgresql+psycopg")
def test_no_connection_is_left_in_an_engine_that_was_disposed_of(database, orgs):
    own = database.engine()
    with listening():
        insert(own)
        own.dispose()
    assert own.pool.checkedin() == 0
    assert count(orgs) == 0


@on("sqlite")
def test_what_a_lasting_row_needs_is_deleted_after_it_and_told_of_once(orgs):
    found = SuiteSummary()
    suite = WholeSuite(
        found.add, with_ledger=False, on_ledger=lambda *_whose: None, everything=True
    )
    suite.start()
    with suite.test("a test", {}, lambda: False, print):
        insert(orgs)
        with suite.engines.pushed(suite.outside), orgs.begin() as connection:
            connection.execute(sa.insert(USERS).values(org_id=1))
    assert count(orgs) == 1
    suite.end()
    assert count(orgs) == 0
    assert (found.rows.created.total(), found.rows.deleted.total()) == (2, 2)
    assert not found.undeleted


def test_a_file_that_the_suite_has_deleted_is_not_made_again(tmp_path):
    ledgers = []
    file = tmp_path / "own.db"
    own = sa.create_engine(f"sqlite:///{file}")
    with listening(ledgers) as suite:
        METADATA.create_all(own)
        with suite.test("another", {}, lambda: False, print):  # the ledger is installed by now
            insert(own)
        own.dispose()
        file.unlink()
    for ledger in ledgers:
        ledger.close()
    assert len(ledgers) == 1
    assert not file.exists()


@on("sqlite")
def test_an_engine_is_garbage_with_its_spare_engine(database):
    engine = sa.create_engine(database.url)
    with engine.connect():
        spare_engine_of(engine)
    gone = weakref.ref(engine)
    engine.dispose()
    del engine
    gc.collect()
    assert gone() is None


def test_an_object_of_another_database_stays_in_its_session_though_its_key_is_the_same(
    orgs, tmp_path
):
    class Org:
        pass

    orm.registry(metadata=METADATA).map_imperatively(Org, ORGS)
    other = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    METADATA.create_all(other)
    with orm.Session(other) as elsewhere, orm.Session(orgs) as here:
        elsewhere.add(theirs := Org())
        elsewhere.commit()
        with listening():
            here.add(ours := Org())
            here.commit()
            assert (ours.id, theirs.id) == (1, 1)
            here.commit()
            elsewhere.commit()
        assert theirs in elsewhere
        assert ours not in here
    other.dispose()
