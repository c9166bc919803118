"""Who has a connection is known, by line and test; what a test leaves is given back."""

import asyncio
import os
import threading
import warnings
from contextlib import closing

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from harness.asynchronous import DRIVERS, ONE_EACH
from harness.targets import on
from tidyrows import Ledger, TidyRowsWarning, WorkerContext, advisory_lock
from tidyrows.connections import leases
from tidyrows.connections.engine import worker_async_engine, worker_engine
from tidyrows.connections.report import pool_report
from tidyrows.testing import Tidy

RUN = WorkerContext("nightly-17", "gw3", 3)
on_servers = on("postgresql+psycopg", "mysql+pymysql")
LEFT = "A connection was still checked out when its test ended"


@pytest.fixture
def engine(database):
    engine = worker_engine(database.url, context=RUN, reserve=0, pool_size=2, max_overflow=0)
    yield engine
    engine.dispose()


def line_here():
    import sys  # noqa: PLC0415

    return f"test_leases.py:{sys._getframe(1).f_lineno}"


# --- what is left


def test_a_connection_that_a_test_leaves_is_named_and_given_back(engine):
    table = sa.Table("left_open", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    table.create(engine)
    tidy = Tidy(engine, test="test_login").start()
    connection = engine.connect()
    place = line_here().replace(":", r":")
    connection.execute(sa.insert(table).values(id=1))
    driver = connection.connection.dbapi_connection
    with pytest.warns(TidyRowsWarning, match=LEFT) as warned:
        tidy.finish()
    (said,) = warned
    line = int(place.rpartition(":")[2]) - 1
    assert f"test_leases.py:{line} took it" in str(said.message)
    assert "It was rolled back and given back." in str(said.message)
    assert (said.filename, said.lineno) == (__file__, line)
    assert pool_report(engine).out == ()
    assert engine.pool.checkedout() == 0
    with engine.connect() as other:
        assert other.connection.dbapi_connection is driver
        assert other.scalar(sa.select(sa.func.count()).select_from(table)) == 0
        # whoever had it cannot reach it any more
        with pytest.raises(sa.exc.PendingRollbackError):
            connection.scalar(sa.text("SELECT 1"))
    connection.close()
    table.drop(engine)


def test_the_test_is_named_in_other_frameworks_too(engine, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    tidy = Tidy(engine, test="shop.LoginTest.test_login").start()
    left = engine.connect()
    with pytest.warns(TidyRowsWarning, match=r"took it in shop\.LoginTest\.test_login\."):
        tidy.finish()
    left.close()
    with engine.connect():
        pass
    assert {"shop.LoginTest.test_login", "outside of tests"} == pool_report(engine).held.keys()


def test_a_session_that_a_test_leaves_is_named_too_and_can_be_closed_later(engine):
    tidy = Tidy(engine).start()
    session = Session(engine)
    session.execute(sa.text("SELECT 1"))
    with pytest.warns(TidyRowsWarning, match=LEFT):
        tidy.finish()
    session.close()
    assert session.scalar(sa.text("SELECT 1")) == 1
    session.close()
    assert engine.pool.checkedout() == 0


def test_the_cleanup_runs_where_warnings_are_errors(engine):
    table = sa.Table("cleaned", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    table.create(engine)
    tidy = Tidy(engine).start()
    with engine.begin() as connection:
        connection.execute(sa.insert(table).values(id=1))
    left = engine.connect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TidyRowsWarning, match=LEFT):
            tidy.finish()
    assert tidy.report.deleted
    left.close()
    table.drop(engine)


def test_the_failure_of_a_block_surfaces_and_the_connection_is_in_a_note(engine):
    with pytest.raises(ZeroDivisionError) as caught, Tidy(engine):
        left = engine.connect()
        raise ZeroDivisionError
    assert LEFT in " ".join(caught.value.__notes__)
    left.close()


def test_what_is_older_or_tidys_own_or_closed_is_left_alone(engine):
    older = engine.connect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Tidy(engine) as tidy:
            tidy.session.execute(sa.text("SELECT 1"))
            older.execute(sa.text("SELECT 1"))
    with Tidy(engine), engine.connect():
        pass
    assert older.scalar(sa.text("SELECT 1")) == 1
    older.close()


@on_servers
def test_what_tidyrows_took_in_the_test_is_left_alone(engine):
    tidy = Tidy(engine).start()
    with warnings.catch_warnings(), advisory_lock(engine, "held"):
        warnings.simplefilter("error")
        (lease,) = pool_report(engine).out
        assert lease.is_own
        tidy.finish()
        assert len(pool_report(engine).out) == 1


@on_servers
def test_a_ledger_keeps_its_connections(database, engine):
    with warnings.catch_warnings(), closing(Ledger(database.engine())) as ledger:
        warnings.simplefilter("error")
        ledger.install()
        with Tidy(engine, ledger=ledger):
            pass


def test_a_thread_that_still_runs_keeps_its_connection(engine):
    taken, done = threading.Event(), threading.Event()
    result = []

    def work():
        with engine.connect() as connection:
            taken.set()
            done.wait(10)
            result.append(connection.scalar(sa.text("SELECT 1")))

    tidy = Tidy(engine).start()
    thread = threading.Thread(target=work)
    thread.start()
    assert taken.wait(10)
    with pytest.warns(TidyRowsWarning, match="Its thread is still running, so it was left to it"):
        tidy.finish()
    done.set()
    thread.join()
    assert result == [1]


@pytest.mark.parametrize("driver", ONE_EACH)
def test_asynchronous_connections_are_named_and_given_back(request, driver):
    (target,) = [name for name, drivers in DRIVERS.items() if driver in drivers]
    request.getfixturevalue(f"{target}_engine")
    url = request.getfixturevalue(f"{target}_engine").url.set(drivername=driver)

    async def main():
        engine = worker_async_engine(url, context=RUN, reserve=0)
        tidy = await Tidy(engine).start_async()
        left = await engine.connect()
        place = line_here()
        with pytest.warns(TidyRowsWarning, match=LEFT) as warned:
            await tidy.finish_async()
        assert f"test_leases.py:{int(place.rpartition(':')[2]) - 1} took" in str(warned[0].message)
        assert "It was rolled back and given back." in str(warned[0].message)
        assert pool_report(engine).out == ()
        await left.close()
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SELECT 1")) == 1
        await engine.dispose()

    asyncio.run(main())


# --- the report


def test_the_report_has_peak_waits_times_and_lines(engine, monkeypatch):
    engine.pool._timeout = 0.05
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_a.py::test_login (call)")
    with engine.connect():
        place = line_here()
        monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_a.py::test_pay (call)")
        second = engine.connect()
        with pytest.raises(sa.exc.TimeoutError) as caught:
            engine.connect()
        (note,) = caught.value.__notes__
        assert "all of the 2 connections of this worker are out" in note
        assert f"test_leases.py:{int(place.rpartition(':')[2]) - 1}, " in note
        second.close()
        report = pool_report(engine)
        (lease,) = report.out
        assert lease.place.endswith(f"test_leases.py:{int(place.rpartition(':')[2]) - 1}")
        assert lease.test == "test_a.py::test_login"
    report = pool_report(engine)
    assert (report.most, report.peak, report.checkouts, report.waits) == (2, 2, 2, 1)
    assert report.longest_wait == report.waited >= 0.05
    assert list(report.held) == ["test_a.py::test_login", "test_a.py::test_pay"]
    assert all(seconds > 0.04 for seconds in report.held.values())
    assert "at most 2 of 2 connections at once" in str(report)
    assert "1 waits" in str(report)
    engine.dispose()
    with engine.connect():
        assert pool_report(engine).checkouts == 3


@pytest.mark.parametrize(
    "take",
    [
        lambda engine: engine.connect(),
        lambda engine: engine.raw_connection(),
        lambda engine: engine.pool.connect(),
        lambda engine: Session(engine).connection(),
    ],
)
def test_the_line_is_that_which_took_it_whichever_way(database, take):
    engine = worker_engine(database.url, context=RUN, reserve=0, poolclass=NullPool)
    held = take(engine)
    (lease,) = pool_report(engine).out
    assert lease.place.endswith(f"test_leases.py:{take.__code__.co_firstlineno}")
    assert not lease.is_own
    held.close()


def test_a_forked_child_owns_nothing(engine):
    with engine.connect():
        pid = os.fork()
        if not pid:
            os._exit(0 if pool_report(engine).out == () and not pool_report(engine).peak else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert len(pool_report(engine).out) == 1


def test_a_connection_that_is_collected_is_not_out(engine):
    engine.connect()
    assert pool_report(engine).out == ()


@on_servers
def test_a_connection_that_the_server_has_ended_is_replaced_and_counted(engine, outside):
    ask, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({}, 5000)"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }[engine.dialect.name]
    with engine.connect() as connection:
        number = connection.scalar(sa.text(ask))
    with outside.connect() as connection:
        connection.exec_driver_sql(kill.format(number))
    with engine.connect() as connection:
        assert connection.scalar(sa.text(ask)) != number
    assert pool_report(engine).replaced == 1


# --- names

SHOW = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"


@on("postgresql+psycopg", "postgresql+psycopg2")
def test_a_connection_is_named_after_run_worker_and_test(engine, monkeypatch):
    pings = []
    heard = engine.dialect.do_ping
    engine.dialect.do_ping = lambda driver: pings.append(driver) or heard(driver)
    renamed = []
    dialect = leases.uses[engine.dialect]._dialect
    rename = dialect.rename_connection
    monkeypatch.setattr(
        dialect, "rename_connection", lambda *given: renamed.append(given) or rename(*given)
    )
    for test, names in (("test_login", 0), ("test_login", 0), ("test_pay[it's 100%]", 1)):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"test_a.py::{test} (call)")
        with engine.connect() as connection:
            assert connection.exec_driver_sql(SHOW.replace("%", "%%")).scalar() == (
                f"tidyrows run nightly- gw3 {test}"
            )
        assert len(renamed) == names
    assert len(pings) == 2


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_an_asynchronous_connection_is_named_too(postgresql_engine, monkeypatch, driver):
    async def main():
        engine = worker_async_engine(
            postgresql_engine.url.set(drivername=driver), context=RUN, reserve=0
        )
        for test in ("test_login", "test_pay"):
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"test_a.py::{test} (call)")
            async with engine.connect() as connection:
                shown = (await connection.exec_driver_sql(SHOW)).scalar()
            assert shown == f"tidyrows run nightly- gw3 {test}"
        await engine.dispose()

    asyncio.run(main())


@on("postgresql+psycopg")
def test_a_name_that_the_project_gives_stays(database):
    engine = worker_engine(
        database.url, context=RUN, connect_args={"application_name": "shop"}, reserve=0
    )
    for _ in range(2):
        with engine.connect() as connection:
            assert connection.exec_driver_sql(SHOW).scalar() == "shop"
    engine.dispose()
