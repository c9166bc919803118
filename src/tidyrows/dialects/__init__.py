"""All that differs by database: errors, transactions, delete forms, cycles, timeouts.

Nothing outside this room asks which database it is talking to: it asks a :class:`Dialect`. Another
package adds one by an entry point of the group ``tidyrows.dialects``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tidyrows.dialects.base import Dialect, UnknownDialect
from tidyrows.dialects.bounds import DriverSocket, SilentServerError, connect_within
from tidyrows.dialects.catalogue import RealTable, was_dropped
from tidyrows.dialects.driver import Fault, Loss, database_name
from tidyrows.dialects.locks import Blocker, LivenessLock, LockStatements
from tidyrows.dialects.mysql import MySQL
from tidyrows.dialects.postgresql import PostgreSQL
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.dialects.sqlite import SQLite
from tidyrows.dialects.statements import CycleForm
from tidyrows.errors import DialectError

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = [
    "Blocker",
    "CommitOutcome",
    "CycleForm",
    "Dialect",
    "DriverSocket",
    "Fault",
    "LivenessLock",
    "LockStatements",
    "Loss",
    "RealTable",
    "SilentServerError",
    "connect_within",
    "database_name",
    "dialect_for",
    "was_dropped",
]

ENTRY_POINTS = "tidyrows.dialects"
"""The entry point group of other packages: SQLAlchemy's dialect name = module:Class."""
_BUILT_IN: dict[str, type[Dialect]] = {
    "postgresql": PostgreSQL,
    "mysql": MySQL,
    "mariadb": MySQL,
    "sqlite": SQLite,
}
# Keyed by SQLAlchemy's own dialect object, which holds the driver and is one per engine.
_known: WeakKeyDictionary[Any, Dialect] = WeakKeyDictionary()


def dialect_for(bind: sa.Engine | sa.Connection) -> Dialect:
    """What tidyrows knows of the database behind an engine or a connection.

    Raises:
        DialectError: another package has a dialect for this database, and it cannot be used.
    """
    known = _known.get(bind.dialect)
    if known is None:
        name = bind.dialect.name
        kind = _BUILT_IN.get(name) or _installed(name) or UnknownDialect
        known = _known[bind.dialect] = kind(bind.dialect)
    return known


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
