"""The MySQL family's errors: codes are numbers, never SQLSTATEs (HY000 stands for 1205)."""

from __future__ import annotations

from typing import Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.errors import Fault, Loss

_ROLLED_BACK = frozenset({1213, 1020})
# 1205 rolls back all with innodb_rollback_on_timeout; 1206 is a full lock table.
_PERHAPS_ROLLED_BACK = frozenset({1205, 1206})
# The server hangs up after it; PyMySQL and SQLAlchemy take the connection for usable.
_PACKET_TOO_BIG = 1153
_NO_DATABASE = 1049


class MySQLErrors(Dialect):
    """A deadlock rolls back the whole transaction, a lock timeout only the statement."""

    # 3572 and 3024 are NOWAIT and max_execution_time of MySQL 8, by its manual; MariaDB has 1205
    # and 1969 for them.
    timeout_codes = frozenset({1205, 1969, 3572, 3024})
    transient_codes = timeout_codes | {1213, 1020, 1040, 1317}
    # The first four are the drivers' own; 1927 is what MariaDB says to whom it ends, 4031 MySQL 8.
    lost_codes = frozenset({2002, 2003, 2006, 2013, 1927, 4031})
    constraint_codes = frozenset({1451, 1452, 1216, 1217, 1062, 1048, 4025, 3819})
    permission_codes = frozenset({1044, 1142, 1143})

    def driver_code(self, error: BaseException) -> int | None:
        """The first argument; mariadbconnector has ``errno``."""
        code: Any = getattr(error, "errno", None) or (error.args[0] if error.args else None)
        return code if isinstance(code, int) else None

    def is_database_missing(self, error: BaseException) -> bool:
        """Unknown database."""
        return bool(self.code(error) == _NO_DATABASE)

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A deadlock loses all; a lock timeout the statement, or all where so configured."""
        code = self.code(error)
        lost = code == _PACKET_TOO_BIG or self.fault(error) is Fault.LOST
        if lost or code in _ROLLED_BACK:
            return Loss.EVERYTHING
        return Loss.DOUBT if code in _PERHAPS_ROLLED_BACK else Loss.NOTHING
