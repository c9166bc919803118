"""A worker's lock is held while it lives and free once it is dead, however it died."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from harness import servers
from harness.asynchronous import DRIVERS, engine_on
from harness.pgbouncer import DRIVER_OPTIONS, pgbouncer
from harness.targets import DEFAULT, on
from harness.wires import Wire
from tidyrows import TidyRowsError
from tidyrows.dialects import DriverSocket, dialect_for
from tidyrows.dialects.base import UnknownDialect
from tidyrows.dialects.locks import ConnectionLock
from tidyrows.dialects.sqlite import locks as liveness_file
from tidyrows.errors import LivenessLockError
from tidyrows.greenlets import spawn

# Locks of MariaDB are the whole server's, and other processes test at the same time.
NUMBER = (os.getpid() << 32) | 5
WAIT = 10
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]
SERVERS = ("postgresql+psycopg", "mysql+pymysql")
FORK: Any = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    asked, end = threading.Event(), time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            return False
        asked.wait(0.01)
    return True


def is_alive(engine: sa.Engine, number: int = NUMBER) -> bool | None:
    with engine.connect() as connection:
        return dialect_for(engine).is_alive(connection, number)


def file_of(engine: sa.Engine, number: int = NUMBER) -> Path:
    return Path(f"{engine.url.database}-tidyrows-{number:016x}")


def _hold(url: sa.URL, number: int, options: dict[str, object], pipe: Any) -> None:
    engine = sa.create_engine(url, connect_args=options)
    life = dialect_for(engine).liveness_lock(engine, number)
    life.acquire()
    pipe.send("held")
    pipe.recv()


@contextmanager
def worker(url: sa.URL, number: int = NUMBER, **options: object) -> Iterator[BaseProcess]:
    """Another process that holds the lock until it is killed."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(url, number, options, there))
    process.start()
    there.close()
    try:
        assert here.recv() == "held"
        yield process
    finally:
        process.kill()
        process.join(WAIT)
        process.close()
        here.close()


def lose_connection(life: ConnectionLock, engine: sa.Engine) -> None:
    """End its connection, as an administrator or a network may."""
    number = dialect_for(engine).server_id(life._driver)
    kill = {"postgresql": f"SELECT pg_terminate_backend({number}, 5000)", "mysql": f"KILL {number}"}
    with engine.connect() as connection:
        connection.exec_driver_sql(kill[dialect_for(engine).name])
    assert until(lambda: is_alive(engine) is False)


def test_a_lock_is_held_from_take_to_release(any_driver_engine):
    engine = any_driver_engine
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    assert is_alive(engine) is False
    life.acquire()
    assert is_alive(engine) is True
    life.renew()
    life.acquire()
    assert is_alive(engine) is True
    assert not life.alone
    life.release()
    assert until(lambda: is_alive(engine) is False)  # once the server has noticed it
    life.release()
    life.acquire()
    assert is_alive(engine) is True
    life.release()


def test_looking_disturbs_nobody(engine):
    """Two who look at the same moment must not take each other for the worker."""
    life = dialect_for(engine).liveness_lock(engine, NUMBER, patience=0)
    with engine.connect() as one, engine.connect() as two:
        dialect = dialect_for(engine)
        assert [dialect.is_alive(each, NUMBER) for each in (one, two)] == [False, False]
        life.acquire()
        assert [dialect.is_alive(each, NUMBER) for each in (one, two)] == [True, True]
        life.renew()
        life.release()


def test_a_lock_that_somebody_holds_is_refused_with_words(engine):
    dialect = dialect_for(engine)
    first, second = (
        dialect.liveness_lock(engine, NUMBER),
        dialect.liveness_lock(engine, NUMBER, patience=0.1),
    )
    first.acquire()
    with pytest.raises(LivenessLockError, match=f"{NUMBER:016x}.*start again") as caught:
        second.acquire()
    assert isinstance(caught.value, TidyRowsError)
    assert caught.value.number == NUMBER
    second.release()
    assert is_alive(engine) is True
    first.release()
    second.acquire()
    assert is_alive(engine) is True
    second.release()


def test_the_lock_of_a_killed_process_is_free(any_driver_engine):
    with worker(any_driver_engine.url) as process:
        assert is_alive(any_driver_engine) is True
        process.kill()
        assert until(lambda: is_alive(any_driver_engine) is False)


@pytest.mark.parametrize(
    "number",
    [1, (7 << 32) | 5, (5 << 32) | 7, 0xFFFF_FFFF, 0x8000_0000, 0xFFFF_FFFF << 31, 2**63 - 1],
    ids=hex,
)
def test_numbers_that_share_a_half_are_told_apart(engine, number):
    others = {
        number ^ 1,
        number ^ (1 << 31),
        number ^ (1 << 32),
        (number & 0xFFFF_FFFF) << 32 | number >> 32,
    } - {number}
    life = dialect_for(engine).liveness_lock(engine, number)
    life.acquire()
    assert is_alive(engine, number) is True
    assert [each for each in others if 0 < each < 2**63 and is_alive(engine, each)] == []
    life.release()


@on("postgresql+psycopg")  # only there have locks two forms, and belong to one database
def test_other_locks_of_the_same_number_are_not_taken_for_it(engine):
    elsewhere = sa.create_engine(engine.url.set(database="postgres"))
    with engine.connect() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({NUMBER >> 32}, {NUMBER & 0xFFFF})")
        assert is_alive(engine) is False
    life = dialect_for(elsewhere).liveness_lock(elsewhere, NUMBER)
    life.acquire()
    assert is_alive(engine) is False
    life.release()
    elsewhere.dispose()


@on(*SERVERS)  # a file has no connection
def test_a_killed_connection_is_taken_up_again_at_the_next_beat(engine):
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    lose_connection(life, engine)
    life.renew()
    assert is_alive(engine) is True
    life.release()


@on(*SERVERS)  # as above
def test_release_says_nothing_of_a_connection_that_died(engine):
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    lose_connection(life, engine)
    life.release()
    life.release()


@on("mysql+pymysql")  # a lock of a session may be lost without the session
def test_a_lock_lost_on_a_living_connection_is_taken_again(engine):
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    life._run(life._statements.release)
    assert is_alive(engine) is False
    life.renew()
    assert is_alive(engine) is True
    life.release()


@on("postgresql+psycopg")  # only there the lock lives in a transaction
def test_the_open_transaction_holds_nothing_but_the_lock(database):
    """No snapshot and no transaction id: it must not keep VACUUM from its work."""
    engine = database.engine(
        isolation_level="AUTOCOMMIT",
        connect_args={"options": "-cidle_in_transaction_session_timeout=100"},
    )
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    threading.Event().wait(0.3)
    with engine.connect() as connection:
        (held,) = connection.exec_driver_sql(
            "SELECT a.state, a.backend_xid, a.backend_xmin, a.application_name, "
            "(SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid AND l.locktype <> 'virtualxid') "
            "FROM pg_stat_activity a WHERE a.datname = current_database() "
            f"AND a.pid = {dialect_for(engine).server_id(life._driver)}"
        ).all()  # fmt: skip  # the statement, then what is read from it
    assert tuple(held) == ("idle in transaction", None, None, "tidyrows: a worker is alive", 1)
    life.release()


@on(*SERVERS)  # a file has no connection
def test_a_life_takes_no_connection_of_the_pool_and_leaves_none(database):
    """The suite may have one connection in all, and DROP DATABASE wants to be alone."""
    engine = database.engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    dialect = dialect_for(engine)
    life = dialect.liveness_lock(engine, NUMBER)
    there = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
    }[dialect.name]
    with engine.connect() as connection:

        def count() -> int:
            connection.rollback()
            return connection.exec_driver_sql(there).scalar_one()

        before = count()
        life.acquire()
        assert count() == before + 1
        lose_connection(life, database.engine(poolclass=sa.NullPool))
        life.renew()
        assert until(lambda: count() == before + 1)
        life.release()
        assert until(lambda: count() == before)


# ----- a server that does not answer -------------------------------------------------------------


@pytest.fixture
def wire(database):
    made = Wire(database.url)
    yield made
    made.close()


@on(*SERVERS)  # a file always answers
def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_the_bound(database, wire):
    engine = sa.create_engine(wire.url)
    statements = dialect_for(engine).liveness_lock(engine, NUMBER)._statements
    life = ConnectionLock(engine, NUMBER, statements, patience=0, bound=0.3)
    life.acquire()
    began = time.monotonic()
    wire.dead = True
    with pytest.raises(TimeoutError, match="no connection within"):
        life.renew()
    with pytest.raises(TimeoutError, match="no connection within"):
        life.renew()
    life.release()
    assert time.monotonic() - began < 3
    wire.dead = False
    wire.hang_up()
    assert until(lambda: is_alive(engine) is False)
    life.renew()
    assert is_alive(engine) is True
    wire.dead = True
    life.release()
    assert time.monotonic() - began < 5
    engine.dispose()


def test_bounded_ends_a_wait_and_nothing_else():
    here, there = socket.socketpair()
    with here, there, closing(DriverSocket(here)) as wire:
        here.settimeout(WAIT)
        with wire.bounded(0.05):
            assert here.recv(1) == b""
        assert there.recv(1) == b""
    here, there = socket.socketpair()
    with here, there, closing(DriverSocket(here)) as wire:
        with wire.bounded(0.01):
            pass
        threading.Event().wait(0.05)
        there.sendall(b"x")
        assert here.recv(1) == b"x"
    with DriverSocket(None).bounded(0.0):
        pass


def test_a_descriptor_that_is_somebody_elses_by_now_is_left_alone():
    """A driver closes its socket when it likes, and the next one opened has its number."""
    here, there = socket.socketpair()
    wire, number = DriverSocket(here), here.fileno()
    mine, yours = socket.socketpair()
    here.close()
    os.dup2(mine.fileno(), number)
    with mine, yours, there, closing(socket.socket(fileno=number)) as reused:
        wire.shut()
        wire.redirect_to_null()
        yours.sendall(b"x")
        assert reused.recv(1) == b"x"


# ----- forks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["socket known", "socket unknown"])
def test_a_forked_child_leaves_the_lock_to_its_parent(any_driver_engine, known):
    """Some drivers say goodbye on the parent's socket as soon as the child lets go of it."""
    engine = any_driver_engine
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()

    def held() -> object:
        driver = getattr(life, "_driver", None)
        return life._descriptor if driver is None else dialect_for(engine).server_id(driver)

    before = held()
    pid = os.fork()
    if pid == 0:
        try:
            if not known:
                life._socket = DriverSocket(None)
            life.abandon()
            life.release()
            life.abandon()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert is_alive(engine) is True
    life.renew()
    assert held() == before
    life.release()


def _fork_and_hold(url: sa.URL, pipe: Any) -> None:
    engine = sa.create_engine(url)
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    else:
        life.abandon()
        pipe.send(os.getpid())
        pipe.recv()
        os._exit(0)


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(any_driver_engine):
    here, there = FORK.Pipe()
    process = FORK.Process(target=_fork_and_hold, args=(any_driver_engine.url, there))
    process.start()
    child = here.recv()
    try:
        assert is_alive(any_driver_engine) is True
        process.kill()
        assert until(lambda: is_alive(any_driver_engine) is False)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        process.join(WAIT)
    process.close()
    here.close()
    there.close()


# ----- asynchronous drivers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database", "driver"),
    [(sync, driver) for sync in DEFAULT for driver in DRIVERS[sync.partition("+")[0]]],
    indirect=["database"],
)
def test_over_asynchronous_drivers_it_is_the_same(database, driver):
    outside = database.engine()

    def story(engine: sa.Engine) -> None:
        life = dialect_for(engine).liveness_lock(engine, NUMBER)
        life.acquire()
        assert is_alive(outside) is True
        assert is_alive(engine) is True
        life.renew()
        if database.backend != "sqlite":
            assert life._socket._copy is not None
            lose_connection(life, engine)
        life.renew()
        assert is_alive(outside) is True
        life.release()
        assert is_alive(outside) is False

    async def main() -> None:
        async with engine_on(database, driver) as engine:
            await spawn(story, engine.sync_engine)

    asyncio.run(main())


# ----- files -------------------------------------------------------------------------------------


def test_a_file_tells_the_last_beat(sqlite_engine):
    dialect, file = dialect_for(sqlite_engine), file_of(sqlite_engine)
    life = dialect.liveness_lock(sqlite_engine, NUMBER)
    with sqlite_engine.connect() as connection:
        assert dialect.heartbeat_in_file
        assert dialect.heartbeat_file_age(connection, NUMBER) is None
        life.acquire()
        assert 0 <= dialect.heartbeat_file_age(connection, NUMBER) < 5
        os.utime(file, (1, time.time() - 3600))
        assert 3595 < dialect.heartbeat_file_age(connection, NUMBER) < 3605
        life.renew()
        assert dialect.heartbeat_file_age(connection, NUMBER) < 5
        life.release()
        assert dialect.heartbeat_file_age(connection, NUMBER) is None
    assert not file.exists()


def test_a_file_that_somebody_deleted_is_made_anew(sqlite_engine):
    life = dialect_for(sqlite_engine).liveness_lock(sqlite_engine, NUMBER)
    life.acquire()
    file_of(sqlite_engine).unlink()
    assert is_alive(sqlite_engine) is False
    life.renew()
    assert is_alive(sqlite_engine) is True
    file_of(sqlite_engine).unlink()
    file_of(sqlite_engine).touch()
    life.renew()
    assert is_alive(sqlite_engine) is True
    file_of(sqlite_engine).unlink()
    life.release()
    life.release()


def test_a_file_deleted_just_before_it_is_locked_is_no_lock(sqlite_engine, monkeypatch):
    """A sweep may delete what is left over at any moment."""
    file, left, flock = file_of(sqlite_engine), [True], liveness_file.flock

    def late(descriptor: int, how: int) -> None:
        if left:
            left.clear()
            file.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(liveness_file, "flock", late)
    life = dialect_for(sqlite_engine).liveness_lock(sqlite_engine, NUMBER)
    life.acquire()
    assert is_alive(sqlite_engine) is True
    life.release()


def test_who_looks_is_not_taken_for_the_worker(sqlite_engine):
    file_of(sqlite_engine).touch()
    with file_of(sqlite_engine).open() as looked_at:
        liveness_file.flock(looked_at, liveness_file.LOCK_SH)
        assert is_alive(sqlite_engine) is False


def test_the_file_of_a_dead_worker_is_removed_and_that_of_a_living_one_is_not(sqlite_engine):
    dialect, file = dialect_for(sqlite_engine), file_of(sqlite_engine)
    with sqlite_engine.connect() as connection:
        dialect.remove_liveness_files(connection)
        with worker(sqlite_engine.url) as process:
            dialect.remove_liveness_files(connection)
            assert file.exists()
            assert dialect.is_alive(connection, NUMBER) is True
            process.kill()
            assert until(lambda: is_alive(sqlite_engine) is False)
        assert file.exists()
        dialect.remove_liveness_files(connection)
        assert not file.exists()


def test_a_left_over_file_is_taken_over(sqlite_engine):
    file = file_of(sqlite_engine)
    file.touch()
    os.utime(file, (1, 1))
    life = dialect_for(sqlite_engine).liveness_lock(sqlite_engine, NUMBER)
    life.acquire()
    with sqlite_engine.connect() as connection:
        assert dialect_for(sqlite_engine).heartbeat_file_age(connection, NUMBER) < 5
    life.release()
    assert not file.exists()


@pytest.mark.parametrize(
    "url", ["sqlite:///made.db", "sqlite:///file:made.db?uri=true&mode=rwc", "sqlite:///./made.db"]
)
def test_the_file_stands_beside_the_database_however_that_is_written(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = sa.create_engine(url)
    life = dialect_for(engine).liveness_lock(engine, NUMBER)
    life.acquire()
    expected = Path(os.path.realpath(tmp_path)) / f"made.db-tidyrows-{NUMBER:016x}"
    assert expected.exists()
    monkeypatch.chdir("/")
    life.renew()
    life.release()
    assert not expected.exists()
    engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:shared?mode=memory&cache=shared&uri=true",
        "sqlite:///file:/named?vfs=memdb&uri=true",
    ],
)
def test_nobody_else_can_see_a_database_in_memory(url):
    # Which pool SQLAlchemy takes by itself depends on its version, and warns.
    engine = sa.create_engine(url, poolclass=sa.pool.SingletonThreadPool)
    dialect = dialect_for(engine)
    life = dialect.liveness_lock(engine, NUMBER)
    for _twice in range(2):
        life.acquire()
        life.renew()
    assert life.alone
    with engine.connect() as connection:
        assert dialect.is_alive(connection, NUMBER) is None
        assert dialect.heartbeat_file_age(connection, NUMBER) is None
        dialect.remove_liveness_files(connection)
    life.abandon()
    life.release()
    engine.dispose()


def test_where_the_system_has_no_flock_the_time_alone_tells(sqlite_engine, monkeypatch):
    monkeypatch.setattr(liveness_file, "flock", None)
    dialect = dialect_for(sqlite_engine)
    life = dialect.liveness_lock(sqlite_engine, NUMBER)
    life.acquire()
    assert is_alive(sqlite_engine) is None
    with sqlite_engine.connect() as connection:
        assert dialect.heartbeat_file_age(connection, NUMBER) < 5
        life.renew()
        life.release()
        assert is_alive(sqlite_engine) is False
        file_of(sqlite_engine).touch()
        dialect.remove_liveness_files(connection)  # nobody knows whether its worker is dead
    assert file_of(sqlite_engine).exists()


# ----- clocks, and databases unknown -------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "+09:30"])
def test_the_servers_clock_says_the_same_in_every_time_zone(engine, zone):
    statements = {
        "postgresql": f"SET TIME ZONE INTERVAL '{zone}' HOUR TO MINUTE",
        "mysql": f"SET time_zone = '{zone}'",
    }
    with engine.connect() as connection:
        if dialect_for(engine).name in statements and zone != "UTC":
            connection.exec_driver_sql(statements[dialect_for(engine).name])
        clock = sa.literal_column(dialect_for(engine).clock)
        readings = {connection.execute(sa.select(clock)).scalar_one() for _ in range(20)}
        connection.rollback()
    assert all(isinstance(each, float) for each in readings)
    assert all(abs(each - time.time()) < 60 for each in readings)
    assert any(each % 1 for each in readings)


def test_of_a_database_unknown_nobody_can_tell(sqlite_engine):
    dialect = UnknownDialect(sqlite_engine.dialect)
    life = dialect.liveness_lock(sqlite_engine, NUMBER)
    life.acquire()
    life.renew()
    with sqlite_engine.connect() as connection:
        assert dialect.is_alive(connection, NUMBER) is None
        assert dialect.heartbeat_file_age(connection, NUMBER) is None
        dialect.remove_liveness_files(connection)
    life.abandon()
    life.release()
    assert not dialect.heartbeat_in_file


# ----- behind a pooler ---------------------------------------------------------------------------


@pytest.fixture
def pooled(postgresql_engine):
    """An engine whose server connections are shared with everybody, transaction by transaction."""
    try:
        with pgbouncer(postgresql_engine.url) as url:
            engine = sa.create_engine(url, connect_args=DRIVER_OPTIONS)
            yield engine
            engine.dispose()
    except servers.AbsentError as absent:
        if servers.everything_required():
            pytest.fail(f"{servers.REQUIRE_VARIABLE}=all, but {absent}", pytrace=False)
        pytest.skip(str(absent))


def test_behind_a_pooler_a_lock_is_the_clients_own(pooled):
    """A session's lock would go to whoever gets the server connection next."""
    mine = dialect_for(pooled).liveness_lock(pooled, NUMBER + 1)
    mine.acquire()
    with pytest.raises(LivenessLockError):
        dialect_for(pooled).liveness_lock(pooled, NUMBER + 1, patience=0).acquire()
    mine.release()
    with worker(pooled.url, **DRIVER_OPTIONS) as process:
        for _each in range(5):
            assert is_alive(pooled) is True
            with pytest.raises(LivenessLockError):
                dialect_for(pooled).liveness_lock(pooled, NUMBER, patience=0).acquire()
        process.kill()
        assert until(lambda: is_alive(pooled) is False)
    life = dialect_for(pooled).liveness_lock(pooled, NUMBER)
    life.acquire()
    for _beat in range(10):
        life.renew()
    assert is_alive(pooled) is True
    life.release()
    assert is_alive(pooled) is False


def test_behind_a_pooler_nothing_prepared_is_left(pooled):
    """What one client has prepared on a server connection, the next would prepare again."""
    engine = sa.create_engine(pooled.url)
    for number in (NUMBER, NUMBER + 1):
        life = dialect_for(engine).liveness_lock(engine, number)
        life.acquire()
        driver = life._driver
        for _beat in range(10):
            life.renew()
        assert life._driver is driver
        life.release()
    with engine.connect() as connection:
        prepared = "SELECT count(*) FROM pg_prepared_statements"
        assert connection.exec_driver_sql(prepared).scalar_one() == 0
    engine.dispose()
