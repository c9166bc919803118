"""Many rows at once, tracked: against factory_boy, against dicts that are ready, and in memory.

Run: python -m pytest tests/benchmarks/test_bulk.py -m benchmark -s
"""

from __future__ import annotations

import resource
import time

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.measure import paired, say, undisturbed
from tidyrows import CleanupManager, ResourceTracker, TrackedFactory

ROWS = 2000
PAIRS = 5
MANY = 1_000_000


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str] = mapped_column(sa.String(60))
    visitor: Mapped[str] = mapped_column(sa.String(60))
    country: Mapped[str] = mapped_column(sa.String(2))
    number: Mapped[int]
    note: Mapped[str] = mapped_column(sa.String(60))


def declared(base, session=None, persistence=None):
    class VisitFactory(base):
        class Meta:
            model = Visit
            sqlalchemy_session = session
            sqlalchemy_session_persistence = persistence

        page = factory.Sequence("/page/{}".format)
        visitor = factory.LazyAttribute(lambda o: f"visitor of {o.page}")
        country = "NL"
        number = factory.Sequence(lambda n: n)
        note = factory.LazyFunction(lambda: "a note")

    return VisitFactory


def processor_seconds(work):
    with undisturbed():
        start = time.process_time()
        work()
        return time.process_time() - start


@pytest.fixture
def tables(database):
    """The engine of the tracker, and one that no tracker watches."""
    watched, plain = database.engine(), database.engine()
    Base.metadata.create_all(plain)
    return watched, plain


def compared(tables, ours, theirs, pairs=PAIRS):
    """Processor seconds of both, in turn; ``theirs`` gets a session and rolls it back."""
    watched, plain = tables
    tracker = ResourceTracker(watched)
    with Session(plain) as session, CleanupManager(tracker, verify=False):

        def other():
            taken = processor_seconds(lambda: theirs(session))
            session.rollback()
            session.expunge_all()
            return taken

        return paired(lambda: processor_seconds(ours), other, pairs)


def stock(session):
    return declared(SQLAlchemyModelFactory, session, "flush").create_batch(ROWS)


@pytest.mark.benchmark
@pytest.mark.parametrize("returning", [True, False])
def test_against_factory_boys_batch_with_flush(database, tables, returning):
    make = declared(TrackedFactory)
    medians = compared(tables, lambda: make.create_bulk(ROWS, returning=returning), stock)
    goal = "at most 0.125x on SQLite, 0.1x on PostgreSQL"
    say(f"{database.target}, {ROWS} rows, returning={returning}, factory_boy", *medians, goal)


@pytest.mark.benchmark
@pytest.mark.parametrize("returning", [True, False])
def test_against_dicts_that_are_ready(database, tables, returning):
    make = declared(TrackedFactory)
    dicts = [
        {"page": f"/page/{n}", "visitor": "v", "country": "NL", "number": n, "note": "a note"}
        for n in range(ROWS)
    ]
    medians = compared(
        tables,
        lambda: make.create_bulk(ROWS, returning=returning),
        lambda session: session.execute(sa.insert(Visit), dicts),
    )
    say(f"{database.target}, {ROWS} rows, returning={returning}, dicts", *medians, "at most 3x")


@pytest.mark.benchmark
def test_create_batch_against_factory_boys(database, tables):
    make = declared(TrackedFactory)
    medians = compared(tables, lambda: make.create_batch(ROWS), stock)
    say(f"{database.target}, create_batch of {ROWS}, factory_boy", *medians, "0.9x")


@pytest.mark.benchmark
@pytest.mark.soak
def test_a_million_rows_in_constant_memory(tables):
    watched, _plain = tables
    make = declared(TrackedFactory)
    with CleanupManager(ResourceTracker(watched), verify=False):
        make.create_bulk(20_000, returning=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        make.create_bulk(MANY, returning=False)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{MANY} rows: {grown:.0f} MB above the start (under 100 MB)")
    assert grown < 100
