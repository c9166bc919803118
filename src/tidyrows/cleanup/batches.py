"""A cleanup in transactions of bounded size: which rows go together, and which first.

Rows that reference go before or with what they reference, so that the foreign keys are whole
wherever a transaction ends. Pure: steps in, shares out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.plan import place_of
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.cleanup.deletion import Rows
    from tidyrows.cleanup.plan import Step
    from tidyrows.keys import KeyedTable


class _Share:
    """The rows of one transaction, as they are gathered."""

    def __init__(self) -> None:
        self.rows: Rows = {}
        self.size = 0

    def add(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        place = place_of(table.name)
        if place in self.rows:  # rows of a cycle come level by level
            keys = in_order([*self.rows[place][1], *keys])
        self.size += len(keys) - (len(self.rows[place][1]) if place in self.rows else 0)
        self.rows[place] = table, keys


def shares(
    steps: Iterable[Step], limit: int, *, apart: Callable[[Step], Iterable[Step]]
) -> Iterator[Rows]:
    """The rows of these steps, in order, a transaction each.

    Args:
        steps: what is to be deleted, children first.
        limit: the most rows of one share. Rows that only go together are not parted.
        apart: takes a step whose tables form a cycle, and that is too large for one share, apart
            into smaller ones in the order in which their rows can go; a step of it with ``cycle``
            is a circle of rows. Asked when the shares before have been taken.
    """
    share = _Share()
    for step in steps:
        size = sum(len(batch.keys) for batch in step.batches)
        parts = apart(step) if step.cycle and size > limit else (step,)
        for part in parts:
            if part.cycle:
                size = sum(len(batch.keys) for batch in part.batches)
                if share.size and share.size + size > limit:
                    yield share.rows
                    share = _Share()
                for batch in part.batches:
                    share.add(batch.table, batch.keys)
                continue
            for batch in part.batches:
                at = 0
                while at < len(batch.keys):
                    if share.size >= limit:
                        yield share.rows
                        share = _Share()
                    room = limit - share.size
                    share.add(batch.table, batch.keys[at : at + room])
                    at += room
    if share.size:
        yield share.rows
