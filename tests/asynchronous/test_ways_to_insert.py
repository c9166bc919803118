"""Rows that are inserted past SQLAlchemy's asynchronous connections are said."""

from __future__ import annotations

import warnings

import pytest

from harness.asynchronous import ALL, over
from tidyrows import CleanupManager, ResourceTracker, UntrackedRowsWarning

RAW = "INSERT INTO orgs (name) VALUES ('raw')"


async def by_the_driver(connection):
    """The driver's own asynchronous connection."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    kind = connection.dialect.driver
    if kind in {"aiosqlite", "psycopg"}:
        await (await driver.execute(RAW)).close()
    elif kind == "asyncpg":
        await driver.copy_records_to_table("orgs", records=[("raw",)], columns=["name"])
    else:
        async with driver.cursor() as cursor:
            await cursor.execute(RAW)


async def by_the_cursor(connection):
    """SQLAlchemy's adapter of the driver's cursor."""

    def work(synchronous):
        cursor = synchronous.connection.cursor()
        cursor.execute(RAW)
        cursor.close()

    await connection.run_sync(work)


@pytest.mark.parametrize("way", [by_the_driver, by_the_cursor])
@over(*ALL)
def test_rows_past_an_asynchronous_connection_are_said(world, way):
    async def main(engine):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            async with CleanupManager(ResourceTracker(engine)):
                async with engine.begin() as connection:
                    await connection.exec_driver_sql("SELECT 1")
                    await way(connection)
        return caught

    caught = world.run(main)
    assert world.added() == {"orgs": 1}
    assert {each.category for each in caught} == {UntrackedRowsWarning}
    (message,) = [str(each.message) for each in caught]
    assert message.startswith(("1 row", "up to 1 row"))
    assert ("orgs" in message) is (world.backend == "postgresql")
