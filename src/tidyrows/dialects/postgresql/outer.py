"""Outer transactions of PostgreSQL."""

from __future__ import annotations

import re
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterable

_INERROR, _IN_ERROR = 3, "25P02"  # libpq's status, and the server's code
_SEVERAL_AT_ONCE = frozenset({"psycopg", "psycopg2"})
_HAS_DEFERRABLE = "SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE condeferrable)"
_CHECK = "SET CONSTRAINTS ALL IMMEDIATE"
_CHECKING = "tidyrows_check"


class PostgreSQLOuter(Dialect):
    """SET is undone with the transaction; locks of the session and LISTEN are not."""

    # A lock of the session, whatever function takes it; not one of the transaction.
    session_changing = re.compile(
        r"\bpg_(?:try_)?advisory_lock|^\s*(?:LISTEN|PREPARE)\b", re.IGNORECASE
    )
    transaction_options = frozenset(
        {"isolation_level", "postgresql_readonly", "postgresql_deferrable"}
    )
    savepoint_gone_codes = frozenset({"3B001", "25P01"})
    _has_deferrable: bool | None = None

    def is_aborted(self, dbapi_connection: Any, *, after_error: bool) -> bool:
        """By libpq's status; asyncpg shows none, so after an error the server is asked."""
        raw: Any = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if self.driver == "psycopg":
            return bool(raw.pgconn.transaction_status == _INERROR)
        if self.driver == "psycopg2":
            return bool(raw.get_transaction_status() == _INERROR)
        if not after_error:
            return False
        try:
            self.send(dbapi_connection, ["SELECT 1"])
        except self._dbapi.Error as error:
            return bool(self.code(error) == _IN_ERROR)
        return False

    def deferred_before(self, dbapi_connection: Any) -> Any | None:
        """Asked once; at the end of a test all is checked anyway."""
        if self._has_deferrable is None:
            with closing(dbapi_connection.cursor()) as cursor:
                cursor.execute(_HAS_DEFERRABLE)
                self._has_deferrable = bool(cursor.fetchone()[0])
        return True if self._has_deferrable else None

    def check_deferred(self, dbapi_connection: Any, before: Any, *, at_end: bool) -> None:
        """Constraints are made immediate; before the end, in a savepoint that is rolled back."""
        if at_end:
            self.send(dbapi_connection, [_CHECK])
        elif before is not None:
            back = f"ROLLBACK TO SAVEPOINT {_CHECKING}", f"RELEASE SAVEPOINT {_CHECKING}"
            self.send(dbapi_connection, [f"SAVEPOINT {_CHECKING}", _CHECK, *back])

    def send(self, dbapi_connection: Any, statements: Iterable[str]) -> None:
        """In one round trip, where the driver can."""
        if self.driver in _SEVERAL_AT_ONCE:
            statements = ["; ".join(statements)]
        super().send(dbapi_connection, statements)
