"""The driver behind an engine, which every role of a dialect uses, and the database's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

if TYPE_CHECKING:
    import sqlalchemy as sa


def database_name(engine: sa.Engine) -> str:
    """The database without user and password, as ``postgresql://host:5432/app``.

    One in memory is named after its pool: two engines never share it.
    """
    url = engine.url
    backend = url.get_backend_name()
    database = url.database or _elsewhere(url, "dbname", "database")
    if database in {"", ":memory:"}:
        return f"{backend}://#{id(engine.pool):x}"
    host = url.host or _elsewhere(url, "host", "hostaddr", "unix_socket", "service")
    port = url.port or _elsewhere(url, "port")
    return f"{backend}://{f'{host}:{port}' if port else host}/{database}"


def _elsewhere(url: sa.URL, *names: str) -> str:
    """The first of these parameters of a URL: postgresql:///app?host=one."""
    for name in names:
        value = url.query.get(name, "")
        if value:
            return value if isinstance(value, str) else ",".join(value)
    return ""


class DriverAccess(ABC):
    """One object per engine.

    Args:
        dialect: SQLAlchemy's own dialect object of the engine.

    Attributes:
        driver: SQLAlchemy's name of the driver, such as ``psycopg``.
    """

    name: ClassVar[str]
    """The database, for messages."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self.driver: str = dialect.driver
        self._dbapi: Any = dialect.loaded_dbapi
        # Weak, since the registry of dialects has this very object as its key.
        self._dialect: Any = ref(dialect)

    @abstractmethod
    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """Whether a transaction is open, as the driver sees it, without a question to the server.

        None where the driver does not know.
        """

    def server_id(self, dbapi_connection: Any) -> int | None:
        """The server's number for a connection, without a question to the server; None if unknown.

        A dialect overrides :meth:`driver_server_id`.
        """
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        try:
            return self.driver_server_id(raw)
        except (AttributeError, TypeError, self._dbapi.Error):  # closed already, or never begun
            return None

    def driver_server_id(self, raw: Any) -> int | None:
        """As :meth:`server_id`, of the driver's own connection object; may raise its errors."""
        return None

    def _query(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """All rows, without SQLAlchemy's events: on a cursor of the driver."""
        with closing(connection.connection.cursor()) as cursor:
            if values:
                cursor.execute(sql, values)
            else:
                cursor.execute(sql)
            return list(cursor.fetchall())

    def _execute(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """All rows of SQL in the driver's own parameter style, with SQLAlchemy's events."""
        return list(self._run(connection, sql, values).all())

    def _run(
        self, connection: sa.Connection, sql: str, values: tuple[Any, ...]
    ) -> sa.CursorResult[Any]:
        """The result of SQL in the driver's own parameter style."""
        return connection.exec_driver_sql(sql, values)
