"""A lock by name is held by whom it is said to be, across processes, and by nobody else."""

import os
import re
import signal
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.models import Org, User
from harness.pgbouncer import DRIVER_OPTIONS, pgbouncer
from harness.servers import AbsentError, everything_required
from harness.wires import Wire
from tidyrows import (
    ArgumentError,
    LockLostError,
    LockManager,
    LockTimeoutError,
    NotBoundError,
    UnknownTableError,
    WorkerContext,
    advisory_lock,
    try_advisory_lock,
)
from tidyrows.dialects import SilentServerError, advisory
from tidyrows.locks.advisory import _own

GW3 = WorkerContext("nightly-17", "gw3", 3, test_id="tests/test_a.py::test_login", worker_count=8)


def is_free(engine, name, **how):
    with try_advisory_lock(engine, name, **how) as held:
        return held


def other_engine(engine):
    """As another process would have it."""
    return sa.create_engine(engine.url)


@pytest.fixture(params=[False, True], ids=["transaction", "session"])
def how(request):
    return {"session": request.param}


def test_one_holds_it_alone_or_several_share_it(any_driver_engine, how):
    mine, theirs = any_driver_engine, other_engine(any_driver_engine)
    with advisory_lock(mine, "seed", **how) as held:
        assert held
        assert not is_free(theirs, "seed")
        assert not is_free(theirs, "seed", shared=True)
        assert is_free(theirs, "another")
        assert is_free(mine, "Seed")
    with advisory_lock(mine, "seed", shared=True, **how):
        with advisory_lock(theirs, "seed", shared=True, **how):
            assert not is_free(theirs, "seed")
        assert not is_free(theirs, "seed")
        assert is_free(theirs, "seed", shared=True)
    assert is_free(theirs, "seed")
    theirs.dispose()


def test_the_error_names_who_holds_it(engine):
    theirs = other_engine(engine)
    with (
        advisory_lock(theirs, "seed", context=GW3),
        pytest.raises(LockTimeoutError, match="The advisory lock 'seed' was not free") as caught,
        advisory_lock(engine, "seed", timeout=0.1),
    ):
        raise AssertionError("two hold it")
    assert caught.value.lock == "seed"
    (holder,) = caught.value.holders
    text = str(caught.value)
    assert f"pid {holder.pid}" in text
    assert "This process holds it itself: leave that block first." in text
    if engine.dialect.name in {"postgresql", "sqlite"}:
        assert holder.application == "tidyrows run nightly- gw3 test_login"
    else:
        assert holder.user == "root"
    assert is_free(engine, "seed")
    theirs.dispose()


def test_it_is_waited_for(any_driver_engine, how):
    theirs = other_engine(any_driver_engine)
    released_at = []
    holds = threading.Event()

    def hold():
        with advisory_lock(theirs, "seed", **how):
            holds.set()
            time.sleep(0.2)  # what the block does
            released_at.append(time.monotonic())

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait(10)
    with advisory_lock(any_driver_engine, "seed", timeout=20, **how):
        assert released_at
        assert released_at[0] <= time.monotonic()
    thread.join()
    theirs.dispose()


def test_twelve_workers_count_without_a_loss(database):
    """Each reads, yields to the others, and writes; readers never see one in the middle."""
    engine = database.engine(pool_size=12)
    box = {"count": 0, "in the middle": False}
    faults = []

    def write():
        for _ in range(5):
            with advisory_lock(engine, "box", timeout=60):
                before = box["count"]
                box["in the middle"] = True
                time.sleep(0.001)  # so that others run
                box["count"] = before + 1
                box["in the middle"] = False

    def read():
        for _ in range(5):
            with advisory_lock(engine, "box", shared=True, timeout=60):
                for _look in range(3):
                    faults.extend(["read in the middle"] * box["in the middle"])
                    time.sleep(0.001)  # so that others run

    threads = [threading.Thread(target=work) for work in (write, read) * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert box["count"] == 30


@pytest.mark.parametrize("kind", [orm.Session, orm.sessionmaker, sa.Engine.connect])
def test_no_commit_of_the_block_ends_it(engine, kind):
    bind = kind(engine)
    theirs = other_engine(engine)
    with ExitStack() as closing:
        used = bind() if isinstance(bind, orm.sessionmaker) else bind
        closing.callback(used.close)
        with advisory_lock(bind, "seed"):
            used.execute(sa.text("SELECT 1"))
            used.commit()
            used.execute(sa.text("SELECT 1"))
            used.rollback()
            assert not is_free(theirs, "seed")
        assert is_free(theirs, "seed")
    theirs.dispose()


@pytest.mark.parametrize("options", [{"isolation_level": "AUTOCOMMIT"}, {"pool_size": 1}], ids=str)
def test_engines_of_other_kinds(database, options, how):
    if "pool_size" in options and database.backend == "sqlite":
        options |= {"poolclass": sa.QueuePool}
    engine = database.engine(**options)
    theirs = database.engine()
    with advisory_lock(engine, "seed", **how):
        assert not is_free(theirs, "seed")
    assert is_free(theirs, "seed")
    with engine.connect() as connection:  # it is as it was
        connection.execute(sa.text("SELECT 1"))
        if database.backend == "postgresql":
            shown = connection.exec_driver_sql("SHOW application_name").scalar()
            assert "tidyrows" not in shown
    with advisory_lock(engine, "seed", **how):
        pass


def lock_files(engine):
    database = Path(engine.url.database)
    return list(database.parent.glob(f"{database.name}-tidyrows-lock-*"))


def lose(engine):
    """What holds the lock dies, as by a network that breaks or a file that is deleted."""
    if engine.dialect.name == "sqlite":
        for file in lock_files(engine):
            file.unlink()
        return
    with pytest.raises(LockTimeoutError) as caught, advisory_lock(engine, "seed", timeout=0):
        pass
    end = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}
    with engine.connect() as connection:
        for holder in caught.value.holders:
            connection.exec_driver_sql(end[engine.dialect.name].format(holder.pid))


def test_a_lock_that_was_lost_is_said_at_the_end(database, how):
    engine, other = database.engine(), database.engine()

    with (
        pytest.raises(LockLostError, match="'seed' was lost inside its block"),
        advisory_lock(engine, "seed", **how),
    ):
        lose(other)
    with pytest.raises(KeyError) as caught, advisory_lock(engine, "seed", **how):
        lose(other)
        raise KeyError
    assert re.search("tidyrows: The advisory lock 'seed' was lost", caught.value.__notes__[0])
    assert is_free(other, "seed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_holds_nothing(database):
    """And a child that leaves its parent's block releases nothing."""
    engine = database.engine()
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), advisory_lock(other_engine(engine), "seed"):
            os.write(say, b"!")
            signal.pause()
        os._exit(1)
    os.read(ready, 1)
    assert not is_free(engine, "seed")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with advisory_lock(engine, "seed", timeout=20) as held:
        child = os.fork()
        if child == 0:
            leave = next(each for each in _own if each.name.text == "seed")
            os._exit(not leave.release())
        assert os.waitpid(child, 0)[1] == 0
        assert held
        assert not is_free(database.engine(), "seed")
    assert is_free(database.engine(), "seed")


def test_no_file_is_left(sqlite_engine):
    with advisory_lock(sqlite_engine, "seed"), advisory_lock(sqlite_engine, "b", shared=True):
        assert len(lock_files(sqlite_engine)) == 2
    assert lock_files(sqlite_engine) == []


def test_a_file_that_is_deleted_between_its_opening_and_the_lock(sqlite_engine, monkeypatch):
    """Whoever locks it then would be alone with it: others make a new one."""
    opened = os.open
    first = advisory_lock(sqlite_engine, "seed")

    def slow(path, *options):
        found = opened(path, *options)
        if first._held:
            first.__exit__(None, None, None)
        return found

    first.__enter__()
    monkeypatch.setattr(os, "open", slow)
    with advisory_lock(sqlite_engine, "seed"):
        assert not is_free(sqlite_engine, "seed")


def test_a_database_in_memory_is_this_process_alone():
    engine, other = sa.create_engine("sqlite://"), sa.create_engine("sqlite://")
    with advisory_lock(engine, "seed"):
        assert not is_free(engine, "seed")
        assert is_free(other, "seed")


def test_rows_of_a_model(zoo_engine):
    locks = LockManager(zoo_engine, timeout=0.1)
    with locks.reading(Org), locks.reading(Org.__table__), locks.creating(User):
        with pytest.raises(LockTimeoutError, match="rows of orgs"), locks.creating(Org):
            pass
    with locks.creating(Org), locks.lock("anything"):
        assert not is_free(zoo_engine, "rows of orgs")


def test_through_a_pooler_that_shares_connections(postgresql_engine):
    """What a transaction holds stays on its server connection; statements of others do not."""
    direct = other_engine(postgresql_engine)
    try:
        with pgbouncer(postgresql_engine.url, servers=3) as url:
            engine = sa.create_engine(url, connect_args=DRIVER_OPTIONS)
            with advisory_lock(engine, "seed"):
                for _ in range(5):
                    with engine.begin() as connection:
                        connection.execute(sa.text("SELECT 1"))
                assert not is_free(direct, "seed")
                assert not is_free(engine, "seed")
            assert is_free(direct, "seed")
            engine.dispose()
    except AbsentError as absent:
        if everything_required():
            pytest.fail(str(absent), pytrace=False)
        pytest.skip(str(absent))
    direct.dispose()


def test_a_server_that_goes_silent_is_given_up(database, monkeypatch):
    if database.backend == "sqlite":
        return  # no network
    monkeypatch.setattr(advisory, "_BOUND", 0.2)
    wire = Wire(database.url)
    try:
        engine = sa.create_engine(database.url.set(host=wire.url.host, port=wire.url.port))
        with advisory_lock(engine, "seed"):
            pass
        wire.dead = True
        began = time.monotonic()
        with pytest.raises((SilentServerError, sa.exc.DBAPIError)):
            advisory_lock(engine, "seed", timeout=0.2).__enter__()
        assert time.monotonic() - began < 5
    finally:
        wire.close()
    assert is_free(database.engine(), "seed")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda e: advisory_lock(e, ""), ArgumentError, "name must be a text that is not empty"),
        (lambda e: advisory_lock(e, "a", timeout=-1), ArgumentError, "timeout must be a number"),
        (lambda e: advisory_lock(e, "a", timeout=None), ArgumentError, "write timeout=10.0"),
        (lambda e: advisory_lock(e, "a", shared="yes"), ArgumentError, "write shared=True"),
        (lambda e: try_advisory_lock(e, "a", timeout=1), ArgumentError, "takes no timeout="),
        (lambda _: advisory_lock(5, "a"), NotBoundError, "advisory_lock(engine, 'a name')"),
        (lambda _: advisory_lock(orm.Session(), "a"), NotBoundError, "needs one database"),
        (lambda _: LockManager("x"), NotBoundError, "needs one database"),
        (lambda e: LockManager(e).creating("users"), UnknownTableError, "locks.lock('a name')"),
    ],
)
def test_a_wrong_call_says_what_to_write(sqlite_engine, call, error, said):
    with pytest.raises(error, match=re.escape(said)):
        call(sqlite_engine)
