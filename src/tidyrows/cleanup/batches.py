"""How rows are divided into transactions: in order, and of bounded size.

Rows that reference go before or with what they reference, so that the foreign keys are whole
wherever a transaction ends. Pure: steps in, rows out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.plan import Batch, Step
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.cleanup.plan import Rows
    from tidyrows.keys import KeyedTable


def transactions_of(
    steps: Iterable[Step], limit: int, *, apart: Callable[[Step], Iterable[Step]]
) -> Iterator[Rows]:
    """The rows of these steps, in order, a transaction each.

    Args:
        steps: what is to be deleted, children first.
        limit: the most rows of one transaction. Rows that only go together are not divided.
        apart: divides a step whose tables form a cycle, and that is too large for one
            transaction, into smaller ones in the order in which their rows can go; a step of it
            with ``cycle`` is a circle of rows. Called when the transactions before have ended.
    """
    rows: Rows = {}
    size = 0
    for step in steps:
        parts = apart(step) if step.cycle and step.size > limit else (step,)
        for part in parts:
            if part.cycle:
                if size and size + part.size > limit:
                    yield rows
                    rows, size = {}, 0
                for batch in part.batches:
                    size += _add(rows, batch.table, batch.keys)
                continue
            for batch in part.batches:
                at = 0
                while at < len(batch.keys):
                    if size >= limit:
                        yield rows
                        rows, size = {}, 0
                    room = limit - size
                    whole = not at and room >= len(batch.keys)
                    keys = batch.keys if whole else batch.keys[at : at + room]
                    size += _add(rows, batch.table, keys)
                    at += room
    if size:
        yield rows


def _add(rows: Rows, table: KeyedTable, keys: Sequence[Any]) -> int:
    place = table.place
    before = len(rows[place][1]) if place in rows else 0
    if before:  # rows of a cycle come level by level
        keys = in_order([*rows[place][1], *keys])
    rows[place] = table, keys
    return len(keys) - before


def part_of(step: Step, rows: Iterable[tuple[int, Any]]) -> Step:
    """Some rows of a step, given as (number of the batch, key)."""
    keys: dict[int, list[Any]] = {}
    for number, key in rows:
        keys.setdefault(number, []).append(key)
    places = {step.batches[number].table.place for number in keys}
    return Step(
        tuple(Batch(step.batches[number].table, keys[number]) for number in sorted(keys)),
        tuple(key for key in step.cycle if {key.child, key.parent} <= places),
    )
