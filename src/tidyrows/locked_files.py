"""Files that a process locks, and who locks a file; the lock ends with the process."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tidyrows.greenlets import sleep

# flock, never lockf: that one is lost as soon as any other descriptor of the file is closed.
flock: Any
try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
except ImportError:
    flock = None

_OFTEN = 0.01
"""Seconds between two tries to lock a file."""
_LOCKS = Path("/proc/locks")
# Such as "1: POSIX ADVISORY WRITE 77 08:01:9 0 EOF"; not of one that waits, nor without a file.
_LOCK = r"\d+: +\w+ +\w+ +(?:{kind}) +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) "


class LockedFile:
    """A file, locked by whoever holds the lock; its lines say who that may be.

    Args:
        path: of the file; it is made, and deleted again.
        label: who asks, for those who wait.
        shared: several may hold it at once, unless one holds it alone.
    """

    def __init__(self, path: Path, label: str, *, shared: bool = False) -> None:
        self._path = path
        self._label = label
        self._shared = shared
        self._process = os.getpid()
        self._descriptor: int | None = None

    def acquire(self, timeout: float) -> bool:
        """Acquire it within so many seconds, by trying again and again; whether it is held."""
        until = time.monotonic() + timeout
        while not self._try_to_hold():
            left = until - time.monotonic()
            if left <= 0:
                return False
            sleep(min(left, _OFTEN))
        return True

    def release(self) -> bool:
        """Close it, and delete it after the last holder; whether it was held until now.

        In a forked child the parent's lock stays.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return True
        try:
            if self._process != os.getpid():
                return True
            held = is_there(self._path, descriptor)
            with suppress(OSError):  # others share it
                if flock is not None:
                    flock(descriptor, LOCK_EX | LOCK_NB)
                # That is not one step: somebody may have deleted the file meanwhile.
                if is_there(self._path, descriptor):
                    self._path.unlink()
            return held
        finally:
            os.close(descriptor)

    def holders(self) -> dict[int, str | None]:
        """The processes that hold it, and how they are called.

        As Linux tells who locks the file; elsewhere by its lines.
        """
        try:
            lines = self._path.read_text(errors="replace").splitlines()
            facts = self._path.stat()
        except OSError:
            return {}
        labels = {int(pid): label for pid, _space, label in (line.partition(" ") for line in lines)}
        locking = locking_processes({identity(facts)}, "READ|WRITE")
        wanted = labels if locking is None else {pid: labels.get(pid) for pid in locking}
        return {pid: label or command(pid) for pid, label in wanted.items()}

    def _try_to_hold(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with suppress(BlockingIOError, PermissionError):
                _lock(descriptor, shared=self._shared)
                if is_there(self._path, descriptor):
                    os.write(descriptor, f"{os.getpid()} {self._label}\n".encode())
                    self._descriptor = descriptor
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)
        return self._descriptor == descriptor


def _lock(descriptor: int, *, shared: bool) -> None:
    """Lock an open file; BlockingIOError or PermissionError where somebody else has locked it."""
    if sys.platform == "win32":
        # By its manual; not tried. It locks a byte that nobody reads, and knows no shared locks.
        import msvcrt  # noqa: PLC0415 -- that system's own

        os.lseek(descriptor, 2**30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        flock(descriptor, (LOCK_SH if shared else LOCK_EX) | LOCK_NB)


def is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def identity(facts: os.stat_result) -> tuple[int, int, int]:
    """A file as :func:`locking_processes` knows it."""
    return os.major(facts.st_dev), os.minor(facts.st_dev), facts.st_ino


def locking_processes(wanted: set[tuple[int, int, int]], kind: str) -> list[int] | None:
    """The processes that lock one of these files; None where the system does not tell."""
    try:
        lines = _LOCKS.read_text(errors="replace").splitlines()
    except OSError:
        return None
    lock = re.compile(_LOCK.format(kind=kind), re.ASCII)
    held = (
        (int(pid), (int(major, 16), int(minor, 16), int(inode)))
        for pid, major, minor, inode in (m.groups() for m in map(lock.match, lines) if m)
    )
    return list(dict.fromkeys(pid for pid, file in held if pid > 0 and file in wanted))


def command(pid: int) -> str | None:
    """The program, and the script if it runs one; no more, since arguments may hold a password."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    program, *rest = (word.decode(errors="replace") for word in words)
    scripts = (Path(word).name for word in rest if word.endswith(".py"))
    return " ".join([Path(program).name, *list(scripts)[:1]]) or None
