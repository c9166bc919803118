"""An engine for one worker of several takes no more connections than the server gives it."""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness.targets import on
from tidyrows import WorkerContext
from tidyrows.connections import fallback
from tidyrows.connections.engine import worker_async_engine, worker_engine
from tidyrows.connections.report import pool_report
from tidyrows.errors import (
    ArgumentError,
    ConnectionBudgetError,
    NotBoundError,
    ServerAwayError,
    TidyRowsWarning,
)

LIMIT = 6
GW3 = WorkerContext("nightly-17", "gw3", 3, worker_count=16)
ALONE = WorkerContext("nightly-17", "main", 0)
on_servers = on("postgresql+psycopg", "mysql+pymysql")


@pytest.fixture
def made():
    """Engines of a test, closed at its end."""
    engines = []

    def make(url, **options):
        engines.append(worker_engine(url, **{"context": ALONE, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def admin(database):
    return database.engine(isolation_level="AUTOCOMMIT")


def run(engine, sql):
    with engine.connect() as connection:
        connection.exec_driver_sql(sql)


@pytest.fixture
def small(database, admin):
    """The URL of a user who may have six connections."""
    user = f"tidy_{uuid.uuid4().hex[:8]}"
    make, drop = {
        "postgresql": (
            f"CREATE ROLE {user} LOGIN PASSWORD 'secret' CONNECTION LIMIT {LIMIT}",
            f"DROP ROLE {user}",
        ),
        "mysql": (
            f"CREATE USER '{user}'@'%%' IDENTIFIED BY 'secret' WITH MAX_USER_CONNECTIONS {LIMIT}",
            f"DROP USER '{user}'@'%%'",
        ),
    }[database.backend]
    run(admin, make)
    if database.backend == "mysql":
        run(admin, f"GRANT ALL ON {database.url.database}.* TO '{user}'@'%%'")
    yield database.url.set(username=user, password="secret")
    run(admin, drop)


# --- how many


@on_servers
def test_twelve_threads_at_once_do_not_exceed_the_limit_of_their_user(made, small):
    engine = made(small, reserve=2)
    together = threading.Barrier(12)

    def work(_number):
        together.wait(10)
        for _ in range(3):
            with engine.connect() as connection:
                assert connection.scalar(sa.text("SELECT 1")) == 1

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, range(12)))
    report = pool_report(engine)
    assert report.most == LIMIT - 2
    assert 1 <= report.peak <= LIMIT - 2
    assert report.checkouts == 36
    assert report.out == ()


@on_servers
def test_workers_have_equal_parts_and_the_connections_of_others_count(made, small):
    assert made(small, workers=2, reserve=0).pool.size() == 2
    others = [sa.create_engine(small).connect() for _ in range(3)]
    try:
        assert pool_report(made(small, reserve=0)).most == LIMIT - 3
        with pytest.raises(ConnectionBudgetError, match="of which others use 3"):
            made(small, reserve=3)
    finally:
        for connection in others:
            connection.close()
            connection.engine.dispose()


@on_servers
def test_the_connections_of_the_same_run_are_not_those_of_others(made, small):
    first = made(small, workers=2, reserve=0)
    with first.connect(), first.connect():
        second = made(small, workers=2, reserve=0, context=GW3)
    assert pool_report(second).most == 2


@on_servers
def test_a_sum_that_cannot_fit_is_refused_with_its_numbers_and_a_line_that_helps(
    made, small, admin
):
    with pytest.raises(ConnectionBudgetError) as caught:
        made(small, context=GW3)
    error, text = caught.value, str(caught.value)
    assert (error.free, error.workers, error.need) == (LIMIT, 16, 37)
    assert text.startswith(
        "16 workers with 2 connections each (one of them shows the others that it is alive) and "
        "reserve=5 for others need 37 connections, and "
    )
    assert small.username in error.limit
    assert "secret" not in text
    remedy = text.partition("Write ")[2].partition(". ")[0]
    assert "37" in remedy
    run(admin, remedy.replace("%", "%%"))
    assert pool_report(made(small, context=GW3)).most == 1


@on_servers
def test_a_pool_that_the_user_makes_too_large_is_refused(made, small):
    with pytest.raises(ConnectionBudgetError, match="1 workers with 9 connections each and"):
        made(small, pool_size=9, reserve=0)
    with pytest.raises(ConnectionBudgetError, match="Or run with 1 workers"):
        made(small, pool_size=4, max_overflow=0, workers=2, reserve=0)


@on_servers
def test_a_server_that_is_full_is_said_at_once(made, small):
    others = [sa.create_engine(small).connect() for _ in range(LIMIT)]
    try:
        with pytest.raises(ConnectionBudgetError, match="takes no more connections now"):
            made(small)
    finally:
        for connection in others:
            connection.close()
            connection.engine.dispose()


@on("postgresql+psycopg")
def test_the_limit_of_a_database_counts(made, small, admin):
    database = small.database
    run(admin, f"ALTER DATABASE {database} CONNECTION LIMIT 4")
    try:
        with admin.connect():  # a superuser is not limited, but counts
            with pytest.raises(ConnectionBudgetError, match=f"4 of database {database} allows 4"):
                made(small, reserve=4)
            assert made(admin.url, reserve=0).pool.size() == 5
    finally:
        run(admin, f"ALTER DATABASE {database} CONNECTION LIMIT -1")


@on("sqlite")
def test_without_a_server_there_is_no_limit(made, database):
    engine = made(database.url, context=GW3)
    assert pool_report(engine).most == 15
    assert engine.pool.timeout() == 10


# --- what the user gives


def test_options_of_the_user_come_first(made, database):
    engine = made(database.url, pool_size=1, max_overflow=1, pool_timeout=2, pool_pre_ping=False)
    assert (engine.pool.size(), engine.pool.timeout(), engine.pool._pre_ping) == (1, 2, False)
    assert pool_report(engine).most == 2
    no_pool = made(database.url, poolclass=NullPool)
    assert isinstance(no_pool.pool, NullPool)
    with no_pool.connect():
        assert (pool_report(no_pool).most, pool_report(no_pool).peak) == (None, 1)
    with engine.connect().execution_options(stream_results=True) as connection:
        assert pool_report(connection.engine.execution_options(a=1)).peak == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pool": None}, "write poolclass="),
        ({"workers": 0}, "workers=0"),
        ({"reserve": -1}, "reserve=-1"),
        ({"reserve": 1.5}, "whole number"),
        ({"fallback": "duckdb"}, "fallback='duckdb'"),
        ({"fallback": "sqlite"}, "metadata=Base.metadata"),
        ({"context": "gw3"}, "context='gw3'"),
        ({"metadata": 3}, "MetaData"),
    ],
)
def test_wrong_arguments_are_refused(options, said):
    with pytest.raises(ArgumentError, match=said):
        worker_engine("sqlite://", **options)
    with pytest.raises(ArgumentError, match=said):
        worker_async_engine("sqlite+aiosqlite://", **options)


def test_wrong_urls_are_refused():
    with pytest.raises(NotBoundError, match="write worker_async_engine"):
        worker_engine("sqlite+aiosqlite://")
    with pytest.raises(NotBoundError, match="write worker_engine"):
        worker_async_engine("sqlite://")
    for make in (worker_engine, worker_async_engine):
        with pytest.raises(NotBoundError, match="The text is no URL"):
            make("nonsense")
    with pytest.raises(ArgumentError, match="url=3"):
        worker_engine(3)
    with pytest.raises(NotBoundError, match=r"Write engine = worker_engine\(url\)"):
        pool_report(sa.create_engine("sqlite://"))
    with pytest.raises(NotBoundError, match="This int"):
        pool_report(3)


# --- where no server answers

CLOSED = ("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
metadata = sa.MetaData()
parents = sa.Table("parents", metadata, sa.Column("id", sa.Integer, primary_key=True))
children = sa.Table(
    "children",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("parent_id", sa.ForeignKey("parents.id")),
)


def closed(driver):
    return f"{driver}://scott:tiger@127.0.0.1:1/app"


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(fallback, "NOTES", {})  # of this suite, which has its servers


@pytest.mark.parametrize("driver", CLOSED)
def test_a_server_that_is_not_there_is_said_at_once(driver):
    began = time.monotonic()
    with pytest.raises(ServerAwayError, match=r"No server answers at .*://127.0.0.1:1/app") as away:
        worker_engine(closed(driver))
    assert time.monotonic() - began < 2
    assert "Start it, or correct host and port" in str(away.value)
    assert "tiger" not in str(away.value)
    assert isinstance(away.value, ConnectionError)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg", "mysql+aiomysql"])
def test_an_asynchronous_engine_says_it_too(driver):
    with pytest.raises(ServerAwayError, match="No server answers at"):
        worker_async_engine(closed(driver))


@on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
def test_a_server_that_refuses_is_not_away(database):
    with pytest.raises(sa.exc.OperationalError):
        worker_engine(
            database.url.set(username="tidy_nobody", password="x"),
            fallback="sqlite",
            metadata=metadata,
        )


def test_the_tables_are_on_sqlite_where_that_is_asked_for():
    with pytest.warns(TidyRowsWarning, match="No server answers at .* run on sqlite in") as warned:
        engine = worker_engine(
            closed(CLOSED[0]),
            fallback="sqlite",
            metadata=metadata,
            connect_args={"sslmode": "require"},
            pool_size=2,
        )
    assert warned[0].filename == __file__
    (note,) = fallback.NOTES
    assert (
        note == "the tests ran on sqlite, since no server answers at postgresql://127.0.0.1:1/app"
    )
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["children", "parents"]
        with pytest.raises(sa.exc.IntegrityError):
            connection.execute(sa.insert(children).values(parent_id=1))
    assert pool_report(engine).peak == 1
    engine.dispose()


def test_in_ci_the_server_must_be_there(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ServerAwayError, match=r"CI is set, so fallback=.* start the server"):
        worker_engine(closed(CLOSED[0]), fallback="sqlite", metadata=metadata)


def test_tables_that_sqlite_cannot_have_are_refused_by_name():
    other = sa.MetaData()
    sa.Table("tags", other, sa.Column("names", sa.ARRAY(sa.Text)))
    with pytest.raises(sa.exc.CompileError) as caught:
        worker_engine(closed(CLOSED[0]), fallback="sqlite", metadata=other)
    assert "fallback='sqlite' cannot make these tables" in caught.value.__notes__[0]
