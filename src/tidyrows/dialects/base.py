"""What the other rooms may ask of a database: one :class:`Dialect`, made of roles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.advisory import AdvisoryLocks
from tidyrows.dialects.capacity import Capacity
from tidyrows.dialects.catalogue import Catalogue, RealTable
from tidyrows.dialects.keyless_rows import KeylessStatements
from tidyrows.dialects.locks import Locks
from tidyrows.dialects.outer import OuterTransactions
from tidyrows.dialects.row_locks import RowLocks
from tidyrows.dialects.sessions import Sessions
from tidyrows.dialects.spaces import Spaces
from tidyrows.dialects.statements import Inserts, Statements

if TYPE_CHECKING:
    import sqlalchemy as sa


class Dialect(
    Capacity,
    Sessions,
    OuterTransactions,
    Inserts,
    Statements,
    KeylessStatements,
    Locks,
    AdvisoryLocks,
    RowLocks,
    Spaces,
    Catalogue,
):
    """A database as tidyrows needs it. Subclass it for another database.

    It must have what is abstract, and ``name``; docs/dialects.md lists what it may have. Each
    default is right for any database, only slower or more careful: an error leaves rows in doubt,
    a key may be used again, a cycle is deleted level by level. ``tidyrows.testing.dialect_suite``
    has the tests that every dialect must pass.
    """


class UnknownDialect(Dialect):
    """A database that tidyrows knows nothing about: plain SQL, and doubt wherever it can matter."""

    name = "generic"

    def driver_code(self, error: BaseException) -> Any:
        """None: no error is retried."""
        return None

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """Nobody knows."""
        return None

    def begin_cleanup(self, connection: sa.Connection, **limits: Any) -> None:
        """A transaction as the driver begins it, without a bound for waits."""
        self.refuse_open_transaction(connection)
        connection.begin()

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The default schema for an unqualified name."""
        return RealTable(schema or self.default_schema(connection), "table", plain=False)
