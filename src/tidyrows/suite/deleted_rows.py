"""Rows that a test deleted though it had not created them, and may insert again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Inserted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.suite.tracker import SuiteTracker


class DeletedRows:
    """Remembers which tracker had created each deleted row.

    Args:
        trackers: those that are started; the list changes during the run.
    """

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
