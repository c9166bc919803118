"""Who keeps a cleanup waiting is named: what it is, what it does, and what to do about it."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession

from harness import asynchronous, forks
from harness.blocks import insert, left_over, table, tracked
from harness.bystanders import Bystanders
from harness.races import PATIENCE, Doing
from harness.targets import ALL_DRIVERS, DEFAULT, on
from tidyrows import CleanupError, CleanupManager, ResourceTracker, RetryPolicy, locked_files
from tidyrows.cleanup import connection as cleanup_connection
from tidyrows.dialects import Blocker, dialect_for

POSTGRESQL, MYSQL = "postgresql+psycopg", "mysql+pymysql"
everywhere = on(*DEFAULT)
servers = on(POSTGRESQL, MYSQL)
every_driver = on(*ALL_DRIVERS)
"""For what asks the driver which connection is its own."""

HOLDER = """
import sys
import sqlalchemy as sa

url, begin, statement, asks = sys.argv[1:]
arguments = {"application_name": "night shift"} if url.startswith("postgresql") else {}
engine = sa.create_engine(url, connect_args=arguments)
with engine.connect() as connection:
    if begin:
        connection.exec_driver_sql(begin)
    connection.exec_driver_sql(statement)
    print(connection.exec_driver_sql(asks).scalar(), flush=True)
    sys.stdin.readline()
    connection.rollback()
"""
OWN_ID = {
    "sqlite": "SELECT 0",
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT CONNECTION_ID()",
}
UPDATE = "UPDATE parents SET note = 1 WHERE id = 4"


@pytest.fixture
def parent(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents", sa.Column("note", sa.Integer))
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]))
    return parent


def rows(parent, numbers=range(2, 7)):
    return parent, [{"id": n} for n in numbers]


def patient(tracker, *, attempts=2, lock_timeout=0.4, **options):
    retry = RetryPolicy(attempts=attempts, base=0.0)
    return CleanupManager(tracker, lock_timeout=lock_timeout, retry=retry, **options)


class Process:
    """Another process that holds a lock until its end is asked for."""

    def __init__(self, database, statement=UPDATE, begin=""):
        arguments = (
            database.url.render_as_string(hide_password=False),
            begin or ("BEGIN IMMEDIATE" if database.backend == "sqlite" else ""),
            statement,
            OWN_ID[database.backend],
        )
        self._process = forks.Process(
            [sys.executable, "-c", HOLDER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._process.stdout.readline()
        assert said, "the process did not get its lock"
        self.pid = int(said) or self._process.pid

    def end(self):
        """Have it roll back, and wait until it is gone."""
        if self._process.poll() is None:
            self._process.communicate("\n", timeout=20)


@contextmanager
def process(database, *arguments):
    holder = Process(database, *arguments)
    try:
        yield holder
    finally:
        holder.end()


def id_of(connection):
    backend = connection.engine.url.get_backend_name()
    return connection.exec_driver_sql(OWN_ID[backend]).scalar()


@contextmanager
def nothing_stays(database):
    """After the block there are as many threads, and connections to this database, as before."""
    outside = database.engine(poolclass=sa.NullPool)
    threads, before = set(threading.enumerate()), _connections(outside)
    yield
    assert set(threading.enumerate()) <= threads
    ends = time.monotonic() + PATIENCE
    while (now := _connections(outside)) > before:  # the server takes a moment to see the end
        assert time.monotonic() < ends, f"{now} connections, and {before} before"


def _connections(engine):
    if engine.dialect.name == "sqlite":
        return 0
    sql = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        if engine.dialect.name == "postgresql"
        else "SELECT count(*) FROM information_schema.processlist WHERE db = database()"
    )
    with engine.connect() as connection:
        return connection.exec_driver_sql(sql).scalar()


@everywhere
def test_another_process_that_holds_a_lock_is_named(database, engine, parent):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    manager.plan()
    with process(database) as holder, nothing_stays(database):
        left = left_over(manager)
    (blocker,) = manager.report.blockers
    assert blocker.pid == holder.pid
    assert blocker.own is None
    assert blocker.certain
    assert left["parents", 4].endswith(f"; blocked by {blocker}")
    assert f"waited for {blocker}" in str(manager.report).splitlines()
    if database.backend == "sqlite":
        assert blocker.application.startswith("python")
        assert "-c" not in blocker.application  # arguments may hold a password
        assert len(left) == 5
    else:
        assert set(left) == {("parents", 4)}
        assert blocker.user == database.url.username
        assert blocker.seconds >= 0
        assert blocker.host
    if database.backend == "postgresql":
        assert blocker.application == "night shift"
        assert blocker.state == "idle in transaction"
        assert "pg_backend_pid" in blocker.statement  # the last that it ran
    report = manager.cleanup()
    assert report.total_deleted == len(left)
    assert report.blockers == ()
    bystanders.assert_untouched()


@everywhere
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lock_timeout": 1.0}, id="one attempt"),
        pytest.param({"lock_timeout": 2.0, "deadline": 1.5}, id="a deadline before the timeout"),
        pytest.param(
            {"lock_timeout": 5.0, "deadline": 0.5},
            id="a deadline long before it",
        ),
    ],
)
def test_the_only_attempt_names_who_is_in_its_way(database, engine, parent, options):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker, attempts=1, **options)
    manager.plan()
    with process(database) as holder, nothing_stays(database):
        left = left_over(manager)
    assert [each.pid for each in manager.report.blockers] == [holder.pid]
    assert f"blocked by pid {holder.pid}, " in left["parents", 4]


@on(POSTGRESQL)
def test_the_statement_that_took_the_lock_is_shown(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    with database.engine().connect() as holder:
        number = id_of(holder)
        holder.exec_driver_sql(UPDATE)
        manager = patient(tracker)
        left = left_over(manager)
    (blocker,) = manager.report.blockers
    assert (blocker.pid, blocker.statement) == (number, UPDATE)
    assert f"pid {number}, user " in left["parents", 4]
    assert f"idle in transaction for {blocker.seconds:.1f} s: {UPDATE}" in left["parents", 4]


@every_driver
def test_a_session_of_this_very_process_is_named_and_told_to_be_closed(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    with engine.connect(), engine.connect():
        pass  # so many will be needed: the pool has them from now on
    with orm.Session(engine) as session, nothing_stays(database):
        if database.backend == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        session.execute(sa.update(parent).where(parent.c.id == 4).values(note=1))
        left = left_over(manager)
        words = f"the session {session!r} of this very process"
        assert f"blocked by {words}" in left["parents", 4]
        assert left["parents", 4].endswith("; commit, roll back or close it first")
        assert [blocker.own for blocker in manager.report.blockers] == [f"the session {session!r}"]
        session.rollback()
        manager.cleanup()
    assert len(tracker) == 0


@every_driver
def test_a_session_on_another_engine_of_this_process_is_named(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    with orm.Session(database.engine()) as session:
        if database.backend == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        session.execute(sa.update(parent).where(parent.c.id == 4).values(note=1))
        left = left_over(manager)
        assert f"the session {session!r} of this very process" in left["parents", 4]


@every_driver
def test_a_connection_of_this_process_that_was_not_given_back_is_named(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    with engine.connect() as holder, engine.connect():
        if database.backend == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        holder.exec_driver_sql(UPDATE)
        left = left_over(manager)
        cause = left["parents", 4]
        words = "a connection that was not given back to the engine of this very process"
        assert words in cause
        assert cause.endswith("; commit, roll back or close it first")
        (blocker,) = manager.report.blockers
        if database.backend != "sqlite":
            assert blocker.pid == id_of(holder)
        holder.rollback()
        manager.cleanup()
    assert len(tracker) == 0


# --- whole tables


@on(POSTGRESQL)
def test_who_has_locked_a_whole_table_on_postgresql_is_named(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    manager.plan()
    lock = "LOCK TABLE parents IN ACCESS EXCLUSIVE MODE"
    with process(database, lock) as holder, nothing_stays(database):
        left = left_over(manager)
    assert len(left) == 5
    assert [each.pid for each in manager.report.blockers] == [holder.pid]
    assert all(f"blocked by pid {holder.pid}, " in cause for cause in left.values())
    assert manager.cleanup().total_deleted == 5


@on(MYSQL)
def test_who_may_have_locked_a_whole_table_on_mariadb_is_named_with_a_perhaps(
    database, engine, parent
):
    """The server does not tell whose lock it is."""
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    manager.plan()
    with process(database, "LOCK TABLES parents WRITE") as holder, nothing_stays(database):
        left = left_over(manager)
    assert len(left) == 5
    (blocker,) = [each for each in manager.report.blockers if each.pid == holder.pid]
    assert not blocker.certain
    assert all(f"perhaps pid {holder.pid}, " in cause for cause in left.values())
    assert manager.cleanup().total_deleted == 5


# --- several


@servers
def test_two_who_keep_the_same_waiting_are_both_named(database, engine, parent):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    manager.plan()
    lock = (
        "LOCK TABLE parents IN SHARE MODE"
        if database.backend == "postgresql"
        else "SELECT id FROM parents WHERE id = 4 LOCK IN SHARE MODE"
    )
    with process(database, lock) as first, process(database, lock) as second:
        left = left_over(manager)
    # MariaDB may name others besides, with a perhaps, where its picture of the waits is stale
    assert {each.pid for each in manager.report.blockers} >= {first.pid, second.pid}
    assert f"pid {first.pid}, " in left["parents", 4]
    assert f"pid {second.pid}, " in left["parents", 4]
    assert "; and by " in left["parents", 4]


@servers
def test_a_blocker_that_waits_itself_is_said_to_wait(database, engine, parent):
    """It holds our row, and wants another: who keeps that one is the culprit."""
    insert(engine, (parent, [{"id": 99}]))
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    manager.plan()
    outside = database.engine()
    culprit, middle = outside.connect(), outside.connect()
    last = UPDATE.replace("= 4", "= 99")
    try:
        first_pid, middle_pid = id_of(culprit), id_of(middle)
        culprit.exec_driver_sql(last)
        middle.exec_driver_sql(UPDATE)
        waiting = Doing(lambda: middle.exec_driver_sql(last))
        waiting.settle(engine)
        left = left_over(manager)
        culprit.rollback()
        waiting.outcome()
    finally:
        for each in (culprit, middle):
            each.rollback()
            each.close()
    (blocker,) = [each for each in manager.report.blockers if each.pid == middle_pid]
    assert f"pid {middle_pid}, " in left["parents", 4]
    if database.backend == "postgresql":
        assert f"itself waiting for pid {first_pid}," in blocker.state
    else:
        assert "lock wait" in blocker.state
    assert manager.cleanup().total_deleted == 1


# --- a lock that goes away in time


@contextmanager
def told_when_seen(monkeypatch):
    """An event that is set once the cleanup has seen a blocker."""
    seen = threading.Event()
    look = cleanup_connection.LockMonitor._blockers

    def looked(self, *given):
        found = look(self, *given)
        if found:
            seen.set()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cleanup_connection.LockMonitor, "_blockers", looked)
        yield seen


@everywhere
def test_who_was_waited_for_is_told_after_a_success_too(database, engine, parent, monkeypatch):
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker, attempts=50)
    with process(database) as holder, told_when_seen(monkeypatch) as seen:
        giving_up = Doing(lambda: (seen.wait(PATIENCE), holder.end()))
        report = manager.cleanup()
        giving_up.outcome()
    assert report.total_deleted == 5
    assert report.retries
    assert [each.pid for each in report.blockers] == [holder.pid]
    assert f"waited for pid {holder.pid}, " in str(report)
    report = CleanupManager(tracker).cleanup()
    assert report.blockers == ()
    assert "waited for" not in str(report)


# --- what it costs


def opened_by(engine, monkeypatch):
    """The connections that an engine opens from now on, and the threads that are started."""
    connects, threads = [], []
    start = threading.Thread.start
    sa.event.listen(engine, "connect", lambda *_: connects.append(1))

    def started(self):
        threads.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", started)
    return connects, threads


@everywhere
def test_a_cleanup_that_waits_for_nobody_opens_no_connection_and_starts_no_thread(
    database, engine, parent, monkeypatch
):
    tracker = tracked(engine, rows(parent))
    connects, threads = opened_by(engine, monkeypatch)
    report = patient(tracker).cleanup()
    assert report.total_deleted == 5
    assert (connects, threads) == ([], [])


@everywhere
def test_what_a_cleanup_that_waits_opens_and_starts_ends_with_it(
    database, engine, parent, monkeypatch
):
    tracker = tracked(engine, rows(parent, [4]))
    with process(database):
        connects, threads = opened_by(engine, monkeypatch)
        left_over(patient(tracker))
        assert threads
        if database.backend == "sqlite":
            assert not connects
        else:
            assert 1 <= len(connects) <= len(threads)
        assert not any(thread.is_alive() for thread in threads)


@everywhere
def test_a_pool_of_one_connection_is_enough(database, engine, parent):
    alone = database.engine(pool_size=1, max_overflow=0, pool_timeout=2)
    tracker = tracked(alone, rows(parent))
    with process(database) as holder, nothing_stays(database):
        manager = patient(tracker)
        left = left_over(manager)
        assert alone.pool.checkedout() == 0
    assert [each.pid for each in manager.report.blockers] == [holder.pid]
    assert f"blocked by pid {holder.pid}" in left["parents", 4]
    manager.cleanup()
    assert len(tracker) == 0


# --- those who may not see everything


@pytest.fixture
def restricted(database):
    """A user that may do anything in this database, and nothing beside it."""
    name = f"plain_{secrets.token_hex(4)}"
    if database.backend == "postgresql":
        make = (
            f"CREATE ROLE {name} LOGIN PASSWORD 'x'",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}",
        )
        drop = (f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    else:
        make = (
            f"CREATE USER {name} IDENTIFIED BY 'x'",
            f"CREATE USER {name}@localhost IDENTIFIED BY 'x'",
            f"GRANT ALL ON {database.url.database}.* TO {name}",
            f"GRANT ALL ON {database.url.database}.* TO {name}@localhost",
        )
        drop = (f"DROP USER {name}, {name}@localhost",)
    root = database.engine(isolation_level="AUTOCOMMIT")

    def run(statements):
        with root.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    run(make)
    engine = sa.create_engine(database.url.set(username=name, password="x"))
    yield engine
    engine.dispose()
    run(drop)


@on(POSTGRESQL)
def test_a_role_that_may_not_see_what_others_do_names_them_all_the_same(
    database, parent, restricted
):
    tracker = tracked(restricted, rows(parent))
    manager = patient(tracker)
    with process(database) as holder:
        left = left_over(manager)
    (blocker,) = manager.report.blockers
    assert (blocker.pid, blocker.user) == (holder.pid, database.url.username)
    assert blocker.state is None
    assert blocker.seconds is None
    assert f"blocked by pid {holder.pid}, user " in left["parents", 4]


@on(MYSQL, "mysql+mysqldb")
def test_a_user_without_the_process_right_names_its_own_connections_with_a_perhaps(
    database, parent, restricted
):
    tracker = tracked(restricted, rows(parent))
    manager = patient(tracker)
    with restricted.connect() as holder:
        number = id_of(holder)
        holder.exec_driver_sql(UPDATE)
        left = left_over(manager)
        holder.rollback()
    assert set(left) == {("parents", 4)}
    (blocker,) = manager.report.blockers
    assert blocker.pid == number
    assert not blocker.certain
    assert "perhaps a connection that was not given back to the engine" in left["parents", 4]


@on(MYSQL)
def test_a_user_without_the_process_right_says_nothing_of_what_it_cannot_see(
    database, parent, restricted
):
    tracker = tracked(restricted, rows(parent))
    manager = patient(tracker)
    with process(database) as holder:
        left = left_over(manager)
    assert set(left) == {("parents", 4)}
    assert "gave up" in left["parents", 4]
    assert str(holder.pid) not in left["parents", 4]
    assert manager.report.blockers == ()
    assert manager.cleanup().total_deleted == 1


@on(MYSQL)
def test_nobody_is_named_on_mariadb_to_a_connection_that_waits_for_nobody(database, engine):
    """With the PROCESS right InnoDB's answer is known, and the rest are locks of whole tables."""
    dialect = dialect_for(engine)
    with engine.connect() as idle, engine.connect() as busy, engine.connect() as looking:
        number = id_of(busy)
        assert id_of(idle)
        working = Doing(lambda: busy.exec_driver_sql("DO SLEEP(2)"))
        with closing(looking.connection.cursor()) as cursor:
            running = f"SELECT COUNT(*) FROM information_schema.processlist WHERE id = {number}"
            while not working.over:
                cursor.execute(f"{running} AND state = 'User sleep'")
                if cursor.fetchall()[0][0]:
                    break
            found = dialect.blockers(cursor, number)
        working.outcome()
    assert found == []


# --- asynchronous engines


@pytest.mark.parametrize(
    ("database", "driver"),
    [("postgresql+psycopg", "postgresql+asyncpg"), ("mysql+pymysql", "mysql+aiomysql")],
    indirect=["database"],
    ids=["asyncpg", "aiomysql"],
)
def test_an_asynchronous_cleanup_names_a_process_and_a_session_of_its_own(database, driver, parent):
    async def main(engine):
        tracker = ResourceTracker(engine)
        tracker.start()
        async with engine.begin() as connection:
            await connection.execute(sa.insert(parent), rows(parent)[1])
        tracker.stop()
        manager = patient(tracker)
        tasks = asyncio.all_tasks()
        with process(database) as holder:
            with pytest.raises(CleanupError, match=f"blocked by pid {holder.pid}, "):
                await manager.cleanup_async()
            assert [each.pid for each in manager.report.blockers] == [holder.pid]
        async with AsyncSession(engine) as session:
            await session.execute(sa.update(parent).where(parent.c.id == 4).values(note=1))
            with pytest.raises(CleanupError, match=r"the session .* of this very process"):
                await manager.cleanup_async()
        assert asyncio.all_tasks() == tasks
        await manager.cleanup_async()
        assert len(tracker) == 0

    with nothing_stays(database):
        asynchronous.run(database, driver, main)


# --- what Linux tells of SQLite's files


@on("sqlite")
def test_where_the_system_does_not_tell_of_locks_nobody_is_named(
    database, engine, parent, monkeypatch, tmp_path
):
    monkeypatch.setattr(locked_files, "_LOCKS", tmp_path / "absent")
    tracker = tracked(engine, rows(parent))
    manager = patient(tracker)
    with process(database):
        left = left_over(manager)
    assert all("gave up: database is locked" in cause for cause in left.values())
    assert not any("cannot be seen" in cause for cause in left.values())
    assert manager.report.blockers == ()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\n\n",
        b"nothing of the kind",
        b"1: POSIX  ADVISORY  WRITE 77",
        b"1: -> POSIX  ADVISORY  WRITE 77 08:01:9 0 EOF",
        b"1: POSIX  ADVISORY  READ 77 08:01:9 0 EOF",
        b"1: POSIX  ADVISORY  WRITE 77 08:01:9 0 EOF",
        b"1: POSIX  ADVISORY  WRITE 77 <none>:0 0 EOF",
        b"1: POSIX  ADVISORY  WRITE many 08:01:9 0 EOF",
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_line_that_is_no_lock_of_a_file_names_nobody(garbage, monkeypatch, tmp_path):
    path = tmp_path / "locks"
    path.write_bytes(garbage)
    monkeypatch.setattr(locked_files, "_LOCKS", path)
    dialect = dialect_for(sa.create_engine("sqlite://"))
    assert dialect.blockers(None, [str(path), "/does/not/exist"]) == []


# --- in words


@pytest.mark.parametrize(
    ("blocker", "words"),
    [
        (Blocker(7), "pid 7"),
        (Blocker(7, user="ann"), "pid 7, user ann"),
        (
            Blocker(7, "ann", "night shift", "10.0.0.1", "idle in transaction", 3.14),
            (
                "pid 7, user ann, application 'night shift', from 10.0.0.1, "
                "idle in transaction for 3.1 s"
            ),
        ),
        (Blocker(7, seconds=0.04), "pid 7, transaction open for 0.0 s"),
        (Blocker(7, state="active"), "pid 7, active"),
        (
            Blocker(7, statement="UPDATE parents\n   SET note = 1\tWHERE id = 4"),
            "pid 7: UPDATE parents SET note = 1 WHERE id = 4",
        ),
        (Blocker(7, statement="x" * 120), f"pid 7: {'x' * 120}"),
        (Blocker(7, statement="x" * 121), f"pid 7: {'x' * 117}..."),
        (
            Blocker(7, user="ann", own="the session <S>"),
            (
                "the session <S> of this very process (pid 7, user ann); "
                "commit, roll back or close it first"
            ),
        ),
        (Blocker(7, user="ann", certain=False), "perhaps pid 7, user ann"),
        (
            Blocker(7, own="the session <S>", certain=False),
            (
                "perhaps the session <S> of this very process (pid 7); "
                "commit, roll back or close it first"
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_blocker_in_words(blocker, words):
    assert str(blocker) == words
