"""What capture tells of: the one interface between it and whoever holds or observes rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change, Touched
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.worker import WorkerContext

INTERNAL = "tidyrows_internal"
"""The execution option of tidyrows' own statements, of which no sink hears."""


class Sink(Protocol):
    """Receives the changes of an engine's transactions.

    An INSERT concerns the one sink that owns it. Every other change concerns all sinks of the
    engine, which look for their own rows in it.
    """

    @property
    def context(self) -> WorkerContext:
        """Whose tag marks a value as this sink's."""

    @property
    def active(self) -> bool:
        """Whether it takes new rows."""

    @property
    def is_shared(self) -> bool:
        """Whether its rows are for several tests."""

    # -- of a transaction, in this order -------------------------------------------------------

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """A COMMIT is about to be sent: write, in its transaction, what it concerns.

        Called again with the same changes where the first COMMIT failed.
        """

    def apply(self, change: Change) -> Change:
        """A change has been committed; returns what is left of it for the other sinks.

        Only of deleted rows without a primary key less may be left than there was.
        """

    def mark_uncertain(self, change: Change) -> Change:
        """It is not known whether a change has been committed; returns what is left of it."""

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain; warn now."""

    # -- what it holds -------------------------------------------------------------------------

    def holds(self, table: TableName) -> bool:
        """Whether it holds rows of a table."""

    def held_keys(self, table: TableName, keys: Iterable[Any]) -> list[Any]:
        """Of these keys, those that it holds."""

    def count_of(self, table: TableName) -> int:
        """How many rows of a table it holds."""

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """All keys that it holds."""

    # -- warnings ------------------------------------------------------------------------------

    def warn_once(self, subject: Any, message: str) -> None:
        """Warn of untracked rows, once per block and subject."""

    def warn_late(self, table: KeyedTable) -> None:
        """Warn that rows are committed after the sink has stopped."""

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A raw statement is about to drop a database."""


def tell_watcher(watcher: Sink, touched: Touched, sinks: Sequence[Sink]) -> None:
    """Tell a sink that watches of the rows that are not its own, nor those of a block within its.

    What wider fixtures do to each other's rows, and when they are torn down, is their own affair.
    """
    name = touched.table.name
    own = [sink for sink in sinks if sink is watcher or watcher.is_shared or not sink.is_shared]
    keys = set(touched.keys)
    for sink in own:
        keys.difference_update(sink.held_keys(name, touched.keys))
    if touched.keys:
        count = min(touched.count, len(keys))
    else:  # the statement does not say which: as many as cannot be its own
        count = touched.count - sum(sink.count_of(name) for sink in own)
    if count > 0:
        watcher.apply(replace(touched, keys=sorted(keys, key=repr), count=count))
