"""A server that was never there: the first connection fails at once, and the error says where."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import DRIVERS
from harness.blocks import table
from harness.factories import OrgFactory
from tidyrows import (
    CleanupManager,
    Ledger,
    ResourceTracker,
    find_orphans,
    sweep,
    with_retries,
)

NOBODY = "127.0.0.1:1"  # no program listens there
THING = table(sa.MetaData(), "things")
SYNCHRONOUS = ("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")


def make(engine, ledger=None):
    with CleanupManager(ResourceTracker(engine, ledger=ledger)):
        OrgFactory()


def clean(engine):
    tracker = ResourceTracker(engine)
    tracker.track_rows(THING, [(1,)])
    CleanupManager(tracker).cleanup()


CALLS = {
    "factory": make,
    "factory with a ledger": lambda engine: make(engine, Ledger(engine)),
    "install": lambda engine: Ledger(engine).install(),
    "sweep": sweep,
    "find_orphans": find_orphans,
    "with_retries": lambda engine: with_retries(engine, lambda _connection: None),
    "track_rows, cleanup": clean,
    "track_query": lambda engine: ResourceTracker(engine).track_query(sa.select(THING)),
    "preserve": lambda engine: ResourceTracker(engine).preserve(sa.select(THING)),
}


def attempts_of(engine):
    made = []
    sa.event.listen(engine, "do_connect", lambda *args: made.append(args))
    return made


def assert_fails_at_once(attempts, error):
    assert NOBODY in " ".join([str(error), *getattr(error, "__notes__", ())]).replace("', ", ":")
    assert len(attempts) == 1


@pytest.mark.parametrize("driver", SYNCHRONOUS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_first_connection_fails_at_once(driver, call):
    engine = sa.create_engine(f"{driver}://somebody@{NOBODY}/app")
    attempts = attempts_of(engine)
    with pytest.raises((sa.exc.OperationalError, engine.dialect.loaded_dbapi.Error)) as caught:
        call(engine)
    assert_fails_at_once(attempts, caught.value)


@pytest.mark.parametrize("driver", [*DRIVERS["postgresql"], *DRIVERS["mysql"]])
@pytest.mark.parametrize("with_ledger", [False, True], ids=["alone", "ledger"])
def test_in_a_task_it_is_the_same(driver, with_ledger):
    async def main():
        engine = create_async_engine(f"{driver}://somebody@{NOBODY}/app")
        attempts = attempts_of(engine.sync_engine)
        ledger = Ledger(engine) if with_ledger else None
        with pytest.raises(Exception, match=r"127\.0\.0\.1") as caught:
            async with CleanupManager(ResourceTracker(engine, ledger=ledger)):
                await OrgFactory.create_async()
        assert_fails_at_once(attempts, caught.value)

    asyncio.run(main())
