"""The parts of a tracker, and what capture tells it; see :class:`tidyrows.capture.changes.Sink`."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import KeysChanged, Untracked
from tidyrows.errors import LateCommitWarning, UntrackedRowsWarning, not_raised
from tidyrows.external import Externals
from tidyrows.tracking.binding import Binding, Engines
from tidyrows.tracking.journals import Journals
from tidyrows.tracking.leak_warning import warn_of_leak
from tidyrows.tracking.sessions import Sessions
from tidyrows.tracking.store import Store
from tidyrows.tracking.untracked import UntrackedRows
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.table import Ledger


class TrackerParts:
    """Holds the rows of changes, records them, and warns of rows that are not tracked."""

    is_shared = False
    """Whether its rows are for several tests."""

    def __init__(
        self,
        bind: Any,
        context: WorkerContext | None,
        allow_production: bool | Collection[str],
        ledger: Ledger | Iterable[Ledger] | None,
    ) -> None:
        self.context = context or WorkerContext.current()
        self.active = False  # started, not stopped, and not inherited by a forked child
        self.is_foreign = False  # inherited by a forked child, which owns nothing
        self.started_at: list[str] = []
        self.engines = Engines(self, allow_production)
        self.binding = Binding(bind)
        self.sessions = Sessions(self.binding, self.engines)
        self.store = Store()
        self.external_resources = Externals()
        self.journals = Journals(
            ledger, self.context, self.store, self.external_resources, self.warn_aside
        )
        self.untracked = UntrackedRows()
        self.note_untracked = self.untracked.add
        self._warned: set[Any] = set()
        self.late: dict[TableName, KeyedTable] | None = None  # while a cleanup runs
        # What capture and factories call often, without a call in between.
        self.is_async = self.binding.is_async
        self.owns_session = self.binding.owns_session
        self.holds = self.store.holds
        self.held_keys = self.store.held_keys
        self.keys_by_table = self.store.keys_by_table
        self.mark_uncertain = self.store.mark_uncertain
        self.before_commit = self.journals.before_commit
        self.integer = self.journals.integer
        self.watch_leak()
        if self.bound_engine is not None:
            self.engines.capture(self.bound_engine)

    def forget_parent(self) -> None:
        """In a forked child: the rows are the parent's."""
        self.is_foreign = False
        self.store.forget_parent()
        self.sessions.forget_parent()
        self.external_resources.clear()
        self.journals.forget_parent()
        self.watch_leak()
        self.untracked.clear()
        self._warned.clear()

    @property
    def bound_engine(self) -> sa.Engine | None:
        """The one engine that the tracker is bound to, or None where a session has several."""
        return self.binding.engine()

    def engine_of(self, database: str) -> sa.Engine:
        """The engine that reaches a database of the store, or of the journals."""
        known = self.engines.by_database
        journal = None if database in known else self.journals.of(database)
        return known[database] if journal is None else journal.ledger.engine

    # -- what capture tells --------------------------------------------------------------------

    def apply(self, change: Change) -> Change:
        """A change has been committed."""
        if isinstance(change, KeysChanged) and change.certain and len(self.external_resources):
            self.external_resources.rename(change.table, list(change.keys))
        return self.store.apply(change)

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain."""
        if self.journals.databases:
            self.journals.after_commit(changes, certain=certain)
        if self.store.lost:
            self.warn_of_lost_rows()

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A raw statement is about to drop a database, through an engine to its server."""

    def count_of(self, table: TableName) -> int:
        """How many rows of a table are its own at most, with those that cannot be tracked."""
        return self.store.count_of(table) + self.untracked.count_of(table)

    # -- warnings ------------------------------------------------------------------------------

    def warn_of_lost_rows(self) -> None:
        """Warn of rows that can no longer be followed, and count them as untracked."""
        while self.store.lost:
            table, count = self.store.lost.pop()
            self.note_untracked(Untracked(table, count=count))
            self.warn_aside(
                ("renamed", table.name),
                f"An UPDATE changed primary keys of {table.name} in a way that cannot be followed, "
                f"so tracked rows are lost from sight. Name them with tracker.track_rows(table, "
                f"keys).",
            )

    def warn_once(self, subject: Any, message: str) -> None:
        """Warn of untracked rows, once per block and subject."""
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, UntrackedRowsWarning, stacklevel=2)

    def warn_aside(self, subject: Any, message: str) -> None:
        """As :meth:`warn_once`, while a transaction ends."""
        with not_raised():
            self.warn_once(subject, message)

    def warn_late(self, table: KeyedTable) -> None:
        """Warn that rows are committed after the tracker has stopped.

        While a cleanup runs, which may delete them yet, that is only noted.
        """
        if self.late is not None:
            self.late[table.name] = table
            return
        with not_raised():
            warnings.warn(
                f"Rows of {table.name} are committed after their tracker has stopped. They stay "
                f"tracked: call cleanup() again to delete them.",
                LateCommitWarning,
                stacklevel=2,
            )

    def warn_of_late_rows(self, noted: Mapping[TableName, KeyedTable]) -> None:
        """A cleanup has ended: warn of rows that were committed meanwhile and are still there."""
        self.engines.resolve()
        under_way = {change.table.name for change in self.engines.pending_changes()}
        for name, table in noted.items():
            if name in under_way or self.holds(name):
                self.warn_late(table)

    def watch_leak(self) -> None:
        """Warn of what the tracker still holds once it is garbage, or the process ends."""
        self._leak_warning = weakref.finalize(
            self,
            warn_of_leak,
            self.store,
            self.external_resources,
            self.context.tag,
            self.started_at,
            os.getpid(),
            entered=bool(self.journals),
        )

    def dismiss_leak_warning(self) -> None:
        """What it holds has been reported: no warning is needed once the tracker is garbage."""
        self._leak_warning.detach()
