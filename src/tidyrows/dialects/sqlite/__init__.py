"""SQLite, with the driver of the standard library and aiosqlite."""

from __future__ import annotations

from tidyrows.dialects.sqlite.catalogue import SQLiteCatalogue
from tidyrows.dialects.sqlite.errors import SQLiteErrors
from tidyrows.dialects.sqlite.locks import SQLiteLocks
from tidyrows.dialects.sqlite.sessions import SQLiteSessions
from tidyrows.dialects.sqlite.statements import SQLiteStatements

__all__ = ["SQLite"]


class SQLite(
    SQLiteErrors,
    SQLiteSessions,
    SQLiteStatements,
    SQLiteLocks,
    SQLiteCatalogue,
):
    """One writer at a time; a failed COMMIT leaves its transaction open."""

    name = "sqlite"
