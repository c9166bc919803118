"""A lock on a file beside the database file, for a database without a server."""

from __future__ import annotations

import glob
import os
import re
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from weakref import ref

from tidyrows.dialects.liveness_lock import PATIENCE, PAUSE, LivenessLock
from tidyrows.errors import LivenessLockError, SessionStateError
from tidyrows.greenlets import sleep

if TYPE_CHECKING:
    import sqlalchemy as sa

# flock, never lockf: that one is lost as soon as any other descriptor of the file is closed.
flock: Any
try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
except ImportError:  # on Windows: there the time in the file alone says who lives
    flock = None

_IN_MEMORY = frozenset({None, "", ":memory:"})


class FileLock(LivenessLock):
    """The lock of a file, whose time of change is the worker's last beat.

    Args:
        engine: how to find the database file; it is held weakly.
        number: the worker's number.
        patience: how long to wait for the lock where it is not free, in seconds.
    """

    def __init__(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> None:
        self._engine = ref(engine)
        self._where = repr(engine.url)
        self._number = number
        self._patience = patience
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
            self._hold(self._path)

    def renew(self) -> None:
        """Set its time, and make it anew if somebody deleted it."""
        if self._path is None or self._descriptor is None:
            self.acquire()
        elif _is_there(self._path, self._descriptor):
            _beat(self._path, self._descriptor)
        else:
            self._close()
            self._hold(self._path)

    def release(self) -> None:
        """Delete it."""
        if self._path is None or self._descriptor is None:
            return
        with suppress(OSError):
            if flock is None:
                self._close()  # a file that is open cannot be deleted there
                self._path.unlink()
            elif _is_there(self._path, self._descriptor):
                self._path.unlink()
        self._close()

    def abandon(self) -> None:
        """Close it: the parent's descriptor still holds the lock."""
        self._close()

    def _hold(self, path: Path) -> None:
        for _try in range(1 + round(self._patience / PAUSE)):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if _lock(descriptor, path):
                    _beat(path, descriptor)
                    self._descriptor = descriptor
                    return
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
            sleep(PAUSE)
        raise LivenessLockError(self._number, self._where)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _database(self) -> str | None:
        engine = self._engine()
        if engine is None:
            raise SessionStateError(
                f"The engine for {self._where} is gone, so this worker cannot show that it is "
                f"alive. Keep a reference to the engine for as long as its rows are tracked."
            )
        if is_in_memory(engine.url):
            return None
        pool = engine.pool.recreate()
        try:
            with closing(pool.connect()) as connection, closing(connection.cursor()) as cursor:
                return database_file(cursor)
        finally:
            pool.dispose()


def is_in_memory(url: sa.URL) -> bool:
    """Whether the URL alone says that the database is in memory."""
    if url.database in _IN_MEMORY:
        return True
    # SQLite names a file for its memdb, which is none.
    said = (url.query.get("mode"), url.query.get("vfs"), *re.split("[?&]", str(url.database))[1:])
    return not {"memory", "memdb", "mode=memory", "vfs=memdb"}.isdisjoint(map(str, said))


def missing_file(url: sa.URL) -> str | None:
    """The file that a URL names, where it is not there; None where nothing can be said."""
    if url.host or is_in_memory(url):
        return None
    named = _named(url)
    try:
        return None if any(Path(each).exists() for each in named) else named[-1]
    except OSError:  # it may not be looked at: connecting will say why
        return None


def file_identity(url: sa.URL) -> tuple[str, int, int] | None:
    """The file that a URL names, as its path, device and inode; None where it is not there."""
    for each in _named(url):
        try:
            found = Path(each).stat()
        except OSError:
            continue
        return str(Path(each).absolute()), found.st_dev, found.st_ino
    return None


def _named(url: sa.URL) -> list[str]:
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
    """Whether a living process holds the lock; None where the system does not tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        if flock is None:
            return None
        # Shared, so that those who look do not see each other.
        flock(descriptor, LOCK_SH | LOCK_NB)
        flock(descriptor, LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return None
    else:
        return False
    finally:
        os.close(descriptor)


def heartbeat_age(path: Path) -> float | None:
    """How many seconds ago its time was set; None where there is no file."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def remove_all(database: str) -> None:
    """Delete the files of all dead workers of a database; none without ``flock``."""
    if flock is None:
        return
    place = Path(database)
    for path in place.parent.glob(f"{glob.escape(place.name)}-tidyrows-{'[0-9a-f]' * 16}"):
        with suppress(OSError):  # somebody else deletes it too
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _lock(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    if flock is None:
        return True
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    # Between the opening and the lock somebody may have deleted it.
    return _is_there(path, descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _beat(path: Path, descriptor: int) -> None:
    os.utime(descriptor if os.utime in os.supports_fd else path)
