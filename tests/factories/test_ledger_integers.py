"""With a ledger a ScopedInteger is unique in all runs, on all hosts: ranges are handed out once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

import tidyrows
from harness.forks import Process
from tidyrows import (
    CleanupManager,
    Ledger,
    LedgerError,
    ResourceTracker,
    ScopedInteger,
    ScopeError,
    TrackedFactory,
    WorkerContext,
)
from tidyrows.ledger.process import RANGE


class Base(orm.DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    number: orm.Mapped[int] = orm.mapped_column(unique=True)


class InvoiceFactory(TrackedFactory[Invoice]):
    class Meta:
        model = Invoice

    number = ScopedInteger(start=10_000)


WORKER = """
import sys
import sqlalchemy as sa
from tidyrows import CleanupManager, Ledger, ResourceTracker
engine = sa.create_engine(sys.argv[1])
tracker = ResourceTracker(engine, ledger=Ledger(engine))
with CleanupManager(tracker):
    print(*(tracker.integer(5) for _ in range(1500)))
"""


@pytest.fixture
def ledger(engine):
    Base.metadata.create_all(engine)
    made = Ledger(engine)
    made.install()
    yield made
    made.close()


class Line(Base):
    __tablename__ = "lines"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    first: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("invoices.id"))
    second: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("invoices.id"))


class LineFactory(TrackedFactory[Line]):
    class Meta:
        model = Line

    first = factory.LazyFunction(lambda: InvoiceFactory().id)
    second = factory.LazyFunction(lambda: InvoiceFactory().id)


def test_one_call_may_need_one_after_it_has_written(ledger):
    """Where only one may write, as with SQLite, that is the call itself."""
    with CleanupManager(ResourceTracker(ledger.engine, ledger=ledger)) as manager:
        LineFactory()
        with orm.Session(ledger.engine) as session:
            session.add(Invoice(number=1))
            session.flush()
            assert InvoiceFactory.build().number
            session.rollback()
    assert manager.report.total_deleted == 3


def test_processes_of_one_run_and_worker_never_have_the_same(ledger):
    """They share run and worker, so that without the ledger all would count alike."""
    env = {**os.environ, "TIDYROWS_RUN": "same", "TIDYROWS_WORKER": "gw1"}
    env["PYTHONPATH"] = str(Path(tidyrows.__file__).parent.parent)
    url = ledger.engine.url.render_as_string(hide_password=False)
    processes = [
        Process([sys.executable, "-c", WORKER, url], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    numbers = [list(map(int, each.communicate(timeout=60)[0].split())) for each in processes]
    assert [len(each) for each in numbers] == [1500] * 4
    together = {number for each in numbers for number in each}
    assert len(together) == 6000
    assert min(together) == 5
    assert max(together) < 5 + 8 * RANGE


def test_a_factorys_values_begin_at_start(ledger):
    context = WorkerContext("run", "gw7", 7, worker_count=8)
    tracker = ResourceTracker(ledger.engine, ledger=ledger, context=context)
    with CleanupManager(tracker):
        made = [each.number for each in InvoiceFactory.create_batch(3)]
    assert made == [10_000, 10_001, 10_002]
    with CleanupManager(ResourceTracker(ledger.engine, ledger=ledger)):
        assert InvoiceFactory().number == 10_003  # the process goes on where it was


def test_without_a_ledger_workers_interleave_as_before(engine):
    Base.metadata.create_all(engine)
    context = WorkerContext("a run without a ledger", "gw7", 7, worker_count=8)
    with CleanupManager(ResourceTracker(engine, context=context)):
        assert InvoiceFactory().number % 1000 == 7


def test_a_range_that_cannot_be_taken_now_is_said(sqlite_engine):
    """The one writer is this very test."""
    Base.metadata.create_all(sqlite_engine)
    ledger = Ledger(sqlite_engine)
    ledger.install()
    tracker = ResourceTracker(sqlite_engine, ledger=ledger)
    with CleanupManager(tracker):
        with sqlite_engine.begin() as connection:
            connection.execute(sa.insert(Invoice).values(number=1))
            assert [tracker.integer() for _ in range(RANGE)] == list(range(RANGE))
            with pytest.raises(ScopeError, match="Commit first"):
                tracker.integer()
        assert tracker.integer() == RANGE
    ledger.close()


def test_a_ledger_that_has_lost_the_row_says_so(ledger):
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM tidyrows_ledger WHERE kind = 'integers'"))
    tracker = ResourceTracker(ledger.engine, ledger=ledger)
    with pytest.raises(LedgerError, match="has lost the row"):  # where one only may write, at once
        with CleanupManager(tracker):
            tracker.integer()
