"""What came of all transactions of a cleanup in one database."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.deletion import add_rows
from tidyrows.keys import TableName

if TYPE_CHECKING:
    from tidyrows.cleanup.deletion import Done
    from tidyrows.cleanup.dependents import Reason
    from tidyrows.cleanup.report import TableRows


@dataclass(slots=True)
class Outcome:
    """What came of all transactions.

    Attributes:
        deleted: tracked rows deleted, by table.
        gone: their keys, as far as they are known one by one.
        refused: why rows could not be deleted, by table and key.
        kept: why rows were not to be deleted, by table and key.
        dependents: untracked rows deleted, by table.
        detached: untracked rows detached, by table.
        seconds: how long each table's deletes took.
        retries: how often a transaction was run again.
    """

    deleted: Counter[TableName] = field(default_factory=Counter)
    gone: dict[TableName, list[Any]] = field(default_factory=dict)
    refused: dict[TableName, dict[Any, str]] = field(default_factory=dict)
    kept: dict[TableName, dict[Any, Reason]] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    seconds: Counter[TableName] = field(default_factory=Counter)
    retries: int = 0

    def add(self, done: Done, database: str) -> None:
        """Add what a transaction did, now that it is committed."""
        self.deleted += done.deleted
        for name, keys in done.gone.items():
            self.gone.setdefault(name, []).extend(keys)
        for name, rows in done.dependents.items():
            add_rows(self.dependents, rows, name)
            if name in self.detached:  # by an earlier transaction, when less was known of them
                left = self.detached.pop(name).without(rows)
                self.detached.update({name: left} if left else {})
        for name, rows in done.detached.items():
            add_rows(self.detached, rows, name)
        self.seconds.update(done.seconds)
        for (schema, table), kept in done.kept.items():
            if kept:
                self.kept.setdefault(TableName(database, schema, table), {}).update(kept)
