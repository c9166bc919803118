"""The questions that name who blocks whom, one for each kind of server."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.blocker import Blocker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LOCKS = Path("/proc/locks")
_LOCK = re.compile(r"\d+: +\w+ +\w+ +(\w+) +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ", re.ASCII)

# Process 0 is a prepared transaction, which no session holds any more.
_POSTGRESQL = """
SELECT b.pid, a.usename, a.application_name, pg_catalog.host(a.client_addr), a.state,
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8, a.query,
       pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(b.pid), ', ')
FROM (SELECT DISTINCT unnest(pg_catalog.pg_blocking_pids({waiting})) AS pid) b
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid ORDER BY 1"""
_PREPARED = """
SELECT gid, owner, extract(epoch FROM pg_catalog.clock_timestamp() - prepared)::float8
FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()"""

_MARIADB_WAITS = """
information_schema.INNODB_LOCK_WAITS w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_trx_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_trx_id"""
# By its manual; not tried.
_MYSQL_8_WAITS = """
performance_schema.data_lock_waits w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_engine_transaction_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_engine_transaction_id"""
_ABOUT = """
SELECT DISTINCT t.trx_mysql_thread_id, p.USER, p.HOST, p.COMMAND, t.trx_state,
       TIMESTAMPDIFF(SECOND, t.trx_started, NOW()), COALESCE(t.trx_query, p.INFO)
FROM {waits}
LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.trx_mysql_thread_id
WHERE {condition}"""
# Locks of whole tables are not InnoDB's: whoever has a transaction open may hold them, or whoever
# is connected to the same database (LOCK TABLES).
_STATE = "SELECT STATE FROM information_schema.PROCESSLIST WHERE ID = {waiting}"
_PERHAPS = """
SELECT p.ID, p.USER, p.HOST, p.COMMAND, p.STATE, p.TIME, p.INFO
FROM information_schema.PROCESSLIST p
JOIN information_schema.PROCESSLIST me ON me.ID = {waiting}
WHERE p.DB = me.DB AND p.ID NOT IN (me.ID, CONNECTION_ID())
      AND (p.STATE IS NULL OR p.STATE NOT LIKE 'Waiting%')
ORDER BY 1"""
_NEEDS_PROCESS = 1227


def blockers_on_postgresql(cursor: Any, waiting: int) -> list[Blocker]:
    """Whom a session waits for."""
    found = []
    for pid, user, application, host, state, seconds, query, waits_for in _rows(
        cursor, _POSTGRESQL.format(waiting=int(waiting))
    ):
        if pid == 0:
            prepared = _rows(cursor, _PREPARED)
            found += [
                Blocker(
                    0,
                    user=owner,
                    state=f"prepared transaction {gid!r}",
                    seconds=float(age),
                    certain=len(prepared) == 1,
                )
                for gid, owner, age in prepared
            ]
            continue
        doing = f"{state or 'waiting'}, itself waiting for pid {waits_for}," if waits_for else state
        age = None if seconds is None else float(seconds)
        found.append(Blocker(int(pid), user, application or None, host, doing, age, query or None))
    return found


def blockers_on_mysql(cursor: Any, waiting: int, *, mariadb: bool, error: Any) -> list[Blocker]:
    """Whom a connection waits for.

    Args:
        cursor: of another connection.
        waiting: the id of the connection that waits.
        mariadb: or MySQL 8, which keeps its waits elsewhere.
        error: the driver's base error.

    Raises:
        Exception: the driver's, where the PROCESS right is missing and nobody else is seen.
    """
    waits = _MARIADB_WAITS if mariadb else _MYSQL_8_WAITS
    condition = f"r.trx_mysql_thread_id = {int(waiting)}"
    try:
        rows = _rows(cursor, _ABOUT.format(waits=waits, condition=condition))
    except error as refused:
        if refused.args[:1] != (_NEEDS_PROCESS,):
            raise
        # Without the PROCESS right nobody is shown InnoDB's waits, nor other users' connections.
        perhaps = _those_connected(cursor, waiting)
        if not perhaps:
            raise
        return perhaps
    if rows:
        return [_connection(row) for row in rows]
    state = _rows(cursor, _STATE.format(waiting=int(waiting)))
    if not state or not str(state[0][0]).startswith("Waiting"):
        return []
    return _those_connected(cursor, waiting)


def _those_connected(cursor: Any, waiting: int) -> list[Blocker]:
    found = _rows(cursor, _PERHAPS.format(waiting=int(waiting)))
    return [_connection(row, certain=False) for row in found]


def _connection(row: Sequence[Any], *, certain: bool = True) -> Blocker:
    pid, user, host, command, state, seconds, query = row
    doing = ", ".join(str(each).lower() for each in (command, state) if each)
    age = None if seconds is None else float(seconds)
    host = str(host).rpartition(":")[0] or host if host else None
    return Blocker(int(pid), user, None, host, doing or None, age, query or None, None, certain)


def _rows(cursor: Any, sql: str) -> list[Any]:
    cursor.execute(sql)
    return list(cursor.fetchall())


def holders_of_files(paths: Iterable[str]) -> list[Blocker]:
    """The processes that hold a lock on one of these files, as far as Linux tells.

    The files are not opened: closing a file drops every lock that this process has on it.
    """
    wanted = set()
    for path in paths:
        for suffix in ("", "-wal", "-shm"):
            try:
                facts = os.stat(path + suffix)  # noqa: PTH116 -- a name as SQLite has it
            except OSError:
                continue
            wanted.add((os.major(facts.st_dev), os.minor(facts.st_dev), facts.st_ino))
    try:
        lines = _LOCKS.read_text(errors="replace").splitlines()
    except OSError:
        return []
    pids = dict.fromkeys(
        pid for kind, pid, file in map(_lock_of, lines) if kind == "WRITE" and file in wanted
    )
    return [Blocker(pid, application=_command(pid)) for pid in pids if pid > 0]


def _lock_of(line: str) -> tuple[str, int, tuple[int, int, int]]:
    """The kind, holder and file of a line such as ``1: POSIX ADVISORY WRITE 77 08:01:9 0 EOF``."""
    match = _LOCK.match(line)  # not of one that waits, nor of one without a file
    if match is None:
        return "", 0, (0, 0, 0)
    kind, pid, major, minor, inode = match.groups()
    return kind, int(pid), (int(major, 16), int(minor, 16), int(inode))


def _command(pid: int) -> str | None:
    """The program, and the script if it runs one; no more, since arguments may hold a password."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    program, *rest = (word.decode(errors="replace") for word in words)
    scripts = (Path(word).name for word in rest if word.endswith(".py"))
    return " ".join([Path(program).name, *list(scripts)[:1]]) or None
