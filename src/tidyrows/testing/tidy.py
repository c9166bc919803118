"""One object per test, in any framework; and one for rows that several tests share."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self, TypeVar

import sqlalchemy as sa

from tidyrows.arguments import checked, instance_of, optional
from tidyrows.cleanup.configuration import with_configured
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.connections.leases import leases_returned
from tidyrows.dialects import engine_for
from tidyrows.errors import LedgerError, NotBoundError, SessionStateError, TidyRowsWarning
from tidyrows.greenlets import asynchronous_session, in_greenlet, is_async, spawn
from tidyrows.ledger.table import Ledger
from tidyrows.locks.once import Asked, FilePlace, made_once
from tidyrows.tracking.binding import Binding
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext, note_test

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path
    from types import TracebackType

    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncSession

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.retry import RetryPolicy
    from tidyrows.tracking.binding import Bind

T = TypeVar("T")

_installed: weakref.WeakKeyDictionary[sa.Engine, bool] = weakref.WeakKeyDictionary()
"""True: the database of the engine has a ledger; False: this role may not make one."""


class Tidy:
    """The tracker, the context and the cleanup of one test.

    Use it as a block, or with :meth:`start` and :meth:`finish` where a framework has a hook for
    each. A cleanup that Ctrl-C prevents is done when the process ends.

    Args:
        bind: where the rows go, as for ``ResourceTracker``, or a URL.
        test: the test's id.
        context: run, worker and test of the rows; by default this worker's, with this test.
        ledger: True enters the rows into a ledger, and installs it where there is none; by default
            where the run has more than one worker, or rows may be kept. Or a ledger of your own.
        keep_on_failure: where the test fails, leave its rows for study.
        allow_production: as for ``ResourceTracker``.
        retry: the retries of factory calls and of the cleanup.
        options: passed to ``CleanupManager``.

    Attributes:
        bind: the bind, or an engine for the URL.
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
    )
    def __init__(
        self,
        bind: Bind | str | sa.URL,
        *,
        test: str | None = None,
        context: WorkerContext | None = None,
        ledger: Ledger | bool | None = None,
        keep_on_failure: bool = False,
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
        self._ledger = ledger
        self._keep = keep_on_failure
        self._allow_production = allow_production
        self._retry = retry
        self._options = options
        self.context = context or WorkerContext.current().for_test(test)
        self.has_kin = self.context.worker_count > 1

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
    def report(self) -> CleanupReport | None:
        """The report of the cleanup; None before it."""
        return self.cleanup.last_report

    @property
    def is_unfinished(self) -> bool:
        """After :meth:`finish`, whether rows wait for others, or for a COMMIT."""
        is_held = self.report is not None and bool(self.report.held)
        return is_held or any(self.tracker.engines.pending_changes())

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
        """Start the tracker.

        Raises:
            LedgerError: a ledger was asked for, and this role may not make it.
            ProductionDatabaseError: the database looks like production.
            SessionStateError: it has been started already.
        """
        if hasattr(self, "tracker") and self.tracker.active:
            self.tracker.start()  # which raises
        ledger = self._installed_ledger()
        self.tracker = ResourceTracker(
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
        if not self.is_async:  # there is no loop when the process ends
            self._process = os.getpid()
            atexit.register(self._finish_at_exit)
        return self

    async def start_async(self) -> Self:
        """As :meth:`start`, where the bind is asynchronous."""
        await self.prepare_async()
        return self.start()

    async def prepare_async(self) -> None:
        """The part of :meth:`start` that must be awaited: install the ledger."""
        if self.is_async:
            await spawn(self._installed_ledger)

    def finish(self, *, failed: bool = False) -> str | None:
        """Stop the tracker, and delete what the test made.

        Args:
            failed: the test has failed: its rows are kept where that was asked for.

        Returns:
            Where rows were kept: which rows, and what deletes them.

        Raises:
            CleanupError: rows are still there.
        """
        self.tracker.stop()
        with self._at_exit_unless_done(), self._leases():
            if failed and self._keep and self._has_rows:
                return self.cleanup.keep()
            self.cleanup.cleanup()
        return None

    async def finish_async(self, *, failed: bool = False) -> str | None:
        """As :meth:`finish`, where the bind is asynchronous."""
        if not self.tracker.is_async:
            return self.finish(failed=failed)
        return await self.tracker.run_sync(lambda _tracker: self.finish(failed=failed))

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
            self.cleanup.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Self:
        return await self.start_async()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._at_exit_unless_done():
            await self.cleanup.__aexit__(kind, error, traceback)

    # -- the ledger --------------------------------------------------------------------------------

    def _choose_ledger(self) -> Ledger | None:
        """The ledger to use, which may have to be installed."""
        if isinstance(self._ledger, Ledger):
            return self._ledger
        # Kept rows outlive this process: without a ledger nobody could delete them any more.
        wanted = self._ledger or self.has_kin or self._keep
        engine = Binding(self.bind).engine() if wanted else None
        if engine is None or self._ledger is False:
            return None
        if self._ledger is None and not _installed.get(engine, True):
            return None
        ledger = Ledger(engine, allow_production=self._allow_production)
        return None if ledger.is_private else ledger

    def _installed_ledger(self) -> Ledger | None:
        """The ledger to use; where this role may not make one that was not asked for, None."""
        ledger = self._choose_ledger()
        if ledger is None or ledger is self._ledger or _installed.get(ledger.engine):
            return ledger
        if self.is_async and not in_greenlet():
            raise SessionStateError(
                "The ledger of an asynchronous engine is installed by await: write async with "
                "Tidy(...), or await tidy.start_async()."
            )
        try:
            ledger.install()
        except LedgerError as error:
            if self._ledger:
                raise
            _installed[ledger.engine] = False
            warnings.warn(
                f"Rows of a worker that is killed, and those of failed tests that are kept, would "
                f"have to be deleted by hand: {error}",
                TidyRowsWarning,
                stacklevel=4,
            )
            return None
        _installed[ledger.engine] = True
        return ledger

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


class Shared:
    """Rows that several tests share.

    Rows that are created in the block are not the test's, and stay when the test ends.

    Args:
        tidy: its tracker tracks the rows.
        folder: where workers share what they have made; None where there is one process only.

    Example:
        >>> @pytest.fixture(scope="session")
        ... def org_id(tidy_run):
        ...     return tidy_run.once("org", lambda: OrgFactory().id)
    """

    def __init__(self, tidy: Tidy, folder: Path | None = None) -> None:
        self._tidy = tidy
        self._folder = folder
        self._values: dict[str, Any] = {}
        self._depth = 0
        tidy.start().tracker.stop()

    @property
    def tracker(self) -> ResourceTracker:
        """The tracker of the rows."""
        return self._tidy.tracker

    @property
    def session(self) -> orm.Session:
        """The session that factories use in the block."""
        return self._tidy.session

    def __enter__(self) -> Self:
        if not self._depth:
            self.tracker.start()
        self._depth += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.tracker.stop()
            self.tracker.sessions.release()  # tests must not wait for its locks

    def once(self, name: str, make: Callable[[], T], *, timeout: float = 300.0) -> T:
        """The value that ``make`` returned when this name was first used.

        Args:
            name: of the value.
            make: creates rows, and returns what tests need to know of them. Where several workers
                share the rows, one worker calls it, and the value must have a form in JSON: keys,
                names.
            timeout: how long to wait for the worker that calls it, in seconds.

        Raises:
            OncePerRunError: the value has no such form, or ``make`` has failed in another worker.
            LockTimeoutError: the value was not there in time; the error names who makes it.
        """
        if name not in self._values:

            def tracked() -> T:
                with self:
                    return make()

            if self._folder is None:
                self._values[name] = tracked()
            else:
                asked = Asked("tidy_run.once", name, timeout, WorkerContext.current())
                self._values[name] = made_once(asked, tracked, FilePlace(self._folder, name))
        value: T = self._values[name]
        return value
