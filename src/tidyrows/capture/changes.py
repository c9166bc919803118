"""What one database transaction has done to tracked tables and not yet committed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.capture.digests import Patch, Prints
    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Book, Number
    from tidyrows.tracking.tracker import ResourceTracker


class Kind(Enum):
    """What happened to the rows."""

    INSERTED = auto()
    UNKEYED = auto()  # inserted into a table without a primary key: keys holds whole
    # rows in the order of the columns, or None for one of which only the number is known
    DELETED = auto()
    TAKEN = (
        auto()
    )  # deleted from a table without a primary key: whole rows, or None for any of them
    RENAMED = auto()  # keys holds (old, new) pairs
    MOVED = auto()  # keys were changed, and nobody knows which: keys is empty
    UPDATED = auto()  # other columns were set; keys is empty where it may have been any row
    TOUCHED = auto()  # updated or deleted, whosever they are: for who watches, and no ledger


@dataclass(frozen=True, slots=True)
class Touch:
    """What a statement did to rows, whosever they are.

    Attributes:
        watcher: who wants to know.
        verb: ``updated`` or ``deleted``.
        count: how many rows.
    """

    watcher: ResourceTracker
    verb: str
    count: int


@dataclass(slots=True)
class Change:
    """The effect of one statement.

    Attributes:
        kind: what happened.
        table: the real table.
        keys: the keys, in the form that ``kind`` says.
        owner: the tracker whose rows they are; None for what concerns every tracker.
        generated: the database made the keys, so that no stranger can hold them.
        certain: False where the statement's effect on these very rows is not known.
        prints: what inserted rows look like, if keys may come back.
        patches: what was set, per key, or once for any row.
        told: the user named the rows.
        touch: what was done to rows that may be others', where somebody watches.
        entered: it stands in every ledger that it concerns.
        entries: where it stands there.
    """

    kind: Kind
    table: KeyedTable
    keys: list[Any]
    owner: ResourceTracker | None = None
    generated: bool = False
    certain: bool = True
    prints: Prints | None = None
    patches: Sequence[Patch] = ()
    told: bool = False
    touch: Touch | None = None
    entered: bool = False
    entries: list[tuple[Book, Number]] = field(default_factory=list)


@dataclass(slots=True)
class Savepoint:
    """Changes since a savepoint; the first of a log is the transaction itself."""

    name: str
    changes: list[Change] = field(default_factory=list)


class TransactionLog:
    """The changes of the transaction that is open on one connection, by savepoint.

    Attributes:
        targets: real tables resolved in this transaction.
        rewritten: how statements under way were changed, by the id of the statement.
        release_unsure: a savepoint was released; on SQLite that may have been a commit.
        outermost: the savepoint with which the transaction began, whose RELEASE is its COMMIT.
        emptied: the execution of the newest raw statement, and what it does to whole tables once it
            has succeeded.
    """

    __slots__ = (
        "_any",
        "_savepoints",
        "emptied",
        "outermost",
        "release_unsure",
        "rewritten",
        "targets",
    )

    def __init__(self) -> None:
        self._savepoints = [Savepoint("")]
        self._any = False
        self.targets: dict[Any, Any] = {}
        self.rewritten: dict[int, Any] = {}
        self.release_unsure = False
        self.outermost: str | None = None
        self.emptied: tuple[Any, list[Change]] | None = None

    def __bool__(self) -> bool:
        return self._any

    def __iter__(self) -> Iterator[Change]:
        for savepoint in self._savepoints:
            yield from savepoint.changes

    def add(self, change: Change) -> None:
        """Note what the newest statement did."""
        self._savepoints[-1].changes.append(change)
        self._any = True

    def restore(self, changes: list[Change]) -> None:
        """Put back what a COMMIT that failed has left open."""
        self._savepoints[0].changes[:0] = changes
        self._any = True

    def failed(self, execution: Any) -> None:
        """A statement has failed: it has emptied no table."""
        if self.emptied is not None and self.emptied[0] is execution:
            self.emptied = None

    def savepoint(self, name: str) -> None:
        """A savepoint was set."""
        self._savepoints.append(Savepoint(name))

    def knows(self, name: str) -> bool:
        """Whether a savepoint was set since somebody listened."""
        return self._find(name) is not None

    def release(self, name: str) -> None:
        """A savepoint was released: what stands in it is its parent's now."""
        place = self._find(name)
        if place is not None:
            merged = [change for inner in self._savepoints[place:] for change in inner.changes]
            del self._savepoints[place:]
            self._savepoints[-1].changes.extend(merged)

    def rollback_to(self, name: str) -> None:
        """A savepoint was rolled back, and every savepoint in it.

        One that was set before anybody listened is unknown here: what it held cannot be told from
        what came before it, so the changes around it are no longer certain.
        """
        place = self._find(name)
        self.targets.clear()  # what SET LOCAL has set since is undone as well
        if place is None:
            place = 1
            for change in self:
                change.certain = False
            self._savepoints[0].changes = list(self)
        del self._savepoints[place:]

    def take(self) -> list[Change]:
        """All changes, in order; the log is empty afterwards."""
        changes = list(self)
        self._savepoints = [Savepoint("")]
        self._any = False
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
