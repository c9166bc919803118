"""The ResourceTracker: every row whose insert committed while it listened."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

from tidyrows.arguments import checked
from tidyrows.capture import ownership
from tidyrows.errors import ArgumentError, SessionStateError
from tidyrows.greenlets import in_greenlet, spawn
from tidyrows.production import PERMISSION
from tidyrows.retry import RETRY, RetryPolicy
from tidyrows.tracking import handover
from tidyrows.tracking.leak_warning import started_here
from tidyrows.tracking.selection import Selection
from tidyrows.worker import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from sqlalchemy import orm

    from tidyrows.capture.ownership import TrackerStack
    from tidyrows.keys import RowKey
    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.binding import Bind
    from tidyrows.worker import WorkerContext

P = ParamSpec("P")
T = TypeVar("T")


_USUAL = RetryPolicy()
_all: weakref.WeakSet[ResourceTracker] = weakref.WeakSet()


class ResourceTracker(Selection):
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
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> tracker = ResourceTracker(engine)
        >>> with CleanupManager(tracker):
        ...     UserFactory()
        ...     len(tracker)
        1
    """

    @checked(context=CONTEXT, allow_production=PERMISSION, retry=RETRY)
    def __init__(
        self,
        bind: Bind | TrackerStack[Any],
        *,
        context: WorkerContext | None = None,
        allow_production: bool | Collection[str] = False,
        retry: RetryPolicy | None = None,
        ledger: Ledger | Iterable[Ledger] | None = None,
    ) -> None:
        super().__init__(bind, context, allow_production, ledger)
        self.retry = retry or _USUAL
        self.sessions.patience = self.retry.deadline
        _all.add(self)

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
            self.forget_parent()
        elif not self._leak_warning.alive:
            self.watch_leak()
        self.journals.open(self.bound_engine)
        self.started_at[:] = started_here()
        self.sessions.begin()
        self.active = True
        if self.binding.is_ambient:
            ownership.enter(self)
        return self

    def stop(self) -> None:
        """End the block. What is tracked stays tracked; a COMMIT under way still counts."""
        if not self.active:
            return
        try:
            self.engines.resolve()
            if not self.is_async or in_greenlet():
                self.journals.catch_up()
        finally:  # where warnings are errors, another tracker's late commit may be one here
            self.active = False
            ownership.leave(self)
            self.sessions.stop_listening()
            self._warned.clear()

    async def run_sync(
        self, fn: Callable[Concatenate[ResourceTracker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``fn(tracker, ...)`` where it may ask an asynchronous database.

        As SQLAlchemy's ``AsyncSession.run_sync``: for the methods that have no ``await`` of their
        own. No other task uses the tracker's session meanwhile.

        Example:
            >>> await tracker.run_sync(lambda tracker: tracker.track_query(select(User)))
        """
        async with self.sessions.exclusive():
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
            session = self.binding.callers_session()
        return session is not None and session.in_transaction()

    def rows(self) -> Iterator[RowKey]:
        """Every tracked row, table by table, in the order of the keys.

        Rows of a table without a primary key have no RowKey: they are deleted all the same, and
        neither listed here nor counted by ``len(tracker)``.
        """
        self.engines.resolve()
        for held in self.store.snapshot():
            for key in held.keys.in_order():
                yield held.table.row(key)

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

    def __reduce__(self) -> NoReturn:
        raise ArgumentError(
            f"{self!r} cannot be pickled or copied: it has connections. Send tracker.to_json() to "
            f"the other process, and write ResourceTracker.from_json(text, engine) there.",
            argument="tracker",
        )

    if not TYPE_CHECKING:  # a type checker refuses the block by itself

        def __enter__(self) -> NoReturn:
            raise ArgumentError(
                "A tracker alone is no block, since nobody would clean up after it. Write "
                "with CleanupManager(ResourceTracker(engine)): ...",
                argument="tracker",
            )

        __aenter__ = __exit__ = __aexit__ = __enter__

    def __len__(self) -> int:
        if self.is_foreign:
            return 0
        self.engines.resolve()
        return len(self.store)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<ResourceTracker {self.context.tag}: {len(self.store)} rows>"


def trackers_of(database: str) -> list[ResourceTracker]:
    """The trackers of this process that know of a database, oldest run and test first."""
    known = [each for each in _all if database in each.engines.by_database and not each.is_foreign]
    return sorted(known, key=lambda each: each.context.tag)


def current_tracker() -> ResourceTracker | None:
    """The innermost active tracker of this context, or None outside of any block.

    A forked child has none of its parent's.
    """
    for sink in reversed(ownership.entered_sinks()):
        if sink.active:
            return cast("ResourceTracker", sink)  # nothing else is entered
    return None


def _orphan() -> None:
    """In a forked child: all trackers are the parent's."""
    for tracker in _all:
        tracker.active, tracker.is_foreign = False, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_orphan)
