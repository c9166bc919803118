"""Outer transactions of SQLite."""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any

from tidyrows.dialects.base import Dialect

_HAS_DEFERRED = (
    "SELECT 1 FROM sqlite_master WHERE type = 'table' AND sql LIKE '%DEFERR%' "
    "UNION SELECT 1 FROM pragma_defer_foreign_keys WHERE defer_foreign_keys"
)
_FOREIGN_KEY_ERROR = 787  # SQLITE_CONSTRAINT_FOREIGNKEY


class SQLiteOuter(Dialect):
    """The driver's legacy mode begins no transaction before a SAVEPOINT or DDL, so we do."""

    # Not those that only tell: PRAGMA table_info(users).
    session_changing = re.compile(
        r"^\s*(?:PRAGMA\s+(?:\w+\.)?(?!\w*(?:info|list|check)\b)\w+\s*[=(]|ATTACH\b|DETACH\b)",
        re.IGNORECASE,
    )
    # SQLITE_ERROR: a statement on a savepoint of our own has no other reason.
    savepoint_gone_codes = frozenset({1})

    def begin_outer(self, dbapi_connection: Any) -> None:
        """BEGIN IMMEDIATE: a file has one writer, and a later upgrade could not be waited for."""
        raw: Any = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if getattr(raw, "autocommit", None) is False:  # Python 3.12: one is always open
            dbapi_connection.rollback()
            self.send(dbapi_connection, ["ROLLBACK"])
        self.send(dbapi_connection, ["BEGIN IMMEDIATE"])

    def deferred_before(self, dbapi_connection: Any) -> Any | None:
        """The violations that are there already."""
        if self._fetch(dbapi_connection, "PRAGMA foreign_keys") != [(1,)]:
            return None
        if not self._fetch(dbapi_connection, _HAS_DEFERRED):
            return None
        return frozenset(self._fetch(dbapi_connection, "PRAGMA foreign_key_check"))

    def check_deferred(self, dbapi_connection: Any, before: Any, *, at_end: bool) -> None:
        """Raise the error that COMMIT would."""
        if before is None:
            return
        found = set(self._fetch(dbapi_connection, "PRAGMA foreign_key_check")) - before
        if found:
            listed = sorted(f"{table} -> {parent}" for table, _row, parent, _key in found)
            error = self._dbapi.IntegrityError(
                f"FOREIGN KEY constraint failed: {', '.join(listed)}"
            )
            error.sqlite_errorcode = _FOREIGN_KEY_ERROR
            raise error

    def _fetch(self, dbapi_connection: Any, sql: str) -> list[Any]:
        with closing(dbapi_connection.cursor()) as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())
