"""PostgreSQL's blockers, and its advisory locks for live workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.liveness_lock import PATIENCE, ConnectionLock, LivenessLock, LockStatements
from tidyrows.dialects.locks import Blocker

if TYPE_CHECKING:
    import sqlalchemy as sa

# Process 0 is a prepared transaction, which no session holds any more.
_BLOCKERS = """
SELECT b.pid, a.usename, a.application_name, pg_catalog.host(a.client_addr), a.state,
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8, a.query,
       pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(b.pid), ', ')
FROM (SELECT DISTINCT unnest(pg_catalog.pg_blocking_pids({waiter})) AS pid) b
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid ORDER BY 1"""
_PREPARED = """
SELECT gid, owner, extract(epoch FROM pg_catalog.clock_timestamp() - prepared)::float8
FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()"""

# For this transaction only: behind a pooler the session is not ours. From no table, which would be
# locked for as long. PostgreSQL 17 is the first that ends long transactions.
_BEGIN_LIVENESS = """
SELECT pg_catalog.set_config('application_name', 'tidyrows: a worker is alive', true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
       pg_catalog.set_config('statement_timeout', '0', true),
       CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
            THEN pg_catalog.set_config('transaction_timeout', '0', true) END"""
# The halves of a lock's number are listed apart, with 1 for a number in one piece.
_ALIVE = """
SELECT 1 FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_database d ON d.oid = l.database
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
      AND l.classid = CAST('{high}' AS pg_catalog.oid)
      AND l.objid = CAST('{low}' AS pg_catalog.oid)
      AND d.datname = pg_catalog.current_database()"""


class PostgreSQLLocks(Dialect):
    """``pg_blocking_pids``, and an advisory lock of a transaction that stays open."""

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        """By pg_blocking_pids."""
        cursor.execute("SET statement_timeout = 1500")
        cursor.execute(_BLOCKERS.format(waiter=int(waiter)))
        found = []
        for pid, user, application, host, state, seconds, query, waits_for in cursor.fetchall():
            if pid == 0:
                found += _prepared(cursor)
                continue
            doing = state
            if waits_for:
                doing = f"{state or 'waiting'}, itself waiting for pid {waits_for},"
            age = None if seconds is None else float(seconds)
            found.append(
                Blocker(int(pid), user, application or None, host, doing, age, query or None)
            )
        return found

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """An advisory lock of a transaction that stays open; it holds no snapshot meanwhile.

        Not a session's lock: behind a pooler sessions belong to nobody, while an open transaction
        keeps its server connection, and ends with its client.
        """
        acquire = f"SELECT pg_catalog.pg_try_advisory_xact_lock({int(number)})"
        # Acquired again where it is held already: as good a proof as any.
        statements = LockStatements(
            "READ COMMITTED", begin=_BEGIN_LIVENESS, acquire=acquire, is_held=acquire, release=None
        )
        return ConnectionLock(engine, number, statements, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        """By the list of locks, which everybody may read."""
        high, low = divmod(int(number), 2**32)
        return bool(self._query(connection, _ALIVE.format(high=high, low=low)))


def _prepared(cursor: Any) -> list[Blocker]:
    cursor.execute(_PREPARED)
    prepared = cursor.fetchall()
    return [
        Blocker(
            0,
            user=owner,
            state=f"prepared transaction {gid!r}",
            seconds=float(age),
            certain=len(prepared) == 1,
        )
        for gid, owner, age in prepared
    ]
