"""The rows of a suite that knows nothing of tidyrows, in this process."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from harness.targets import on
from tidyrows.testing.suite import Suite
from tidyrows.tracking.twins import twin_of

METADATA = sa.MetaData()
ORGS = sa.Table("orgs", METADATA, sa.Column("id", sa.Integer, primary_key=True))


@contextmanager
def listening():
    suite = Suite(lambda _said: None, with_ledger=False, entered=lambda *_whose: None)
    suite.start()
    try:
        with suite.test("a test", {}, lambda: False, print):
            yield
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
def test_an_engine_is_garbage_with_its_twin(database):
    engine = sa.create_engine(database.url)
    with engine.connect():
        twin_of(engine)
    gone = weakref.ref(engine)
    engine.dispose()
    del engine
    gc.collect()
    assert gone() is None
