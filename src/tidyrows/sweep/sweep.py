"""What dead workers left, found in the ledger and deleted.

A sweep first takes over the entries, in one transaction: from then on the rows are its own, as any
worker's are, with a lock and a heart. So two sweeps never have the same row, a sweep that is killed
is swept itself, and a worker that was only thought dead finds that its rows are no longer its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.report import describe_leftovers
from tidyrows.dialects import Fault
from tidyrows.errors import LedgerError, TidyRowsError
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.ledger.entries import MAKING
from tidyrows.ledger.journal import Book
from tidyrows.ledger.process import OWNER, Owner, forget_owner, is_handed, is_kept, is_left, left_id
from tidyrows.ledger.process_identity import is_over
from tidyrows.ledger.table import LEDGER, NAME, RUN, WORKER, Ledger
from tidyrows.retry import RetryPolicy
from tidyrows.sweep.recovery import Logged, load, played, put_aside, take_over
from tidyrows.sweep.sweep_arguments import refuse_missing, refuse_unkept, refuse_unknown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidyrows.cleanup.report import CleanupReport, Leftover
    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

    Place = str | sa.URL | sa.Engine | AsyncEngine | Ledger

PATIENCE = 15.0
"""Seconds without a heartbeat after which a worker whose lock is free is dead."""
_LETS_GO = 5.0
"""Seconds in which a server notices that a process has ended, and frees its lock."""
_TESTS = 3
"""How many tests an orphan shows."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Orphans:
    """What one worker of one run left.

    Attributes:
        run: the run's id.
        worker: the worker's.
        tests: the tests that it was made in, as far as known.
        host: the machine; None where it is not known.
        pid: the process there.
        age: seconds since it was last known to live.
        rows: how many rows are entered, by table.
        external: how many external resources, by kind.
        kept: the name that ``keep_on_failure`` gave it; None for what is not kept.
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

    def __str__(self) -> str:
        things = [f"{table} {count}" for table, count in self.rows.items()]
        things += [f"{kind} {count}" for kind, count in self.external.items()]
        where = f" on {self.host}" if self.host else ""
        kept = f", kept as {self.kept}" if self.kept else ""
        tests = f", made in {some(self.tests, _TESTS)}" if self.tests else ""
        return (
            f"worker {self.worker} of run {self.run}{where}, {self.age:.0f} s ago{kept}: "
            f"{', '.join(things) or 'nothing'}{tests}"
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which entries a sweep takes.

    Attributes:
        run: of this run only.
        worker: of workers with this id only.
        older_than: whoever's, if nothing came since so many seconds.
        kept: what was kept for study too: all of it, or what has this name alone.
        patience: seconds without a heartbeat after which a worker is dead.
        handed: what a worker has handed to its controller too, which is who asks; to others it
            is there once nobody has come for it in those seconds.

    Raises:
        ValueError: a time is negative, or a name empty.
    """

    run: str | None = None
    worker: str | None = None
    older_than: float | None = None
    kept: bool | str = False
    patience: float = PATIENCE
    handed: bool = False

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

    def names(self, part: _Part) -> bool:
        """Whether it is of the run and worker that were named, if any."""
        return (self.run is None or part.run == self.run[:RUN]) and (
            self.worker is None or part.worker == self.worker[:WORKER]
        )


@dataclass(slots=True)
class _Part:
    """The entries of one tracker of one owner.

    Attributes:
        owner: whose they are.
        scope: the number of the tracker.
        run: the run's id.
        worker: the worker's.
        beat: when the owner's heart last beat, by the database's clock.
        process: the owner's.
        idle: seconds since the newest entry.
        age: seconds since the owner was last known to live.
    """

    owner: str
    scope: int
    run: str
    worker: str
    beat: float
    process: dict[str, Any]
    idle: float = 0.0
    age: float = 0.0


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

    A worker is dead only when its lock is free and its heart has stopped: on this machine when its
    process has ended, elsewhere when it has not beaten for ``patience`` seconds. Safe while live
    workers work, and while another sweep does the same.

    Args:
        place: an engine, a URL, or a :class:`Ledger`.
        run: only what this run left.
        worker: only what workers with this id left.
        older_than: instead of what is dead, take what nobody has added to for so many seconds,
            dead or alive; 0 for all, once you know that its workers have ended.
        kept: take rows that ``keep_on_failure`` kept, too; or only those of this name.
        patience: see above, in seconds.
        ledger: the name of the ledger's table.
        schema: where that is.
        allow_production: as for :class:`ResourceTracker`.
        options: passed to :class:`CleanupManager`.

    Raises:
        CleanupError: rows are still there; they stay in the ledger, for a later sweep.
        LedgerError: there is no ledger, or one of another version, or one that this role may not
            use; or nothing is kept under the name that ``kept`` gives.
        ProductionDatabaseError: the database looks like production.
        TypeError: an argument has a name that neither this nor ``CleanupManager`` knows.
        ValueError: a time is negative, or a name empty.

    Example:
        >>> print(sweep("postgresql+psycopg://ci@db/app"))
        public.users 3 deleted (0.012 s)
    """
    refuse_unknown(options, signature(sweep).parameters)
    wanted = Wanted(run, worker, older_than, kept, patience)
    with _opened(place, ledger, schema, allow_production) as opened:
        custody = Custody(opened, options.get("retry"))
        try:
            with opened.engine.connect() as connection:
                refuse_unkept(opened, connection, kept)
            custody.take(wanted)
            return custody.clean(**options)
        finally:
            custody.close()
            with suppress(sa.exc.SQLAlchemyError, LedgerError):
                _forget(opened, _gone(opened, wanted))


class _Sweeping(CleanupManager):
    """Says of what is left that it stands in the ledger: nobody has its tracker."""

    def _described(self, leftovers: Sequence[Leftover]) -> str:
        return describe_leftovers(leftovers, swept=True)


class Custody:
    """Rows that were others', and are this process's to delete: an owner as any worker is.

    Args:
        ledger: where they are entered.
        retry: how often and how patiently.

    Raises:
        LedgerError: there is no ledger, or one of another version, or that this role may not use.
    """

    def __init__(self, ledger: Ledger, retry: RetryPolicy | None = None) -> None:
        with ledger.engine.connect() as connection:
            ledger.check(connection)
        self._ledger = ledger
        self._retry = retry or RetryPolicy()
        # Its own, and no other tracker's of this process: what it leaves is nobody's afterwards.
        self._owner = Owner(ledger)

    def take(self, wanted: Wanted) -> None:
        """Take entries over, in one transaction."""
        _let_locks_go(self._ledger, wanted, self._retry)
        self._run(lambda: _take(self._book(), wanted))

    def clean(self, **options: Any) -> CleanupReport:
        """Delete the rows; what cannot be deleted is left to whoever sweeps next.

        Args:
            options: passed to :class:`CleanupManager`.

        Raises:
            CleanupError: rows are still there.
        """
        book = self._book()
        tracker = self._run(lambda: _loaded(book))
        try:
            return _Sweeping(tracker, **options).cleanup()
        finally:
            # It is tidying up: what fails here, the next sweep does.
            with suppress(sa.exc.SQLAlchemyError, LedgerError):
                put_aside(book, left_id())

    def close(self) -> None:
        """Live no more: what is not deleted is anybody's to sweep."""
        self._owner.close()

    def _book(self) -> Book:
        book = Book(self._ledger, self._owner, _refuse)
        book.keeps_log = True
        return book

    def _run(self, transaction: Callable[[], T]) -> T:
        dialect = self._ledger.dialect

        def is_transient(error: BaseException) -> bool:
            return dialect.fault(error) in {Fault.TRANSIENT, Fault.LOST}

        return self._retry.run(transaction, is_transient=is_transient)


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
    """What :func:`sweep` would take, and what was kept for study; deletes nothing.

    Args:
        place: as for :func:`sweep`, and so all others.
        run: only what this run left.
        worker: only what workers with this id left.
        older_than: what nobody has added to for so many seconds, dead or alive.
        kept: show what was kept too; or only what has this name.
        patience: seconds without a heartbeat after which a worker is dead.
        ledger: the name of the ledger's table.
        schema: where that is.
        allow_production: as for :class:`ResourceTracker`.

    Raises:
        LedgerError: as for :func:`sweep`.
        ProductionDatabaseError: the database looks like production.
        ValueError: a time is negative, or a name empty.
    """
    wanted = Wanted(run, worker, older_than, kept, patience)
    with (
        _opened(place, ledger, schema, allow_production) as opened,
        opened.engine.connect() as connection,
    ):
        opened.check(connection)
        refuse_unkept(opened, connection, kept)
        logs: dict[str, dict[int, Logged]] = {}
        found = []
        for part in _parts(opened, connection, wanted):
            if part.owner not in logs:
                logs[part.owner] = played(opened, connection, part.owner)
            log = logs[part.owner].get(part.scope)
            if log is not None:
                found.append(_shown(part, log))
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
    """The ledger; an engine that was made for it is disposed of."""
    if isinstance(place, Ledger):
        refuse_missing(place)
        yield place
        return
    if isinstance(place, (str, sa.URL)):
        engine = sa.create_engine(place)
        try:
            if engine.dialect.is_async:
                raise LedgerError(
                    f"{engine.dialect.driver} is an asynchronous driver. Give the URL of a "
                    f"synchronous one, or write await sweep_async(create_async_engine(...))."
                )
            ledger = Ledger(engine, name=name, schema=schema, allow_production=allow_production)
            refuse_missing(ledger)
            yield ledger
        finally:
            engine.dispose()
        return
    ledger = Ledger(place, name=name, schema=schema, allow_production=allow_production)
    if ledger.engine.dialect.is_async and not in_greenlet():
        raise LedgerError(
            "This engine is asynchronous: write await sweep_async(engine), or await "
            "find_orphans_async(engine)."
        )
    refuse_missing(ledger)
    yield ledger


def _refuse(table: TableName, reason: str) -> None:
    raise TidyRowsError(f"What is gone of {table} cannot be written to the ledger: {reason}")


# -- whose -------------------------------------------------------------------------------------


def _parts(ledger: Ledger, connection: sa.Connection, wanted: Wanted) -> list[_Part]:
    """What is to be taken, tracker by tracker."""
    table = ledger.table_on(connection)
    now = _now(ledger, connection)
    names = ("owner", "scope", "kind", "run", "worker", "maker")
    columns = [table.c[name] for name in names]
    asked = (
        sa.select(*columns, sa.func.max(table.c.written))
        .where(table.c.seq > 0, table.c.owner != LEDGER)
        .group_by(*columns)
        .order_by(*columns)
    )
    owners = _owners(ledger, connection)
    parts: dict[tuple[str, int], _Part] = {}
    newest: dict[tuple[str, int], float] = {}
    for owner, scope, kind, run, worker, maker, written in ledger.run(connection, asked):
        place = owner, scope
        newest[place] = max(newest.get(place, written), written)
        if kind in MAKING and place not in parts:
            beat, process = owners.get(owner, owners.get(maker, (written, {})))
            parts[place] = _Part(owner, scope, run, worker, beat, process)
    dead: dict[str, bool] = {}
    found = []
    for place, part in parts.items():
        part.idle = now - newest[place]
        part.age = min(now - part.beat, part.idle)
        if not wanted.names(part):
            continue
        if is_kept(part.owner):
            take = wanted.kept is True or wanted.kept == part.owner
        elif isinstance(wanted.kept, str):
            take = False
        elif wanted.older_than is not None:
            take = part.idle >= wanted.older_than
        else:
            if part.owner not in dead:
                dead[part.owner] = _is_dead(ledger, connection, part, wanted)
            take = dead[part.owner]
        if take:
            found.append(part)
    return found


def _now(ledger: Ledger, connection: sa.Connection) -> float:
    return float(connection.execute(sa.text(f"SELECT {ledger.dialect.clock}")).scalar_one())


def _owners(ledger: Ledger, connection: sa.Connection) -> dict[str, tuple[float, dict[str, Any]]]:
    """Each owner's last heartbeat, and its process."""
    table = ledger.table_on(connection)
    asked = sa.select(table.c.maker, table.c.written, table.c.body).where(table.c.kind == OWNER)
    return {
        maker: (float(written), json.loads(body))
        for maker, written, body in ledger.run(connection, asked)
    }


def _is_dead(ledger: Ledger, connection: sa.Connection, part: _Part, wanted: Wanted) -> bool:
    """Whether the owner's lock is free and its heart has stopped."""
    if is_left(part.owner):
        return True
    if is_handed(part.owner):
        return wanted.handed or part.age > wanted.patience
    dialect, number = ledger.dialect, int(part.owner, 16)
    if dialect.is_alive(connection, number):
        return False
    if is_over(part.process):
        return True
    age = part.age
    if dialect.beats_in_file:
        since = dialect.file_beat_age(connection, number)
        age = age if since is None else min(age, since)
    return age > wanted.patience


def _let_locks_go(ledger: Ledger, wanted: Wanted, retry: RetryPolicy) -> None:
    """Wait for the locks of processes that have ended on this machine: it takes a moment."""
    until = retry.clock() + _LETS_GO
    everybody = replace(wanted, older_than=0.0, kept=False)
    while True:
        with ledger.engine.connect() as connection:
            held = any(
                is_over(part.process)
                and not (is_left(part.owner) or is_handed(part.owner))
                and ledger.dialect.is_alive(connection, int(part.owner, 16))
                for part in _parts(ledger, connection, everybody)
            )
        if not held or retry.clock() >= until:
            return
        retry.sleep(0.02)


def _take(book: Book, wanted: Wanted) -> None:
    ledger = book.ledger
    with ledger.alone(lock_timeout=5.0) as connection:
        places = [(part.owner, part.scope) for part in _parts(ledger, connection, wanted)]
        take_over(book, connection, places)


def _loaded(book: Book) -> ResourceTracker:
    with book.ledger.engine.connect() as connection:
        return load(book, connection)


def _gone(ledger: Ledger, wanted: Wanted) -> list[str]:
    """Dead owners that have no entries any more."""
    with ledger.engine.connect() as connection:
        table = ledger.table_on(connection)
        now = _now(ledger, connection)
        used = set(
            ledger.run(
                connection,
                sa.select(table.c.maker)
                .where(table.c.seq > 0)
                .union(sa.select(table.c.owner).where(table.c.seq > 0)),
            ).scalars()
        )
        return [
            owner
            for owner, (beat, process) in sorted(_owners(ledger, connection).items())
            if owner not in used
            and _is_dead(
                ledger,
                connection,
                _Part(owner, 0, "", "", beat, process, age=now - beat),
                wanted,
            )
        ]


def _forget(ledger: Ledger, owners: list[str]) -> None:
    """What is left of dead owners themselves: their own rows, their lock files."""
    with ledger.alone(lock_timeout=5.0) as connection:
        table = ledger.table_on(connection)
        for owner in owners:
            forget_owner(connection, table, owner)
        ledger.dialect.remove_lives(connection)


# -- what --------------------------------------------------------------------------------------


def _shown(part: _Part, log: Logged) -> Orphans:
    external: dict[str, int] = defaultdict(int)
    for body in log.externals.values():
        external[json.loads(body)["kind"]] += 1
    return Orphans(
        part.run,
        part.worker,
        tuple(log.tests),
        part.process.get("host"),
        part.process.get("pid"),
        part.age,
        {
            held.table.name: len(held.keys) + held.nameless + len(held.doubtful)
            for held in log.tracker.snapshot()
        },
        dict(external),
        part.owner if is_kept(part.owner) else None,
    )
