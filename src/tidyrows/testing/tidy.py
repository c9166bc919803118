"""One object per test, in any framework."""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from tidyrows.arguments import checked, instance_of, kinds_of, optional
from tidyrows.cleanup.configuration import with_configured
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.connections.leases import leases_returned
from tidyrows.dialects import engine_for
from tidyrows.errors import NotBoundError, SessionStateError
from tidyrows.greenlets import asynchronous_session, in_greenlet, is_async, is_engine, spawn
from tidyrows.isolation.isolate import LEVELS, Isolation, PassiveTracker, environment, isolate
from tidyrows.isolation.levels import LEVEL, NONE, WORKER, Wanted
from tidyrows.ledger.table import Ledger
from tidyrows.testing.installed_ledger import installed_ledger
from tidyrows.tracking.binding import Binding
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext, note_test

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.retry import RetryPolicy
    from tidyrows.tracking.binding import Bind

_BUILDS = {name: kinds_of(isolate)[name] for name in ("metadata", "migrate", "seed", "pool")}


class Tidy:
    """The tracker, the context and the cleanup of one test.

    Use it as a block, or with :meth:`start` and :meth:`finish` where a framework has a hook for
    each. A cleanup that Ctrl-C prevents is done when the process ends.

    At a level of isolation that undoes all rows there is no cleanup: the level is closed, and what
    concerns a cleanup (``ledger``, ``keep_on_failure``, ``own``...) has no effect.

    Args:
        bind: where the rows go, as for ``ResourceTracker``, or a URL.
        test: the test's id.
        context: run, worker and test of the rows; by default this worker's, with this test.
        ledger: True enters the rows into a ledger, and installs it where there is none; by default
            where the run has more than one worker, or rows may be kept. Or a ledger of your own.
        keep_on_failure: where the test fails, leave its rows for study.
        isolation: how far the test is kept from others: a level of :func:`tidyrows.isolate`. Other
            levels than ``none`` and ``worker`` need an Engine or an AsyncEngine.
        metadata: as for ``isolate``, and so are ``migrate``, ``seed`` and ``pool``; for the levels
            ``schema`` and ``database``.
        migrate: see ``metadata``.
        seed: see ``metadata``.
        pool: see ``metadata``.
        allow_production: as for ``ResourceTracker``.
        retry: the retries of factory calls and of the cleanup.
        options: passed to ``CleanupManager``.

    Attributes:
        bind: the bind, or an engine for the URL; from ``start`` on the engine of the level.
        isolation: the level.
        context: run, worker and test.
        has_kin: whether the run has, or may get, other workers; then there is a ledger by default.
        tracker: tracks the rows; set by ``start``.
        cleanup: deletes them.

    Example:
        >>> with Tidy(engine, test="test_login") as tidy:
        ...     UserFactory()
        ...     len(tidy.tracker)
        1
    """

    tracker: ResourceTracker
    cleanup: CleanupManager

    @with_configured
    @checked(
        CleanupManager,
        ResourceTracker,
        test=optional(instance_of(str, need="a text", example="'test_login'")),
        ledger=optional(instance_of(Ledger, bool, need="a Ledger, True or False", example="True")),
        isolation=LEVEL,
        **_BUILDS,
    )
    def __init__(
        self,
        bind: Bind | str | sa.URL,
        *,
        test: str | None = None,
        context: WorkerContext | None = None,
        ledger: Ledger | bool | None = None,
        keep_on_failure: bool = False,
        isolation: str = WORKER,
        metadata: sa.MetaData | None = None,
        migrate: Any = None,
        seed: Any = None,
        pool: Any = True,
        allow_production: bool | Collection[str] = False,
        retry: RetryPolicy | None = None,
        **options: Any,
    ) -> None:
        self._own_engine = engine_for(bind) if isinstance(bind, (str, sa.URL)) else None
        if self._own_engine is not None and self._own_engine.dialect.is_async:
            raise NotBoundError(
                f"{self._own_engine.dialect.driver} is an asynchronous driver: write "
                f"Tidy(create_async_engine(...)), or give the URL of a synchronous one."
            )
        self.bind: Any = bind if self._own_engine is None else self._own_engine
        self._wanted_ledger = ledger
        self._keep = keep_on_failure
        self._allow_production = allow_production
        self._retry = retry
        self._options = options
        self.context = context or WorkerContext.current().for_test(test)
        self.has_kin = self.context.worker_count > 1
        self.isolation = isolation
        self._given = self.bind
        self._builds = (metadata, migrate, seed, pool)
        self._level: Isolation | None = None
        self._given_is_engine = is_engine(self.bind)
        if isolation not in {NONE, WORKER} and not self._given_is_engine:
            raise NotBoundError(
                f"The level {isolation!r} of isolation gives the test an engine of its own, and a "
                f"{type(bind).__name__} is bound to another. Give an Engine (in pytest: have "
                f"tidy_engine return one), and take tidy.session or Session(tidy.engine); or write "
                f"isolation='worker'."
            )

    # -- what a test uses ----------------------------------------------------------------------

    @property
    def is_async(self) -> bool:
        """Whether the bind is asynchronous."""
        return is_async(self.bind)

    @property
    def session(self) -> orm.Session:
        """The session that factories use.

        Raises:
            SessionStateError: the bind is asynchronous.
        """
        self.tracker.sessions.refuse_blocking(
            "await tidy.async_session.scalars(...), or await tidy.tracker.run_sync(lambda tracker: "
            "tracker.session.scalars(...))"
        )
        return self.tracker.session

    @property
    def async_session(self) -> AsyncSession:
        """The session that factories use, where the bind is asynchronous.

        Raises:
            SessionStateError: the bind is synchronous.
        """
        if not self.is_async:
            raise SessionStateError(
                "This test's database is reached by a synchronous engine. Write tidy.session, or "
                "have tidy_engine return create_async_engine(...)."
            )
        return asynchronous_session(self.tracker.session)

    @property
    def engine(self) -> sa.Engine | AsyncEngine:
        """The engine that the test uses, at any level.

        Raises:
            NotBoundError: the bind is a session that leads to several databases, or to none.
        """
        found: sa.Engine | AsyncEngine | None = (
            self.bind if is_engine(self.bind) else Binding(self.bind).engine()
        )
        if found is None:
            raise NotBoundError(
                f"This {type(self.bind).__name__} leads to several databases, or to none, so there "
                f"is no tidy.engine. Have tidy_engine return an Engine."
            )
        return found

    @property
    def url(self) -> sa.URL:
        """The URL of the engine, with the password."""
        return self.engine.url

    @property
    def schema(self) -> str | None:
        """The schema, database or file that the test has for itself; None at other levels."""
        return None if self._level is None else self._level.schema

    @property
    def suite_engine(self) -> sa.Engine | None:
        """The engine of the bind that was given; None for a session with several or none."""
        return Binding(self._given).engine()

    def environ(self) -> dict[str, str]:
        """Environment variables for a process that is to use the same tables.

        ``DATABASE_URL``, with the password, what ``WorkerContext.current()`` reads, and
        ``PGAPPNAME``; where no URL can name the schema (asyncpg), ``TIDYROWS_SCHEMA``.

        Raises:
            IsolationError: at level ``transaction``, of which no other process sees anything.
        """
        if self._level is not None:
            return self._level.environ()
        engine: Any = self.engine
        return environment(getattr(engine, "sync_engine", engine), self.context)

    @property
    def deletes_rows(self) -> bool:
        """Whether a cleanup deletes the rows, as at level ``worker``."""
        return self.isolation == WORKER

    @property
    def undoes_rows(self) -> bool:
        """Whether the end of the level undoes all rows."""
        return LEVELS[self.isolation].undoes_rows

    @property
    def report(self) -> CleanupReport | None:
        """The report of the cleanup; None before it, and where there is none."""
        return self.cleanup.last_report

    @property
    def is_unfinished(self) -> bool:
        """After :meth:`finish`, whether rows wait for others, or for a COMMIT."""
        is_held = self.report is not None and bool(self.report.held)
        return self.deletes_rows and (is_held or any(self.tracker.engines.pending_changes()))

    @property
    def has_late_rows(self) -> bool:
        """After :meth:`finish`, whether rows have been committed that it did not see."""
        self.tracker.engines.resolve()
        held = {each.row for each in self.report.held} if self.report else set()
        return any(
            each.keyless_count or any(each.table.row(key) not in held for key in each.keys)
            for each in self.tracker.store.snapshot()
        )

    # -- a framework's two hooks -------------------------------------------------------------------

    def start(self) -> Self:
        """Open the level, and start the tracker.

        Raises:
            IsolationError: the database cannot give the level, or what it needs is locked.
            LedgerError: a ledger was asked for, and this role may not make it.
            ProductionDatabaseError: the database looks like production.
            SessionStateError: it has been started already.
        """
        if hasattr(self, "tracker") and self.tracker.active:
            self.tracker.start()  # which raises
        ledger = self._ledger()
        self._open()
        try:
            self._start_tracker(ledger)
        except BaseException:
            if self._level is not None and (not self.is_async or in_greenlet()):
                self._level.close()
            raise
        if not self.is_async:  # there is no loop when the process ends
            self._process = os.getpid()
            atexit.register(self._finish_at_exit)
        return self

    def _ledger(self) -> Ledger | None:
        """The ledger to use; none where no row can outlive this process."""
        if not self.deletes_rows:
            return None
        # Kept rows outlive this process: without a ledger nobody could delete them any more.
        may_outlive = self.has_kin or self._keep
        return installed_ledger(
            self.bind, self._wanted_ledger, self._allow_production, by_default=may_outlive
        )

    def _open(self) -> None:
        """Open the level, unless :meth:`prepare_async` has."""
        if self._level is None and self.isolation != WORKER and self._given_is_engine:
            allowed = self._allow_production
            wanted = Wanted(self.context, *self._builds, allow_production=allowed)
            level = LEVELS[self.isolation]
            opened = Isolation(self._given, level, wanted, allow_production=allowed)
            self.bind = opened.open()
            self._level = opened

    def _start_tracker(self, ledger: Ledger | None) -> None:
        tracker = ResourceTracker if self.deletes_rows else PassiveTracker
        self.tracker = tracker(
            self.bind,
            context=self.context,
            ledger=ledger,
            allow_production=self._allow_production,
            retry=self._retry,
        )
        self.cleanup = CleanupManager(
            self.tracker, retry=self._retry, keep_on_failure=self._keep, **self._options
        )
        self._began = perf_counter()
        note_test(self.context.test_id)
        self.tracker.start()
        if self._level is not None:
            self._level.tracker = self.tracker

    async def start_async(self) -> Self:
        """As :meth:`start`, where the bind is asynchronous."""
        await self.prepare_async()
        return self.start()

    async def prepare_async(self) -> None:
        """The part of :meth:`start` that must be awaited: install the ledger, open the level."""
        if self.is_async:
            await spawn(self._ledger)
            await spawn(self._open)

    def finish(self, *, failed: bool = False) -> str | None:
        """Stop the tracker, and delete what the test made; or close the level.

        Args:
            failed: the test has failed: its rows are kept where that was asked for.

        Returns:
            Where rows were kept: which rows, and what deletes them.

        Raises:
            CleanupError: rows are still there.
            IsolationError: something has been committed behind the level's back, or what the test
                started holds locks.
        """
        self.tracker.stop()
        with self._at_exit_unless_done(), self._leases():
            if not self.deletes_rows:
                self._end_level()
                return None
            if failed and self._keep and self._has_rows:
                return self.cleanup.keep()
            self.cleanup.cleanup()
        return None

    async def finish_async(self, *, failed: bool = False) -> str | None:
        """As :meth:`finish`, where the bind is asynchronous."""
        if not self.tracker.is_async:
            return self.finish(failed=failed)
        return await self.tracker.run_sync(lambda _tracker: self.finish(failed=failed))

    def _end_level(self, error: BaseException | None = None) -> None:
        """Undo what the test wrote, or leave it at level ``none``."""
        if self._level is not None:
            self._level.end(error)
        else:
            self.tracker.stop()
            self.tracker.dismiss_leak_warning()
            self.tracker.sessions.release()
        if self.undoes_rows:
            self.tracker.untracked.clear()  # nothing is left of them either

    def _leases(self, error: BaseException | None = None) -> AbstractContextManager[None]:
        """Connections of ``worker_engine`` that the test has left are given back."""
        note_test(None)
        return leases_returned(self._began, self.tracker.sessions.release, error)

    @property
    def _has_rows(self) -> bool:
        self.tracker.engines.resolve()
        return bool(self.tracker.store.snapshot() or self.tracker.externals())

    # -- as a block ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._at_exit_unless_done(), self._leases(error):
            if self.deletes_rows:
                self.cleanup.__exit__(kind, error, traceback)
            else:
                self._end_level(error)

    async def __aenter__(self) -> Self:
        return await self.start_async()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._at_exit_unless_done():
            if self.deletes_rows:
                await self.cleanup.__aexit__(kind, error, traceback)
            else:
                await spawn(self._end_level, error)

    # -- the end of the process --------------------------------------------------------------------

    @contextmanager
    def _at_exit_unless_done(self) -> Iterator[None]:
        """Where the block is interrupted, or rows are held by others, finish at process exit."""
        is_done = True
        try:
            yield
            is_done = not self.is_unfinished
        except KeyboardInterrupt:
            is_done = False
            raise
        finally:
            if is_done:
                atexit.unregister(self._finish_at_exit)
            if self._own_engine is not None:
                self._own_engine.dispose()

    def _finish_at_exit(self) -> None:
        if self._process == os.getpid():  # not in a child that was forked
            self.finish()
