"""The public functions that show and delete what dead workers left.

A sweep first makes the entries its own, owner by owner: it has a liveness lock and a heartbeat
as a worker has. So two sweeps never delete the same row, the next sweep recovers the rows of one
that is killed, and a worker that was taken for dead gets an error.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.arguments import SWITCH, Kind, checked, name, number, optional
from tidyrows.cleanup.configuration import configured
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.dialects import SilentServerError, engine_for
from tidyrows.errors import LedgerError
from tidyrows.greenlets import in_greenlet, is_async, spawn
from tidyrows.ledger.process import OwnerKind
from tidyrows.ledger.table import NAME, Ledger
from tidyrows.production import PERMISSION
from tidyrows.retry import RetryPolicy
from tidyrows.sweep.dead_workers import (
    PATIENCE,
    SweepArguments,
    find_candidates,
    forget_dead_processes,
)
from tidyrows.sweep.owners import OwnerLeftError, are_owners, names_in_short
from tidyrows.sweep.recovery import Recovery, TrackerEntries, read_owner
from tidyrows.worker import printable, worker_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import TableName
    from tidyrows.sweep.dead_workers import Candidate

    Place = str | sa.URL | sa.Engine | AsyncEngine | Ledger

_TESTS = 3
"""How many tests the report of a worker's rows names."""


@dataclass(frozen=True, slots=True)
class Orphans:
    """What one worker of one run left.

    Attributes:
        run: the run's id.
        worker: the worker's id.
        tests: the tests that made the rows, as far as they are known.
        host: the machine; None where it is not known.
        pid: the process on that machine.
        age: seconds since the worker was last known to live.
        rows: the number of rows, by table.
        external: the number of external resources, by kind.
        kept: the name under which ``keep_on_failure`` kept the rows; None for other rows.
        owner: the owner of the entries in the ledger, as ``sweep(forget=...)`` takes it.
        unreadable: why a sweep leaves the entries where they are; None where it takes them.
    """

    run: str
    worker: str
    tests: tuple[str, ...]
    host: str | None
    pid: int | None
    age: float
    rows: dict[TableName, int] = field(default_factory=dict)
    external: dict[str, int] = field(default_factory=dict)
    kept: str | None = None
    owner: str = ""
    unreadable: str | None = None

    def __str__(self) -> str:
        things = [f"{table} {count}" for table, count in self.rows.items()]
        things += [f"{kind} {count}" for kind, count in self.external.items()]
        where = f" on {self.host}" if self.host else ""
        kept = f", kept as {self.kept}" if self.kept else ""
        owner = f", owner {self.owner}" if self.owner and not kept else ""
        tests = f", made in {names_in_short(self.tests, _TESTS)}" if self.tests else ""
        what = f"stays: {self.unreadable}" if self.unreadable else ", ".join(things) or "nothing"
        name = worker_name(self.worker, self.run)
        return f"{name}{printable(where)}, {self.age:.0f} s ago{printable(kept + owner)}: " + (
            printable(what + tests)
        )


_KINDS = {
    "place": Kind(
        lambda place: isinstance(place, (str, sa.URL, sa.Engine, Ledger)) or is_async(place),
        "an engine, a URL or a Ledger",
        "engine",
    ),
    "run": optional(name("nightly-17")),
    "worker": optional(name("gw3")),
    "test": optional(name("tests/test_login.py::test_login")),
    "older_than": optional(number("3600, or older_than=0 for all", least=0)),
    "kept": Kind(
        lambda kept: isinstance(kept, bool) or (isinstance(kept, str) and bool(kept)),
        "True, False, or a name as find_orphans(engine) shows it (a shell variable that is not "
        "set gives an empty one)",
        "True for all that is kept",
    ),
    "forget": Kind(are_owners, "owners as find_orphans(engine) shows them", "['left5f0c1a2b3c4d']"),
    "patience": number("15", least=0),
    "ledger": name(NAME),
    "schema": optional(name("audit")),
    "allow_production": PERMISSION,
    "as_superuser": SWITCH,
}


@checked(CleanupManager, **_KINDS)
def sweep(
    place: Place,
    *,
    run: str | None = None,
    worker: str | None = None,
    test: str | None = None,
    older_than: float | None = None,
    kept: bool | str = False,
    forget: str | Iterable[str] = (),
    as_superuser: bool = False,
    patience: float = PATIENCE,
    ledger: str = NAME,
    schema: str | None = None,
    allow_production: bool | Collection[str] = False,
    **options: Any,
) -> CleanupReport:
    """Delete what dead workers left, as a cleanup of their own would have done.

    A worker is dead only when its lock is free and its heartbeat has stopped: on this machine when
    its process has ended, elsewhere when it has not beaten for ``patience`` seconds. Safe while
    live workers work, and while another sweep does the same. Owners whose entries cannot be read
    are left alone and named, after everybody else's rows are deleted.

    Args:
        place: an engine, a URL, or a :class:`Ledger`.
        run: only what this run left.
        worker: only what workers with this id left.
        test: only what this test left; rows that it shared with others are not its own.
        older_than: instead of the rows of dead workers, delete those of every worker, dead or
            alive, whose newest row is this many seconds old; 0 for all rows, once you know that
            the workers have ended.
        kept: also delete rows that ``keep_on_failure`` kept; or only those of this name.
        forget: first forget the entries of these owners, as :func:`find_orphans` and the error of a
            sweep name them; the rows stay, whoever made them.
        as_superuser: sweep as a superuser although other roles may write to the ledger, and so
            name rows that are deleted with a superuser's rights.
        patience: see above, in seconds.
        ledger: the name of the ledger's table.
        schema: the schema of that table.
        allow_production: as for :class:`ResourceTracker`.
        options: passed to :class:`CleanupManager`.

    Raises:
        CleanupError: rows are still there; they stay in the ledger, for a later sweep. Or entries
            cannot be read, or name what is never a target.
        LedgerError: there is no ledger, or one of another version, or one that this role may not
            use; or this role is a superuser, see ``as_superuser``; or nothing is kept under the
            name that ``kept`` gives; or an owner in ``forget`` has no entries.
        ProductionDatabaseError: the database looks like production.
        ArgumentError: an argument has a value that it does not take, or a name that neither
            this nor ``CleanupManager`` knows.

    Example:
        >>> print(sweep("postgresql+psycopg://ci@db/app"))
        public.users 3 deleted (0.012 s)
    """
    owners = (forget,) if isinstance(forget, str) else tuple(forget)
    arguments = SweepArguments(
        run, worker, older_than, kept, patience, as_superuser=as_superuser, test=test
    )
    options = configured() | options
    retry = options.get("retry") or RetryPolicy()
    with opened_ledger(place, ledger, schema, allow_production) as whole:
        opened = whole.within(options.get("deadline") or retry.deadline)
        recovery = Recovery(opened, retry)
        silent = False
        try:
            with opened.looking() as connection:
                _refuse_unknown_kept(opened, connection, kept)
            recovery.forget(owners)
            recovery.recover(arguments)
            return recovery.delete_rows(**options)
        except Exception as error:
            causes = [each.error for each in getattr(error, "leftovers", ())]
            silent = any(isinstance(each, SilentServerError) for each in (error, *causes))
            raise
        finally:
            if silent:
                recovery.close(timeout=0.0)
            else:
                recovery.close()
                with suppress(sa.exc.SQLAlchemyError, LedgerError, ConnectionError):
                    forget_dead_processes(opened, arguments)


@checked(**_KINDS)
def find_orphans(
    place: Place,
    *,
    run: str | None = None,
    worker: str | None = None,
    test: str | None = None,
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
        test: only what this test left; rows that it shared with others are not its own.
        older_than: rows of every worker, dead or alive, whose newest row is this many seconds old.
        kept: also show rows that were kept; or only those of this name.
        patience: seconds without a heartbeat after which a worker is dead.
        ledger: the name of the ledger's table.
        schema: the schema of that table.
        allow_production: as for :class:`ResourceTracker`.

    Raises:
        LedgerError: as for :func:`sweep`.
        ProductionDatabaseError: the database looks like production.
        ArgumentError: an argument has a value that it does not take.
    """
    arguments = SweepArguments(run, worker, older_than, kept, patience, test=test)
    with (
        opened_ledger(place, ledger, schema, allow_production) as opened,
        opened.looking() as connection,
    ):
        opened.check(connection)
        _refuse_unknown_kept(opened, connection, kept)
        of_owner: dict[str, dict[int, TrackerEntries]] = {}
        found = []
        for candidate in find_candidates(opened, connection, arguments):
            owner = candidate.owner
            if owner not in of_owner:
                try:
                    of_owner[owner] = read_owner(opened, connection, owner)
                except OwnerLeftError as why:
                    connection.rollback()
                    of_owner[owner] = {}
                    orphans = _orphans(candidate, TrackerEntries())
                    found.append(replace(orphans, unreadable=str(why)))
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
def opened_ledger(
    place: Place, name: str, schema: str | None, allow_production: bool | Collection[str]
) -> Iterator[Ledger]:
    """The ledger; an engine that is made here is disposed of at the end."""
    if isinstance(place, Ledger):
        _refuse_missing_file(place)
        yield place
        return
    engine = engine_for(place) if isinstance(place, (str, sa.URL)) else place
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
        try:
            yield ledger
        except Exception as error:
            ledger.dialect.explain_first_connection(error, ledger.engine)
            raise
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
            held.table.name: len(held.keys) + held.keyless_count + len(held.in_doubt)
            for held in entries.store.snapshot()
        },
        dict(kinds),
        candidate.owner if OwnerKind.KEPT.includes(candidate.owner) else None,
        candidate.owner,
    )


def _refuse_unknown_kept(ledger: Ledger, connection: sa.Connection, kept: bool | str) -> None:
    """Raise LedgerError for a name under which no rows are kept."""
    if not isinstance(kept, str):
        return
    table = ledger.table_on(connection)
    owners = sa.select(table.c.owner).where(table.c.seq > 0).distinct().order_by(table.c.owner)
    found = ledger.execute(connection, owners).scalars()
    names = [owner for owner in found if OwnerKind.KEPT.includes(owner)]
    if kept not in names:
        kept_names = f"What is kept: {names_in_short(names)}."
        there = kept_names if names else "Nothing else is, either."
        raise LedgerError(
            f"Nothing is kept as {kept!r} in {ledger!r}; it may have been swept already. "
            f"{there} find_orphans(engine) shows all that there is."
        )
