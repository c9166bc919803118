"""What tracking adds to a factory call: at most a tenth, with every persistence.

Run: python -m pytest tests/benchmarks/test_factories.py -m benchmark -s
"""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.measure import paired, say, seconds
from tidyrows import CleanupManager, ResourceTracker, TrackedFactory

CALLS = 30
PAIRS = 60


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(60))
    name: Mapped[str] = mapped_column(sa.String(60))
    city: Mapped[str] = mapped_column(sa.String(60))
    points: Mapped[int]


def declared(base, session, persistence):
    class CustomerFactory(base):
        class Meta:
            model = Customer
            sqlalchemy_session = session
            sqlalchemy_session_persistence = persistence

        email = factory.Sequence(lambda n: f"customer{n}@example.test")
        name = "A name"
        city = "A city"
        points = factory.Sequence(lambda n: n)

    return CustomerFactory


@pytest.mark.benchmark
@pytest.mark.parametrize("persistence", [None, "flush", "commit", "one commit per call"])
def test_a_call_with_tracking_against_the_same_call_without(database, persistence):
    watched, plain = database.engine(), database.engine()
    Base.metadata.create_all(plain)
    once = persistence == "one commit per call"
    # Two sessions with the same options; only one engine has a tracker on it.
    theirs = Session(plain, expire_on_commit=not once)
    tracker = ResourceTracker(watched)
    ours = tracker.session if once else Session(watched)
    bare = declared(SQLAlchemyModelFactory, theirs, "commit" if once else persistence)
    tracked = declared(TrackedFactory, None if once else ours, None if once else persistence)

    def run(make, session):
        def work():
            for _ in range(CALLS):
                make()
            if persistence is None:
                session.flush()

        taken = seconds(work)
        session.rollback()
        session.expunge_all()
        return taken

    with CleanupManager(tracker, verify=False):
        medians = paired(lambda: run(tracked, ours), lambda: run(bare, theirs), PAIRS)
        ours.close()
        theirs.close()
    say(f"{database.target}, {CALLS} calls, persistence {persistence}", *medians, "at most 1.10x")
