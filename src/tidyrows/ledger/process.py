"""This process in a ledger: its id, its liveness lock and its heartbeat.

Entries belong to a process that is dead only when its liveness lock is free *and* its heartbeat has
stopped. A connection that drops is no death, since the heartbeat goes on; a heartbeat that pauses
is none either, since the lock is held.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import weakref
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.ledger.entry_table import OPTIONS
from tidyrows.ledger.heartbeat import Heartbeat
from tidyrows.ledger.id_ranges import IntegerRanges
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from tidyrows.ledger.entry_table import EntryTable

PROCESS = "owner"
"""The kind of the entry that describes a process; its time is that of the last heartbeat."""
_KEPT, _LEFT, _HANDED = "kept", "left", "hand"
_START_TIME = 21
"""The place of the start time in /proc/<pid>/stat, counted from 0; see proc(5)."""


class LedgerProcess:
    """One process in one ledger; a forked child is another one, with an id of its own."""

    def __init__(self, ledger: EntryTable, *, beat: float) -> None:
        number = secrets.randbits(62) + 1
        self.id = f"{number:016x}"  # the number of its liveness lock, as the columns have it
        self.integers = IntegerRanges()
        self._pid = os.getpid()
        # entries have the order of the COMMITs that they belong to; a scope is a tracker's number
        self.next_entry, self.next_scope = count(1).__next__, count(1).__next__
        self._heartbeat = None if ledger.is_private else self._started(ledger, number, beat)

    @property
    def is_running(self) -> bool:
        """Whether this is the process that runs, and its heartbeat goes on."""
        is_beating = self._heartbeat is None or self._heartbeat.is_running
        return self._pid == os.getpid() and is_beating

    def close(self) -> None:
        """Stop the heartbeat and release the liveness lock."""
        if self._heartbeat is not None and self._pid == os.getpid():
            self._heartbeat.stop()

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

        heartbeat = Heartbeat(
            ledger.engine,
            dialect.liveness_lock(ledger.engine, number),
            begin=begin,
            beat=beat,
            end=end,
            interval=interval,
        )
        with ledger.explaining_rights():
            heartbeat.start()
        return heartbeat


def forget_process(connection: sa.Connection, table: sa.Table, process_id: str) -> bool:
    """Delete the entry that describes a process, unless other entries of it are left."""
    left = sa.select(sa.func.count()).where(table.c.maker == process_id, table.c.seq > 0)
    if connection.execute(left, execution_options=OPTIONS).scalar_one():
        return False
    row = sa.delete(table).where(table.c.maker == process_id, table.c.seq == 0)
    connection.execute(row, execution_options=OPTIONS)
    return True


# -- owners of entries that are no process ---------------------------------------------------------


def kept_id() -> str:
    """An owner of rows that are kept for study; only a sweep that names it recovers them."""
    return f"{_KEPT}{secrets.token_hex(6)}"


def left_id() -> str:
    """An owner of rows that a sweep could not delete; the next sweep recovers them."""
    return f"{_LEFT}{secrets.token_hex(6)}"


def handed_id() -> str:
    """An owner of rows that a worker has handed to its controller."""
    return f"{_HANDED}{secrets.token_hex(6)}"


def is_kept(owner: str) -> bool:
    """Whether :func:`kept_id` made this owner."""
    return owner.startswith(_KEPT)


def is_left(owner: str) -> bool:
    """Whether :func:`left_id` made this owner."""
    return owner.startswith(_LEFT)


def is_handed(owner: str) -> bool:
    """Whether :func:`handed_id` made this owner."""
    return owner.startswith(_HANDED)


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
