"""The blockers, live workers and advisory locks of MariaDB and MySQL."""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.locks import PAUSE, Blocker, LockStatements
from tidyrows.dialects.mysql.statements import NEEDS_PROCESS
from tidyrows.errors import ArgumentError
from tidyrows.greenlets import sleep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.advisory import LockName


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

_SLOT = "tidyrows.advisory_slot"  # in Connection.info
_SHARERS = 32
"""How many may share a lock; GET_LOCK itself knows no shared locks."""
# Evaluated from left to right. Whoever shares the lock passes the gate and takes a free slot.
_SHARE = """
SELECT IF(GET_LOCK({gate}, {timeout}) = 1, COALESCE({free}, 0), NULL), RELEASE_LOCK({gate})"""
_HOLDERS = """
SELECT ID, USER, HOST, COMMAND, STATE, TIME, NULL FROM information_schema.PROCESSLIST
WHERE ID IN ({used}) ORDER BY 1"""

_WAITS = ("innodb_lock_wait_timeout", "lock_wait_timeout")
"""For a row, and for a table."""
_LOCKS_SINCE = {
    ("nowait", True): (10, 3),
    ("skip_locked", True): (10, 6),
    ("nowait", False): (8, 0, 1),
    ("skip_locked", False): (8, 0, 1),
}
"""The first version that has it, of MariaDB (True) and MySQL."""


class MySQLLocks(Dialect):
    """InnoDB knows who waits; an advisory lock belongs to a connection, on the whole server."""

    lock_wait_codes = frozenset({1205, 3572})

    def cancel(self, connection: sa.Connection, waiter: int) -> None:
        self._query(connection, f"KILL QUERY {waiter}")

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        """By InnoDB's lock waits, else by the process list."""
        is_mariadb = bool(getattr(self._dialect(), "is_mariadb", False))
        if is_mariadb:
            cursor.execute("SET max_statement_time = 1.5")
        waits = _MARIADB_WAITS if is_mariadb else _MYSQL_8_WAITS
        condition = f"r.trx_mysql_thread_id = {int(waiter)}"
        try:
            rows = _rows(cursor, _BLOCKERS.format(waits=waits, condition=condition))
        except self._dbapi.Error as refused:
            if refused.args[:1] != (NEEDS_PROCESS,):
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

    def lock_statements(self, number: int) -> LockStatements:
        """GET_LOCK."""
        lock = lock_name(number)
        return LockStatements(
            isolation="AUTOCOMMIT",
            acquire=f"SELECT GET_LOCK({lock}, 0)",
            is_held=f"SELECT IS_USED_LOCK({lock}) = CONNECTION_ID()",
            is_alive=f"SELECT IS_USED_LOCK({lock}) IS NOT NULL",
            release=f"SELECT RELEASE_LOCK({lock})",
        )

    # ----- advisory locks

    def acquire_advisory(self, connection: sa.Connection, name: LockName, timeout: float) -> bool:
        """GET_LOCK, of the connection: there are none of a transaction.

        A shared lock is one of 32 slots behind a gate. Who wants the lock alone closes the gate,
        and waits until all slots are free.
        """
        gate, *slots = _advisory_names(connection, name)
        if name.shared:
            return self._share(connection, gate, slots, timeout)
        until = time.monotonic() + timeout
        free = " AND ".join(f"IS_FREE_LOCK({slot})" for slot in slots)
        acquire = f"SELECT IF(GET_LOCK({gate}, {timeout:.3f}) = 1, {free}, NULL)"
        ((are_free,),) = self._query(connection, acquire)
        if are_free is None:
            return False
        for slot in () if are_free else slots:
            left = max(0.0, until - time.monotonic())
            ((is_free,),) = self._query(connection, f"SELECT GET_LOCK({slot}, {left:.3f})")
            if is_free != 1:
                self._query(connection, f"SELECT RELEASE_LOCK({gate})")
                return False
            self._query(connection, f"SELECT RELEASE_LOCK({slot})")
        return True

    def _share(
        self, connection: sa.Connection, gate: str, slots: list[str], timeout: float
    ) -> bool:
        until = time.monotonic() + timeout
        # Each begins at another slot.
        start = (self.server_id(connection.connection.dbapi_connection) or 0) % _SHARERS
        order = [*range(start, _SHARERS), *range(start)]
        free = ", ".join(f"IF(GET_LOCK({slots[each]}, 0) = 1, {each + 1}, NULL)" for each in order)
        while True:
            left = max(0.0, until - time.monotonic())
            share = _SHARE.format(gate=gate, timeout=f"{left:.3f}", free=free)
            slot = self._query(connection, share)[0][0]
            if slot:
                connection.info[_SLOT] = slots[slot - 1]
                return True
            if slot is None or not left:
                return False
            sleep(min(PAUSE, left))  # more than 32 share it: nothing tells when one ends

    def release_advisory(self, connection: sa.Connection, name: LockName) -> bool:
        gate = _advisory_names(connection, name)[0]
        lock = connection.info.pop(_SLOT) if name.shared else gate
        return bool(self._query(connection, f"SELECT RELEASE_LOCK({lock})")[0][0])

    def advisory_holders(self, connection: sa.Connection, name: LockName) -> list[Blocker]:
        """The server shows no application name."""
        used = ", ".join(f"IS_USED_LOCK({lock})" for lock in _advisory_names(connection, name))
        return [_blocker(row) for row in self._query(connection, _HOLDERS.format(used=used))]

    # ----- row locks

    def refuse_row_locks(self, *, nowait: bool, skip_locked: bool) -> None:
        """What the server's version does not have."""
        dialect = self._dialect()
        is_mariadb = bool(getattr(dialect, "is_mariadb", False))
        for name, wanted in (("nowait", nowait), ("skip_locked", skip_locked)):
            since = _LOCKS_SINCE[name, is_mariadb]
            if wanted and dialect.server_version_info < since:
                now, first = (
                    ".".join(map(str, each)) for each in (dialect.server_version_info, since)
                )
                raise ArgumentError(
                    f"{'MariaDB' if is_mariadb else 'MySQL'} {now} has no {name}: it came with "
                    f"{first}. Write timeout=1, or use a newer server.",
                    argument=name,
                )

    @contextmanager
    def waiting_for_rows(
        self, connection: sa.Connection, tables: Sequence[sa.Table], timeout: float
    ) -> Iterator[None]:
        """By two settings of the session, in whole seconds; a timeout undoes the statement only."""
        listed = ", ".join(f"@@{name}" for name in _WAITS)
        before = self._query(connection, f"SELECT {listed}")[0]
        seconds = math.ceil(timeout)  # MySQL makes 1 of 0, MariaDB does not wait
        self._set_waits(connection, [seconds, seconds])
        try:
            yield
        finally:
            if not connection.invalidated:
                self._set_waits(connection, before)

    def _set_waits(self, connection: sa.Connection, seconds: Sequence[int]) -> None:
        pairs = zip(_WAITS, seconds, strict=True)
        self._query(connection, f"SET {', '.join(f'{name} = {int(s)}' for name, s in pairs)}")


def _advisory_names(connection: sa.Connection, name: LockName) -> list[str]:
    """The gate, and the slots of those who share the lock; names are the whole server's."""
    database = (connection.engine.url.database or "").encode()
    lock = f"tidyrows:{hashlib.blake2b(database, digest_size=8).hexdigest()}:{name.number:016x}"
    return [f"'{lock}'", *(f"'{lock}:{slot}'" for slot in range(_SHARERS))]


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
