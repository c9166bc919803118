"""The plan: in which order which rows will be deleted. What it prints is what runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.graphs import graph_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.rows import KeyedTable, TableName
    from tidyrows.schema import ForeignKey, Place
    from tidyrows.tracking.holdings import TableHoldings


def place_of(name: TableName) -> Place:
    """A table as the schema room names it."""
    return name.schema, name.name


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one table.

    Attributes:
        table: the table.
        keys: its keys, in the one global order.
    """

    table: KeyedTable
    keys: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Step:
    """Batches that are deleted together: one, or those of the tables of a cycle.

    Attributes:
        batches: what is deleted.
        cycle: the foreign keys of the cycle; empty where there is none.
    """

    batches: tuple[Batch, ...]
    cycle: tuple[ForeignKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The ordered list of what a cleanup will delete: children before their parents.

    ``str(plan)`` is text for people, :meth:`to_mermaid` a diagram.

    Attributes:
        steps: what runs, in this order.
        foreign_keys: the foreign keys among the planned tables, which force the order.
    """

    steps: tuple[Step, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()

    @property
    def total_rows(self) -> int:
        """Rows to delete."""
        return sum(len(batch.keys) for step in self.steps for batch in step.batches)

    def __str__(self) -> str:
        if not self.steps:
            return "Nothing to delete."
        parents: dict[Place, list[str]] = {}
        for key in self.foreign_keys:
            if key.child != key.parent:
                columns = ", ".join(key.child_columns)
                parents.setdefault(key.child, []).append(f"{'.'.join(key.parent)} ({columns})")
        lines = []
        for number, step in enumerate(self.steps, 1):
            for batch in step.batches:
                line = f"{number}. {batch.table.name}: {len(batch.keys)} row(s)"
                before = sorted(set(parents.get(place_of(batch.table.name), ())))
                if before:
                    line += f", before {', '.join(before)}"
                if step.cycle:
                    names = sorted({".".join(key.child) for key in step.cycle})
                    line += (
                        f"; cycle of {', '.join(names)}"
                        if len(names) > 1
                        else "; references itself"
                    )
                lines.append(line)
        return "\n".join(lines)

    def to_mermaid(self) -> str:
        """The plan as a Mermaid flowchart: arrows lead from a child to the parent it waits for."""
        lines = ["flowchart TD"]
        nodes: dict[Place, str] = {}
        for number, step in enumerate(self.steps, 1):
            for batch in step.batches:
                node = nodes[place_of(batch.table.name)] = f"t{len(nodes)}"
                label = f"{number}. {batch.table.name}: {len(batch.keys)} row(s)"
                lines.append(f'    {node}["{_mermaid_text(label)}"]')
        for key in self.foreign_keys:
            columns = _mermaid_text(", ".join(key.child_columns))
            lines.append(f'    {nodes[key.child]} -->|"{columns}"| {nodes[key.parent]}')
        return "\n".join(lines)


def _mermaid_text(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;")


def make_plan(databases: Mapping[str, Database], holdings: Iterable[TableHoldings]) -> Plan:
    """Order what is held, database by database."""
    steps: list[Step] = []
    foreign_keys: list[ForeignKey] = []
    by_database: dict[str, list[TableHoldings]] = {}
    for held in holdings:
        if len(held.keys):
            by_database.setdefault(held.table.name.database, []).append(held)
    for name, tables in sorted(by_database.items()):
        graph = graph_of(databases[name], (held.table for held in tables))
        at = {place_of(held.table.name): held for held in tables}
        steps.extend(
            Step(
                tuple(Batch(at[p].table, at[p].keys.in_order()) for p in group),
                graph.foreign_keys_between(group) if graph.is_cyclic(group) else (),
            )
            for group in graph.order(at)
        )
        foreign_keys.extend(graph.foreign_keys_between(at))
    return Plan(tuple(steps), tuple(foreign_keys))
