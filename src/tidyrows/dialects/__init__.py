"""All that differs by database: errors, transactions, delete forms, cycles, timeouts.

Nothing outside this room asks which database it is talking to: it asks a :class:`Dialect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tidyrows.dialects.base import CommitOutcome, CycleForm, Dialect, Fault, Loss, RealTable
from tidyrows.dialects.blocker import Blocker
from tidyrows.dialects.database_names import database_name
from tidyrows.dialects.liveness_lock import Life, Socket, in_time
from tidyrows.dialects.mysql import MySQL
from tidyrows.dialects.postgresql import PostgreSQL
from tidyrows.dialects.sqlite import SQLite

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = [
    "Blocker",
    "CommitOutcome",
    "CycleForm",
    "Dialect",
    "Fault",
    "Life",
    "Loss",
    "RealTable",
    "Socket",
    "database_name",
    "dialect_for",
    "in_time",
]

_KINDS: dict[str, type[Dialect]] = {
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
        kind = _KINDS.get(bind.dialect.name, Dialect)
        known = _known[bind.dialect] = kind(bind.dialect)
    return known
