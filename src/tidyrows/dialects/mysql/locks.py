"""The MySQL family's blockers, and GET_LOCK for live workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.liveness_lock import PATIENCE, ConnectionLock, LivenessLock, LockStatements
from tidyrows.dialects.locks import Blocker

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

_MARIADB_WAITS = """
information_schema.INNODB_LOCK_WAITS w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_trx_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_trx_id"""
# By its manual; not tried.
_MYSQL_8_WAITS = """
performance_schema.data_lock_waits w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_engine_transaction_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_engine_transaction_id"""
_BLOCKERS = """
SELECT DISTINCT t.trx_mysql_thread_id, p.USER, p.HOST, p.COMMAND, t.trx_state,
       TIMESTAMPDIFF(SECOND, t.trx_started, NOW()), COALESCE(t.trx_query, p.INFO)
FROM {waits}
LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.trx_mysql_thread_id
WHERE {condition}"""
# Locks of whole tables are not InnoDB's: whoever has a transaction open may hold them, or whoever
# is connected to the same database (LOCK TABLES).
_STATE = "SELECT STATE FROM information_schema.PROCESSLIST WHERE ID = {waiter}"
_CANDIDATES = """
SELECT p.ID, p.USER, p.HOST, p.COMMAND, p.STATE, p.TIME, p.INFO
FROM information_schema.PROCESSLIST p
JOIN information_schema.PROCESSLIST me ON me.ID = {waiter}
WHERE p.DB = me.DB AND p.ID NOT IN (me.ID, CONNECTION_ID())
      AND (p.STATE IS NULL OR p.STATE NOT LIKE 'Waiting%')
ORDER BY 1"""
_NEEDS_PROCESS = 1227


class MySQLLocks(Dialect):
    """InnoDB's lock waits, which only the PROCESS right shows, else the process list."""

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        """By InnoDB's lock waits, else by the process list.

        Raises:
            Exception: the driver's, where the PROCESS right is missing and nobody else is seen.
        """
        is_mariadb = bool(getattr(self._dialect(), "is_mariadb", False))
        if is_mariadb:
            cursor.execute("SET max_statement_time = 1.5")
        waits = _MARIADB_WAITS if is_mariadb else _MYSQL_8_WAITS
        condition = f"r.trx_mysql_thread_id = {int(waiter)}"
        try:
            rows = _rows(cursor, _BLOCKERS.format(waits=waits, condition=condition))
        except self._dbapi.Error as refused:
            if refused.args[:1] != (_NEEDS_PROCESS,):
                raise
            # That right alone shows InnoDB's waits, and connections of other users.
            candidates = _connected(cursor, waiter)
            if not candidates:
                raise
            return candidates
        if rows:
            return [_blocker(row) for row in rows]
        state = _rows(cursor, _STATE.format(waiter=int(waiter)))
        if not state or not str(state[0][0]).startswith("Waiting"):
            return []
        return _connected(cursor, waiter)

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """GET_LOCK, on a connection of its own."""
        lock = lock_name(number)
        statements = LockStatements(
            "AUTOCOMMIT",
            begin=None,
            acquire=f"SELECT GET_LOCK({lock}, 0)",
            is_held=f"SELECT IS_USED_LOCK({lock}) = CONNECTION_ID()",
            release=f"SELECT RELEASE_LOCK({lock})",
        )
        return ConnectionLock(engine, number, statements, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        """By IS_USED_LOCK."""
        sql = f"SELECT IS_USED_LOCK({lock_name(number)}) IS NOT NULL"
        ((held,),) = self._query(connection, sql)
        return bool(held)


def lock_name(number: int) -> str:
    """The lock of a worker, quoted; names are the server's, of at most 64 characters."""
    return f"'tidyrows:{int(number):016x}'"


def _connected(cursor: Any, waiter: int) -> list[Blocker]:
    rows = _rows(cursor, _CANDIDATES.format(waiter=int(waiter)))
    return [_blocker(row, certain=False) for row in rows]


def _blocker(row: Sequence[Any], *, certain: bool = True) -> Blocker:
    pid, user, host, command, state, seconds, query = row
    doing = ", ".join(str(each).lower() for each in (command, state) if each)
    age = None if seconds is None else float(seconds)
    host = str(host).rpartition(":")[0] or host if host else None
    return Blocker(int(pid), user, None, host, doing or None, age, query or None, None, certain)


def _rows(cursor: Any, sql: str) -> list[Any]:
    cursor.execute(sql)
    return list(cursor.fetchall())
