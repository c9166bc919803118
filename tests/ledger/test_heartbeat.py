"""A heartbeat lasts as long as its process, whatever happens to its connections."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness import forks
from harness.asynchronous import DRIVERS
from harness.targets import DEFAULT, on
from tidyrows.dialects import dialect_for
from tidyrows.errors import LivenessLockError, SessionStateError
from tidyrows.ledger.heartbeat import Heartbeat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
SERVERS = ("postgresql+psycopg", "mysql+pymysql")
WAIT = 20
FORK: Any = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="this system cannot fork")
# Locks of MariaDB are the whole server's, and other processes test at the same time.
_numbers = count(os.getpid() << 20)

metadata = sa.MetaData()
owners = sa.Table(
    "owners",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("beats", sa.Integer, nullable=False),
)


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    asked, end = threading.Event(), time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            return False
        asked.wait(0.01)
    return True


class Patient:
    """A heartbeat, and how to see it from outside.

    Args:
        engine: what it beats through.
        outside: what looks at it.
        options: of the heartbeat.
    """

    def __init__(self, engine: sa.Engine, outside: sa.Engine, **options: Any) -> None:
        self.number = next(_numbers)
        self._outside = outside
        life = dialect_for(engine).liveness_lock(engine, self.number, patience=0.2)
        works = {"begin": self.begin, "beat": self.beat, "end": self.end, "interval": 0.02}
        self.heartbeat = Heartbeat(engine, life, **{**works, **options})

    def begin(self, connection: sa.Connection) -> None:
        connection.execute(sa.insert(owners).values(id=self.number, beats=0))

    def beat(self, connection: sa.Connection) -> None:
        mine = sa.update(owners).where(owners.c.id == self.number)
        connection.execute(mine.values(beats=owners.c.beats + 1))

    def end(self, connection: sa.Connection) -> None:
        connection.execute(sa.delete(owners).where(owners.c.id == self.number))

    @property
    def is_alive(self) -> bool:
        with self._outside.connect() as connection:
            return dialect_for(self._outside).is_alive(connection, self.number) is True

    @property
    def beats(self) -> int | None:
        with self._outside.connect() as connection:
            mine = sa.select(owners.c.beats).where(owners.c.id == self.number)
            return connection.execute(mine).scalar()

    def beats_on(self) -> bool:
        """Whether another beat comes."""
        last = self.heartbeat.last_beat
        return until(lambda: self.heartbeat.last_beat != last)


@pytest.fixture
def outside(database):
    engine = database.engine()
    metadata.create_all(engine)
    return engine


@pytest.fixture
def patient(database, outside):
    made = Patient(database.engine(), outside)
    yield made
    made.heartbeat.stop()


def connections_to(engine: sa.Engine) -> set[int]:
    """The ids of all connections to the database, but the one that asks."""
    sql = {
        "postgresql": "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid()",
        "mysql": "SELECT id FROM information_schema.processlist WHERE db = database() "
        "AND id <> connection_id()",
    }[engine.dialect.name]
    with engine.connect() as connection:
        return set(connection.exec_driver_sql(sql).scalars())


def kill(engine: sa.Engine, ids: set[int]) -> None:
    sql = {"postgresql": "SELECT pg_terminate_backend({}, 5000)", "mysql": "KILL {}"}
    with engine.connect() as connection:
        for each in ids:
            with suppress(sa.exc.OperationalError):  # a beat's own has just gone
                connection.exec_driver_sql(sql[engine.dialect.name].format(each))


def test_a_heart_holds_the_lock_and_beats(patient):
    heartbeat = patient.heartbeat
    assert (heartbeat.is_running, heartbeat.last_beat, patient.is_alive) == (False, None, False)
    heartbeat.start()
    assert heartbeat.is_running
    assert patient.is_alive
    assert patient.beats is not None
    assert heartbeat.last_beat is not None
    assert patient.beats_on()
    if not dialect_for(patient._outside).heartbeat_in_file:
        assert until(lambda: patient.beats >= 3)
    assert heartbeat.last_error is None
    assert heartbeat.is_running
    heartbeat.stop()
    assert not heartbeat.is_running
    assert not patient.is_alive
    assert patient.beats is None
    heartbeat.stop()


@on("sqlite")  # only there a file tells the beats
def test_a_beat_in_a_file_writes_no_row(patient):
    """A writer would keep every other writer waiting."""
    patient.heartbeat.start()
    assert patient.beats_on()
    assert patient.beats_on()
    assert patient.beats == 0
    with patient._outside.connect() as connection:
        dialect = dialect_for(patient._outside)
        age = dialect.heartbeat_file_age(connection, patient.number)
        assert 0 <= age < 5


def test_stopping_wakes_it_at_once(database, outside):
    patient = Patient(database.engine(), outside, interval=3600)
    patient.heartbeat.start()
    began = time.monotonic()
    patient.heartbeat.stop()
    assert time.monotonic() - began < WAIT / 2
    assert not patient.is_alive
    assert patient.beats is None


@on(*SERVERS)  # a file has no connection
def test_no_connection_idles_between_beats_and_none_is_left(database, outside):
    engine = database.engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    with engine.connect() as connection:  # the suite has taken the only one
        connection.rollback()
        before = connections_to(outside)
        patient = Patient(engine, outside, interval=3600)
        patient.heartbeat.start()
        assert until(lambda: len(connections_to(outside)) == len(before) + 1)
        patient.heartbeat.stop()
        assert until(lambda: connections_to(outside) == before)


def test_what_goes_wrong_at_the_beginning_is_raised_where_it_is_started(database, outside):
    first = Patient(database.engine(), outside)
    first.heartbeat.start()
    second = Patient(database.engine(), outside)
    second.heartbeat.lock = dialect_for(outside).liveness_lock(outside, first.number, patience=0)
    with pytest.raises(LivenessLockError):
        second.heartbeat.start()
    assert not second.heartbeat.is_running
    assert first.is_alive
    first.heartbeat.stop()

    def refuse(connection: sa.Connection) -> None:
        raise LookupError("no table")

    third = Patient(database.engine(), outside, begin=refuse)
    with pytest.raises(LookupError, match="no table"):
        third.heartbeat.start()
    assert not third.heartbeat.is_running
    assert not third.is_alive
    third.heartbeat.stop()


def test_a_start_that_takes_too_long_is_given_up(database, outside):
    release = threading.Event()
    patient = Patient(database.engine(), outside, begin=lambda _connection: release.wait(WAIT))
    with pytest.raises(SessionStateError, match=r"within 0\.1 s"):
        patient.heartbeat.start(timeout=0.1)
    assert not patient.heartbeat.is_running
    release.set()
    patient.heartbeat.stop()
    assert not patient.is_alive
    with pytest.raises(SessionStateError, match="started before"):
        patient.heartbeat.start()


@on(*SERVERS)  # a file has no connection
def test_killed_connections_do_not_end_it(database, outside, patient):
    before = connections_to(outside)
    patient.heartbeat.start()
    for _twice in range(2):
        kill(outside, connections_to(outside) - before)
        assert until(lambda: patient.is_alive)
        assert patient.beats_on()
    assert patient.heartbeat.is_running
    assert patient.is_alive


def test_a_beat_that_fails_is_tried_again(database, outside):
    """A server may restart, and a row may be locked."""
    failures = iter([LookupError("one"), LookupError("two")])

    def beat(connection: sa.Connection) -> None:
        for failure in failures:
            raise failure

    patient = Patient(database.engine(), outside, beat=beat)
    if dialect_for(outside).heartbeat_in_file:
        patient.heartbeat.lock.renew = lambda: beat(None)
    patient.heartbeat.start()
    assert patient.beats_on()
    assert next(failures, None) is None
    assert patient.heartbeat.last_error is None
    patient.heartbeat.stop()


def test_what_a_failed_beat_wrote_is_not_committed(database, outside):
    done = threading.Event()

    def fails(connection: sa.Connection) -> None:
        patient.beat(connection)
        done.set()
        raise LookupError("after the write")

    patient = Patient(database.engine(), outside, beat=fails, end=None)
    patient.heartbeat.start()
    if not dialect_for(outside).heartbeat_in_file:
        assert done.wait(WAIT)
        assert until(lambda: isinstance(patient.heartbeat.last_error, LookupError))
    patient.heartbeat.stop()
    assert patient.beats == 0


def test_time_is_given_from_outside(database, outside):
    patient = Patient(database.engine(), outside, clock=iter(range(100, 10**6)).__next__)
    patient.heartbeat.start()
    assert patient.heartbeat.last_beat >= 100
    assert until(lambda: patient.heartbeat.last_beat > 102)
    patient.heartbeat.stop()


def test_it_ends_with_its_engine(database, outside):
    engine = sa.create_engine(database.url)
    with engine.connect():
        pass
    patient = Patient(engine, outside)
    patient.heartbeat.start()
    assert patient.beats_on()
    engine.dispose()
    del engine

    def over() -> bool:
        gc.collect()
        return not patient.heartbeat.is_running

    assert until(over)
    patient.heartbeat.stop()
    assert until(lambda: not patient.is_alive)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_that_nobody_else_sees_is_left_alone(url):
    """A connection of the heartbeat would lead to another, empty database."""
    engine = sa.create_engine(url)
    patient = Patient(engine, engine)
    patient.heartbeat.start()
    assert patient.heartbeat.lock.alone
    assert patient.beats_on()
    assert patient.heartbeat.last_error is None
    patient.heartbeat.stop()
    engine.dispose()


# ----- asynchronous drivers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database", "driver"),
    [(sync, driver) for sync in DEFAULT for driver in DRIVERS[sync.partition("+")[0]]],
    indirect=["database"],
)
def test_over_asynchronous_drivers_it_beats_in_a_loop_of_its_own(database, outside, driver):
    """The suite's own loop may be busy, or closed between two tests."""
    before = set() if database.backend == "sqlite" else connections_to(outside)

    async def main() -> None:
        engine = create_async_engine(database.url.set(drivername=driver))
        patient = Patient(engine.sync_engine, outside)
        patient.heartbeat.start()
        assert patient.is_alive
        assert patient.beats_on()
        if database.backend != "sqlite":
            assert until(lambda: patient.beats >= 3)
            kill(outside, connections_to(outside) - before)
            assert until(lambda: patient.is_alive)
            assert patient.beats_on()
        async with engine.connect() as connection:
            assert await connection.run_sync(
                lambda sync: dialect_for(sync).is_alive(sync, patient.number)
            )
        patient.heartbeat.stop()
        assert patient.heartbeat.last_error is None
        assert not patient.is_alive
        assert patient.beats is None
        await engine.dispose()

    asyncio.run(main())
    if database.backend != "sqlite":
        assert until(lambda: connections_to(outside) == before)


# ----- other processes ---------------------------------------------------------------------------


@needs_fork
def test_a_forked_child_has_no_heart_and_the_parents_goes_on(outside, patient):
    patient.heartbeat.start()
    pid = os.fork()
    if pid == 0:
        status = 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                heartbeat = patient.heartbeat
                assert not heartbeat.is_running
                assert getattr(heartbeat.lock, "_driver", None) is None
                assert getattr(heartbeat.lock, "_descriptor", None) is None
                heartbeat.stop()
                status = 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert patient.is_alive
    assert patient.beats_on()
    assert patient.heartbeat.last_error is None
    assert patient.heartbeat.is_running


def _live(url: sa.URL, driver: str | None, number: int, pipe: Any, *, forks: bool) -> None:
    engine = sa.create_engine(url)
    if driver is not None:
        engine = create_async_engine(url.set(drivername=driver)).sync_engine
    life = dialect_for(engine).liveness_lock(engine, number)
    heartbeat = Heartbeat(
        engine, life, beat=lambda connection: connection.scalar(sa.text("SELECT 1"))
    )
    heartbeat.start()
    child = os.fork() if forks else 1
    if child == 0 or not forks:
        pipe.send(os.getpid())
    pipe.recv()


def _watch_the_death(database: Any, driver: str | None, *, forks: bool) -> None:
    engine, number = database.engine(), next(_numbers)
    here, there = FORK.Pipe()
    process = FORK.Process(
        target=_live, args=(database.url, driver, number, there), kwargs={"forks": forks}
    )

    def is_alive() -> bool | None:
        with engine.connect() as connection:
            return dialect_for(engine).is_alive(connection, number)

    process.start()
    pid = here.recv()
    try:
        assert is_alive() is True
        process.kill()
        assert until(lambda: is_alive() is False)
        if forks:
            os.kill(pid, 0)
    finally:
        if forks:
            os.kill(pid, signal.SIGKILL)
        process.join(WAIT)
    here.close()
    there.close()


@needs_fork
def test_a_killed_process_holds_no_lock(database):
    _watch_the_death(database, None, forks=False)


@needs_fork
def test_a_child_that_outlives_its_parent_holds_no_lock(database):
    """Workers of a test's own, and servers that it starts, often live longer than they should."""
    _watch_the_death(database, None, forks=True)


@needs_fork
@pytest.mark.parametrize(
    ("database", "driver"),
    [(sync, DRIVERS[sync.partition("+")[0]][0]) for sync in DEFAULT],
    indirect=["database"],
)
def test_over_asynchronous_drivers_too(database, driver):
    _watch_the_death(database, driver, forks=True)


ENDS = """
import sys
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from tidyrows.dialects import dialect_for
from tidyrows.ledger.heartbeat import Heartbeat

def end(connection):
    connection.exec_driver_sql("SELECT 1")
    print("ended", flush=True)

one, other = sa.create_engine(sys.argv[1]), create_async_engine(sys.argv[2])
heartbeats = [
    Heartbeat(engine, dialect_for(engine).liveness_lock(engine, number), end=end, interval=0.01,
              beat=lambda connection: None)
    for engine, number in ((one, 1), (other.sync_engine, 2))
]
for heartbeat in heartbeats:
    heartbeat.start()
print("started", flush=True)
"""


def test_a_process_that_just_ends_ends_quietly(database):
    engine = database.engine()
    urls = [database.url, database.url.set(drivername=DRIVERS[database.backend][0])]
    shown = (url.render_as_string(hide_password=False) for url in urls)
    done = forks.run([sys.executable, "-W", "error", "-c", ENDS, *shown])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["started", "ended", "ended"]
    with engine.connect() as connection:
        for number in (1, 2):
            assert dialect_for(engine).is_alive(connection, number) is False
            assert dialect_for(engine).heartbeat_file_age(connection, number) is None
