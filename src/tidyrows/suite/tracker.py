"""The trackers of a suite that does not use tidyrows, and the engines whose rows they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Inserted, Touched
from tidyrows.capture.ownership import TrackerStack
from tidyrows.observe.all_engines import AllEngines
from tidyrows.suite.spare_engine import usable_engine
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change, Sink
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.table import Ledger

_SHOWN = 3
_COUNTED = frozenset({"raw", "untold", "unseen", "unnamed"})
"""Subjects of warnings of rows whose number is noted when they are committed."""


class SuiteEngines(TrackerStack["SuiteTracker"]):
    """All engines of the process; the tracker that was pushed last is given the rows of all."""

    def __init__(
        self,
        accept: Callable[[sa.Engine], bool],
        on_drop: Callable[[sa.Engine, str], None],
        deleted_rows: DeletedRows,
        observer: Sink | None = None,
    ) -> None:
        super().__init__()
        self.on_drop = on_drop
        self.observer = observer
        self.deleted_rows = deleted_rows
        engines = AllEngines(accept, self._tracker)
        self.start, self.stop, self._engines = engines.start, engines.stop, engines

    @property
    def known(self) -> list[sa.Engine]:
        """The engines whose rows are tracked, as far as they are still alive."""
        return self._engines.known

    def _tracker(self, reference: weakref.ref[sa.Engine]) -> SuiteTracker | None:
        stack = self._stack
        tracker = stack[-1] if stack else None
        if tracker is None or not tracker.active:
            return None
        if reference not in tracker.captured:
            engine = reference()
            if engine is None:
                return None
            tracker.engines.capture(engine)
            tracker.captured.add(reference)
        return tracker


class SuiteTracker(ResourceTracker):
    """Tracks all rows that no other tracker does; it collects its warnings for the summary."""

    def __init__(
        self,
        engines: SuiteEngines,
        test: str,
        *,
        is_shared: bool,
        ledgers: Sequence[Ledger],
    ) -> None:
        self._suite = engines
        self.test = test
        self.is_shared = is_shared
        self.committed_late = False
        self.captured: set[weakref.ref[sa.Engine]] = set()  # which tell of its rows already
        self._touched: dict[tuple[str, str, str], None] = {}
        self._untracked: dict[str, None] = {}
        super().__init__(
            engines,
            context=WorkerContext.current().for_test(test),
            ledger=ledgers or None,
            allow_production=True,  # the suite has looked at each engine
        )

    def pop_observed(self) -> dict[str, Any]:
        """Rows of others that were touched, and what was not tracked, since the last call."""
        record = {
            "whole_suite": True,
            "touched": [[table, verb, rows] for table, verb, rows in self._touched],
            "untracked": [*self._untracked],
        }
        self._touched, self._untracked = {}, {}
        return record

    def engine_of(self, database: str) -> sa.Engine:
        """An engine that can connect now."""
        return usable_engine(super().engine_of(database))

    def own_engine_of(self, database: str) -> sa.Engine:
        """The suite's own engine."""
        return super().engine_of(database)

    def warn_once(self, subject: Any, message: str) -> None:
        """Collect the warning: the suite may turn warnings into errors."""
        if self._suite.observer is not None:
            self._suite.observer.warn_once(subject, message)
        if subject[0] not in _COUNTED:
            brief = message.partition(". ")[0]  # the remedy is for a test with a tracker
            self._untracked[brief] = None

    def warn_late(self, table: KeyedTable) -> None:
        """A transaction that the test left open is committed: its rows can be deleted now."""
        self.committed_late = True
        if self.late is not None:
            self.late[table.name] = table

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """No connection of the ledger's may be in the way."""
        self._suite.on_drop(engine, database)

    def apply(self, change: Change) -> Change:
        """Track rows that were inserted, except those that a test had only deleted."""
        if isinstance(change, Touched):
            self._note_touched(change)
            return change
        rest = super().apply(change)
        if self._suite.observer is not None and isinstance(change, Inserted):
            self._suite.observer.apply(change)
        if isinstance(change, Inserted) and change.certain and not change.generated:
            self._suite.deleted_rows.give_back(self, change.table, change.keys)
        return rest

    def _note_touched(self, touched: Touched) -> None:
        """Rows that the test did not create were changed."""
        keys = touched.keys
        rows = ", ".join(str(key) for key in keys[:_SHOWN])
        if len(keys) != touched.count:  # it names none, or some that are gone already
            rows = f"{touched.count} row(s)"
        elif len(keys) > _SHOWN:
            rows += f" and {len(keys) - _SHOWN} more"
        self._touched[str(touched.table.name), touched.verb, rows] = None
        if touched.verb == "deleted":
            self._suite.deleted_rows.note(touched.table, keys)


class DeletedRows:
    """Remembers which tracker had created each deleted row."""

    def __init__(self, trackers: Sequence[SuiteTracker]) -> None:
        self._trackers = trackers
        self._creators: dict[tuple[TableName, Any], SuiteTracker | None] = {}

    def note(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """A test has deleted these rows."""
        for key in keys:
            self._creators[table.name, key] = next(
                (each for each in self._trackers if each.held_keys(table.name, [key])), None
            )

    def give_back(self, tracker: SuiteTracker, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Deleted rows are inserted again under their keys: track them as before the DELETE."""
        for key in keys if self._creators else ():
            if (table.name, key) in self._creators:
                creator = self._creators.pop((table.name, key))
                tracker.store.forget(table, [key])
                if creator is not None and creator in self._trackers:
                    creator.store.apply(Inserted(table, [key], named=True))
