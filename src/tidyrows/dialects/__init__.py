"""All that differs by database: errors, transactions, delete forms, cycles, timeouts.

Nothing outside this room asks which database it is talking to: it asks a :class:`Dialect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tidyrows.dialects.base import Dialect, UnknownDialect
from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.database_names import database_name
from tidyrows.dialects.errors import Fault, Loss
from tidyrows.dialects.liveness_lock import DriverSocket, LivenessLock, connect_within
from tidyrows.dialects.locks import Blocker
from tidyrows.dialects.mysql import MySQL
from tidyrows.dialects.postgresql import PostgreSQL
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.dialects.sqlite import SQLite
from tidyrows.dialects.statements import CycleForm

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
    "Loss",
    "RealTable",
    "connect_within",
    "database_name",
    "dialect_for",
]

_BUILT_IN: dict[str, type[Dialect]] = {
    "postgresql": PostgreSQL,
    "mysql": MySQL,
    "mariadb": MySQL,
    "sqlite": SQLite,
}
# Keyed by SQLAlchemy's own dialect object, which holds the driver and is one per engine.
_known: WeakKeyDictionary[Any, Dialect] = WeakKeyDictionary()


def dialect_for(bind: sa.Engine | sa.Connection) -> Dialect:
    """What tidyrows knows of the database behind an engine or a connection."""
    known = _known.get(bind.dialect)
    if known is None:
        kind = _BUILT_IN.get(bind.dialect.name, UnknownDialect)
        known = _known[bind.dialect] = kind(bind.dialect)
    return known
