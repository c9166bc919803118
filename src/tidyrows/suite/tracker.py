"""The tracker of a suite that does not use tidyrows: it collects its warnings for the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tidyrows.capture.changes import Inserted, Touched
from tidyrows.suite.spare_engine import usable_engine
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.capture.tracker_stack import TrackerStack
    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.table import Ledger
    from tidyrows.suite.summary import Record

_SHOWN = 3


class SuiteEvents(Protocol):
    """What a tracker reports to its suite at once."""

    def inserted(self, tracker: SuiteTracker, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Rows were inserted under keys that the database has not generated."""

    def deleted(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Rows that this tracker does not hold were deleted."""

    def committed_late(self, tracker: SuiteTracker) -> None:
        """Rows are committed after the tracker has stopped."""

    def dropping(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped."""


class SuiteTracker(ResourceTracker):
    """Tracks all rows that no other tracker does.

    Args:
        engines: all engines; they give the rows to one tracker at a time.
        events: what is reported at once.
        test: the test, or the module, class or package whose rows these are.
        is_shared: for several tests.
        ledgers: where the rows are entered.
    """

    def __init__(
        self,
        engines: TrackerStack[ResourceTracker],
        events: SuiteEvents,
        test: str,
        *,
        is_shared: bool,
        ledgers: Sequence[Ledger],
    ) -> None:
        self._events = events
        self.test = test
        self.is_shared = is_shared
        self._touched: dict[tuple[str, str, str], None] = {}
        self._untracked: dict[str, None] = {}
        super().__init__(
            engines,
            context=WorkerContext.current().for_test(test),
            ledger=ledgers or None,
            allow_production=True,  # the suite has looked at each engine
        )

    def pop_observed(self, untracked: Iterable[str] = ()) -> Record:
        """Rows of others that were touched, and what was not tracked, since the last call."""
        record = {
            "whole_suite": True,
            "touched": [[table, verb, rows] for table, verb, rows in self._touched],
            "untracked": [*untracked, *self._untracked],
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
        self._untracked[_in_brief(subject, message)] = None

    def warn_late(self, table: KeyedTable) -> None:
        """A transaction that the test left open is committed: its rows can be deleted now."""
        self._events.committed_late(self)

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """No connection of the ledger's may be in the way."""
        self._events.dropping(engine, database)

    def apply(self, change: Change) -> Change:
        """Track rows that were inserted, except those that a test had only deleted."""
        if isinstance(change, Touched):
            self._note_touched(change)
            return change
        rest = super().apply(change)
        if isinstance(change, Inserted) and change.certain and not change.generated:
            self._events.inserted(self, change.table, change.keys)
        return rest

    def _note_touched(self, touched: Touched) -> None:
        """Rows that the test did not create were changed."""
        keys = touched.keys
        rows = ", ".join(str(key) for key in keys[:_SHOWN]) or f"{touched.count} row(s)"
        if len(keys) > _SHOWN:
            rows += f" and {touched.count - _SHOWN} more"
        self._touched[str(touched.table.name), touched.verb, rows] = None
        if touched.verb == "deleted":
            self._events.deleted(touched.table, keys)


def _in_brief(subject: Any, message: str) -> str:
    """The first sentence: the remedy in the second is for a test that has a tracker."""
    if subject[0] == "raw":
        return f"rows that raw SQL inserted into {subject[1]}"
    return message.partition(". ")[0]
