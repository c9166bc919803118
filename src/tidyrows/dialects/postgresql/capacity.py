"""How many connections PostgreSQL takes, and the names that they have in pg_stat_activity."""

from __future__ import annotations

import re
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.capacity import ConnectionLimit
from tidyrows.dialects.driver import raw_connection
from tidyrows.greenlets import wait_for

if TYPE_CHECKING:
    import sqlalchemy as sa

# Workers of the server itself have no user or no database. Everybody may read these columns.
_LIMITS = """
SELECT CAST(pg_catalog.current_setting('max_connections') AS pg_catalog.int4),
       CAST(pg_catalog.current_setting('superuser_reserved_connections') AS pg_catalog.int4)
       + CAST(COALESCE(pg_catalog.current_setting('reserved_connections', true), '0')
              AS pg_catalog.int4),
       r.rolname, r.rolsuper, r.rolconnlimit, d.datname, d.datconnlimit,
       count(a.pid), count(a.pid) FILTER (WHERE a.usesysid = r.oid),
       count(a.pid) FILTER (WHERE a.datid = d.oid)
FROM pg_catalog.pg_roles r
JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
LEFT JOIN pg_catalog.pg_stat_activity a
     ON a.usesysid IS NOT NULL AND a.datid IS NOT NULL
        AND a.pid <> pg_catalog.pg_backend_pid()
        AND pg_catalog.left(a.application_name, pg_catalog.length(%s)) <> %s
        AND (a.application_name = ''
             OR a.application_name <> pg_catalog.current_setting('application_name'))
WHERE r.rolname = session_user
GROUP BY r.rolname, r.rolsuper, r.rolconnlimit, d.datname, d.datconnlimit"""
_LONGEST_NAME = 63
# Of a connection that was refused, libpq gives the text only.
_ANSWERED = re.compile(r"FATAL: ")
_FULL_TEXT = re.compile(r"FATAL: .*(too many|remaining connection slots)")
_FULL = "53300"


class PostgreSQLCapacity(Dialect):
    """The limits of server, role and database."""

    renames_connections = True

    def connection_limits(
        self, connection: sa.Connection, *, run: str, workers: int
    ) -> list[ConnectionLimit]:
        """Superusers have no other limit than the server's; what is reserved is left to admins."""
        ((most, reserved, role, is_super, of_role, database, of_database, *used),) = self._query(
            connection, _LIMITS, run, run
        )
        server, by_role, by_database = used
        kept = f", less {reserved} reserved" if reserved else ""
        limits = [
            ConnectionLimit(
                f"max_connections = {most} of the server{kept}",
                most - reserved,
                server,
                "ALTER SYSTEM SET max_connections = {}, and start the server again",
            )
        ]
        if of_role >= 0 and not is_super:
            limits.append(
                ConnectionLimit(
                    f"CONNECTION LIMIT {of_role} of role {role}",
                    of_role,
                    by_role,
                    f"ALTER ROLE {role} CONNECTION LIMIT {{}}",
                )
            )
        if of_database >= 0 and not is_super:
            limits.append(
                ConnectionLimit(
                    f"CONNECTION LIMIT {of_database} of database {database}",
                    of_database,
                    by_database,
                    f"ALTER DATABASE {database} CONNECTION LIMIT {{}}",
                )
            )
        return limits

    def name_connection(self, arguments: dict[str, Any], name: str) -> bool:
        """As ``application_name``, unless the project has set one."""
        if self.driver == "asyncpg":
            settings = dict(arguments.get("server_settings") or {})
            arguments["server_settings"] = settings
            arguments = settings
        if "application_name" in arguments:
            return False
        arguments["application_name"] = _short(name)
        return True

    def environ(self, name: str) -> dict[str, str]:
        """As libpq reads them; asyncpg does not."""
        return {"PGAPPNAME": _short(name)}

    def rename_connection(self, dbapi_connection: Any, name: str) -> None:
        """By SET, outside of a transaction, whose end would take it back."""
        quoted = _short(name).replace("'", "''")
        sql = f"SET application_name = '{quoted}'"
        if self.driver == "asyncpg":
            wait_for(raw_connection(dbapi_connection).execute(sql))
            return
        before = dbapi_connection.autocommit
        if not before:
            dbapi_connection.autocommit = True
        try:
            with closing(dbapi_connection.cursor()) as cursor:
                cursor.execute(sql)
        finally:
            if not before and not dbapi_connection.closed:
                dbapi_connection.autocommit = before

    def is_server_away(self, error: BaseException) -> bool:
        return super().is_server_away(error) and not _ANSWERED.search(str(error))

    def is_server_full(self, error: BaseException) -> bool:
        return bool(self.code(error) == _FULL or _FULL_TEXT.search(str(error)))


def _short(name: str) -> str:
    """As the server keeps it: it makes question marks of what is not ASCII."""
    return name.encode("ascii", "replace")[:_LONGEST_NAME].decode()
