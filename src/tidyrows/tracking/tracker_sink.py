"""What capture tells a tracker; see :class:`tidyrows.capture.changes.Sink`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import KeysChanged
from tidyrows.errors import LateCommitWarning, UntrackedRowsWarning

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.external import Externals
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.journals import Journals
    from tidyrows.tracking.store import Store


class TrackerSink:
    """Holds the rows of changes, records them, and warns of rows that are not tracked."""

    is_shared = False
    """Whether its rows are for several tests."""
    store: Store
    journals: Journals
    external_resources: Externals

    def __init__(self) -> None:
        self._warned: set[Any] = set()

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
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, UntrackedRowsWarning, stacklevel=2)

    def warn_late(self, table: KeyedTable) -> None:
        """Warn that rows are committed after the tracker has stopped."""
        warnings.warn(
            f"Rows of {table.name} are committed after their tracker has stopped. They stay "
            f"tracked: call cleanup() again to delete them.",
            LateCommitWarning,
            stacklevel=2,
        )
