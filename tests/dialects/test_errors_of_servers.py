"""What an error means that only a server of one's own may be made to give."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from harness.asynchronous import DRIVERS
from harness.own_servers import Server, own_server
from harness.servers import AbsentError, everything_required
from harness.targets import ALL_DRIVERS
from tidyrows.dialects import CommitOutcome, Dialect, Fault, Loss, dialect_for

# MariaDB makes ten of fewer, and gives one more to an administrator.
FEW = {"postgresql": ("-c", "max_connections=5"), "mysql": ("--max-connections=10",)}
WITHOUT_A_CODE = ("postgresql+psycopg", "postgresql+psycopg2", "async postgresql+psycopg")
"""The drivers that say of a refused connection no more than that it was refused."""


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def backend(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(backend: str) -> Iterator[Server]:
    """A server that is not started, or in whatever state the last test left it."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(own_server(backend))
        except AbsentError as absent:
            if everything_required():
                pytest.fail(str(absent), pytrace=False)
            pytest.skip(f"not at hand: {absent}")
        yield made


def with_every_driver(url: sa.URL, play: Callable[[dict[str, sa.Engine]], None]) -> None:
    """Play with an engine for each of the server's drivers, in a greenlet for half of them."""
    backend = url.get_backend_name()
    engines = {
        name: sa.create_engine(url.set(drivername=name), poolclass=NullPool)
        for name in ALL_DRIVERS
        if name.startswith(backend)
    }

    def inside() -> None:
        with ExitStack() as stack:
            for name in DRIVERS[backend]:
                awaited = create_async_engine(url.set(drivername=name), poolclass=NullPool)
                engines[f"async {name}"] = awaited.sync_engine
            for engine in engines.values():
                stack.callback(engine.dispose)
            play(engines)

    asyncio.run(greenlet_spawn(inside))


def begun(engines: dict[str, sa.Engine], stack: ExitStack) -> dict[str, sa.Connection]:
    """A connection of each, in a transaction; thrown away at the end."""
    connections = {}
    for name, engine in engines.items():
        connections[name] = connection = engine.connect()
        stack.callback(connection.invalidate)
        connection.exec_driver_sql("SELECT 1").all()
    return connections


def assert_lost(dialect: Dialect, error: BaseException, driver: str) -> None:
    assert dialect.fault(error) is Fault.LOST, (driver, error)
    assert not dialect.is_timeout(error), driver
    assert dialect.loss(error, None) is Loss.EVERYTHING, driver


def test_a_server_that_has_too_many_connections_is_tried_again(
    server: Server, backend: str
) -> None:
    def play(engines: dict[str, sa.Engine]) -> None:
        with ExitStack() as stack:
            first, *_ = engines.values()
            with pytest.raises(sa.exc.DBAPIError):
                for _ in range(20):
                    stack.enter_context(first.connect())
            for driver, engine in engines.items():
                with pytest.raises(Exception, match=r"(?s).*") as caught:  # asyncpg's may be bare
                    engine.connect()
                fault = Fault.LOST if driver in WITHOUT_A_CODE else Fault.TRANSIENT
                assert dialect_for(engine).fault(caught.value) is fault, (driver, caught.value)
                assert not dialect_for(engine).is_timeout(caught.value), driver

    server.stop()
    with_every_driver(server.start(*FEW[backend]), play)


def test_a_server_that_starts_anew_has_lost_the_connection(server: Server) -> None:
    def play(engines: dict[str, sa.Engine]) -> None:
        with ExitStack() as stack:
            connections = begun(engines, stack)
            server.stop()
            server.start()
            for driver, connection in connections.items():
                with pytest.raises(sa.exc.DBAPIError) as caught:
                    connection.exec_driver_sql("SELECT 1")
                assert_lost(dialect_for(connection), caught.value, driver)
                with engines[driver].connect() as again:
                    assert again.exec_driver_sql("SELECT 1").scalar_one() == 1

    server.stop()
    with_every_driver(server.start(), play)


def test_a_server_that_stops_has_lost_the_connection(server: Server) -> None:
    """Whether the COMMIT it was to answer has been done, nobody knows."""

    def play(engines: dict[str, sa.Engine]) -> None:
        with ExitStack() as stack:
            connections = begun(engines, stack)
            server.stop()
            for driver, connection in connections.items():
                dialect = dialect_for(connection)
                with pytest.raises(Exception, match=r"(?s).*") as caught:
                    connection.commit()
                assert_lost(dialect, caught.value, driver)
                outcome = dialect.commit_outcome(caught.value, connection)
                assert outcome is CommitOutcome.UNKNOWN, driver
                with pytest.raises((sa.exc.DBAPIError, ConnectionRefusedError)) as caught:
                    engines[driver].connect()
                assert_lost(dialect, caught.value, driver)

    server.stop()
    with_every_driver(server.start(), play)
