"""PostgreSQL's blockers, live workers and advisory locks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.advisory import PoolerError
from tidyrows.dialects.base import Dialect
from tidyrows.dialects.locks import Blocker, LockStatements

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.advisory import LockName


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

# For this transaction only: a pooler shares sessions. From no table, which would be
# locked for as long. PostgreSQL 17 is the first that ends long transactions.
_BEGIN_LIVENESS = """
SELECT pg_catalog.set_config('application_name', COALESCE(
           substring(pg_catalog.current_setting('application_name')
                     FROM '^tidyrows run [^ ]+ [^ ]+'), 'tidyrows') || ': a worker is alive', true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
       pg_catalog.set_config('statement_timeout', '0', true),
       CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
            THEN pg_catalog.set_config('transaction_timeout', '0', true) END"""
# The halves of a lock's number are listed apart, with 1 for a number in one piece.
_ALIVE = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
               WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                     AND l.classid = CAST('{high}' AS pg_catalog.oid)
                     AND l.objid = CAST('{low}' AS pg_catalog.oid)
                     AND d.datname = pg_catalog.current_database())"""

# As _BEGIN_LIVENESS, for a lock that a test waits for: one statement where it is free.
_ACQUIRE = """
SELECT pg_catalog.pg_try_advisory_xact_lock{shared}({number}),
       pg_catalog.set_config('application_name', %s, true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
       CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
            THEN pg_catalog.set_config('transaction_timeout', '0', true) END"""
# Through a pooler the client is told a number that is no session's.
_ACQUIRE_SESSION = """
SELECT CASE WHEN pg_catalog.pg_backend_pid() = {told}
            THEN pg_catalog.pg_try_advisory_lock{shared}({number}) END,
       pg_catalog.set_config('application_name', %s, false)"""
_WAIT = """
SELECT pg_catalog.set_config('lock_timeout', '{milliseconds}', true),
       pg_catalog.set_config('statement_timeout', '0', true)"""
_RELEASE_SESSION = """
SELECT pg_catalog.pg_advisory_unlock{shared}({number}),
       pg_catalog.set_config('application_name', reset_val, false)
FROM pg_catalog.pg_settings WHERE name = 'application_name'"""
_HOLDERS = """
SELECT l.pid, a.usename, a.application_name, pg_catalog.host(a.client_addr), a.state,
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
      AND l.classid = CAST('{high}' AS pg_catalog.oid)
      AND l.objid = CAST('{low}' AS pg_catalog.oid)
      AND d.datname = pg_catalog.current_database() ORDER BY 1"""
_WAIT_FOR_ROWS = """
SELECT pg_catalog.current_setting('lock_timeout'),
       pg_catalog.set_config('lock_timeout', %s, true)"""
_LONGEST_NAME = 63


class PostgreSQLLocks(Dialect):
    """Who waits is known to the server; an advisory lock belongs to a transaction or a session."""

    lock_wait_codes = frozenset({"55P03"})

    def cancel(self, connection: sa.Connection, waiter: int) -> None:
        self._query(connection, "SELECT pg_catalog.pg_cancel_backend(%s)", waiter)

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        cursor.execute("SET statement_timeout = 1500")
        cursor.execute(_BLOCKERS.format(waiter=int(waiter)))
        found = []
        for pid, user, name, host, state, age, query, waits_for in cursor.fetchall():
            waiting = f"{state or 'waiting'}, itself waiting for pid {waits_for},"
            doing = waiting if waits_for else state
            session = Blocker(pid, user, name or None, host, doing, age, query or None)
            found += [session] if pid else _prepared(cursor)
        return found

    def lock_statements(self, number: int) -> LockStatements:
        """An advisory lock of a transaction that stays open; it holds no snapshot meanwhile."""
        # Not a session's lock: behind a pooler sessions belong to nobody, while an open transaction
        # keeps its server connection, and ends with its client.
        acquire = f"SELECT pg_catalog.pg_try_advisory_xact_lock({int(number)})"
        high, low = divmod(int(number), 2**32)
        return LockStatements(
            isolation="READ COMMITTED",
            begin=_BEGIN_LIVENESS,
            acquire=acquire,
            is_held=acquire,  # acquired again where it is held already: as good a proof as any
            is_alive=_ALIVE.format(high=high, low=low),  # the list that everybody may read
        )

    # ----- advisory locks

    def acquire_advisory(self, connection: sa.Connection, name: LockName, timeout: float) -> bool:
        """Of the transaction, which a pooler leaves on one server connection; or of the session."""
        driver: Any = connection.connection.dbapi_connection
        if getattr(driver, "autocommit", False):
            connection.execution_options(isolation_level="READ COMMITTED")
        names = {"number": name.number, "shared": "_shared" if name.shared else ""}
        label = name.label.encode()[:_LONGEST_NAME].decode(errors="ignore")
        acquire = _ACQUIRE_SESSION if name.session else _ACQUIRE
        told = self.server_id(driver) or "pg_catalog.pg_backend_pid()"
        sql = acquire.format(told=told, **names)
        held = self._query(connection, sql, label)[0][0]
        if held is None:
            driver.rollback()
            raise PoolerError(
                "The connections lead to a pooler such as PgBouncer, which gives the sessions of "
                "PostgreSQL to others too, so that none can hold a lock for its length."
            )
        if not held and timeout > 0:
            self._query(connection, _WAIT.format(milliseconds=max(1, round(timeout * 1000))))
            kind = "advisory" if name.session else "advisory_xact"
            wait = "SELECT pg_catalog.pg_{kind}_lock{shared}({number})"
            try:
                self._query(connection, wait.format(kind=kind, **names))
                held = True
            except self._dbapi.Error as error:
                if not self.is_timeout(error):
                    raise
                driver.rollback()
        if name.session:
            driver.commit()  # a setting of the session, and no transaction is left open
        return bool(held)

    def release_advisory(self, connection: sa.Connection, name: LockName) -> bool:
        """By the end of its transaction."""
        driver: Any = connection.connection.dbapi_connection
        held = True
        if name.session:
            shared = "_shared" if name.shared else ""
            release = _RELEASE_SESSION.format(number=name.number, shared=shared)
            held = bool(self._query(connection, release)[0][0])
        driver.commit()  # a ROLLBACK makes psycopg forget what it has prepared
        return held

    def advisory_holders(self, connection: sa.Connection, name: LockName) -> list[Blocker]:
        high, low = divmod(name.number, 2**32)
        rows = self._query(connection, _HOLDERS.format(high=high, low=low))
        return [
            Blocker(pid, user, application or None, host, state, age)
            for pid, user, application, host, state, age in rows
        ]

    # ----- row locks

    def refuse_row_locks(self, *, nowait: bool, skip_locked: bool) -> None:
        """All that it is asked for."""

    @contextmanager
    def waiting_for_rows(
        self, connection: sa.Connection, tables: Sequence[sa.Table], timeout: float
    ) -> Iterator[None]:
        """By a setting of the transaction, in a savepoint that undoes it with the failure."""
        with connection.begin_nested():
            wait = str(max(1, round(timeout * 1000)))  # 0 would mean for ever
            before = self._query(connection, _WAIT_FOR_ROWS, wait)[0][0]
            yield
            self._query(connection, _WAIT_FOR_ROWS, before)


def _prepared(cursor: Any) -> list[Blocker]:
    cursor.execute(_PREPARED)
    rows = cursor.fetchall()
    one = len(rows) == 1
    return [
        Blocker(0, owner, state=f"prepared transaction {gid!r}", seconds=float(age), certain=one)
        for gid, owner, age in rows
    ]
