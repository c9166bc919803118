"""PostgreSQL's errors: codes are SQLSTATEs."""

from __future__ import annotations

import re
from typing import Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.errors import Fault, Loss

_NO_DATABASE = "3D000"
_NO_DATABASE_TEXT = re.compile(r'FATAL: +database ".*" does not exist')


class PostgreSQLErrors(Dialect):
    """The codes, by DATABASE_FACTS of each driver."""

    transient_codes = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
    timeout_codes = frozenset({"55P03", "57014"})
    permission_codes = frozenset({"42501"})

    def driver_code(self, error: BaseException) -> str | None:
        """``sqlstate`` of psycopg and asyncpg, ``pgcode`` of psycopg2."""
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return code if isinstance(code, str) else None

    def driver_fault(self, error: BaseException) -> Fault:
        """By classes of codes: 08 and 57P0 are lost connections, 23 is a constraint."""
        # Before the code is looked for: SQLAlchemy makes it anew for asyncpg, without one.
        if type(error).__name__ == "InvalidCachedStatementError":
            return Fault.TRANSIENT
        code = self.driver_code(error)
        if code is None:
            # Only what happens to the connection itself comes without a code: server down,
            # too many connections, killed between two statements.
            lost = self._dbapi is not None and isinstance(error, self._dbapi.OperationalError)
            return Fault.LOST if lost else Fault.OTHER
        if code in self.transient_codes:
            return Fault.TRANSIENT
        if code.startswith(("08", "57P0")) or code == "25P03":
            return Fault.LOST
        return Fault.CONSTRAINT if code.startswith("23") else Fault.OTHER

    def is_database_missing(self, error: BaseException) -> bool:
        """invalid_catalog_name; libpq tells of a refused connection in words only."""
        code: Any = self.code(error)
        return code == _NO_DATABASE if code else bool(_NO_DATABASE_TEXT.search(str(error)))

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A rollback to a savepoint saves the rest; without one, ``commit_is_void`` sees it."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.NOTHING
