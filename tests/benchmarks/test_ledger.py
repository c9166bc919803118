"""What the ledger costs: a call with one commit, rows in bulk, and the cleanup of many rows.

Run: python -m pytest tests/benchmarks/test_ledger.py -m benchmark -s
"""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import paired, say, seconds
from tidyrows import CleanupManager, Ledger, ResourceTracker, TrackedFactory

CALLS = 30
ROWS = 1_000
MANY = 100_000


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(60))
    name: Mapped[str] = mapped_column(sa.String(60))
    city: Mapped[str] = mapped_column(sa.String(60))
    points: Mapped[int]


class CustomerFactory(TrackedFactory[Customer]):
    class Meta:
        model = Customer

    email = factory.Sequence(lambda n: f"customer{n}@example.test")
    name = "A name"
    city = "A city"
    points = factory.Sequence(lambda n: n)


@pytest.fixture
def ledger(database):
    made = Ledger(database.engine())
    Base.metadata.create_all(made.engine)
    made.install()
    yield made
    made.close()


def calls():
    for _ in range(CALLS):
        CustomerFactory()


def in_one_transaction(engine):
    row = {"name": "A name", "city": "A city", "points": 1}
    rows = [{**row, "email": f"customer{n}@example.test"} for n in range(ROWS)]
    with engine.begin() as connection:
        connection.execute(sa.insert(Customer), rows)


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("what", "pairs", "goal"),
    [
        ("calls, a commit each", 40, "at most 1.35x"),
        ("factory rows in a transaction", 8, "at most 1.15x"),
        ("Core rows in a transaction", 20, "at most 1.15x"),
    ],
)
def test_creating_with_the_ledger_against_without(database, ledger, what, pairs, goal):
    def run(given):
        tracker = ResourceTracker(ledger.engine, ledger=given)

        def work():
            if what.startswith("calls"):
                calls()
            elif what.startswith("Core"):
                in_one_transaction(ledger.engine)
            else:
                CustomerFactory.create_batch(ROWS)

        with CleanupManager(tracker, verify=False):
            return seconds(work)

    medians = paired(lambda: run(ledger), lambda: run(None), pairs)
    say(f"{database.target}, {what}", *medians, goal)


@pytest.mark.benchmark
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_cleaning_100k_rows_through_the_ledger_against_a_bare_delete(database, ledger, verify):
    engine = ledger.engine

    def fill():
        for _ in range(MANY // ROWS):
            in_one_transaction(engine)

    def bare():
        fill()

        def work():
            with engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM customers")

        return seconds(work)

    def tidy():
        manager = CleanupManager(ResourceTracker(engine, ledger=ledger), verify=verify)
        manager.tracker.start()
        fill()
        manager.tracker.stop()
        taken = seconds(manager.cleanup)
        assert manager.report.total_deleted == MANY
        return taken

    medians = paired(tidy, bare, 5)
    word = "with" if verify else "without"
    say(f"{database.target}, {MANY} rows, {word} verification", *medians, "at most 1.5x")
