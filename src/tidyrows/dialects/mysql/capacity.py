"""How many connections MariaDB and MySQL take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.capacity import ConnectionLimit

if TYPE_CHECKING:
    import sqlalchemy as sa

# The session's max_user_connections is the limit of this account. The process list has all
# connections of the same user, and with the right PROCESS those of others too.
_LIMITS = """
SELECT @@GLOBAL.max_connections, @@SESSION.max_user_connections, CURRENT_USER(),
       COUNT(*) FROM information_schema.PROCESSLIST
WHERE USER = SUBSTRING_INDEX(USER(), '@', 1) AND ID <> CONNECTION_ID()"""
_CONNECTED = "SHOW GLOBAL STATUS LIKE 'Threads_connected'"
_AWAY = frozenset({2002, 2003, 2005})
_FULL = frozenset({1040, 1203, 1226})
_NAMES = frozenset({"pymysql", "aiomysql", "asyncmy"})


class MySQLCapacity(Dialect):
    """The limits of server and account. A connection keeps the name that it was made with."""

    def connection_limits(
        self, connection: sa.Connection, *, run: str, workers: int
    ) -> list[ConnectionLimit]:
        """The server does not show names of connections.

        So where a run has several workers, connections of the same user count as theirs.
        """
        ((most, of_user, user, same_user),) = self._query(connection, _LIMITS)
        ((_name, connected),) = self._query(connection, _CONNECTED)
        others = int(connected) - 1 - (same_user if workers > 1 else 0)
        limits = [
            ConnectionLimit(
                f"max_connections = {most} of the server",
                most,
                max(0, others),
                "SET GLOBAL max_connections = {}",
            )
        ]
        if of_user:
            account = "@".join(f"'{part}'" for part in user.rsplit("@", 1))
            limits.append(
                ConnectionLimit(
                    f"MAX_USER_CONNECTIONS {of_user} of {account}",
                    of_user,
                    0 if workers > 1 else same_user,
                    f"ALTER USER {account} WITH MAX_USER_CONNECTIONS {{}}",
                )
            )
        return limits

    def name_connection(self, arguments: dict[str, Any], name: str) -> bool:
        """As the attribute ``program_name``, which cannot be changed later."""
        if self.driver in _NAMES:
            arguments.setdefault("program_name", name)
        return False  # there is nothing to keep up to date

    def is_server_away(self, error: BaseException) -> bool:
        return isinstance(error, OSError) or self.code(error) in _AWAY

    def is_server_full(self, error: BaseException) -> bool:
        return self.code(error) in _FULL
