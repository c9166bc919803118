"""The public functions that show and delete what dead workers left.

A sweep first makes the entries its own, in one transaction. From then on the rows have a live
owner, as those of a worker have, with a liveness lock and a heartbeat. So two sweeps never delete
the same row, the next sweep recovers the rows of a sweep that is killed, and a worker that was
taken for dead gets an error instead of deleting rows that are no longer its own.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, suppress
from inspect import signature
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import LedgerError
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.ledger.process import is_kept
from tidyrows.ledger.table import NAME, Ledger
from tidyrows.sweep.database_sweep import DatabaseSweep
from tidyrows.sweep.dead_workers import find_candidates, forget_dead_processes
from tidyrows.sweep.orphans import Orphans
from tidyrows.sweep.recovery import TrackerEntries, read_entries
from tidyrows.sweep.sweep_arguments import (
    PATIENCE,
    SweepArguments,
    refuse_unknown_kept,
    refuse_unknown_options,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.sweep.dead_workers import Candidate

    Place = str | sa.URL | sa.Engine | AsyncEngine | Ledger


def sweep(
    place: Place,
    *,
    run: str | None = None,
    worker: str | None = None,
    older_than: float | None = None,
    kept: bool | str = False,
    patience: float = PATIENCE,
    ledger: str = NAME,
    schema: str | None = None,
    allow_production: bool | Collection[str] = False,
    **options: Any,
) -> CleanupReport:
    """Delete what dead workers left, as a cleanup of their own would have done.

    A worker is dead only when its lock is free and its heartbeat has stopped: on this machine when
    its process has ended, elsewhere when it has not beaten for ``patience`` seconds. Safe while
    live workers work, and while another sweep does the same.

    Args:
        place: an engine, a URL, or a :class:`Ledger`.
        run: only what this run left.
        worker: only what workers with this id left.
        older_than: instead of the rows of dead workers, delete those of every worker, dead or
            alive, whose newest row is this many seconds old; 0 for all rows, once you know that
            the workers have ended.
        kept: also delete rows that ``keep_on_failure`` kept; or only those of this name.
        patience: see above, in seconds.
        ledger: the name of the ledger's table.
        schema: the schema of that table.
        allow_production: as for :class:`ResourceTracker`.
        options: passed to :class:`CleanupManager`.

    Raises:
        CleanupError: rows are still there; they stay in the ledger, for a later sweep.
        LedgerError: there is no ledger, or one of another version, or one that this role may not
            use; or nothing is kept under the name that ``kept`` gives.
        ProductionDatabaseError: the database looks like production.
        TypeError: an argument has a name that neither this nor ``CleanupManager`` knows.
        ValueError: a time is negative, or a name is empty.

    Example:
        >>> print(sweep("postgresql+psycopg://ci@db/app"))
        public.users 3 deleted (0.012 s)
    """
    refuse_unknown_options(options, signature(sweep).parameters)
    arguments = SweepArguments(run, worker, older_than, kept, patience)
    with _opened(place, ledger, schema, allow_production) as opened:
        database_sweep = DatabaseSweep(opened, options.get("retry"))
        try:
            with opened.engine.connect() as connection:
                refuse_unknown_kept(opened, connection, kept)
            database_sweep.recover(arguments)
            return database_sweep.delete_rows(**options)
        finally:
            database_sweep.close()
            with suppress(sa.exc.SQLAlchemyError, LedgerError):
                forget_dead_processes(opened, arguments)


def find_orphans(
    place: Place,
    *,
    run: str | None = None,
    worker: str | None = None,
    older_than: float | None = None,
    kept: bool | str = True,
    patience: float = PATIENCE,
    ledger: str = NAME,
    schema: str | None = None,
    allow_production: bool | Collection[str] = False,
) -> list[Orphans]:
    """What :func:`sweep` would delete, and what was kept for study; deletes nothing.

    Args:
        place: as for :func:`sweep`, as all other arguments are.
        run: only what this run left.
        worker: only what workers with this id left.
        older_than: rows of every worker, dead or alive, whose newest row is this many seconds old.
        kept: also show rows that were kept; or only those of this name.
        patience: seconds without a heartbeat after which a worker is dead.
        ledger: the name of the ledger's table.
        schema: the schema of that table.
        allow_production: as for :class:`ResourceTracker`.

    Raises:
        LedgerError: as for :func:`sweep`.
        ProductionDatabaseError: the database looks like production.
        ValueError: a time is negative, or a name is empty.
    """
    arguments = SweepArguments(run, worker, older_than, kept, patience)
    with (
        _opened(place, ledger, schema, allow_production) as opened,
        opened.engine.connect() as connection,
    ):
        opened.check(connection)
        refuse_unknown_kept(opened, connection, kept)
        of_owner: dict[str, dict[int, TrackerEntries]] = {}
        found = []
        for candidate in find_candidates(opened, connection, arguments):
            owner = candidate.owner
            if owner not in of_owner:
                of_owner[owner] = read_entries(opened, connection, owner)
            entries = of_owner[owner].get(candidate.scope)
            if entries is not None:
                found.append(_orphans(candidate, entries))
        return found


async def sweep_async(place: Place, **options: Any) -> CleanupReport:
    """As :func:`sweep`, for an AsyncEngine."""
    return await spawn(sweep, place, **options)


async def find_orphans_async(place: Place, **options: Any) -> list[Orphans]:
    """As :func:`find_orphans`, for an AsyncEngine."""
    return await spawn(find_orphans, place, **options)


@contextmanager
def _opened(
    place: Place, name: str, schema: str | None, allow_production: bool | Collection[str]
) -> Iterator[Ledger]:
    """The ledger; an engine that is made here is disposed of at the end."""
    if isinstance(place, Ledger):
        _refuse_missing_file(place)
        yield place
        return
    engine = sa.create_engine(place) if isinstance(place, (str, sa.URL)) else place
    try:
        if engine is not place and engine.dialect.is_async:
            raise LedgerError(
                f"{engine.dialect.driver} is an asynchronous driver. Give the URL of a synchronous "
                f"one, or write await sweep_async(create_async_engine(...))."
            )
        ledger = Ledger(engine, name=name, schema=schema, allow_production=allow_production)
        if ledger.engine.dialect.is_async and not in_greenlet():
            raise LedgerError(
                "This engine is asynchronous: write await sweep_async(engine), or await "
                "find_orphans_async(engine)."
            )
        _refuse_missing_file(ledger)
        yield ledger
    finally:
        if engine is not place and isinstance(engine, sa.Engine):
            engine.dispose()


def _refuse_missing_file(ledger: Ledger) -> None:
    """To connect would make the database, empty."""
    path = ledger.dialect.missing_file(ledger.engine)
    if path is not None:
        raise LedgerError(
            f"There is no file {path}, so there is nothing to sweep; connecting would make an "
            f"empty one. Look at the path in the URL: one that does not begin with / is looked "
            f"for in the folder that the program runs in."
        )


def _orphans(candidate: Candidate, entries: TrackerEntries) -> Orphans:
    kinds = Counter(body["kind"] for body in entries.externals.values())
    return Orphans(
        candidate.run,
        candidate.worker,
        tuple(entries.tests),
        candidate.process.get("host"),
        candidate.process.get("pid"),
        candidate.age,
        {
            held.table.name: len(held.keys) + held.nameless + len(held.doubtful)
            for held in entries.store.snapshot()
        },
        dict(kinds),
        candidate.owner if is_kept(candidate.owner) else None,
    )
