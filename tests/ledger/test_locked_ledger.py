"""Somebody holds a lock on the ledger: the COMMIT of a test ends, and its error says who it is."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import DRIVERS
from harness.blocks import table
from harness.targets import DEFAULT, on
from tidyrows import Ledger, ResourceTracker, RetryPolicy
from tidyrows.dialects import dialect_for
from tidyrows.ledger import heartbeat, journal

servers = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "_GUARD", 0.1)


@pytest.fixture
def things(engine):
    metadata = sa.MetaData()
    made = table(metadata, "things")
    metadata.create_all(engine)
    Ledger(engine).install()
    return made


@contextmanager
def locked(database):
    """Yields the server's number of the session that holds the lock."""
    engine = database.engine()
    holder = engine.connect()
    how = {"postgresql": "LOCK TABLE {}", "mysql": "LOCK TABLES {} WRITE"}[database.backend]
    holder.exec_driver_sql(how.format(journal_table(engine)))
    try:
        yield dialect_for(engine).server_id(holder.connection.dbapi_connection)
    finally:
        if database.backend == "mysql":
            holder.exec_driver_sql("UNLOCK TABLES")
        holder.close()


def journal_table(engine):
    return Ledger(engine).name


def assert_says(error, holder):
    notes = "".join(error.__notes__)
    assert "could not be entered into" in notes
    assert f"pid {holder}" in notes


@servers
def test_a_commit_ends(database, engine, things):
    ledger = Ledger(engine, beat=60)
    tracker = ResourceTracker(engine, ledger=ledger)
    tracker.start()
    with locked(database) as holder:
        with pytest.raises(sa.exc.DBAPIError) as caught, engine.begin() as connection:
            connection.execute(sa.insert(things).values(id=1))
        assert_says(caught.value, holder)
    assert not len(tracker)
    with engine.begin() as connection:  # the connection is as good as before
        connection.execute(sa.insert(things).values(id=2))
    assert len(tracker) == 1
    tracker.stop()
    tracker.dismiss_leak_warning()
    ledger.close()


@pytest.mark.parametrize(
    ("database", "driver"),
    [(sync, driver) for sync in DEFAULT[1:] for driver in DRIVERS[sync.partition("+")[0]]],
    indirect=["database"],
)
def test_in_a_task_it_is_the_same(database, things, driver):
    async def main():
        engine = create_async_engine(database.url.set(drivername=driver))
        ledger = Ledger(engine, beat=60)
        tracker = ResourceTracker(engine, ledger=ledger, retry=RetryPolicy(attempts=1))
        tracker.start()
        with locked(database) as holder:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                async with engine.begin() as connection:
                    await connection.execute(sa.insert(things).values(id=1))
            assert_says(caught.value, holder)
        assert not len(tracker)
        tracker.stop()
        ledger.close()
        await engine.dispose()

    asyncio.run(main())
