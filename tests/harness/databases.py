"""What one test gets to do anything with, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from harness.bystanders import close_connections
from harness.homes import Home, MysqlHome, PostgresqlHome
from harness.servers import Server


class Database:
    """What one test gets: a database, seen through one driver.

    Attributes:
        backend: ``sqlite``, ``postgresql`` or ``mysql``.
        target: the name of the parameter, as ``postgresql+psycopg``.
        url: where it is; for SQLite a file.
    """

    def __init__(self, target: str, url: sa.URL, home: Home | None = None) -> None:
        self.target = target
        self.url = url
        self.backend = url.get_backend_name()
        self._home = home
        self._engines: list[sa.Engine] = []
        self._attached: dict[str, Path] = {}

    def engine(self, *, foreign_keys: bool | None = None, **options: Any) -> sa.Engine:
        """Another engine on this database, disposed of when the test ends.

        Args:
            foreign_keys: SQLite only: whether they are enforced; the target's habit if None.
            options: passed to ``create_engine``.
        """
        engine = sa.create_engine(self.url, **options)
        if self.backend == "sqlite":
            on = self.target == "sqlite" if foreign_keys is None else foreign_keys

            @sa.event.listens_for(engine, "connect")
            def prepare(dbapi_connection: Any, record: Any) -> None:
                cursor = dbapi_connection.cursor()
                cursor.execute(f"PRAGMA foreign_keys = {'ON' if on else 'OFF'}")
                cursor.execute("PRAGMA synchronous = OFF")  # no test ends the machine
                for schema, path in self._attached.items():
                    cursor.execute(f'ATTACH ? AS "{schema}"', (str(path),))
                cursor.close()

        self._engines.append(engine)
        return engine

    def extra_schema(self, suffix: str = "other") -> str:
        """Make another schema, seen by every engine of this test, and return its real name."""
        if self._home is not None:
            return self._home.extra_schema(suffix)
        self._attached[suffix] = Path(f"{self.url.database}.{suffix}")
        for engine in self._engines:
            engine.dispose()  # what is pooled has not attached it
        return suffix

    def close(self) -> None:
        """Close what the test opened and clean up after it."""
        for engine in self._engines:
            engine.dispose()
        close_connections()
        if self._home is not None:
            self._home.reset()


class Homes:
    """The databases of this process: found, made and dropped once, each when first wanted."""

    def __init__(self, find: Mapping[str, Callable[[], Server]]) -> None:
        self._find = find
        self._servers: dict[str, Server | Exception] = {}
        self._homes: dict[tuple[str, str], Home] = {}

    def server(self, backend: str) -> Server:
        """The server of a backend, looked for once.

        Raises:
            AbsentError: there is none; said again at each call.
        """
        if backend not in self._servers:
            try:
                self._servers[backend] = self._find[backend]()
            except Exception as error:  # noqa: BLE001 -- raised below, and for each later test
                self._servers[backend] = error
        found = self._servers[backend]
        if isinstance(found, Exception):
            raise found
        return found

    def home(self, backend: str, purpose: str = "", *metadata: sa.MetaData) -> Home:
        """The database of a backend for a purpose; ``metadata`` are the tables it keeps."""
        key = (backend, purpose)
        if key not in self._homes:
            kind = {"postgresql": PostgresqlHome, "mysql": MysqlHome}[backend]
            home = kind(self.server(backend))
            self._homes[key] = home
            home.keep(*metadata)
        return self._homes[key]

    def drop_all(self) -> None:
        """Drop every database of this process; a failure does not stop the rest."""
        failures = []
        while self._homes:
            _, home = self._homes.popitem()
            try:
                home.drop()
            except sa.exc.SQLAlchemyError as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("test databases could not be dropped", failures)
