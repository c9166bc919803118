"""SQLite's blockers and live workers, by the operating system's file locks."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.liveness_lock import PATIENCE, LivenessLock
from tidyrows.dialects.locks import Blocker
from tidyrows.dialects.sqlite.liveness_file import (
    FileLock,
    database_file,
    heartbeat_age,
    is_held,
    is_in_memory,
    lock_file,
    remove_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

_LOCKS = Path("/proc/locks")
_LOCK = re.compile(r"\d+: +\w+ +\w+ +(\w+) +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ", re.ASCII)


class SQLiteLocks(Dialect):
    """One lock for the whole file, and a lock file beside it for each worker."""

    has_row_locks = False
    blockers_need_cursor = False
    heartbeat_in_file = True

    def waiter(self, connection: sa.Connection) -> list[str]:
        """The files of the database and of what is attached."""
        return [path for _n, _name, path in self._query(connection, "PRAGMA database_list") if path]

    def blockers(self, cursor: Any, waiter: list[str]) -> list[Blocker]:
        """The processes that have locked the file, as far as the operating system tells."""
        return holders_of_files(waiter)

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """A locked file beside the database's own; nothing for a database in memory."""
        return FileLock(engine, number, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool | None:
        """Whether its file is locked; None in memory, and where the system has no ``flock``."""
        database = self._file(connection)
        return None if database is None else is_held(lock_file(database, number))

    def heartbeat_file_age(self, connection: sa.Connection, number: int) -> float | None:
        """By the time of the file."""
        database = self._file(connection)
        return None if database is None else heartbeat_age(lock_file(database, number))

    def remove_liveness_files(self, connection: sa.Connection) -> None:
        """All files that nobody has locked."""
        database = self._file(connection)
        if database is not None:
            remove_all(database)

    def _file(self, connection: sa.Connection) -> str | None:
        if is_in_memory(connection.engine.url):
            return None
        with closing(connection.connection.cursor()) as cursor:
            return database_file(cursor)


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
