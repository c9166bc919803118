"""A test of ten rows at level transaction: against the usual recipe, pytest-sqla and level worker.

Run: python -m pytest tests/benchmarks/test_transaction.py -m benchmark -s

The recipe is SQLAlchemy's "Joining a Session into an External Transaction": one connection of the
pool, an outer transaction, ``join_transaction_mode="create_savepoint"``. Nothing is tracked there.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.pool import NullPool

from benchmarks.measure import paired, say, seconds
from harness.models import Group
from tidyrows.isolation.isolate import isolate

TESTS, PAIRS = 20, 15


def ten_rows(make_session, commits):
    with make_session() as session:
        for number in range(10):
            session.add(Group(name=f"{number}"))
            if commits == 10:
                session.commit()
        session.commit()
        assert len(session.scalars(sa.select(Group)).all()) == 10


def corrected(engine):
    """The listeners without which SQLite rolls nothing back, as SQLAlchemy's page has them."""
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def recipe(engine, commits):
    with engine.connect() as connection:
        outer = connection.begin()
        joined = {"bind": connection, "join_transaction_mode": "create_savepoint"}
        ten_rows(orm.sessionmaker(**joined), commits)
        outer.rollback()


def ours(engine, level, commits):
    with isolate(engine, level) as db:
        ten_rows(db.session, commits)


def times(work):
    def run():
        return seconds(lambda: [work() for _ in range(TESTS)]) / TESTS

    return run


@pytest.mark.benchmark
@pytest.mark.parametrize("commits", [1, 10])
def test_ten_rows_against_the_recipe(zoo_database, commits):
    engine, theirs = zoo_database.engine(), corrected(zoo_database.engine())
    figures = paired(
        times(lambda: ours(engine, "transaction", commits)),
        times(lambda: recipe(theirs, commits)),
        PAIRS,
    )
    say(f"{zoo_database.backend}, {commits} commits, against the recipe", *figures, "1.1x")


@pytest.mark.benchmark
@pytest.mark.parametrize("commits", [1, 10])
def test_ten_rows_against_pytest_sqla(zoo_database, commits):
    """Its default, a connection for each test, without what its fixtures cost."""
    sqla = pytest.importorskip("pytest_sqla._isolation")
    engine, theirs = zoo_database.engine(), corrected(zoo_database.engine(poolclass=NullPool))

    def their_test():
        with theirs.connect() as connection:
            isolation = sqla.open_isolation(connection)
            joined = {"bind": connection, "join_transaction_mode": "create_savepoint"}
            ten_rows(orm.sessionmaker(**joined), commits)
            assert sqla.end_isolation(isolation, nodeid="a", fixture="b") is None
            isolation.unwatch()

    figures = paired(times(lambda: ours(engine, "transaction", commits)), times(their_test), PAIRS)
    say(f"{zoo_database.backend}, {commits} commits, against pytest-sqla", *figures, "never slower")


@pytest.mark.benchmark
@pytest.mark.parametrize("commits", [1, 10])
def test_ten_rows_of_a_worker_against_a_transaction(zoo_database, commits):
    engine = zoo_database.engine()
    figures = paired(
        times(lambda: ours(engine, "worker", commits)),
        times(lambda: ours(engine, "transaction", commits)),
        PAIRS,
    )
    goal = "1.2x without fsync, 2x with"
    say(f"{zoo_database.backend}, {commits} commits, level worker", *figures, goal)
