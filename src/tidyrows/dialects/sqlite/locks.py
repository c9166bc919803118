"""SQLite's blockers and live workers, by the operating system's file locks."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

from tidyrows.dialects.advisory import HeldLock
from tidyrows.dialects.base import Dialect
from tidyrows.dialects.driver import database_name
from tidyrows.dialects.locks import PATIENCE, Blocker, LivenessLock
from tidyrows.errors import ArgumentError
from tidyrows.locked_files import LockedFile, command, identity, is_there, locking_processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.advisory import LockName

# flock, never lockf: that one is lost as soon as any other descriptor of the file is closed.
flock: Any
try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
except ImportError:  # on Windows only the time of the file shows a live worker
    flock = None

_IN_MEMORY = frozenset({None, "", ":memory:"})


class FileLock(LivenessLock):
    """The lock of a file; the file's time of change is the worker's last heartbeat."""

    def __init__(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> None:
        super().__init__(engine, number, patience=patience)
        self._path: Path | None = None
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the file, unless the database is in memory."""
        if self._descriptor is not None:
            self.renew()
            return
        if self._path is None and not self.alone:
            database = self._database()
            self.alone = database is None
            if database is not None:
                self._path = lock_file(database, self._number)
        if self._path is not None:
            self._try_within_patience(partial(self._try_to_hold, self._path))

    def renew(self) -> None:
        """Set its time, and make it again if it was deleted."""
        if self._path is not None and self._descriptor is not None:
            if is_there(self._path, self._descriptor):
                _beat(self._path, self._descriptor)
                return
            self._close()
        self.acquire()

    def release(self) -> None:
        """Delete it."""
        if self._path is None or self._descriptor is None:
            return
        with suppress(OSError):
            if flock is None:
                self._close()  # a file that is open cannot be deleted there
                self._path.unlink()
            elif is_there(self._path, self._descriptor):
                self._path.unlink()
        self._close()

    def abandon(self) -> None:
        """Close it: the parent's descriptor still holds the lock."""
        self._close()

    def _try_to_hold(self, path: Path) -> bool:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(descriptor, path):
                _beat(path, descriptor)
                self._descriptor = descriptor
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)
        return self._descriptor == descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _database(self) -> str | None:
        engine = self._living_engine()
        if is_in_memory(engine.url):
            return None
        pool = engine.pool.recreate()
        try:
            with closing(pool.connect()) as connection, closing(connection.cursor()) as cursor:
                return database_file(cursor)
        finally:
            pool.dispose()


def is_in_memory(url: sa.URL) -> bool:
    """Whether the database is in memory, by the URL alone."""
    if url.database in _IN_MEMORY:
        return True
    # SQLite names a file for its memdb, which is none.
    options = (
        url.query.get("mode"),
        url.query.get("vfs"),
        *re.split("[?&]", str(url.database))[1:],
    )
    return not {"memory", "memdb", "mode=memory", "vfs=memdb"}.isdisjoint(map(str, options))


def named_files(url: sa.URL) -> list[str]:
    """The paths that the database of a URL may have."""
    name = str(url.database)
    return [name, unquote(urlsplit(name).path)] if name.startswith("file:") else [name]


def database_file(cursor: Any) -> str | None:
    """The absolute path of ``main``, as SQLite has opened it; None in memory."""
    cursor.execute("PRAGMA database_list")
    for _number, name, path in cursor.fetchall():
        if name == "main":
            return str(path) if path else None
    return None


def lock_file(database: str, number: int) -> Path:
    """The lock file of a worker."""
    return Path(f"{database}-tidyrows-{number:016x}")


def is_held(path: Path) -> bool | None:
    """Whether a living process holds the lock; None where the system does not know."""
    try:
        with path.open("rb") as file:
            if flock is None:
                return None
            # Shared, so that two processes that look do not see each other.
            flock(file.fileno(), LOCK_SH | LOCK_NB)
            flock(file.fileno(), LOCK_UN)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _lock(descriptor: int, path: Path) -> bool:
    if flock is None:
        return True
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    # It may have been deleted between the opening and the lock.
    return is_there(path, descriptor)


def _beat(path: Path, descriptor: int) -> None:
    os.utime(descriptor if os.utime in os.supports_fd else path)


class FileHeldLock(HeldLock):
    """A file, locked by whoever holds the lock."""

    _file: LockedFile

    def acquire(self, timeout: float) -> list[Blocker] | None:
        """By trying again and again."""
        path = _advisory_file(self._engine, self.name.number)
        self._file = LockedFile(path, self.name.label, shared=self.name.shared)
        if not self._file.acquire(timeout):
            holders = self._file.holders().items()
            return [Blocker(pid, application=application) for pid, application in holders]
        self.server_id = os.getpid()
        return None

    def release(self) -> bool:
        """The last one deletes it."""
        return self._file.release()


_advisory_places: WeakKeyDictionary[sa.Engine, Path] = WeakKeyDictionary()


def _advisory_file(engine: sa.Engine, number: int) -> Path:
    """The file of an advisory lock; of a database in memory it is among the temporary files."""
    place = _advisory_places.get(engine)
    if place is None:
        with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            database = database_file(cursor)
        if database is None:
            name = hashlib.blake2b(database_name(engine).encode(), digest_size=8).hexdigest()
            database = f"{tempfile.gettempdir()}/{os.getpid()}-{name}"
        place = _advisory_places[engine] = Path(database).resolve()
    return place.with_name(f"{place.name}-tidyrows-lock-{number:016x}")


class SQLiteLocks(Dialect):
    """One lock for the whole file, and a lock file beside it for each worker."""

    has_row_locks = False
    blockers_need_cursor = False
    heartbeat_in_file = True
    lock_wait_codes = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED

    def waiter(self, connection: sa.Connection) -> list[str]:
        """The files of the database and of what is attached."""
        return [path for _n, _name, path in self._query(connection, "PRAGMA database_list") if path]

    def blockers(self, cursor: Any, waiter: list[str]) -> list[Blocker]:
        """The processes that hold a lock on one of these files, as far as Linux shows."""
        # The files are not opened: closing a file drops every lock that this process has on it.
        wanted = set()
        for path in waiter:
            for suffix in ("", "-wal", "-shm"):
                with suppress(OSError):
                    facts = os.stat(path + suffix)  # noqa: PTH116 -- a name as SQLite has it
                    wanted.add(identity(facts))
        pids = locking_processes(wanted, "WRITE") or ()
        return [Blocker(pid, application=command(pid)) for pid in pids]

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
        database = self._file(connection)
        if database is None:
            return None
        try:
            return max(0.0, time.time() - lock_file(database, number).stat().st_mtime)
        except FileNotFoundError:
            return None

    def remove_liveness_files(self, connection: sa.Connection) -> None:
        """Nothing without ``flock``."""
        database = self._file(connection)
        if database is None or flock is None:
            return
        place = Path(database)
        for path in place.parent.glob(f"{glob.escape(place.name)}-tidyrows-{'[0-9a-f]' * 16}"):
            with suppress(OSError):  # another process deletes it too
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if _lock(descriptor, path):
                        path.unlink()
                finally:
                    os.close(descriptor)

    def advisory_lock(self, engine: sa.Engine, name: LockName) -> HeldLock:
        """A locked file beside the database's own; one in memory has it among temporary files."""
        if flock is None:
            raise ArgumentError(
                "SQLite's advisory locks are locked files, which this system does not have. Use "
                "filelock.FileLock, or a database server.",
                argument="bind",
            )
        return FileHeldLock(self, engine, name)

    # ----- row locks

    def refuse_row_locks(self, *, nowait: bool, skip_locked: bool) -> None:
        """There is one lock for the whole file."""
        if skip_locked:
            raise ArgumentError(
                "SQLite locks no rows, but the whole file, so skip_locked has nothing to skip. "
                "Leave it out, or use a database server.",
                argument="skip_locked",
            )

    @contextmanager
    def waiting_for_rows(
        self, connection: sa.Connection, tables: Sequence[sa.Table], timeout: float
    ) -> Iterator[None]:
        """With the lock of a writer, by a statement that changes nothing."""
        before = self._query(connection, "PRAGMA busy_timeout")[0][0]
        self._query(connection, f"PRAGMA busy_timeout = {round(timeout * 1000)}")
        try:
            place = connection.dialect.identifier_preparer.format_table(tables[0])
            try:
                self._query(connection, f"DELETE FROM {place} WHERE 0")
            except self._dbapi.Error as error:
                if self.code(error) in self.lock_wait_codes:
                    raise
                yield  # where there is no such table, the SELECT tells it
                raise ArgumentError(
                    f"SQLite did not let {place} be locked: {error}. Name a table that this "
                    f"connection may write, and no view.",
                    argument="select",
                ) from error
            yield
        finally:
            if not connection.invalidated:
                self._query(connection, f"PRAGMA busy_timeout = {before}")

    def _file(self, connection: sa.Connection) -> str | None:
        if is_in_memory(connection.engine.url):
            return None
        with closing(connection.connection.cursor()) as cursor:
            return database_file(cursor)
