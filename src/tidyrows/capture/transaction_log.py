"""What one database transaction has done to tracked tables and not yet committed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tidyrows.capture.changes import Change
    from tidyrows.capture.sink import Sink

Logged: TypeAlias = "tuple[Change, Sink | None]"
"""A change, and the one sink that it concerns; None where it concerns all."""


@dataclass(slots=True)
class Savepoint:
    """Changes since a savepoint; the first of a log is the transaction itself."""

    name: str
    changes: list[Logged] = field(default_factory=list)


class TransactionLog:
    """The changes of the transaction that is open on one connection, by savepoint.

    Attributes:
        changed: whether there are changes.
        targets: real tables resolved in this transaction.
        rewritten: statements under way that were changed, by the id of the statement.
        release_unsure: a savepoint was released; on SQLite that may have been a commit.
        outermost: the savepoint with which the transaction began, whose RELEASE is its COMMIT.
        emptied: the execution of the newest raw statement, and what it does to whole tables once it
            has succeeded.
    """

    __slots__ = (
        "_savepoints",
        "changed",
        "emptied",
        "outermost",
        "release_unsure",
        "rewritten",
        "targets",
    )

    def __init__(self) -> None:
        self._savepoints = [Savepoint("")]
        self.changed = False
        self.targets: dict[Any, Any] = {}
        self.rewritten: dict[int, Any] = {}
        self.release_unsure = False
        self.outermost: str | None = None
        self.emptied: tuple[Any, list[Change]] | None = None

    def all(self) -> list[Logged]:
        """All changes, in order."""
        first, *inner = self._savepoints
        changes = list(first.changes)
        for savepoint in inner:
            changes += savepoint.changes
        return changes

    def add(self, change: Change, sink: Sink | None) -> None:
        """Add the effect of the newest statement."""
        self._savepoints[-1].changes.append((change, sink))
        self.changed = True

    def restore(self, changes: list[Logged]) -> None:
        """Put back the changes of a COMMIT that failed and left its transaction open."""
        self._savepoints[0].changes[:0] = changes
        self.changed = True

    def failed(self, execution: Any) -> None:
        """A statement has failed: it has emptied no table."""
        if self.emptied is not None and self.emptied[0] is execution:
            self.emptied = None

    def mark_uncertain(self) -> None:
        """It is not known which of the changes are still part of the transaction."""
        for savepoint in self._savepoints:
            savepoint.changes = [
                (replace(change, certain=False), sink) for change, sink in savepoint.changes
            ]

    def savepoint(self, name: str) -> None:
        """A savepoint was set."""
        self._savepoints.append(Savepoint(name))

    def has_savepoint(self, name: str) -> bool:
        """Whether the setting of a savepoint was seen."""
        return self._find(name) is not None

    def release(self, name: str) -> None:
        """A savepoint was released: its changes are its parent's now."""
        place = self._find(name)
        if place is not None:
            merged = [change for inner in self._savepoints[place:] for change in inner.changes]
            del self._savepoints[place:]
            self._savepoints[-1].changes.extend(merged)

    def rollback_to(self, name: str) -> None:
        """A savepoint was rolled back, and every savepoint in it.

        Of a savepoint that was set before capture began it is not known which changes it holds, so
        all changes around it become uncertain.
        """
        place = self._find(name)
        self.targets.clear()  # what SET LOCAL has set since is undone as well
        if place is None:
            place = 1
            self.mark_uncertain()
            self._savepoints[0].changes = self.all()
        del self._savepoints[place:]

    def clear(self) -> list[Logged]:
        """Remove and return all changes, in order."""
        changes = self.all()
        self._savepoints = [Savepoint("")]
        self.changed = False
        self.targets.clear()
        self.rewritten.clear()
        self.release_unsure = False
        self.outermost = None
        return changes

    def _find(self, name: str) -> int | None:
        for place in range(len(self._savepoints) - 1, 0, -1):
            if self._savepoints[place].name == name:
                return place
        return None
