"""Which entries a sweep may recover: those that it is asked for, of workers that are dead."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.ledger.entries import MAKING
from tidyrows.ledger.entry_table import LEDGER, RUN, WORKER
from tidyrows.ledger.process import (
    PROCESS,
    forget_process,
    has_ended,
    is_handed,
    is_kept,
    is_left,
)

if TYPE_CHECKING:
    from tidyrows.ledger.table import Ledger
    from tidyrows.retry import RetryPolicy

PATIENCE = 15.0
"""Seconds without a heartbeat after which a worker that holds no lock is dead."""
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

    def __post_init__(self) -> None:
        for name, seconds, example in (
            ("older_than", self.older_than, "older_than=3600, or older_than=0 for all"),
            ("patience", self.patience, "patience=15"),
        ):
            if seconds is not None and not seconds >= 0:
                raise ValueError(
                    f"{name}={seconds!r} is no length of time; give seconds, as in {example}."
                )
        for name, text, others in (
            ("run", self.run, "leave run= out for all runs"),
            ("worker", self.worker, "leave worker= out for all workers"),
            ("kept", self.kept, "write kept=True for all that is kept"),
        ):
            if text == "":
                raise ValueError(
                    f"{name}='' names nothing; a shell variable that is not set gives that. Give "
                    f"the name, as find_orphans(engine) shows it, or {others}."
                )

    def names(self, run: str, worker: str) -> bool:
        """Whether entries of this run and worker are asked for."""
        return (self.run is None or run == self.run[:RUN]) and (
            self.worker is None or worker == self.worker[:WORKER]
        )


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
    ledger: Ledger, connection: sa.Connection, arguments: SweepArguments
) -> list[Candidate]:
    """The entries that a sweep with these arguments recovers, tracker by tracker."""
    dead: dict[str, bool] = {}

    def is_wanted(candidate: Candidate) -> bool:
        if is_kept(candidate.owner):
            return arguments.kept in {True, candidate.owner}
        if isinstance(arguments.kept, str):
            return False
        if arguments.older_than is not None:
            return candidate.idle >= arguments.older_than
        if candidate.owner not in dead:
            dead[candidate.owner] = _is_dead(ledger, connection, candidate, arguments)
        return dead[candidate.owner]

    return [
        candidate
        for candidate in _all_entries(ledger, connection)
        if arguments.names(candidate.run, candidate.worker) and is_wanted(candidate)
    ]


def _all_entries(ledger: Ledger, connection: sa.Connection) -> list[Candidate]:
    table = ledger.table_on(connection)
    columns = [table.c[name] for name in ("owner", "scope", "kind", "run", "worker", "maker")]
    newest_of_each = (
        sa.select(*columns, sa.func.max(table.c.written))
        .where(table.c.seq > 0, table.c.owner != LEDGER)
        .group_by(*columns)
        .order_by(*columns)
    )
    now = ledger.now(connection)
    processes = _processes(ledger, connection)
    makers: dict[tuple[str, int], tuple[str, str, float, dict[str, Any]]] = {}
    newest: dict[tuple[str, int], float] = {}
    rows = ledger.execute(connection, newest_of_each)
    for owner, scope, kind, run, worker, maker, written in rows:
        place = owner, scope
        newest[place] = max(newest.get(place, written), written)
        if kind in MAKING and place not in makers:
            beat, process = processes.get(owner, processes.get(maker, (written, {})))
            makers[place] = run, worker, beat, process
    found = []
    for place, (run, worker, beat, process) in makers.items():
        idle = now - newest[place]
        found.append(Candidate(*place, run, worker, process, idle, min(now - beat, idle)))
    return found


def _processes(
    ledger: Ledger, connection: sa.Connection
) -> dict[str, tuple[float, dict[str, Any]]]:
    """The last heartbeat of each process, and its description."""
    table = ledger.table_on(connection)
    rows = sa.select(table.c.maker, table.c.written, table.c.body).where(table.c.kind == PROCESS)
    return {
        maker: (float(written), json.loads(body))
        for maker, written, body in ledger.execute(connection, rows)
    }


def _is_dead(
    ledger: Ledger, connection: sa.Connection, candidate: Candidate, arguments: SweepArguments
) -> bool:
    """Whether the liveness lock of the owner is free and its heartbeat has stopped."""
    owner, age = candidate.owner, candidate.age
    if is_left(owner):
        return True
    if is_handed(owner):
        return arguments.handed or age > arguments.patience
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
    everything = replace(arguments, older_than=0.0, kept=False)
    while True:
        with ledger.engine.connect() as connection:
            is_held = any(
                has_ended(candidate.process)
                and not (is_left(candidate.owner) or is_handed(candidate.owner))
                and ledger.dialect.is_alive(connection, int(candidate.owner, 16))
                for candidate in find_candidates(ledger, connection, everything)
            )
        if not is_held or retry.clock() >= until:
            return
        retry.sleep(0.02)


def forget_dead_processes(ledger: Ledger, arguments: SweepArguments) -> None:
    """Delete the rows and the lock files of dead processes that have no entries any more."""
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
        ledger.dialect.remove_liveness_files(connection)
