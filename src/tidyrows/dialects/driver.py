"""The driver behind an engine, the database's name, and the role *errors*."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import sqlalchemy as sa

from tidyrows.errors import add_note

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_SERVER = (
    "tidyrows: the first connection to {} failed, so it was not tried again. Start the server, or "
    "correct host and port"
)


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


def raw_connection(dbapi_connection: Any) -> Any:
    """The driver's own connection, also under SQLAlchemy's adapter of an asynchronous driver."""
    return getattr(dbapi_connection, "driver_connection", dbapi_connection)


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
        # SQL with the driver's own marks of parameters, where these are not %s, or ? on SQLite
        self._mark: Callable[[str], str] | None = None
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
        try:
            return self.driver_server_id(raw_connection(dbapi_connection))
        except (AttributeError, TypeError, self._dbapi.Error):  # closed already, or never begun
            return None

    def driver_server_id(self, raw: Any) -> int | None:
        """As :meth:`server_id`, of the driver's own connection object; may raise its errors."""
        return None

    def _query(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """All rows, without SQLAlchemy's events: on a cursor of the driver."""
        try:
            driver: Any = connection.connection.dbapi_connection
            with closing(driver.cursor()) as cursor:
                if self._mark is not None:
                    sql = self._mark(sql)
                cursor.execute(sql, *([values] if values else []))
                return list(cursor.fetchall())
        except BaseException as error:
            # As SQLAlchemy does: aiomysql and asyncmy close what is cancelled in between.
            if not isinstance(error, Exception) and not connection.invalidated:
                connection.invalidate(error)
            raise

    def _execute(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """All rows of SQL in the driver's own parameter style, with SQLAlchemy's events."""
        return list(self._run(connection, sql, values).all())

    def _run(
        self, connection: sa.Connection, sql: str, values: tuple[Any, ...]
    ) -> sa.CursorResult[Any]:
        """The result of SQL in the driver's own parameter style."""
        return connection.exec_driver_sql(sql if self._mark is None else self._mark(sql), values)


class Fault(Enum):
    """What to do about an error."""

    TRANSIENT = auto()
    """Run the whole transaction again."""
    LOST = auto()
    """The connection is gone: run the whole transaction again, on a new one."""
    CONSTRAINT = auto()
    """A constraint was violated; after a DELETE, a foreign key: look for dependents again."""
    OTHER = auto()
    """Raise."""


class Loss(Enum):
    """What a failed statement did to the earlier rows of its transaction."""

    NOTHING = auto()
    UNKNOWN = auto()
    EVERYTHING = auto()


class Errors(DriverAccess):
    """Errors by the database's own codes; never by message, nor by SQLAlchemy's class."""

    transient_codes: ClassVar[frozenset[Any]] = frozenset()
    """Deadlock, lock timeout, serialization failure: the transaction may be run again."""
    lost_codes: ClassVar[frozenset[Any]] = frozenset()
    """The connection is gone, or there was none."""
    constraint_codes: ClassVar[frozenset[Any]] = frozenset()
    """A foreign key above all."""
    foreign_key_codes: ClassVar[frozenset[Any]] = frozenset()
    """Of these, foreign keys; where empty, any of them may be one."""
    timeout_codes: ClassVar[frozenset[Any]] = frozenset()
    """A wait for a lock, or a statement, took too long."""
    permission_codes: ClassVar[frozenset[Any]] = frozenset()
    """The role may not do that."""

    @abstractmethod
    def driver_code(self, error: BaseException) -> Any:
        """The database's own code of a driver's error, as in the sets above; None if it has none.

        It is called with errors of any class.
        """

    def code(self, error: BaseException) -> Any:
        """As :meth:`driver_code`, also for SQLAlchemy's errors."""
        if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
            error = error.orig
        return self.driver_code(error)

    def fault(self, error: BaseException) -> Fault:
        """What to do about an error of SQLAlchemy or of the driver."""
        if isinstance(error, sa.exc.DBAPIError):
            if error.connection_invalidated:
                return Fault.LOST
            error = error.orig or error
        if self.is_database_missing(error):
            return Fault.OTHER  # it will not come back
        # asyncpg lets the socket's own error through when the server is down.
        return Fault.LOST if isinstance(error, ConnectionError) else self.driver_fault(error)

    def driver_fault(self, error: BaseException) -> Fault:
        """As :meth:`fault`, for an error of the driver: by its code."""
        code = self.driver_code(error)
        if code in self.transient_codes:
            return Fault.TRANSIENT
        if code in self.lost_codes:
            return Fault.LOST
        return Fault.CONSTRAINT if code in self.constraint_codes else Fault.OTHER

    def is_transient(self, error: BaseException) -> bool:
        """Whether a transaction that failed so may succeed another time.

        Not where the engine has never reached its server.
        """
        fault = self.fault(error)
        return fault is Fault.TRANSIENT or (fault is Fault.LOST and self._has_connected())

    def explain_first_connection(self, error: BaseException, engine: sa.Engine) -> None:
        """Add a note that names the server, where the engine has never reached it."""
        # An error of the socket may be of anything, and has the address.
        of_database = isinstance(error, (sa.exc.DBAPIError, self._dbapi.Error))
        if of_database and self.fault(error) is Fault.LOST and not self._has_connected():
            note = _NO_SERVER.format(database_name(engine))
            if note not in getattr(error, "__notes__", ()):
                add_note(error, note)

    def has_answered(self, error: BaseException) -> bool:
        """Whether an error is the database's own, and no failure to connect to it."""
        return self._has_connected() and self.fault(error) is not Fault.LOST

    def _has_connected(self) -> bool:
        # SQLAlchemy asks for the version on the first connection.
        return self._dialect().server_version_info is not None

    def is_timeout(self, error: BaseException) -> bool:
        """Whether an error ended a wait: for a lock, or for the statement itself."""
        return self.code(error) in self.timeout_codes

    def is_foreign_key(self, error: BaseException) -> bool:
        """Whether a constraint's error may be a foreign key's: rows that reference others came."""
        return self.code(error) in (self.foreign_key_codes or self.constraint_codes)

    def is_permission_denied(self, error: BaseException) -> bool:
        """Whether the role lacks a right."""
        return self.code(error) in self.permission_codes

    def is_database_missing(self, error: BaseException) -> bool:
        """Whether the database does not exist (any more)."""
        return False

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """What a failed statement did to the earlier rows of its transaction."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.UNKNOWN
