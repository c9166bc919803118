"""PostgreSQL, with psycopg, psycopg2 and asyncpg, and with care for unknown drivers."""

from __future__ import annotations

from tidyrows.dialects.postgresql.catalogue import PostgreSQLCatalogue
from tidyrows.dialects.postgresql.errors import PostgreSQLErrors
from tidyrows.dialects.postgresql.locks import PostgreSQLLocks
from tidyrows.dialects.postgresql.sessions import PostgreSQLSessions
from tidyrows.dialects.postgresql.statements import PostgreSQLStatements

__all__ = ["PostgreSQL"]


class PostgreSQL(
    PostgreSQLErrors,
    PostgreSQLStatements,
    PostgreSQLSessions,
    PostgreSQLLocks,
    PostgreSQLCatalogue,
):
    """A transaction that saw an error persists nothing, and its COMMIT raises nothing."""

    name = "postgresql"
