"""The sink of an observer: it receives all changes and holds no rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.keys import KeyedTable, TableName


class ObservingSink:
    """Implements :class:`tidyrows.capture.sink.Sink`; a subclass records the changes."""

    active = True
    is_shared = True

    def __init__(self) -> None:
        self.context = WorkerContext.current()

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Nothing is written."""

    def apply(self, change: Change) -> Change:
        """A change has been committed."""
        return change

    def mark_uncertain(self, change: Change) -> Change:
        """It is not known whether a change has been committed."""
        return change

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain."""

    def holds(self, table: TableName) -> bool:
        """It holds no rows."""
        return False

    def held_keys(self, table: TableName, keys: Iterable[Any]) -> list[Any]:
        """It holds no rows."""
        return []

    def count_of(self, table: TableName) -> int:
        """It holds no rows."""
        return 0

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """It holds no rows."""
        return []

    def warn_once(self, subject: Any, message: str) -> None:
        """Rows were inserted whose keys are not known."""

    def warn_late(self, table: KeyedTable) -> None:
        """It never stops."""

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped."""
