"""What the transactions of a cleanup in one database share, and what came of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from tidyrows.cleanup.report import TableRows, add_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.identity import Identity
    from tidyrows.cleanup.options import DependentRules
    from tidyrows.cleanup.reasons import Reason
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.keys import TableName
    from tidyrows.schema import Place

Kept: TypeAlias = "dict[Place, dict[Any, Reason]]"
"""Rows that stay, by place and key."""


@dataclass(slots=True)
class Outcome:
    """What came of one transaction, or of several.

    Attributes:
        deleted: tracked rows deleted.
        gone: their keys, where every row that was asked for went.
        dependents: untracked rows deleted.
        detached: untracked rows detached.
        kept: rows that were not to be deleted, and why.
        refused: rows that could not be deleted, and why.
        seconds: how long the DELETEs of each table took.
    """

    deleted: Counter[Place] = field(default_factory=Counter)
    gone: dict[Place, list[Sequence[Any]]] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    refused: Kept = field(default_factory=dict)
    seconds: dict[Place, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.deleted.values()) or bool(self.dependents or self.detached)

    def add(self, part: Outcome) -> None:
        """Add what a transaction did, now that it is committed."""
        self.deleted.update(part.deleted)
        for place, seconds in part.seconds.items():
            self.seconds[place] = self.seconds.get(place, 0.0) + seconds
        for place, keys in part.gone.items():
            self.gone.setdefault(place, []).extend(keys)
        for name, rows in part.dependents.items():
            add_rows(self.dependents, rows, name)
            if name in self.detached:  # by an earlier transaction, when less was known of them
                left = self.detached.pop(name).without(rows)
                self.detached.update({name: left} if left else {})
        for name, rows in part.detached.items():
            add_rows(self.detached, rows, name)
        for place, kept in part.kept.items():
            if kept:
                self.kept.setdefault(place, {}).update(kept)


@dataclass(slots=True)
class Scope:
    """What all transactions of a cleanup in one database share.

    Attributes:
        tracked: all our rows, those too that are not to be deleted now.
        stay: rows that are known not to go, and why.
        identity: tells which rows may not be ours any more; None where no key comes back.
        outcome: of all transactions so far.
    """

    run: CleanupRun
    database: Database
    view: SchemaView
    rules: DependentRules
    tracked: Mapping[Place, Collection[Any]]
    stay: Kept
    identity: Identity | None
    outcome: Outcome
