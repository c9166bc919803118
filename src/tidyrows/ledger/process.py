"""This process in a ledger: its id, its liveness lock, its heartbeat, and the integers it reserved.

A process is dead only when its liveness lock is free *and* its heartbeat has stopped: connections
drop, and heartbeats pause.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import weakref
from collections import deque
from contextlib import suppress
from enum import Enum
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import LedgerError, ScopeError
from tidyrows.ledger.entry_table import OPTIONS
from tidyrows.ledger.heartbeat import STOP, Heartbeat
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.ledger.entry_table import EntryTable

RANGE = 1000
"""Integers that a process reserves at once."""
PROCESS = "owner"
"""The kind of the entry that describes a process; its time is that of the last heartbeat."""
_DIGITS = 16
"""Of the id of a process."""
_START_TIME = 21
"""The place of the start time in /proc/<pid>/stat, counted from 0; see proc(5)."""


class LedgerProcess:
    """One process in one ledger; a forked child is another one, with an id of its own."""

    def __init__(self, ledger: EntryTable, *, beat: float) -> None:
        number = secrets.randbits(62) + 1
        self.id = f"{number:0{_DIGITS}x}"  # the number of its liveness lock, as the columns have it
        self.integers = IntegerRanges()
        self._pid = os.getpid()
        # entries have the order of the COMMITs that they belong to; a scope is a tracker's number
        self.next_entry, self.next_scope = count(1).__next__, count(1).__next__
        self.journals: weakref.WeakSet[Any] = weakref.WeakSet()  # of its trackers
        self.is_aside = False  # it was stopped while it had no entries, for a statement of others
        self._heartbeat = None if ledger.is_private else self._started(ledger, number, beat)

    @property
    def is_running(self) -> bool:
        """Whether this is the process that runs, and its heartbeat goes on."""
        is_beating = self._heartbeat is None or self._heartbeat.is_running
        return self._pid == os.getpid() and is_beating

    def close(self, *, timeout: float = STOP) -> None:
        """Stop the heartbeat and release the liveness lock, or wait for so many seconds."""
        if self._heartbeat is not None and self._pid == os.getpid():
            self._heartbeat.stop(timeout=timeout)

    def step_aside(self) -> bool:
        """Close all connections, unless there are entries: then the process must look alive.

        It comes back, as another process, before the next entry is written.
        """
        if not self.is_running or self._heartbeat is None:
            return False
        self.is_aside = True  # before the look: see `Journal.record`
        if not all(journal.is_empty for journal in self.journals):
            self.is_aside = False
            return False
        self.close()
        return True

    def _started(self, ledger: EntryTable, number: int, interval: float) -> Heartbeat:
        dialect, process_id = ledger.dialect, self.id
        body = json.dumps(describe_process())
        row = ledger.row(self.id, 0, 0, PROCESS, body, context=WorkerContext.current())
        # The heartbeat must not keep the engine alive: it ends with the engine.
        weak = weakref.ref(ledger)
        table: sa.Table

        def begin(connection: sa.Connection) -> None:
            nonlocal table
            ledger = weak()
            if ledger is not None:
                ledger.check(connection)
                table = ledger.table_on(connection)
                ledger.insert(connection, [row])

        def update(connection: sa.Connection, **values: Any) -> None:
            mine = sa.update(table).where(table.c.maker == process_id, table.c.seq == 0)
            connection.execute(mine.values(**values), execution_options=OPTIONS)

        def beat(connection: sa.Connection) -> None:
            update(connection, written=sa.literal_column(dialect.clock))

        def end(connection: sa.Connection) -> None:
            if not forget_process(connection, table, process_id):
                update(connection, body=json.dumps({**describe_process(), "ended": True}))

        journals = self.journals

        def guard() -> Callable[[sa.Connection], object] | None:
            stuck = [journal for journal in list(journals) if journal.is_stuck()]
            if not (stuck and dialect.has_server):  # a file's driver bounds its waits itself
                return None
            return lambda connection: [journal.cancel_stuck(connection) for journal in stuck]

        heartbeat = Heartbeat(
            ledger.engine,
            dialect.liveness_lock(ledger.engine, number),
            begin=begin,
            beat=beat,
            end=end,
            guard=guard,
            interval=interval,
        )
        with ledger.explaining_rights():
            heartbeat.start()
        return heartbeat


def is_process_id(text: str) -> bool:
    """Whether a text has the form of :attr:`LedgerProcess.id`."""
    return len(text) == _DIGITS and set(text) <= set("0123456789abcdef")


def forget_process(connection: sa.Connection, table: sa.Table, process_id: str) -> bool:
    """Delete the entry that describes a process, unless other entries of it are left."""
    left = sa.select(sa.func.count()).where(table.c.maker == process_id, table.c.seq > 0)
    if connection.execute(left, execution_options=OPTIONS).scalar_one():
        return False
    row = sa.delete(table).where(table.c.maker == process_id, table.c.seq == 0)
    connection.execute(row, execution_options=OPTIONS)
    return True


class OwnerKind(Enum):
    """The owners of entries that are no process."""

    KEPT = "kept"  # of rows that are kept for study; only a sweep that names it recovers them
    LEFT = "left"  # of rows that a sweep could not delete; the next sweep recovers them
    HANDED = "hand"  # of rows that a worker has handed to its controller

    def new_id(self) -> str:
        """The id of a new owner."""
        return f"{self.value}{secrets.token_hex(6)}"

    def includes(self, owner: str) -> bool:
        """Whether an owner is of this kind."""
        return owner.startswith(self.value)


# -- which process this is -------------------------------------------------------------------------


def describe_process() -> dict[str, Any]:
    """Host, machine, pid and start time, so that others on this machine see whether it ended."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_time(pid),
    }


def has_ended(process: dict[str, Any]) -> bool | None:
    """Whether a process that is described so has ended; None where this machine cannot know."""
    if process.get("ended"):
        return True
    machine = _machine()
    if machine is None or process.get("machine") != machine or process.get("started") is None:
        return None
    return bool(_start_time(int(process["pid"])) != process["started"])


@cache
def _machine() -> str | None:
    """This boot of this machine and its namespace of pids, where Linux shows them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """The start of a process, in the kernel's ticks; None for one that has ended, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name may have blanks and brackets
    return None if fields[0] in {"Z", "X"} else fields[_START_TIME - 2]


# -- integers that no other process, run or host gets ----------------------------------------------


class IntegerRanges:
    """The integers that one process has reserved and not used."""

    def __init__(self) -> None:
        self._left: deque[int] = deque()
        self._lock = threading.Lock()

    def next(self, ledger: EntryTable) -> int:
        """The next integer, from 0 up."""
        with self._lock:
            if not self._left:
                self._reserve(ledger, lock_timeout=1.0)
            return self._left.popleft()

    def reserve_early(self, ledger: EntryTable) -> None:
        """Reserve a range early, while the caller has no open transaction, where few are left."""
        with self._lock:
            if len(self._left) < RANGE // 2:
                with suppress(ScopeError):  # the next call of next() tries again
                    self._reserve(ledger, lock_timeout=0.2)

    def _reserve(self, ledger: EntryTable, *, lock_timeout: float) -> None:
        try:
            # In its own transaction: where the caller's holds SQLite's only lock, waiting is vain.
            with ledger.transaction(lock_timeout=lock_timeout) as connection:
                table = ledger.table_on(connection)
                row = (table.c.maker == "tidyrows", table.c.seq == 1)
                select = sa.select(table.c.body).where(*row).with_for_update()
                reserved = ledger.execute(connection, select).scalar()
                if reserved is None:
                    raise LedgerError(
                        f"The ledger {table.fullname} has lost the row that hands out integers, so "
                        f"nobody knows which are taken. Sweep, drop the table, and write "
                        f"Ledger(engine).install()."
                    )
                update = sa.update(table).where(*row).values(body=str(int(reserved) + 1))
                ledger.execute(connection, update)
        except sa.exc.DBAPIError as error:
            if not ledger.dialect.is_timeout(error):
                raise
            raise ScopeError(
                f"The next {RANGE} integers that no other worker has cannot be taken from "
                f"{ledger!r} while somebody holds its lock; where only one may write, as with "
                f"SQLite, that may be this test's own open transaction. Commit first, or use "
                f"Scoped text."
            ) from error
        start = int(reserved) * RANGE
        self._left.extend(range(start, start + RANGE))
