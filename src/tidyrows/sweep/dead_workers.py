"""Which entries a sweep may recover: those that it is asked for, of workers that are dead."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.ledger.entries import MAKING, ROWS
from tidyrows.ledger.entry_table import LEDGER, RUN, WORKER, stored_test
from tidyrows.ledger.once_per_run import forget_results
from tidyrows.ledger.process import (
    PROCESS,
    OwnerKind,
    forget_process,
    has_ended,
    is_process_id,
)
from tidyrows.worker import worker_name

if TYPE_CHECKING:
    from tidyrows.ledger.table import Ledger
    from tidyrows.retry import RetryPolicy

logger = logging.getLogger("tidyrows")

PATIENCE = 15.0
"""Seconds without a heartbeat after which a worker that holds no lock is dead."""
_LONGEST = 10_000
"""The most characters of the description of a process."""
_LOCK_RELEASE = 5.0
"""Seconds within which a server notices that a process has ended, and releases its lock."""


@dataclass(frozen=True, slots=True)
class SweepArguments:
    """Which entries a sweep recovers, as :func:`tidyrows.sweep` describes them."""

    run: str | None = None
    worker: str | None = None
    older_than: float | None = None
    kept: bool | str = False
    patience: float = PATIENCE
    handed: bool = False
    """Also what a worker has just handed to its controller: the controller itself asks for it."""
    as_superuser: bool = False
    test: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """The entries of one tracker."""

    owner: str
    scope: int
    run: str
    worker: str
    process: dict[str, Any]
    idle: float  # seconds since the newest entry
    age: float  # seconds since the process was last known to live


def find_candidates(
    ledger: Ledger,
    connection: sa.Connection,
    arguments: SweepArguments,
    owner: str | None = None,
) -> list[Candidate]:
    """The entries that a sweep with these arguments recovers, tracker by tracker; of one owner."""
    dead: dict[str, bool] = {}

    def decide(candidate: Candidate) -> tuple[bool, str]:
        owner = candidate.owner
        if OwnerKind.KEPT.includes(owner):
            return arguments.kept in {True, owner}, f"the rows are kept as {owner}"
        if isinstance(arguments.kept, str):
            return False, f"the rows are not kept as {arguments.kept}"
        if arguments.older_than is not None:
            is_old = candidate.idle >= arguments.older_than
            return is_old, f"the newest entry is {candidate.idle:.0f} s old"
        if owner not in dead:
            dead[owner] = _is_dead(ledger, connection, candidate, arguments)
        return dead[owner], "the worker is dead" if dead[owner] else "the worker may be alive"

    found = []
    for candidate in all_entries(ledger, connection, arguments, owner):
        is_wanted, why = decide(candidate)
        if owner is None:
            verb = "takes" if is_wanted else "leaves"
            name = worker_name(candidate.worker, candidate.run)
            logger.debug("A sweep %s the rows of %s: %s", verb, name, why)
        if is_wanted:
            found.append(candidate)
    return found


def all_entries(
    ledger: Ledger,
    connection: sa.Connection,
    arguments: SweepArguments,
    of_owner: str | None = None,
) -> list[Candidate]:
    """The entries of the run, worker and test that are asked for, or of all."""
    table = ledger.table_on(connection)
    columns = [
        table.c[name] for name in ("owner", "scope", "kind", "run", "worker", "test", "maker")
    ]
    newest_of_each = (
        sa.select(*columns, sa.func.max(table.c.written))
        .where(table.c.seq > 0, table.c.owner != LEDGER)
        .group_by(*columns)
        .order_by(*columns)
    )
    if of_owner is not None:
        newest_of_each = newest_of_each.where(table.c.owner == of_owner)
    now = ledger.now(connection)
    processes = _processes(ledger, connection)
    makers: dict[tuple[str, int], tuple[str, str, float, dict[str, Any]]] = {}
    tests: dict[tuple[str, int], set[str]] = {}
    newest: dict[tuple[str, int], float] = {}
    rows = ledger.execute(connection, newest_of_each)
    for owner, scope, kind, run, worker, test, maker, written in rows:
        place = owner, scope
        tests.setdefault(place, set()).add(test)
        newest[place] = max(newest.get(place, written), written)
        # a kind that is unknown here may be about new rows, too
        if (kind in MAKING or kind not in ROWS) and place not in makers:
            beat, process = processes.get(owner, processes.get(maker, (written, {})))
            makers[place] = run, worker, beat, process
    found = []
    for place, (run, worker, beat, process) in makers.items():
        idle = now - newest[place]
        wanted = arguments.run is None or run == arguments.run[:RUN]
        wanted &= arguments.worker is None or worker == arguments.worker[:WORKER]
        wanted &= arguments.test is None or tests[place] == {stored_test(arguments.test)}
        if wanted:
            found.append(Candidate(*place, run, worker, process, idle, min(now - beat, idle)))
    return found


def _processes(
    ledger: Ledger, connection: sa.Connection
) -> dict[str, tuple[float, dict[str, Any]]]:
    """The last heartbeat of each process, and its description."""
    table = ledger.table_on(connection)
    short = sa.case((sa.func.length(table.c.body) <= _LONGEST, table.c.body))
    rows = sa.select(table.c.maker, table.c.written, short).where(table.c.kind == PROCESS)
    return {
        maker: (float(written), _description(body))
        for maker, written, body in ledger.execute(connection, rows)
    }


def _description(body: str | None) -> dict[str, Any]:
    """The description of a process; empty where it is not one that tidyrows wrote."""
    try:
        read = json.loads(body or "{}")
    except (ValueError, RecursionError):
        return {}
    is_whole = isinstance(read, dict) and isinstance(read.get("pid", 0), (int, type(None)))
    return read if is_whole else {}


def _is_dead(
    ledger: Ledger, connection: sa.Connection, candidate: Candidate, arguments: SweepArguments
) -> bool:
    """Whether the liveness lock of the owner is free and its heartbeat has stopped."""
    owner, age = candidate.owner, candidate.age
    if OwnerKind.LEFT.includes(owner):
        return True
    if OwnerKind.HANDED.includes(owner):
        return arguments.handed or age > arguments.patience
    if not is_process_id(owner):
        return True  # no process; reading its entries says so
    dialect, number = ledger.dialect, int(owner, 16)
    if dialect.is_alive(connection, number):
        return False
    if has_ended(candidate.process):
        return True
    if dialect.heartbeat_in_file:
        beat_age = dialect.heartbeat_file_age(connection, number)
        age = age if beat_age is None else min(age, beat_age)
    return age > arguments.patience


def wait_for_locks(ledger: Ledger, arguments: SweepArguments, retry: RetryPolicy) -> None:
    """Wait until the server has released the locks of processes that ended on this machine."""
    until = retry.clock() + _LOCK_RELEASE
    while True:
        with ledger.looking() as connection:
            is_held = any(
                has_ended(each.process)
                and is_process_id(each.owner)
                and ledger.dialect.is_alive(connection, int(each.owner, 16))
                for each in all_entries(ledger, connection, arguments)
            )
        if not is_held or retry.clock() >= until:
            return
        retry.sleep(0.02)


def forget_dead_processes(ledger: Ledger, arguments: SweepArguments) -> None:
    """Delete the rows and the lock files of dead processes that have no entries any more.

    Also the results of ``once_per_run`` of runs that began days ago.
    """
    with ledger.transaction(lock_timeout=5.0) as connection:
        table = ledger.table_on(connection)
        makers = sa.select(table.c.maker).where(table.c.seq > 0)
        owners = sa.select(table.c.owner).where(table.c.seq > 0)
        in_use = set(ledger.execute(connection, makers.union(owners)).scalars())
        now = ledger.now(connection)
        for process_id, (beat, process) in sorted(_processes(ledger, connection).items()):
            age = now - beat
            candidate = Candidate(process_id, 0, "", "", process, age, age)
            if process_id not in in_use and _is_dead(ledger, connection, candidate, arguments):
                forget_process(connection, table, process_id)
        forget_results(ledger, connection)
        ledger.dialect.remove_liveness_files(connection)
