"""What a cleanup did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.rows import RowKey, TableName

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Leftover:
    """Rows of ours that are still there.

    Attributes:
        table: the table.
        row: the row; None for rows of a table without a primary key, which have no name.
        cause: why it is still there, and what to do.
        count: how many rows; more than one only where ``row`` is None.
    """

    table: TableName
    row: RowKey | None
    cause: str
    count: int = 1

    def __str__(self) -> str:
        name = str(self.row) if self.row is not None else f"{self.table}: {self.count} row(s)"
        return f"{name}: {self.cause}"


@dataclass(slots=True)
class CleanupReport:
    """What one cleanup did.

    Attributes:
        deleted: rows deleted, by table.
        already_gone: tracked rows that somebody else had deleted before, by table.
        reappeared: rows that were deleted, and whose key is there again: somebody else's now, or
            put back by a trigger. tidyrows lets go of them.
        leftovers: rows of ours that are still there; they stay tracked.
        retries: how often a transaction was run again, after deadlocks and the like.
        seconds: how long it took.
    """

    deleted: dict[TableName, int] = field(default_factory=dict)
    already_gone: dict[TableName, int] = field(default_factory=dict)
    reappeared: dict[TableName, int] = field(default_factory=dict)
    leftovers: tuple[Leftover, ...] = ()
    retries: int = 0
    seconds: float = 0.0

    @property
    def total_deleted(self) -> int:
        """Rows deleted, in all tables."""
        return sum(self.deleted.values())

    def __str__(self) -> str:
        parts = [f"{table} {count} deleted" for table, count in self.deleted.items() if count]
        parts += [f"{table} {count} already gone" for table, count in self.already_gone.items()]
        parts += [f"{table} {count} there again" for table, count in self.reappeared.items()]
        if self.leftovers:
            parts.append(f"{sum(leftover.count for leftover in self.leftovers)} left over")
        if self.retries:
            parts.append(f"{self.retries} retries")
        return f"{', '.join(parts) or 'nothing to delete'} ({self.seconds:.3f} s)"


def describe_leftovers(leftovers: Iterable[Leftover]) -> str:
    """The message of a CleanupError: every row with its cause, up to a screen of them."""
    leftovers = list(leftovers)
    count = sum(leftover.count for leftover in leftovers)
    lines = [f"{count} tracked row(s) are still there; they stay tracked:"]
    lines += [f"  {leftover}" for leftover in leftovers[:_SHOWN]]
    if len(leftovers) > _SHOWN:
        lines.append(f"  ... and {len(leftovers) - _SHOWN} more in error.leftovers")
    lines.append("Remove the cause, then call cleanup() again.")
    return "\n".join(lines)
