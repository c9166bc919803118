"""The plan: which rows go in which order, and which of them in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tidyrows.cleanup.schema_view import schema_of
from tidyrows.keys import TableName
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph, Place
    from tidyrows.tracking.store import TableHoldings


Rows: TypeAlias = "dict[Place, tuple[KeyedTable, Sequence[Any]]]"
"""Rows by place: their table, and their keys in the one global order."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one table."""

    table: KeyedTable
    keys: Sequence[Any]  # in the one global order
    # to planned tables of the same database
    foreign_keys: tuple[ForeignKey, ...] = ()

    def parent(self, key: ForeignKey) -> TableName:
        """The table that one of its foreign keys references."""
        return TableName(self.table.name.database, *key.parent)


@dataclass(frozen=True, slots=True)
class Step:
    """Batches that are deleted together: one, or those of the tables of a cycle."""

    batches: tuple[Batch, ...]
    cycle: tuple[ForeignKey, ...] = ()  # its foreign keys; empty where there is no cycle

    @property
    def size(self) -> int:
        """How many rows."""
        return sum(len(batch.keys) for batch in self.batches)

    @property
    def rows(self) -> Rows:
        """The rows by place."""
        return {batch.table.place: (batch.table, batch.keys) for batch in self.batches}


@dataclass(frozen=True, slots=True)
class Plan:
    """The ordered list of what a cleanup will delete: children before their parents.

    ``str(plan)`` is text for people, :meth:`to_mermaid` a diagram.

    Attributes:
        steps: what runs, in this order.
    """

    steps: tuple[Step, ...] = ()

    @property
    def total_rows(self) -> int:
        """Rows to delete."""
        return sum(len(batch.keys) for _number, _step, batch in self._batches())

    @property
    def foreign_keys(self) -> tuple[ForeignKey, ...]:
        """The foreign keys among the planned tables, which force the order."""
        return tuple(key for _n, _s, batch in self._batches() for key in batch.foreign_keys)

    def __str__(self) -> str:
        return "\n".join(self._line(*numbered) for numbered in self._batches()) or (
            "Nothing to delete."
        )

    def _line(self, number: int, step: Step, batch: Batch) -> str:
        line = self._label(number, batch)
        columns = {
            f"{batch.parent(key)} ({', '.join(key.child_columns)})"
            for key in batch.foreign_keys
            if not key.is_self_reference
        }
        if columns:
            line += f", before {', '.join(sorted(columns))}"
        if step.cycle:
            names = sorted({".".join(key.child) for key in step.cycle})
            line += f"; cycle of {', '.join(names)}" if len(names) > 1 else "; references itself"
        return line

    def to_mermaid(self) -> str:
        """The plan as a Mermaid flowchart: arrows lead from a child to the parent it waits for."""
        nodes = {batch.table.name: f"t{at}" for at, (_n, _s, batch) in enumerate(self._batches())}
        lines = ["flowchart TD"]
        for number, _step, batch in self._batches():
            label = _mermaid_text(self._label(number, batch))
            lines.append(f'    {nodes[batch.table.name]}["{label}"]')
        for _number, _step, batch in self._batches():
            for key in batch.foreign_keys:
                columns = _mermaid_text(", ".join(key.child_columns))
                arrow = f'-->|"{columns}"|'
                lines.append(f"    {nodes[batch.table.name]} {arrow} {nodes[batch.parent(key)]}")
        return "\n".join(lines)

    def _label(self, number: int, batch: Batch) -> str:
        several = len({each.table.name.database for _n, _s, each in self._batches()}) > 1
        name = batch.table.name
        where = f"{name.database} {name}" if several else str(name)
        return f"{number}. {where}: {len(batch.keys)} row(s)"

    def _batches(self) -> Iterable[tuple[int, Step, Batch]]:
        for number, step in enumerate(self.steps, 1):
            for batch in step.batches:
                yield number, step, batch


def _mermaid_text(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;")


def steps_for(database: Database, holdings: Iterable[TableHoldings]) -> tuple[Step, ...]:
    """Order what is held of one database."""
    rows: Rows = {
        held.table.place: (held.table, held.keys.in_order()) for held in holdings if len(held.keys)
    }
    if not rows:
        return ()
    view = schema_of(database, [table for table, _keys in rows.values()])
    return steps_of(view.graph, rows)


def steps_of(graph: ForeignKeyGraph, rows: Rows) -> tuple[Step, ...]:
    """Order rows."""
    if len(rows) == 1:  # the usual cleanup needs no order
        ((table, keys),) = rows.values()
        own = graph.foreign_keys_between(rows)
        return (Step((Batch(table, keys, own),), own if graph.is_cyclic(rows) else ()),)
    keys_of: dict[Place, list[ForeignKey]] = {}
    for key in graph.foreign_keys_between(rows):
        keys_of.setdefault(key.child, []).append(key)
    return tuple(
        Step(
            tuple(Batch(*rows[place], tuple(keys_of.get(place, ()))) for place in group),
            graph.foreign_keys_between(group) if graph.is_cyclic(group) else (),
        )
        for group in graph.order(rows)
    )


def transactions_of(
    steps: Iterable[Step], limit: int, *, apart: Callable[[Step], Iterable[Step]]
) -> Iterator[Rows]:
    """The rows of these steps, in order, a transaction each: at most ``limit`` rows if possible.

    Rows that reference go before or with what they reference, so that the foreign keys are whole
    wherever a transaction ends. ``apart`` divides a step whose tables form a cycle, and that is too
    large, into smaller ones in the order in which their rows can go; a step of it with ``cycle`` is
    a circle of rows. It is called when the transactions before have ended.
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
                    size += _add(rows, batch.table, batch.keys[at : at + room])
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


def by_place(rows: Iterable[tuple[Place, Any]]) -> dict[Place, list[Any]]:
    """The keys of rows, given as (place, key), by place."""
    keys_of: dict[Place, list[Any]] = {}
    for place, key in rows:
        keys_of.setdefault(place, []).append(key)
    return dict(sorted(keys_of.items()))


def part_of(step: Step, rows: Iterable[tuple[Place, Any]]) -> Step:
    """Some rows of a step, given as (place, key)."""
    keys_of, tables = by_place(rows), step.rows
    return Step(
        tuple(Batch(tables[place][0], keys) for place, keys in keys_of.items()),
        tuple(key for key in step.cycle if {key.child, key.parent} <= keys_of.keys()),
    )
