"""Asynchronous engines on a test's database, and a loop to use them in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from harness.bystanders import Bystanders, snapshot
from harness.databases import Database

T = TypeVar("T")

DRIVERS = {
    "sqlite": ("sqlite+aiosqlite",),
    "postgresql": ("postgresql+asyncpg", "postgresql+psycopg"),
    "mysql": ("mysql+aiomysql", "mysql+asyncmy"),
}
ALL = tuple(driver for drivers in DRIVERS.values() for driver in drivers)
"""Every asynchronous driver."""
ONE_EACH = tuple(drivers[0] for drivers in DRIVERS.values())
"""One for each database."""

_SYNCHRONOUS = {
    "sqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
}


def over(*drivers: str) -> pytest.MarkDecorator:
    """Run a test, which has the fixture ``world``, with these drivers."""
    return pytest.mark.parametrize(
        ("zoo_database", "driver"),
        [(_SYNCHRONOUS[driver.partition("+")[0]], driver) for driver in drivers],
        indirect=["zoo_database"],
        ids=drivers,
    )


@asynccontextmanager
async def engine_on(database: Database, driver: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine, disposed of at the end."""
    engine = create_async_engine(database.url.set(drivername=driver), **options)
    if database.backend == "sqlite":

        @sa.event.listens_for(engine.sync_engine, "connect")
        def enforce(dbapi_connection: Any, _record: Any) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.close()

    try:
        yield engine
    finally:
        await engine.dispose()


def run(database: Database, driver: str, main: Callable[[AsyncEngine], Awaitable[T]]) -> T:
    """Run ``main`` with an engine, in a loop of its own."""

    async def inside() -> T:
        async with engine_on(database, driver) as engine:
            return await main(engine)

    return asyncio.run(inside())


class World:
    """A database with strangers' rows in it, and an asynchronous driver to it.

    Attributes:
        engine: synchronous, to look and to disturb with.
    """

    def __init__(self, database: Database, driver: str) -> None:
        self.database, self.driver = database, driver
        self.backend = database.backend
        self.engine = database.engine()
        self.bystanders = Bystanders(self.engine)

    def run(self, main: Callable[[AsyncEngine], Awaitable[T]]) -> T:
        return run(self.database, self.driver, main)

    def added(self) -> dict[str, int]:
        """How many rows each table has that it did not have at first."""
        rows = snapshot(self.engine).added_since(self.bystanders.expected)
        return {name.rpartition(".")[2]: len(each) for name, each in rows.items() if each}
