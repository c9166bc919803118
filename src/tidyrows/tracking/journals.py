"""The journals of one tracker: one in each of its ledgers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Inserted, InsertedWhole, Noted
from tidyrows.dialects import database_name
from tidyrows.errors import LedgerError
from tidyrows.greenlets import in_greenlet
from tidyrows.ledger.journal import Journal
from tidyrows.ledger.table import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.external import ExternalResource, Externals, Tie
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.tracking.store import Store
    from tidyrows.worker import WorkerContext


class Journals:
    """Records what a tracker holds in its ledgers.

    Attributes:
        ledgers: those of the tracker, private ones too.
    """

    def __init__(
        self,
        ledgers: Ledger | Iterable[Ledger] | None,
        context: WorkerContext,
        store: Store,
        externals: Externals,
        warn_once: Callable[[Any, str], None],
    ) -> None:
        given = () if ledgers is None else (ledgers,) if isinstance(ledgers, Ledger) else ledgers
        self.ledgers = tuple(given)
        for each in self.ledgers:
            if not isinstance(each, Ledger):
                raise LedgerError(
                    f"ledger={each!r} is no ledger. Write ResourceTracker(engine, "
                    f"ledger=Ledger(engine))."
                )
        self._context = context
        self._store = store
        self._externals = externals
        self._warn = weakref.WeakMethod(warn_once)
        self._journals: dict[str, Journal] = {}
        self._early: list[Change] = []
        self._opened = False
        self._engine: sa.Engine | None = None

    def __bool__(self) -> bool:
        """Whether rows are recorded in a ledger."""
        return bool(self._journals) or any(not ledger.is_private for ledger in self.ledgers)

    @property
    def databases(self) -> list[str]:
        """The databases that have a journal."""
        return list(self._journals)

    @property
    def has_entries(self) -> bool:
        """Whether there are entries in a ledger, though their rows may be gone."""
        return any(each.committed or each.uncertain for each in self._journals.values())

    def of(self, database: str) -> Journal | None:
        """The journal of a database; None where it has none."""
        return self._journals.get(database)

    # -- opening -------------------------------------------------------------------------------

    def open(self, engine: sa.Engine | None) -> None:
        """Open a journal in each ledger that other processes can see."""
        for ledger in self.ledgers:
            if ledger.is_private:
                continue
            journal = self._journals.get(ledger.database)
            if journal is None:
                journal = Journal(ledger, ledger.open(), self._warn_unrecorded)
                self._journals[ledger.database] = journal
            elif not journal.process.is_running:
                journal.reopen(ledger.open())
            awaits = ledger.engine.dialect.is_async and not in_greenlet()
            if not (ledger.dialect.has_row_locks or awaits):
                # Its one writer may be the test itself when it needs them.
                journal.process.integers.reserve_early(ledger)
        if self.ledgers and engine is not None:
            bound = database_name(engine)
            if bound not in {ledger.database for ledger in self.ledgers}:
                raise LedgerError(
                    f"The tracker writes to {bound}, and its ledger is in "
                    f"{self.ledgers[0].database}: rows and ledger must share transactions. Write "
                    f"ResourceTracker(engine, ledger=Ledger(engine)), with one engine."
                )
        self._opened, self._engine = True, engine
        early, self._early = self._early, []
        for change in early:
            expected = self._expected(change.table.name.database)
            if expected is not None:
                expected.postpone(change)

    def attach(self, journal: Journal) -> None:
        """Use a journal that was opened elsewhere."""
        self._journals[journal.ledger.database] = journal

    def add_ledger(self, ledger: Ledger) -> None:
        """Record what is committed in the ledger's database from now on."""
        self.ledgers = (*self.ledgers, ledger)
        if self._opened:
            self.open(self._engine)

    def drop_ledger(self, ledger: Ledger) -> None:
        """Record nothing there any more: its database is about to be dropped."""
        self.ledgers = tuple(each for each in self.ledgers if each is not ledger)
        self._journals.pop(ledger.database, None)

    def forget_parent(self) -> None:
        """In a forked child: the journals are the parent's."""
        self._journals = {}

    # -- changes -------------------------------------------------------------------------------

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Record, in the transaction of the changes, those of them that concern the tracker."""
        if not (self.ledgers or self._journals):
            return
        making = (Inserted, InsertedWhole)
        made = {change.table.name for change in changes if isinstance(change, making)}
        own = [
            change
            for change in changes
            if not isinstance(change, Noted)
            and (change.table.name in made or self._store.holds(change.table.name))
        ]
        journal = self._expected(own[0].table.name.database) if own else None
        if journal is not None:
            journal.record(connection, own, self._context)

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """The transaction of these changes has been committed, or perhaps."""
        for journal in self._journals.values():
            if certain:
                journal.confirm(changes)
            else:
                journal.mark_uncertain(changes)

    def add(self, change: Inserted) -> None:
        """Record rows that the user named, which are committed; at the latest at the start."""
        if not self.ledgers or not change.keys:
            return
        if not (self._journals or self._opened):
            self._early.append(change)
            return
        journal = self._expected(change.table.name.database)
        if journal is not None:
            journal.add(change, self._context)

    def catch_up(self) -> None:
        """Record what could not be recorded when the user named it."""
        for journal in self._journals.values():
            journal.catch_up(self._context)

    def _expected(self, database: str) -> Journal | None:
        """The journal of a database, with a warning where its ledger is missing."""
        journal = self._journals.get(database)
        if journal is None and not all(each.is_private for each in self.ledgers):
            self._warn_once(
                ("no ledger", database),
                f"Rows are written to {database}, for which the tracker has no ledger: a kill "
                f"would leave them there. Write ResourceTracker(..., ledger=[Ledger(one), "
                f"Ledger(other)]).",
            )
        return journal

    def _warn_unrecorded(self, table: TableName, reason: str) -> None:
        self._warn_once(
            ("not entered", table),
            f"Rows of {table} are not entered into the ledger, so a kill would leave them there: "
            f"{reason}",
        )

    def _warn_once(self, subject: Any, message: str) -> None:
        warn_once = self._warn()
        if warn_once is not None:
            warn_once(subject, message)

    # -- rows that another will delete ---------------------------------------------------------

    def put_aside(self, database: str, name: str) -> bool:
        """Keep the rows of a database for study, under this name; whether there were any."""
        journal = self._journals[database]
        if not journal.put_aside(name, self._context):
            return False
        self.release(database)
        for resource in list(journal.externals):
            self._externals.forget(resource)
        journal.externals = {}
        return True

    def release(self, database: str) -> None:
        """Forget the rows of a database, and their entries: another deletes them."""
        self._store.forget_database(database)
        journal = self._journals.get(database)
        if journal is not None:
            journal.committed, journal.uncertain, journal.is_log = set(), {}, False
            journal.unanswered = []

    def adopt(
        self, entered: dict[str, Any], engine: sa.Engine, externals: Iterable[ExternalResource]
    ) -> None:
        """Make the entries of another process this one's."""
        self.open(engine)
        (journal,) = self._journals.values()
        changes = self._store.changes(journal.ledger.database)
        with journal.ledger.transaction(lock_timeout=5.0) as connection:
            update = journal.adopt(connection, entered, changes, self._context, externals)
        journal.apply(update)

    # -- what is no row ------------------------------------------------------------------------

    def integer(self, start: int = 0) -> int:
        """A number of this worker's: of all workers, runs and hosts where there is a ledger."""
        journal = next(iter(self._journals.values()), None)
        if journal is None:
            return self._context.integer(start)
        return start + journal.process.integers.next(journal.ledger)

    def intend(self, tie: Tie, tables: Callable[[], Mapping[TableName, KeyedTable]]) -> None:
        """Record an external resource before it is made."""
        journal = next(iter(self._journals.values()), None)
        if journal is not None:
            journal.intend(tie, tables(), self._context)

    def remove(self, resource: ExternalResource) -> None:
        """Delete the entry of an external resource that is gone."""
        for journal in self._journals.values():
            journal.forget_resource(resource)
