"""One call for every level of isolation, with one interface for the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows.arguments import checked, instance_of, optional
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.reasons import in_full
from tidyrows.dialects import dialect_for
from tidyrows.errors import IsolationError, NotBoundError, SessionStateError, add_note
from tidyrows.greenlets import asynchronous_engine, is_async, is_engine, spawn, synchronous
from tidyrows.isolation.blueprint import BUILDER, POOL
from tidyrows.isolation.levels import LEVEL, Level, NoIsolation, Wanted, WorkerLevel
from tidyrows.isolation.schema_level import DatabaseLevel, SchemaLevel
from tidyrows.isolation.transaction import TransactionLevel
from tidyrows.production import PERMISSION
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import CONTEXT, WorkerContext, session_label

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tidyrows.ledger.table import Ledger

LEVELS: dict[str, type[Level]] = {
    each.name: each
    for each in (NoIsolation, WorkerLevel, TransactionLevel, SchemaLevel, DatabaseLevel)
}


class PassiveTracker(ResourceTracker):
    """Knows which rows a test has made, at a level that undoes all of them."""

    def warn_once(self, subject: Any, message: str) -> None:
        """No row is left because it is not tracked."""


def environment(
    engine: sa.Engine, context: WorkerContext, schema: str | None = None
) -> dict[str, str]:
    """Environment variables for a process that is to use the same tables.

    ``DATABASE_URL``, with the password, what ``WorkerContext.current()`` reads, and what names the
    connections (``PGAPPNAME``). Where the driver's URL cannot name a schema (asyncpg),
    ``TIDYROWS_SCHEMA`` names it.
    """
    found = {
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "TIDYROWS_RUN": context.run_id,
        "TIDYROWS_WORKER": context.worker_id,
        "TIDYROWS_WORKER_INDEX": str(context.worker_index),
        "TIDYROWS_WORKER_COUNT": str(context.worker_count),
        "TIDYROWS_TEST": context.test_id or "",
    }
    found |= dialect_for(engine).environ(session_label(context))
    return found | ({"TIDYROWS_SCHEMA": schema} if schema else {})


class Isolation:
    """A database for one test, at any level; :func:`isolate` makes it.

    Attributes:
        level: the level's name.
        context: run, worker and test.
        engine: what the test uses; asynchronous where ``isolate`` was given such an engine.
        tracker: what is inserted through it; set in the block.
    """

    tracker: ResourceTracker
    engine: Any

    def __init__(
        self,
        engine: Any,
        level: type[Level],
        wanted: Wanted,
        *,
        allow_production: bool | Collection[str] = False,
        ledger: Ledger | None = None,
    ) -> None:
        if not is_engine(engine):
            raise NotBoundError(
                f"isolate() needs an Engine or an AsyncEngine, and a {type(engine).__name__} is "
                f"none. Write isolate(create_engine(...), {level.name!r})."
            )
        self._given = engine
        self._level = level(synchronous(engine), wanted)
        self._tracker_options: dict[str, Any] = {
            "allow_production": allow_production,
            "ledger": ledger if level.deletes_rows else None,
        }
        self.level = level.name
        self.context = wanted.context

    # -- what a test uses --------------------------------------------------------------------

    @property
    def schema(self) -> str | None:
        """The schema, database or file that the test has for itself; None at other levels."""
        return self._level.schema

    @property
    def url(self) -> sa.URL:
        """The URL of the database, which leads another process to the same tables."""
        url: sa.URL = synchronous(self.engine).url
        return url

    @property
    def sessionmaker(self) -> Any:
        """Makes sessions on the engine: a sessionmaker, or an async_sessionmaker."""
        if is_async(self._given):
            from sqlalchemy.ext.asyncio import async_sessionmaker  # noqa: PLC0415 -- needs greenlet

            return async_sessionmaker(self.engine, expire_on_commit=False)
        return orm.sessionmaker(self.engine)

    def session(self) -> orm.Session | AsyncSession:
        """A new session on the engine; its user closes it."""
        session: orm.Session | AsyncSession = self.sessionmaker()
        return session

    def environ(self) -> dict[str, str]:
        """Environment variables for a process that is to use the same tables.

        See :func:`environment`.

        Raises:
            IsolationError: at level ``transaction``, of which no other process sees anything.
        """
        if not self._level.is_visible:
            raise IsolationError(
                f"At level {self.level!r} nothing is committed, so another process would not see "
                f"the rows of the test. For an application in another process write "
                f"isolate(engine, 'worker'), 'schema' or 'database'.",
                level=self.level,
            )
        return environment(synchronous(self.engine), self.context, self.schema)

    # -- the level alone, for those who have a tracker of their own ----------------------------

    def open(self) -> Any:
        """Open the level; returns the engine."""
        engine = self._level.open()
        self.engine = asynchronous_engine(engine) if is_async(self._given) else engine
        if engine is self._level.engine:
            self.engine = self._given
        return self.engine

    def close(self) -> None:
        """Close the level."""
        self._level.close()

    # -- as a block --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if is_async(self._given):
            raise SessionStateError(
                f"The engine of isolate() is asynchronous. Write async with isolate(engine, "
                f"{self.level!r}): ..."
            )
        return self._enter()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.end(error)

    async def __aenter__(self) -> Self:
        return await spawn(self._enter)

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await spawn(self.end, error)

    def _enter(self) -> Self:
        self.open()
        try:
            tracker = ResourceTracker if self._level.deletes_rows else PassiveTracker
            self.tracker = tracker(self.engine, context=self.context, **self._tracker_options)
            self.tracker.start()
        except BaseException:
            self.close()
            raise
        return self

    def end(self, error: BaseException | None) -> None:
        """Close the level after its tracker; an error of the block is not hidden by another."""
        try:
            try:
                self.tracker.stop()
                if self._level.deletes_rows:
                    CleanupManager(self.tracker).cleanup()
                else:
                    self.tracker.dismiss_leak_warning()
                    self.tracker.sessions.release()
            finally:
                self._close()
        except Exception as failure:
            if error is None:
                raise
            if error is not failure:
                add_note(error, f"tidyrows: the end of isolate() failed too: {in_full(failure)}")

    def _close(self) -> None:
        try:
            self.close()
        except IsolationError as failure:
            if failure.escaped:
                self._delete_escaped(failure)
            raise
        finally:
            if self._level.undoes_rows:
                self.tracker.store.forget_parent()

    def _delete_escaped(self, failure: IsolationError) -> None:
        """Delete what was committed behind the level's back, as level ``worker`` does."""
        tracker = self.tracker
        for change in list(tracker.engines.pending_changes()):
            tracker.apply(change)  # a session was open at that moment
        failure.rows = tuple(tracker.rows())
        if failure.rows:
            options = {"allow_production": self._tracker_options["allow_production"]}
            own = ResourceTracker.from_json(tracker.to_json(), self._given, **options)
            report = CleanupManager(own).cleanup()
            add_note(failure, f"tidyrows: {report}")
        else:
            add_note(failure, "tidyrows: no rows are known that were inserted before.")


@checked(
    level=LEVEL,
    context=CONTEXT,
    metadata=optional(instance_of(sa.MetaData, need="a MetaData", example="Base.metadata")),
    migrate=BUILDER,
    seed=BUILDER,
    pool=POOL,
    allow_production=PERMISSION,
)
def isolate(
    engine: sa.Engine | AsyncEngine,
    level: str = "worker",
    *,
    context: WorkerContext | None = None,
    metadata: sa.MetaData | None = None,
    migrate: Any = None,
    seed: Any = None,
    pool: Any = True,
    allow_production: bool | Collection[str] = False,
    ledger: Ledger | None = None,
) -> Isolation:
    """Keep what a block writes from all others who use the database.

    Args:
        engine: on the suite's database.
        level: how far: ``none``, ``worker``, ``transaction``, ``schema``, ``database``.
        context: run, worker and test; by default this worker's.
        metadata: the tables of a schema or database that is made.
        migrate: what makes them instead: SQL, or a function that gets an engine.
        seed: what writes the reference data: SQL, or a function that gets a connection.
        pool: whether a schema or database is kept for the next test and the next run; or, where a
            function builds it, the files or folders whose contents tell when it does so otherwise.
        allow_production: as for ``ResourceTracker``.
        ledger: as for ``ResourceTracker``.

    Raises:
        NotBoundError: ``engine`` is no engine.
        ArgumentError: an argument has a value that it does not take.
        IsolationError: in the block, and at its end: the level cannot give what was asked for, or
            a transaction was ended behind its back.

    Example:
        >>> with isolate(engine, "worker") as db, db.session() as session:
        ...     session.add(User(name="Ada"))
        ...     session.commit()
    """
    wanted = Wanted(
        context or WorkerContext.current(), metadata, migrate, seed, pool, allow_production
    )
    return Isolation(
        engine, LEVELS[level], wanted, allow_production=allow_production, ledger=ledger
    )
