"""SQLite's errors: primary result codes."""

from __future__ import annotations

from typing import Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.errors import Loss

_BUSY, _LOCKED, _CONSTRAINT = 5, 6, 19


class SQLiteErrors(Dialect):
    """BUSY and LOCKED mean that another connection writes."""

    transient_codes = frozenset({_BUSY, _LOCKED})
    timeout_codes = transient_codes
    constraint_codes = frozenset({_CONSTRAINT})

    def driver_code(self, error: BaseException) -> int | None:
        """The primary code: the low byte of the extended one."""
        code = getattr(error, "sqlite_errorcode", None)
        return code & 0xFF if isinstance(code, int) else None

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """Some errors roll the transaction back (disk full, RAISE(ROLLBACK)): ask the driver."""
        return Loss.NOTHING if self.in_transaction(dbapi_connection) else Loss.EVERYTHING
