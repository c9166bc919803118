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
from tidyrows.capture.changes import Change, Kind
from tidyrows.capture.engine import Capture, capture_for, root_engine
from tidyrows.dialects import Fault, database_name
from tidyrows.errors import (
    LateCommitWarning,
    LedgerError,
    SessionStateError,
    TidyRowsError,
    UntrackedRowsWarning,
)
from tidyrows.external import Externals, Tie
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.ledger import entries
from tidyrows.ledger.journal import Book
from tidyrows.ledger.table import Ledger
from tidyrows.production import checked_permission, refuse_production
from tidyrows.retry import RetryPolicy
from tidyrows.tracking import handover, leak_warning, selection, tags, ties
from tidyrows.tracking.binding import Binding, listen_to_session, session_engine
from tidyrows.tracking.preserved import Preserved
from tidyrows.tracking.store import Holdings
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence

    from tidyrows.capture.digests import Patch, Prints
    from tidyrows.capture.tracker_stack import Turns
    from tidyrows.external import ExternalResource
    from tidyrows.keys import KeyedTable, RowKey, TableName
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tags import Whose

_ASYNC = "await tracker.run_sync(lambda tracker: tracker.{})"

P = ParamSpec("P")
T = TypeVar("T")


def ledgers_of(given: Any) -> tuple[Ledger, ...]:
    """The ledgers that a tracker was given.

    Raises:
        LedgerError: it is something else.
    """
    ledgers = () if given is None else (given,) if isinstance(given, Ledger) else tuple(given)
    for each in ledgers:
        if not isinstance(each, Ledger):
            raise LedgerError(
                f"ledger={each!r} is no ledger. Write ResourceTracker(engine, "
                f"ledger=Ledger(engine))."
            )
    return ledgers


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
        bind: Bind | Turns,
        *,
        context: WorkerContext | None = None,
        allow_production: bool | Collection[str] = False,
        retry: RetryPolicy | None = None,
        ledger: Ledger | Iterable[Ledger] | None = None,
    ) -> None:
        self._binding = Binding(bind)
        self._ledgers = ledgers_of(ledger)
        self._books: dict[str, Book] = {}
        self._told_early: list[Change] = []
        self.retry = retry or RetryPolicy()
        self._allow_production = checked_permission(allow_production)
        self.context = context or WorkerContext.current()
        self._active = False
        self.holdings = Holdings()
        self.external_resources = Externals()
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
        self._open_books()
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
                self.catch_up()
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
        self._books = {}
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self.holdings = Holdings()
        self.external_resources = Externals()
        self.preserved = Preserved(self)
        self._forgotten = leak_warning.watch(self)
        self._sessions = {}
        self._undo = []
        self._watched.clear()
        self._said.clear()

    def _open_books(self) -> None:
        for ledger in self._ledgers:
            if ledger.is_private:
                continue
            book = self._books.get(ledger.database)
            if book is not None and not book.owner.lives:
                book.reopen(ledger.open())
            elif book is None:
                self._books[ledger.database] = Book(ledger, ledger.open(), self.say_unentered)
            awaits = ledger.engine.dialect.is_async and not in_greenlet()
            if not (ledger.dialect.has_row_locks or awaits):
                # Its one writer may be the test itself when it needs them.
                self._books[ledger.database].owner.integers.stock(ledger)
        engine = self._binding.engine()
        if self._ledgers and engine is not None:
            mine = database_name(engine)
            if mine not in {ledger.database for ledger in self._ledgers}:
                raise LedgerError(
                    f"The tracker writes to {mine}, and its ledger is in "
                    f"{self._ledgers[0].database}: rows and ledger must share transactions. Write "
                    f"ResourceTracker(engine, ledger=Ledger(engine)), with one engine."
                )

        early, self._told_early = self._told_early, []
        for change in early:
            book = self.book(change.table.name.database)
            if book is not None:
                book.wait_for(change)

    def add_ledger(self, ledger: Ledger) -> None:
        """Enter what is committed in the ledger's database from now on."""
        self._ledgers = (*self._ledgers, ledger)
        if self.active:
            self._open_books()

    def drop_ledger(self, ledger: Ledger) -> None:
        """Enter nothing there any more: its database is about to be dropped."""
        self._ledgers = tuple(each for each in self._ledgers if each is not ledger)
        self._books.pop(ledger.database, None)

    @property
    def has_ledger(self) -> bool:
        """Whether what it holds is entered into a ledger."""
        return any(not ledger.is_private for ledger in self._ledgers) or bool(self._books)

    @property
    def has_entries(self) -> bool:
        """Whether anything stands in a ledger for it, be it that rows are gone again."""
        return any(book.committed or book.doubtful for book in self._books.values())

    def said(self) -> None:
        """What it holds has been reported: no warning need say it again, once it is forgotten."""
        self._forgotten.detach()

    def known_book(self, database: str) -> Book | None:
        """What is entered into the ledger of a database; None where it has none."""
        return self._books.get(database)

    def book(self, database: str) -> Book | None:
        """The same, said where a ledger is missing."""
        book = self._books.get(database)
        if book is None and self._ledgers and not all(each.is_private for each in self._ledgers):
            self.warn_once(
                ("no ledger", database),
                f"Rows are written to {database}, for which the tracker has no ledger: a kill "
                f"would leave them there. Write ResourceTracker(..., ledger=[Ledger(one), "
                f"Ledger(other)]).",
            )
        return book

    def books(self) -> list[str]:
        """The databases of which rows are entered into a ledger."""
        return list(self._books)

    def put_aside(self, database: str, name: str) -> bool:
        """Keep the rows of a database for study, under this name; whether there were any."""
        book = self._books[database]
        if not book.put_aside(name, self.context):
            return False
        self.let_go(database)
        for resource in list(book.externals):
            self.external_resources.forget(resource)
        book.externals = {}
        return True

    def let_go(self, database: str) -> None:
        """The rows of a database are somebody else's to delete from now on."""
        with self._lock:
            self.holdings.drop(database)
            book = self._books.get(database)
            if book is not None:
                book.committed, book.doubtful, book.is_log = set(), {}, False
                book.unclear = []

    def catch_up(self) -> None:
        """Enter what could not be entered when it was told."""
        for book in self._books.values():
            book.catch_up(self.context)

    def integer(self, start: int = 0) -> int:
        """A number of this worker's: of all workers, runs and hosts where there is a ledger.

        As :meth:`WorkerContext.integer`, which knows this run only.
        """
        book = next(iter(self._books.values()), None)
        if book is None:
            return self.context.integer(start)
        return start + book.owner.integers.next(book.ledger)

    def say_unentered(self, table: TableName, reason: str) -> None:
        """Say that rows are tracked, and not in the ledger."""
        self.warn_once(
            ("not entered", table),
            f"Rows of {table} are not entered into the ledger, so a kill would leave them there: "
            f"{reason}",
        )

    def add_book(self, book: Book) -> None:
        """Hold what a book says, which somebody else has written."""
        self._books[book.ledger.database] = book

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
        capture.add_holder(self)
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

    def say_late(self, table: KeyedTable) -> None:
        """Say that rows are committed after the tracker has stopped."""
        warnings.warn(
            f"Rows of {table.name} are committed after their tracker has stopped. They stay "
            f"tracked: call cleanup() again to delete them.",
            LateCommitWarning,
            stacklevel=2,
        )

    def hold(
        self,
        table: KeyedTable,
        keys: Sequence[Any],
        *,
        prints: Prints | None = None,
        generated: bool = False,
    ) -> None:
        """Hold rows that were inserted."""
        with self._lock:
            holdings = self.holdings.of(table)
            holdings.keys.update(keys)
            holdings.note(keys, prints, generated=generated)

    def hold_after_all(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Hold rows that were in doubt."""
        with self._lock:
            self.holdings.of(table).keys.update(keys)

    def doubts(self) -> set[tuple[TableName, Any]]:
        """The rows of which nobody knows whether they were committed."""
        with self._lock:
            return self.holdings.doubts()

    def settle_doubt(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Of these rows it is known by now whether they are there."""
        with self._lock:
            self.holdings.settle(table.name, keys)

    def settle_change(self, change: Change) -> None:
        """Of a change that was in doubt it is known by now whether it was committed."""
        with self._lock:
            name = change.table.name
            if change.kind is Kind.UNKEYED:
                self.holdings.settle_unsure(name, len(change.keys))
            elif change.kind is Kind.INSERTED:
                self.holdings.settle(name, change.keys)
            elif change.kind is Kind.DELETED:
                self.holdings.undoubt(name, change.keys)
            elif change.kind is Kind.RENAMED:
                self.holdings.undoubt(name, [old for old, _new in change.keys])

    def note_update(self, table: KeyedTable, keys: Sequence[Any], patches: Sequence[Patch]) -> None:
        """Columns were set in these rows, or without keys in any row of the table."""
        with self._lock:
            self.holdings.note_update(table.name, keys, patches)

    def take_in_doubt(
        self,
        table: KeyedTable,
        keys: Sequence[Any],
        *,
        prints: Prints | None = None,
        generated: bool,
    ) -> None:
        """Hold rows of which nobody knows whether they were committed."""
        with self._lock:
            holdings = self.holdings.of(table)
            holdings.doubtful.update(dict.fromkeys(keys, generated))
            holdings.note(keys, prints, generated=generated)

    def take_unkeyed(
        self, table: KeyedTable, rows: Sequence[tuple[Any, ...] | None], *, certain: bool = True
    ) -> None:
        """Remember rows of a table without a primary key as a whole, or count them where None.

        Args:
            table: theirs.
            rows: values in the order of the table's columns.
            certain: whether they are known to be committed.
        """
        whole = [row for row in rows if row is not None]
        with self._lock:
            held = self.holdings.of(table)
            held.unkeyed += len(rows) - len(whole)
            if certain:
                held.whole += whole
            else:
                held.unsure += len(whole)

    def forget_whole(
        self, table: KeyedTable, rows: Iterable[tuple[Any, ...]], *, unsure: bool = False
    ) -> None:
        """Rows of a table without a primary key that are gone, or may be gone."""
        with self._lock:
            self.holdings.forget_whole(table.name, rows, unsure=unsure)

    def forget_counted(self, table: KeyedTable) -> None:
        """The rows of a table of which only the number is known are gone."""
        with self._lock:
            self.holdings.forget_counted(table.name)

    def drop_equal(
        self, table: KeyedTable, rows: Sequence[tuple[Any, ...] | None], *, unsure: bool
    ) -> Sequence[tuple[Any, ...] | None]:
        """Rows without a primary key that a statement deleted; those that were not held."""
        with self._lock:
            return self.holdings.drop_equal(table.name, rows, unsure=unsure)

    def note_touched(self, table: KeyedTable, keys: Sequence[Any], verb: str, count: int) -> None:
        """Rows of others were changed: for a tracker that watches."""

    def note_dropping(self, engine: sa.Engine, database: str) -> None:
        """A database of this name is about to be dropped, through an engine to its server."""

    def count_of(self, name: TableName) -> int:
        """How many rows of this table are held."""
        with self._lock:
            return self.holdings.count_of(name)

    def holds(self, name: TableName) -> bool:
        """Whether rows of this table are held."""
        return name in self.holdings

    def those_held(self, name: TableName, keys: Iterable[Any]) -> list[Any]:
        """Of these keys of a table, those that are held."""
        with self._lock:
            return self.holdings.those_held(name, keys)

    def forget(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Rows that are gone."""
        with self._lock:
            self.holdings.forget(table.name, keys)

    def doubt(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Of these rows, if held, nobody knows any more whether they are there."""
        with self._lock:
            self.holdings.doubt(table.name, keys)

    def doubt_all(self, table: KeyedTable) -> bool:
        """Of this table's rows nobody knows any more which are ours; whether any are held."""
        with self._lock:
            return self.holdings.doubt_all(table.name)

    def rename(self, table: KeyedTable, pairs: Iterable[tuple[Any, Any]]) -> bool:
        """Rows whose key was changed through a session; whether a new key, None, is unknown."""
        pairs = list(pairs)
        with self._lock:
            if len(self.external_resources):
                self.external_resources.rename(table, pairs)
            return self.holdings.rename(table.name, pairs)

    def say_renamed(self, table: KeyedTable) -> None:
        """Say that rows can no longer be followed."""
        self.warn_once(
            ("renamed", table.name),
            f"An UPDATE changed primary keys of {table.name} in a way that cannot be followed, so "
            f"tracked rows are lost from sight. Name them with tracker.track_rows(table, keys).",
        )

    def warn_once(self, subject: Any, message: str) -> None:
        """Say something about untracked rows, once per block and subject."""
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
            self.tell(keyed, keys)
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
            self.tell(keyed, keys)
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
        self.tell(table, [key for key in keys if key not in pending] if pending else keys)

    def tell(self, table: KeyedTable, keys: list[Any]) -> None:
        """Hold rows that the user named, and enter them into the ledger."""
        self.take_told(table, keys)
        if not self._ledgers or not keys:
            return
        change = Change(Kind.INSERTED, table, keys, self, told=True)
        if not self._books and not self._active:
            self._told_early.append(change)  # entered as soon as the tracker starts
            return
        book = self.book(table.name.database)
        if book is not None:
            book.tell(change, self.context)

    def take_told(self, table: KeyedTable, keys: list[Any]) -> None:
        """Hold rows that the user named."""
        with self._lock:
            holdings = self.holdings.of(table)
            holdings.keys.update(keys)
            holdings.told.update(keys)
            holdings.trust(keys)

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
        if self._ledgers:
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
        book = next(iter(self._books.values()), None)
        if book is not None:
            try:
                book.intend(Tie(resource, needed_by, needs), self._tables(), self.context)
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
        """Believe every announced COMMIT of this tracker's engines that is over."""
        for capture in list(self._captures):
            capture.settle()

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
        for book in self._books.values():
            book.removed(resource)
        with self._lock:
            self.external_resources.forget(resource)

    def snapshot(self) -> list[TableHoldings]:
        """What is held now, by table; a copy. Empty in a forked child, which owns nothing."""
        if self.is_foreign:
            return []
        with self._lock:
            return self.holdings.copy()

    def engine_of(self, database: str) -> sa.Engine:
        """The engine that reaches a database of :meth:`snapshot`, or of :meth:`books`."""
        engine = self._engines.get(database)
        return self._books[database].ledger.engine if engine is None else engine

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

    def handed_on(self) -> dict[str, Any] | None:
        """Which entries of a ledger name what it holds; None where there are none."""
        engine = self.bound_engine
        book = None if engine is None else self._books.get(database_name(engine))
        return None if book is None else book.handed_on(self.externals())

    def take_over(self, entered: dict[str, Any]) -> None:
        """Make the entries its own that another process has made of what it holds."""
        self._open_books()
        (book,) = self._books.values()
        database = book.ledger.database
        with book.ledger.alone(lock_timeout=5.0) as connection:
            page = book.adopt(
                connection, entered, entries.each_of(self, database), self.context, self.externals()
            )
        book.turn(page)

    def __len__(self) -> int:
        if self.is_foreign:
            return 0
        self.settle()
        with self._lock:  # counting sorts the keys
            return len(self.holdings)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        with self._lock:
            return f"<ResourceTracker {self.context.tag}: {len(self.holdings)} rows>"
