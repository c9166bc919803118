"""All that differs by database: errors, transactions, delete forms, cycles, timeouts.

Nothing outside this room asks which database it is talking to: it asks a :class:`Dialect`. Another
package adds one by an entry point of the group ``tidyrows.dialects``.
"""

from __future__ import annotations

from copy import copy
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from tidyrows.dialects.advisory import HeldLock, LockName, PoolerError
from tidyrows.dialects.base import Dialect, UnknownDialect
from tidyrows.dialects.bounds import DriverSocket, SilentServerError, connect_within
from tidyrows.dialects.capacity import ConnectionLimit
from tidyrows.dialects.catalogue import RealTable, was_dropped
from tidyrows.dialects.driver import Fault, Loss, database_name
from tidyrows.dialects.embedded import EMBEDDED
from tidyrows.dialects.locks import Blocker, LivenessLock, LockStatements
from tidyrows.dialects.outer import InnerTransactions
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.dialects.statements import CycleForm
from tidyrows.errors import DialectError, NotBoundError

__all__ = [
    "EMBEDDED",
    "Blocker",
    "CommitOutcome",
    "ConnectionLimit",
    "CycleForm",
    "Dialect",
    "DriverSocket",
    "Fault",
    "HeldLock",
    "LivenessLock",
    "LockName",
    "LockStatements",
    "Loss",
    "PoolerError",
    "RealTable",
    "SilentServerError",
    "connect_within",
    "database_name",
    "dialect_for",
    "engine_for",
    "inner_dialect",
    "was_dropped",
]

ENTRY_POINTS = "tidyrows.dialects"
"""The entry point group of other packages: SQLAlchemy's dialect name = module:Class."""
_BUILT_IN = {
    "postgresql": ("postgresql", "PostgreSQL"),
    "mysql": ("mysql", "MySQL"),
    "mariadb": ("mysql", "MySQL"),
    "sqlite": ("sqlite", "SQLite"),
}
"""Module and class by SQLAlchemy's name; most processes need one of these modules."""
_DRIVERS = {
    "postgresql": ("psycopg", "psycopg2"),
    "mysql": ("pymysql", "mysqldb"),
    "mariadb": ("pymysql", "mysqldb", "mariadbconnector"),
    "sqlite": ("pysqlite",),
}
"""The synchronous drivers of each database, as a URL names them."""
_PACKAGES = {"mysqldb": "MySQLdb", "mariadbconnector": "mariadb", "pysqlite": "sqlite3"}
"""Drivers whose package has another name."""
# Keyed by SQLAlchemy's own dialect object, which holds the driver and is one per engine.
_known: WeakKeyDictionary[Any, Dialect] = WeakKeyDictionary()


def engine_for(url: str | sa.URL, **options: Any) -> sa.Engine:
    """An engine for a URL, with options of ``create_engine``.

    Raises:
        NotBoundError: it is no URL, SQLAlchemy does not know its dialect, or its driver is not
            installed.
    """
    try:
        return sa.create_engine(url, **options)
    except sa.exc.ArgumentError as error:  # which may show the password
        scheme = str(url).partition("://")[0] if "://" in str(url) else ""
        why = f"begins with {scheme!r}, which SQLAlchemy does not know" if scheme else "is no URL"
        raise NotBoundError(f"The text {why}. Write {_proposed(scheme)}://...") from error
    except ModuleNotFoundError as error:
        scheme = str(url).partition("://")[0]
        raise NotBoundError(
            f"The URL begins with {scheme!r}, and its driver {error.name} is not installed. "
            f"Install it, or write {_proposed(scheme)}://..."
        ) from error


def _proposed(scheme: str) -> str:
    """The beginning of a URL that is like this one, with a driver that is installed."""
    backend = scheme.partition("+")[0]
    for near in get_close_matches(backend, _DRIVERS, n=1) or ("postgresql",):
        installed = [d for d in _DRIVERS[near] if find_spec(_PACKAGES.get(d, d)) is not None]
        return f"{near}+{(installed or _DRIVERS[near])[0]}"
    return scheme


def dialect_for(bind: sa.Engine | sa.Connection) -> Dialect:
    """What tidyrows knows of the database behind an engine or a connection.

    Raises:
        DialectError: another package has a dialect for this database, and it cannot be used.
    """
    known = _known.get(bind.dialect)
    if known is None:
        name = bind.dialect.name
        kind = _built_in(name) or _installed(name) or UnknownDialect
        known = _known[bind.dialect] = kind(bind.dialect)
    return known


def _built_in(name: str) -> type[Dialect] | None:
    if name not in _BUILT_IN:
        return None
    module, kind = _BUILT_IN[name]
    found: type[Dialect] = getattr(import_module(f"{__name__}.{module}"), kind)
    return found


def inner_dialect(engine: sa.Engine) -> sa.Dialect:
    """SQLAlchemy's dialect for an engine over an outer transaction on this engine's database.

    :func:`dialect_for` then has an answer whose transactions are the inner ones.
    """
    own = copy(engine.dialect)
    vars(own).pop("dispatch", None)  # listeners of the other engine
    kind = type(dialect_for(engine))
    if not issubclass(kind, InnerTransactions):  # a block within a block
        kind = type(kind.__name__, (InnerTransactions, kind), {})
    _known[own] = kind(own)
    # A streamed result would end with the first savepoint of another user, or statement of one.
    context: Any = own.execution_ctx_cls
    buffered = {"create_server_side_cursor": context.create_default_cursor}
    own.execution_ctx_cls = type(context.__name__, (context,), buffered)
    return own


def _installed(name: str) -> type[Dialect] | None:
    """The dialect that another package has for this database, by its entry point."""
    # One package may be found twice, on two folders of the path.
    found = {point.value: point for point in entry_points(group=ENTRY_POINTS, name=name)}
    if not found:
        return None
    shown = f"{ENTRY_POINTS}: {name} = {' and '.join(sorted(found))}"
    if len(found) > 1:
        raise DialectError(shown, "is there twice", "Uninstall all packages but one of these.")
    (point,) = found.values()
    package = point.dist.name if point.dist is not None else "the package"
    try:
        kind = point.load()
    except Exception as error:
        why = f"cannot be loaded: {type(error).__name__}: {error}"
        raise DialectError(shown, why, f"Repair or uninstall {package}.") from error
    if not (isinstance(kind, type) and issubclass(kind, Dialect)):
        remedy = "Name a subclass of tidyrows.dialects.Dialect."
        raise DialectError(shown, f"leads to {kind!r}, which is no dialect", remedy)
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        remedy = f"Define them in {kind.__qualname__} of {package}; docs/dialects.md has the list."
        raise DialectError(shown, f"leads to a class without {', '.join(missing)}", remedy)
    return kind
