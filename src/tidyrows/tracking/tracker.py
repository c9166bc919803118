"""The ResourceTracker: every row whose insert committed while it listened."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from tidyrows.capture import ownership
from tidyrows.errors import SessionStateError
from tidyrows.external import Externals
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.production import checked_permission
from tidyrows.retry import RetryPolicy
from tidyrows.tracking import handover, leak_warning
from tidyrows.tracking.binding import Binding
from tidyrows.tracking.engines import Engines
from tidyrows.tracking.journals import Journals
from tidyrows.tracking.preserved import Preserved
from tidyrows.tracking.resources import TrackedResources
from tidyrows.tracking.selection import Selection
from tidyrows.tracking.sessions import Sessions
from tidyrows.tracking.store import Store
from tidyrows.tracking.tracker_sink import TrackerSink
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import sqlalchemy as sa
    from sqlalchemy import orm

    from tidyrows.capture.ownership import TrackerStack
    from tidyrows.external import ExternalResource
    from tidyrows.keys import RowKey
    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.tags import Whose

P = ParamSpec("P")
T = TypeVar("T")


_all: weakref.WeakSet[ResourceTracker] = weakref.WeakSet()


class ResourceTracker(TrackerSink):
    """Remembers every row that is committed between :meth:`start` and :meth:`stop`.

    Bound to an Engine it hears what any session in this process writes through that engine; bound
    to a Session, sessionmaker, scoped_session or Connection, what those write; and so with their
    asynchronous kin. ``CleanupManager`` starts and stops it and deletes what it holds.

    Args:
        bind: where the rows go.
        context: whose rows they are; by default this worker's (:meth:`WorkerContext.current`).
        allow_production: names of hosts, databases or environments that are fine though they look
            like production, as in ``["app_prod", "APP_ENV=production"]``; True allows everything.
        retry: how often a factory call whose transaction was lost is run again.
        ledger: where rows are entered in the transaction that makes them, so that a kill leaks
            nothing; several where rows go to several databases.

    Raises:
        NotBoundError: ``bind`` leads to no database.
        ProductionDatabaseError: the database, its host or the environment looks like production.
        TypeError: ``allow_production`` is one string, or something else that is no list of names.

    Example:
        >>> tracker = ResourceTracker(engine)
        >>> with CleanupManager(tracker):
        ...     UserFactory()
        ...     len(tracker)
        1
    """

    def __init__(
        self,
        bind: Bind | TrackerStack[ResourceTracker],
        *,
        context: WorkerContext | None = None,
        allow_production: bool | Collection[str] = False,
        retry: RetryPolicy | None = None,
        ledger: Ledger | Iterable[Ledger] | None = None,
    ) -> None:
        super().__init__()
        self.retry = retry or RetryPolicy()
        self.context = context or WorkerContext.current()
        self.active = False  # started, not stopped, and not inherited by a forked child
        self.is_foreign = False  # inherited by a forked child, which owns nothing
        self.started_at: list[str] = []
        self.engines = Engines(self, checked_permission(allow_production))
        self._binding = Binding(bind)
        self.is_async = self._binding.is_async
        self.owns_session = self._binding.owns_session
        self.sessions = Sessions(self._binding, self.engines)
        self.store = Store()
        externals = self.external_resources = Externals()
        self.journals = Journals(ledger, self.context, self.store, externals, self.warn_once)
        self.preserved = Preserved(self.sessions, self.store)
        self._selection = Selection(self.context, self.sessions, self.store, self.journals)
        self._resources = TrackedResources(self.sessions, self.store, self.journals, externals)
        # What other rooms call often, without a call in between.
        self.capture = self.engines.capture
        self.settle = self.engines.resolve
        self.fault = self.engines.fault
        self.may_pass = self.engines.is_transient
        self.pending_changes = self.engines.pending_changes
        self.turn = self.sessions.turn
        self.watch = self.sessions.watch
        self.pause = self.sessions.pause
        self.release_session = self.sessions.release
        self.refuse_blocking = self.sessions.refuse_blocking
        self.snapshot = self.store.snapshot
        self.holds = self.store.holds
        self.held_keys = self.store.held_keys
        self.count_of = self.store.count_of
        self.keys_by_table = self.store.keys_by_table
        self.uncertain_keys = self.store.uncertain_keys
        self.mark_uncertain = self.store.mark_uncertain
        self.before_commit = self.journals.before_commit
        self.integer = self.journals.integer
        self.resolve_late = self._selection.run_late
        self.ties = self._resources.ties
        self.forget_external = self._resources.forget
        self._leak_warning = self._watch_leak()
        _all.add(self)
        if self.bound_engine is not None:
            self.capture(self.bound_engine)

    def start(self) -> ResourceTracker:
        """Listen from now on, and be the ambient tracker of this context.

        In a forked child it starts anew, without the rows of the parent.

        Raises:
            SessionStateError: it has been started already, or its session or connection is closed.
        """
        if self.active:
            raise SessionStateError(
                "This tracker has been started already. Use one ResourceTracker per block; "
                "blocks nest with a tracker each."
            )
        if self.is_foreign:
            self._forget_parent()
        if not self._leak_warning.alive:
            self._leak_warning = self._watch_leak()
        self.journals.open(self.bound_engine)
        self.started_at[:] = leak_warning.started_here()
        self.sessions.begin()
        self.active = True
        if self._binding.is_ambient:
            ownership.enter(self)
        return self

    def stop(self) -> None:
        """End the block. What is tracked stays tracked; a COMMIT under way still counts."""
        if not self.active:
            return
        try:
            self.settle()
            if not self.is_async or in_greenlet():
                self.journals.catch_up()
        finally:  # where warnings are errors, another tracker's late commit may be one here
            self.active = False
            ownership.leave(self)
            self.sessions.end()
            self._warned.clear()

    def _forget_parent(self) -> None:
        self.is_foreign = False
        self.store.forget_parent()
        self.sessions.forget_parent()
        self._resources.forget_parent()
        self.journals.forget_parent()
        self.preserved = Preserved(self.sessions, self.store)
        self._leak_warning = self._watch_leak()
        self._warned.clear()

    def _watch_leak(self) -> weakref.finalize[..., ResourceTracker]:
        return leak_warning.watch(
            self,
            self.store,
            self.external_resources,
            self.context.tag,
            self.started_at,
            entered=bool(self.journals),
        )

    def dismiss_leak_warning(self) -> None:
        """What it holds has been reported: no warning is needed once the tracker is garbage."""
        self._leak_warning.detach()

    async def run_sync(
        self, fn: Callable[Concatenate[ResourceTracker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``fn(tracker, ...)`` where it may ask an asynchronous database.

        As SQLAlchemy's ``AsyncSession.run_sync``: for the methods that have no ``await`` of their
        own. No other task uses the tracker's session meanwhile.

        Example:
            >>> await tracker.run_sync(lambda tracker: tracker.track_query(select(User)))
        """
        async with self.turn():
            return await spawn(fn, self, *args, **kwargs)

    @property
    def session(self) -> orm.Session:
        """What factories use: the given session, or one that the tracker opens and closes.

        A session is no thing for two threads, so each thread gets its own. Under an asynchronous
        engine it is the synchronous one underneath, for use in :meth:`run_sync`.
        """
        return self.sessions.opened.get(threading.get_ident()) or self.sessions.open()

    @property
    def in_transaction(self) -> bool:
        """Whether what factories use here is in a transaction; opens no session."""
        session = self.sessions.opened.get(threading.get_ident())
        if session is None and not self.owns_session:
            session = self._binding.callers_session()
        return session is not None and session.in_transaction()

    @property
    def bound_engine(self) -> sa.Engine | None:
        """The one engine that the tracker is bound to, or None where a session has several."""
        return self._binding.engine()

    def engine_of(self, database: str) -> sa.Engine:
        """The engine that reaches a database of the store, or of the journals."""
        journal = None if self.engines.knows(database) else self.journals.of(database)
        return self.engines.of(database) if journal is None else journal.ledger.engine

    # -- rows that the user names --------------------------------------------------------------

    def track(self, *instances: Any) -> None:
        """Own these mapped objects: persistent or detached, in every table of their hierarchy.

        Raises:
            UntrackableRowError: an object is not mapped, or has no row yet.
        """
        self._selection.track(*instances)

    def track_rows(self, table: Any, keys: Iterable[Any]) -> None:
        """Own the rows with these primary keys.

        Args:
            table: a mapped class or a Table.
            keys: scalars, or tuples in the order of the primary key where it has several columns.

        Raises:
            UnknownTableError: it is no table, or the database does not have it.
            NoPrimaryKeyError: it has no primary key.
            KeyShapeError: a key has another number of values, a NULL, or a value of another type.
        """
        self._selection.track_rows(table, keys)

    def track_query(self, select: sa.Select[Any], *, late: bool = False) -> int:
        """Own the rows that a query finds now, as committed.

        Args:
            select: selects one mapped class or table, or its primary key columns.
            late: run it when a cleanup begins instead, for rows that are not there yet. It is
                run again at the beginning of every later cleanup of this tracker.

        Returns:
            How many rows were found; 0 where that comes late.

        Raises:
            UnknownTableError: it selects no one model or table.
            NoPrimaryKeyError: the rows have no primary key to be named by.
        """
        return self._selection.track_query(select, late=late)

    def track_tagged(
        self, column: Any, template: str, *, whose: Whose = "test", late: bool = False
    ) -> int:
        """Own the committed rows whose text in a column was made of a tag, as ``Scoped`` makes it.

        It finds what the application made of a value that the test gave it: an account for
        ``Scoped("user-{tag}@example.test")``. Rows that another tracker of this process holds are
        left to it.

        Args:
            column: ``User.email``, or a column of a Table.
            template: what ``Scoped`` was given, literal text and ``{tag}``; a value must match it
                as a whole.
            whose: ``test``, ``worker`` or ``run``: the tags of this one, by the tracker's context.
                ``any``: every tag of tidyrows, those of runs that are going on among them. Ask for
                it where no other run uses the database.
            late: as for :meth:`track_query`.

        Returns:
            How many rows of the column's table were found; 0 where that comes late.

        Raises:
            ScopeError: the template has no tag or does not fit the column, the column is no text,
                or nothing is known that the values begin with.
            UnknownTableError: it is no column of a mapped class or Table.
        """
        return self._selection.track_tagged(column, template, whose=whose, late=late)

    def preserve(self, select: sa.Select[Any]) -> int:
        """Remember the shared rows that a query finds now, and put them back at cleanup.

        For tests that must change what others use too: settings, reference data. At cleanup a row
        that was updated gets its values back, and one that was deleted is inserted again. A row
        that somebody else changed after this tracker's own statements did stays as it is and is
        named in the CleanupError. A row that this tracker's statements never wrote was changed by
        the application under test, so it is put back; two workers in different processes that
        preserve the same row at the same time cannot be told apart.

        Args:
            select: selects one mapped class or table. Every column is remembered, as committed, in
                every table of a class's hierarchy; rows that come later are not touched.

        Returns:
            How many rows were found. Of a row that is preserved already the first memory counts,
            and a tracked row is deleted all the same.

        Raises:
            UnknownTableError: it is no such query, or the database does not have the table.
            NoPrimaryKeyError: the table has no primary key.

        Example:
            >>> tracker.preserve(select(Setting).where(Setting.name == "signup"))
            1
        """
        self.refuse_blocking("preserve(...)")
        return self.preserved.remember(select)

    def track_external(
        self, kind: str, payload: Any, *, after: Iterable[Any] = (), before: Iterable[Any] = ()
    ) -> ExternalResource:
        """Own something that is no row; the :func:`external_handler` of its kind removes it.

        Args:
            kind: which handler.
            payload: what the handler needs to find it, as JSON values.
            after: what needs it: mapped objects, RowKeys, mapped classes or Tables (all their
                tracked rows), or handles of other resources. It is removed when they are gone.
            before: what it needs, of the same kinds. They go when it has been removed.

        Returns:
            A handle, for the ``after`` and ``before`` of others.

        Raises:
            ExternalResourceError: the payload has no JSON form, an argument is no list, or a
                handle is another tracker's.
            UnknownTableError: the database does not have a table.
            UntrackableRowError: an object is not mapped, or has no row yet.
            SessionStateError: the tracker was made before a fork, in the parent.

        Example:
            >>> user = UserFactory()
            >>> tracker.track_external("auth-user", {"id": user.auth_id}, after=[user])
            <ExternalResource auth-user #1>
        """
        return self._resources.track(kind, payload, after=after, before=before)

    def mine(self, model: Any) -> sa.ColumnElement[bool]:
        """A WHERE clause for the rows of this test only, uncommitted ones included.

        Example:
            >>> session.scalars(select(User).where(tracker.mine(User))).all()
        """
        return self._selection.mine(model)

    def explain(self, row: Any) -> str:
        """Why a row is ours, or that it is not.

        Args:
            row: a mapped object or a :class:`RowKey`.
        """
        return self._selection.explain(row)

    def rows(self) -> Iterator[RowKey]:
        """Every tracked row, table by table, in the order of the keys.

        Rows of a table without a primary key have no RowKey: they are deleted all the same, and
        neither listed here nor counted by ``len(tracker)``.
        """
        self.settle()
        for held in self.snapshot():
            for key in held.keys.in_order():
                yield held.table.row(key)

    def externals(self) -> list[ExternalResource]:
        """Every external resource that is not known to be gone, in the order of tracking."""
        return [tie.resource for tie in self.ties()]

    def to_json(self) -> str:
        """The tracked rows as JSON, for :meth:`from_json` in another process.

        Keys are integers, strings, UUIDs, dates, decimals, bytes or tuples of them, and so are
        the values of rows without a primary key.
        """
        return handover.dumps(self)

    @classmethod
    def from_json(
        cls,
        text: str,
        bind: Bind,
        *,
        allow_production: bool | Collection[str] = False,
        ledger: Ledger | None = None,
    ) -> ResourceTracker:
        """A tracker that holds the rows of :meth:`to_json`, bound to ``bind``.

        Args:
            text: what ``to_json`` wrote.
            bind: where the rows are.
            allow_production: as for the class.
            ledger: where they are entered. Their entries are this process's from now on: the
                process that wrote the text can no longer delete the rows.

        Raises:
            UnknownTableError: the database has no such table.
            LedgerError: the rows are entered into a ledger, and none was given.
            TakenOverError: they have been deleted since, or taken over by a sweep.
        """
        return handover.loads(cls, text, bind, allow_production=allow_production, ledger=ledger)

    @classmethod
    async def from_json_async(cls, text: str, bind: Bind, **options: Any) -> ResourceTracker:
        """As :meth:`from_json`, for something asynchronous."""
        return await spawn(cls.from_json, text, bind, **options)

    def __len__(self) -> int:
        if self.is_foreign:
            return 0
        self.settle()
        return len(self.store)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<ResourceTracker {self.context.tag}: {len(self.store)} rows>"


def _orphan() -> None:
    """In a forked child: all trackers are the parent's."""
    for tracker in _all:
        tracker.active, tracker.is_foreign = False, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_orphan)
