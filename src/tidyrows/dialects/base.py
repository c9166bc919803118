"""What the other rooms may ask of a database: one :class:`Dialect`, made of six roles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.catalogue import Catalogue, RealTable
from tidyrows.dialects.driver import Errors
from tidyrows.dialects.keyless_rows import KeylessStatements
from tidyrows.dialects.locks import Locks
from tidyrows.dialects.sessions import Sessions
from tidyrows.dialects.statements import Inserts, Statements

if TYPE_CHECKING:
    import sqlalchemy as sa


class Dialect(Errors, Sessions, Inserts, Statements, KeylessStatements, Locks, Catalogue):
    """A database as tidyrows needs it. Subclass it for another database.

    A dialect MUST have (abstract here):

    - ``name``;
    - ``driver_code`` and the sets of codes, above all ``transient_codes``: without them no
      transaction is retried;
    - ``in_transaction``: it may answer None, at the price of rows in doubt;
    - ``begin_cleanup``: READ COMMITTED, read and write, with a lock timeout;
    - ``resolve``: the real table of a name.

    It MAY have everything else; each default is right for any database, only slower or more
    careful: a key may be used again (``reuses_keys``), an upsert proves nothing
    (``inserted_proof``), an error or a failed COMMIT leaves rows in doubt (``loss``,
    ``commit_outcome``), rows without a key cannot be deleted (``deletes_keyless_rows``), it is
    unknown whether a worker is alive (``liveness_lock``, ``is_alive``), deletes are SQLAlchemy's
    own statements (``delete_by_keys``), a cycle is deleted level by level (``cycle_form``).

    ``tidyrows.testing.dialect_suite`` has the tests that every dialect must pass.
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

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """A transaction as the driver begins it, without a bound for waits."""
        self.refuse_open_transaction(connection)
        connection.begin()

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The default schema for an unqualified name."""
        return RealTable(schema or self.default_schema(connection), "table", plain=False)
