"""The ResourceTracker: every row whose insert committed while it listened."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows.capture import ambient
from tidyrows.capture.changes import Inserted, KeysChanged
from tidyrows.capture.engine import Capture, capture_for, root_engine
from tidyrows.dialects import Fault, database_name
from tidyrows.errors import (
    LateCommitWarning,
    SessionStateError,
    TidyRowsError,
    UntrackedRowsWarning,
)
from tidyrows.external import Externals, Tie
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.production import checked_permission, refuse_production
from tidyrows.retry import RetryPolicy
from tidyrows.tracking import handover, leak_warning, selection, tags, ties
from tidyrows.tracking.binding import Binding, listen_to_session, session_engine
from tidyrows.tracking.journals import Journals
from tidyrows.tracking.preserved import Preserved
from tidyrows.tracking.store import Store
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence

    from tidyrows.capture.changes import Change
    from tidyrows.capture.tracker_stack import TrackerStack
    from tidyrows.external import ExternalResource
    from tidyrows.keys import KeyedTable, RowKey, TableName
    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tags import Whose

_ASYNC = "await tracker.run_sync(lambda tracker: tracker.{})"

P = ParamSpec("P")
T = TypeVar("T")


class ResourceTracker:
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

    is_shared = False
    """Whether its rows are for several tests, so that a change of one is worth a word."""

    def __init__(
        self,
        bind: Bind | TrackerStack[ResourceTracker],
        *,
        context: WorkerContext | None = None,
        allow_production: bool | Collection[str] = False,
        retry: RetryPolicy | None = None,
        ledger: Ledger | Iterable[Ledger] | None = None,
    ) -> None:
        self._binding = Binding(bind)
        self.retry = retry or RetryPolicy()
        self._allow_production = checked_permission(allow_production)
        self.context = context or WorkerContext.current()
        self._active = False
        self.store = Store()
        self.holds = self.store.holds
        self.held_keys = self.store.held_keys
        self.count_of = self.store.count_of
        self.keys_by_table = self.store.keys_by_table
        self.uncertain_keys = self.store.uncertain_keys
        self.external_resources = Externals()
        self.journals = Journals(
            ledger, self.context, self.store, self.external_resources, self.warn_once
        )
        self.integer = self.journals.integer
        self.preserved = Preserved(self)
        self._engines: dict[str, sa.Engine] = {}
        self._captures: dict[Capture, int] = {}  # and how often their schema had changed by then
        self._sessions: dict[int, orm.Session] = {}
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]
        self._turns = weakref.WeakKeyDictionary()
        self._caller_transaction: orm.SessionTransaction | None = None
        self._undo: list[Callable[[], None]] = []
        self._watched: weakref.WeakSet[orm.Session] = weakref.WeakSet()
        self._said: set[Any] = set()
        self._late: list[Callable[[], int]] = []
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self.started_at: list[str] = []
        self._forgotten = leak_warning.watch(self)
        engine = self._binding.engine()
        if engine is not None:
            self.capture(engine)

    # -- life ----------------------------------------------------------------------------------

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
        session = self._binding.callers_session()
        if session is not None:
            self._caller_transaction = session.get_transaction()
        if not self._forgotten.alive:
            self._forgotten = leak_warning.watch(self)
        self.journals.open(self._binding.engine())
        self.started_at[:] = leak_warning.started_here()
        self._undo = self._binding.listen(self)
        self._active = True
        if self._binding.is_ambient:
            ambient.enter(self)
        return self

    def stop(self) -> None:
        """Listen no more. What is tracked stays tracked; a COMMIT under way still counts."""
        if not self.active:
            return
        try:
            self.settle()
            if not self.is_async or in_greenlet():
                self.journals.catch_up()
        finally:  # where warnings are errors, another tracker's late commit may be said here
            self._active = False
            ambient.leave(self)
            while self._undo:
                self._undo.pop()()
            self._watched.clear()
            self._said.clear()

    def rest(self) -> None:
        """Listen no more, but in turns that are given to it: what it is bound to knows when."""
        while self._undo:
            self._undo.pop()()

    @property
    def active(self) -> bool:
        """Whether it listens: started, not stopped, and not inherited by a forked child."""
        return self._active and self._pid == os.getpid()  # as is_foreign; every statement asks

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the one that made the tracker: it owns nothing."""
        return self._pid != os.getpid()

    def _forget_parent(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self.store.forget_parent()
        self.external_resources = Externals()
        self.journals.forget_parent(self.external_resources)
        self.preserved = Preserved(self)
        self._forgotten = leak_warning.watch(self)
        self._sessions = {}
        self._undo = []
        self._watched.clear()
        self._said.clear()

    def add_ledger(self, ledger: Ledger) -> None:
        """Enter what is committed in the ledger's database from now on."""
        self.journals.add_ledger(ledger)
        if self.active:
            self.journals.open(self._binding.engine())

    def dismiss_leak_warning(self) -> None:
        """What it holds has been reported: no warning is needed once the tracker is garbage."""
        self._forgotten.detach()

    @property
    def is_async(self) -> bool:
        """Whether it is bound to something asynchronous."""
        return self._binding.is_async

    def refuse_blocking(self, write: str) -> None:
        """Raise where a task would have to block on the database.

        Args:
            write: the line to write instead.

        Raises:
            SessionStateError: it is bound to something asynchronous, and this is no place to await.
        """
        if self.is_async and not in_greenlet():
            raise SessionStateError(
                f"This tracker is bound to something that is asynchronous, and a "
                f"synchronous call cannot wait for it. Write {write}."
            )

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

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """In the block no other task uses this tracker's session."""
        loop = asyncio.get_running_loop()
        lock = self._turns.get(loop)
        if lock is None:
            lock = self._turns[loop] = asyncio.Lock()
        async with lock:
            yield

    @property
    def session(self) -> orm.Session:
        """What factories use: the given session, or one that the tracker opens and closes.

        A session is no thing for two threads, so each thread gets its own. Under an asynchronous
        engine it is the synchronous one underneath, for use in :meth:`run_sync`.
        """
        if not self._binding.owns_session:
            return self._binding.open_session()
        thread = threading.get_ident()
        session = self._sessions.get(thread)
        if session is None:
            session = self._sessions[thread] = self._binding.open_session()
        return session

    @property
    def bound_engine(self) -> sa.Engine | None:
        """The one engine that the tracker is bound to, or None where a session has several."""
        return self._binding.engine()

    @property
    def bound_to(self) -> sa.Engine | sa.Connection | None:
        """The engine or connection, with its options, or None where a session has several."""
        return self._binding.source()

    @property
    def owns_session(self) -> bool:
        """Whether :attr:`session` was opened by the tracker."""
        return self._binding.owns_session

    @property
    def in_transaction(self) -> bool:
        """Whether what factories use here is in a transaction; opens no session."""
        session = (
            self._sessions.get(threading.get_ident())
            if self._binding.owns_session
            else self._binding.callers_session()
        )
        return session is not None and session.in_transaction()

    def fault(self, error: BaseException) -> Fault:
        """What an error means, of whichever of its databases it is."""
        faults = (capture.dialect.fault(error) for capture in self._captures)
        return next((fault for fault in faults if fault is not Fault.OTHER), Fault.OTHER)

    def release_session(self) -> None:
        """End what the session has open, so that cleanup need not wait for its locks.

        Raises:
            SessionStateError: its transaction began before the block, so it is not ours to end.
        """
        while self._sessions:
            _thread, own = self._sessions.popitem()
            try:
                own.close()
            except sa.exc.DBAPIError:  # its connection is dead, and so is its transaction
                own.invalidate()
        session = self._binding.callers_session()
        if session is not None and session.in_transaction():
            if session.get_transaction() is self._caller_transaction:
                raise SessionStateError(
                    f"The session {session!r} is in a transaction that began before the block, so "
                    f"it is yours to end. Write session.commit() or session.rollback() before the "
                    f"block ends, then call cleanup() again; all rows stay tracked."
                )
            try:
                session.rollback()
            except sa.exc.DBAPIError as error:
                if self.fault(error) is not Fault.LOST:
                    raise
                session.rollback()  # the connection is known to be dead by now

    # -- what capture tells --------------------------------------------------------------------

    def capture(self, engine: sa.Engine) -> Capture:
        """The capture of an engine that this tracker may hold rows of."""
        self.refuse_production(engine)
        capture = capture_for(engine)
        capture.add_sink(self)
        if capture not in self._captures:
            self._captures[capture] = capture.schema_version
            self._engines.setdefault(capture.database, root_engine(engine))
        return capture

    def saw_ddl(self, capture: Capture) -> bool:
        """Whether the schema was changed through an engine since this may hold rows of it."""
        return self._captures.get(capture) != capture.schema_version

    def watch(self, session: orm.Session) -> None:
        """Hear what this session writes too, whatever it is bound to."""
        if session in self._watched:
            return
        self._watched.add(session)
        engine = session_engine(session)
        bound = self._binding.bind
        if (
            engine is not None
            and isinstance(bound, sa.Engine)
            and root_engine(engine) is root_engine(bound)
        ):
            return
        self._undo.append(listen_to_session(session, self))

    def refuse_production(self, engine: sa.Engine) -> None:
        """Raise if the engine's database looks like production and nobody allowed it."""
        if root_engine(engine) not in self._engines.values():  # those have been looked at
            refuse_production(engine.url, self._allow_production)

    def warn_late(self, table: KeyedTable) -> None:
        """Warn that rows are committed after the tracker has stopped."""
        warnings.warn(
            f"Rows of {table.name} are committed after their tracker has stopped. They stay "
            f"tracked: call cleanup() again to delete them.",
            LateCommitWarning,
            stacklevel=2,
        )

    def apply(self, change: Change) -> Change:
        """A change has been committed; returns what is left of it for other trackers."""
        if isinstance(change, KeysChanged) and change.certain and len(self.external_resources):
            self.external_resources.rename(change.table, list(change.keys))
        return self.store.apply(change)

    def mark_uncertain(self, change: Change) -> Change:
        """It is not known whether a change has been committed."""
        return self.store.mark_uncertain(change)

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Record changes in their own transaction, where there is a ledger."""
        self.journals.before_commit(connection, changes)

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain."""
        self.journals.after_commit(changes, certain=certain)
        self.warn_of_lost_rows()

    def warn_of_lost_rows(self) -> None:
        """Warn of rows that can no longer be followed."""
        while self.store.lost:
            table = self.store.lost.pop()
            self.warn_once(
                ("renamed", table.name),
                f"An UPDATE changed primary keys of {table.name} in a way that cannot be followed, "
                f"so tracked rows are lost from sight. Name them with tracker.track_rows(table, "
                f"keys).",
            )

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A raw statement is about to drop a database, through an engine to its server."""

    def warn_once(self, subject: Any, message: str) -> None:
        """Warn of untracked rows, once per block and subject."""
        if subject not in self._said:
            self._said.add(subject)
            warnings.warn(message, UntrackedRowsWarning, stacklevel=2)

    # -- telling the tracker -------------------------------------------------------------------

    def track(self, *instances: Any) -> None:
        """Own these mapped objects: persistent or detached, in every table of their hierarchy.

        Raises:
            UntrackableRowError: an object is not mapped, or has no row yet.
        """
        self.refuse_blocking(_ASYNC.format("track(...)"))
        rows = [row for each in instances for row in selection.rows_of_instance(self, each)]
        for table, key in rows:
            self._take_named(table, [key])

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
        self.refuse_blocking(_ASYNC.format("track_rows(...)"))
        for keyed, stored in selection.named_rows(self, table, keys):
            self._take_named(keyed, stored)

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
        self.refuse_blocking(_ASYNC.format("track_query(...)"))
        if late:
            selection.selected_model(select)
            return self._ask_late(lambda: self.track_query(select))
        found, count = selection.rows_of_query(self, select)
        for keyed, keys in found:
            self._track_named(keyed, keys)
        return count

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
        self.refuse_blocking(_ASYNC.format("track_tagged(...)"))
        if late:
            tags.refuse_unusable(self, column, template, whose)
            return self._ask_late(lambda: self.track_tagged(column, template, whose=whose))
        found = tags.rows_of_tag(self, column, template, whose)
        for keyed, keys in found:
            self._track_named(keyed, keys)
        return max((len(keys) for _keyed, keys in found), default=0)

    def _ask_late(self, question: Callable[[], int]) -> int:
        self._late.append(question)
        return 0

    def may_pass(self, error: BaseException) -> bool:
        """Whether a transaction that failed so may succeed another time."""
        return isinstance(error, Exception) and self.fault(error) in {Fault.TRANSIENT, Fault.LOST}

    def resolve_late(self, retry: RetryPolicy) -> list[Exception]:
        """Ask what was to be asked when a cleanup begins; what went wrong is returned.

        One question that fails keeps no other from being asked, and no row from being deleted.
        """
        failures: list[Exception] = []
        for question in [] if self.is_foreign else list(self._late):
            try:
                retry.run(question, is_transient=self.may_pass)
            except (sa.exc.SQLAlchemyError, TidyRowsError) as error:
                failures.append(error)
        return failures

    def _take_named(self, table: KeyedTable, keys: list[Any]) -> None:
        """An insert that is not committed counts when it is, or is nobody's row."""
        self.settle()  # an insert that is committed is pending no more
        pending = set(self.pending_keys(table.table))
        keys = [key for key in keys if key not in pending] if pending else keys
        self._track_named(table, keys)

    def _track_named(self, table: KeyedTable, keys: list[Any]) -> None:
        """Hold rows that the user named, and record them in the ledger."""
        named = Inserted(table, keys, named=True)
        self.store.apply(named)
        self.journals.add(named, active=self._active)

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
        self.refuse_blocking(_ASYNC.format("preserve(...)"))
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
        if self.journals.has_ledgers:
            self.refuse_blocking(_ASYNC.format("track_external(...)"))
        if self.is_foreign:
            raise SessionStateError(
                f"This tracker was made before the process forked, so the {kind} would be "
                f"forgotten. Write tracker.start() first, or make a tracker in the child."
            )
        needed_by = tuple(ties.items(self, kind, "after", after))
        needs = tuple(ties.items(self, kind, "before", before))
        with self._lock:
            resource = self.external_resources.new(kind, payload)
            self.external_resources.tie(resource, needed_by, needs)
        try:
            self.journals.intend(Tie(resource, needed_by, needs), self._tables)
        except BaseException:
            self.external_resources.forget(resource)
            raise
        return resource

    def _tables(self) -> dict[TableName, KeyedTable]:
        """The tables of what is held, or may be once it is committed."""
        pending = {change.table.name: change.table for change in self.pending_changes()}
        return pending | {held.table.name: held.table for held in self.snapshot()}

    # -- asking --------------------------------------------------------------------------------

    def settle(self) -> None:
        """Apply the changes of every COMMIT of this tracker's engines that is over."""
        for capture in list(self._captures):
            capture.resolve()

    def mine(self, model: Any) -> sa.ColumnElement[bool]:
        """A WHERE clause for the rows of this test only, uncommitted ones included.

        Example:
            >>> session.scalars(select(User).where(tracker.mine(User))).all()
        """
        return selection.mine(self, model)

    def pending_changes(self) -> Iterator[Change]:
        """What is inserted for this tracker and not committed."""
        for capture in list(self._captures):
            yield from capture.pending(self)

    def pending_keys(self, table: sa.Table) -> list[Any]:
        """Keys of a table that are inserted and not committed."""
        return [
            key
            for change in self.pending_changes()
            if change.table.table is table and change.table.key_columns
            for key in change.keys
        ]

    def explain(self, row: Any) -> str:
        """Why a row is ours, or that it is not.

        Args:
            row: a mapped object or a :class:`RowKey`.
        """
        return selection.explain(self, row)

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

    def ties(self) -> list[Tie]:
        """The same, with what goes before and after them. Empty in a forked child."""
        if self.is_foreign:
            return []
        with self._lock:
            return list(self.external_resources)

    def forget_external(self, resource: ExternalResource) -> None:
        """An external resource that is gone."""
        self.journals.remove(resource)
        with self._lock:
            self.external_resources.forget(resource)

    def snapshot(self) -> list[TableHoldings]:
        """What is held now, by table; a copy. Empty in a forked child, which owns nothing."""
        return self.store.snapshot()

    def engine_of(self, database: str) -> sa.Engine:
        """The engine that reaches a database of :meth:`snapshot`, or of :meth:`books`."""
        engine = self._engines.get(database)
        journal = self.journals.of(database) if engine is None else None
        return self._engines[database] if journal is None else journal.ledger.engine

    def reach_by(self, database: str, engine: sa.Engine) -> None:
        """From now on this engine reaches a database of :meth:`snapshot`."""
        self._engines[database] = engine

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

    def handed_on(self) -> Any:
        """Which entries of a ledger name what it holds; None where there are none."""
        engine = self.bound_engine
        if engine is None:
            return None
        return self.journals.handed_on(database_name(engine), self.externals())

    def take_over(self, entered: dict[str, Any]) -> None:
        """Make the entries its own that another process has made of what it holds."""
        engine = self.bound_engine
        if engine is not None:
            self.journals.adopt(entered, engine, self.externals())

    def __len__(self) -> int:
        if self.is_foreign:
            return 0
        self.settle()
        return len(self.store)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<ResourceTracker {self.context.tag}: {len(self.store)} rows>"
