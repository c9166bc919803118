"""Who lives and who is dead: connections end, servers restart, processes stand still."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness.bystanders import Bystanders
from harness.own_servers import own_server
from harness.servers import AbsentError, everything_required
from harness.targets import on
from kills.children import Stepper
from kills.owners import entries, free_lock, is_alive, number_of
from kills.tables import Base, Currency, Note, Token
from storm.run import with_database
from tidyrows import Ledger, find_orphans, sweep

pytestmark = pytest.mark.slow
WAIT = 30


def until(condition: Callable[[], object]) -> bool:
    """Whether it comes true in time."""
    asked, end = threading.Event(), time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            return False
        asked.wait(0.05)
    return True


@pytest.fixture
def prepared(engine):
    """An engine on a database with a ledger."""
    return prepare(engine)


def prepare(engine):
    Base.metadata.create_all(engine)
    Ledger(engine).install()
    return engine


@pytest.fixture
def started():
    """Starts steppers, and ends them."""
    with ExitStack() as stack:

        def start(engine, **given):
            stepper = Stepper(engine.url, **given)
            stack.callback(stepper.end)
            return stepper

        yield start


def ours(engine) -> int:
    """How many rows of ours there are."""
    with engine.connect() as connection:
        return sum(
            connection.scalar(
                sa.select(sa.func.count()).select_from(table).where(table.text == "ours")
            )
            for table in (Note, Token, Currency)
        )


@on("postgresql+psycopg", "mysql+pymysql")
def test_a_worker_whose_lock_connection_is_ended_is_not_swept(prepared, started):
    """Its heart goes on, and takes the lock again."""
    worker = started(prepared, beat=1.0)
    worker("create", "EUR")
    number = number_of(prepared, worker.pid)
    free = 0
    for _ in range(3):
        free_lock(prepared, number)
        free += not is_alive(prepared, number)
        sweep(prepared.url)
        assert until(lambda: is_alive(prepared, number))
    assert free  # or the sweeps would prove little
    assert ours(prepared) == 5
    assert worker("cleanup") == {"deleted": 5, "already_gone": 0}
    assert worker.leave() == ""
    assert entries(prepared) == []


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_worker_outlives_a_restart_of_its_server(backend, started):
    with ExitStack() as stack:
        try:
            server = stack.enter_context(own_server(backend))
        except AbsentError as absent:
            if everything_required():
                pytest.fail(str(absent), pytrace=False)
            pytest.skip(f"{absent}; not at hand")
        engine = prepare(sa.create_engine(with_database(server.start()), poolclass=NullPool))
        bystanders = Bystanders(engine)
        bystanders.insert(Note, {"text": "theirs"})
        worker = started(engine, beat=0.3)
        worker("create", "EUR")
        number = number_of(engine, worker.pid)
        server.stop()
        server.start()
        sweep(engine.url)  # nobody holds the lock, most likely
        assert ours(engine) == 5
        worker("create", "USD")
        assert until(lambda: is_alive(engine, number))
        assert find_orphans(engine.url) == []
        sweep(engine.url)
        assert ours(engine) == 10
        assert worker("cleanup") == {"deleted": 10, "already_gone": 0}
        assert worker.leave() == ""
        assert entries(engine) == []
        bystanders.assert_untouched()


def test_a_worker_that_stood_still_too_long_finds_its_rows_taken_over(prepared, started):
    """It deletes nothing under the keys of its rows: they may be somebody else's by then."""
    bystanders = Bystanders(prepared)
    worker = started(prepared, beat=0.2)
    notes = worker("create", "EUR", "USD")
    number = number_of(prepared, worker.pid)
    worker.signal(signal.SIGSTOP)
    try:
        free_lock(prepared, number)
        sweep(prepared.url, patience=600)
        assert ours(prepared) == 6
        assert until(lambda: sweep(prepared.url, patience=0.5) and not ours(prepared))
        bystanders.insert(Currency, {"code": "EUR", "text": "theirs"})
        if prepared.dialect.name == "sqlite":
            bystanders.insert(Note, *({"id": note, "text": "ours"} for note in notes))
    finally:
        worker.signal(signal.SIGCONT)
    worker("create", "GBP")
    assert worker("cleanup") == {"error": "TakenOverError"}
    assert worker("cleanup") == {"deleted": 0, "already_gone": 0}
    assert worker.leave() == ""
    assert until(lambda: sweep(prepared.url, patience=0.5) and not entries(prepared))
    bystanders.assert_untouched()


def test_rows_under_a_key_that_another_dead_worker_had_before_are_swept(prepared, started):
    """Entries of several workers have no common order: each worker's tell by themselves."""
    pair = [started(prepared), started(prepared)]
    # the one whose entries would come last, if they were read in the order of the owners, is first
    later, earlier = sorted(pair, key=lambda each: number_of(prepared, each.pid))
    earlier("create", "EUR")
    earlier("delete", "EUR")
    later("create", "EUR")
    for each in pair:
        each.end()
    assert until(lambda: sweep(prepared.url) and not entries(prepared))
    assert ours(prepared) == 0
