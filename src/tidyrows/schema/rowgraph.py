"""The order of single rows where tables form a cycle: which can go first, and which are loops.

For databases that check a foreign key row by row. Most cycles of tables hold no cycle of rows; a
tree of categories is one such.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from tidyrows.schema.graph import strong_components

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

Row = TypeVar("Row", bound="Hashable")


@dataclass(frozen=True, slots=True)
class RowStep(Generic[Row]):
    """Rows that no row of a later step references.

    Attributes:
        rows: all rows of the step, in the order in which they were given. Without loops, none of
            them references another, so they can be deleted together, or in any order.
        loops: the rows of ``rows`` that reference each other in a circle, circle by circle, or
            themselves. Before such rows can go, one reference of each circle must.
    """

    rows: tuple[Row, ...]
    loops: tuple[tuple[Row, ...], ...] = ()

    @property
    def loop(self) -> bool:
        """Whether these rows are loops; a step holds loops only, or none."""
        return bool(self.loops)


@dataclass(frozen=True, slots=True)
class RowOrder(Generic[Row]):
    """Every row once, in steps that can be deleted one after the other.

    Attributes:
        steps: children before their parents. A step of loops comes after the rows that reference
            its loops, and before those that its loops reference.
    """

    steps: tuple[RowStep[Row], ...]

    @property
    def loops(self) -> tuple[tuple[Row, ...], ...]:
        """All loops, in the order of the steps."""
        return tuple(loop for step in self.steps for loop in step.loops)


def levels(rows: Iterable[Row], references: Iterable[tuple[Row, Row]]) -> RowOrder[Row]:
    """Put rows in an order in which none is deleted while another one still references it.

    Each step takes all rows that can go by then, so there are as few steps as the longest chain
    has rows; time and memory grow with rows and references, not with depth.

    Args:
        rows: the rows; given twice, a row counts once.
        references: pairs of a child row and the parent row that it references. A pair with a
            row that is not among ``rows`` is ignored.
    """
    position = {row: at for at, row in enumerate(dict.fromkeys(rows))}
    parents: dict[Row, list[Row]] = defaultdict(list)
    for child, parent in references:
        if child in position and parent in position:
            parents[child].append(parent)
    generations, stuck = _peel(position, parents)
    steps = [RowStep(tuple(sorted(free, key=position.__getitem__))) for free in generations]
    if stuck:
        steps.extend(_around_loops(stuck, parents, position))
    return RowOrder(tuple(steps))


def _peel(
    rows: Iterable[Row], parents: Mapping[Row, list[Row]]
) -> tuple[list[list[Row]], list[Row]]:
    """Take away what nothing left references, again and again; and what is left in the end."""
    left = dict.fromkeys(rows, 0)
    for child in left:
        for parent in parents.get(child, ()):
            left[parent] += 1
    generations: list[list[Row]] = []
    free = [row for row, children in left.items() if not children]
    while free:
        generations.append(free)
        freed = []
        for child in free:
            del left[child]
            for parent in parents.get(child, ()):
                left[parent] -= 1
                if not left[parent]:
                    freed.append(parent)
        free = freed
    return generations, list(left)


def _around_loops(
    rows: list[Row], parents: Mapping[Row, list[Row]], position: Mapping[Row, int]
) -> list[RowStep[Row]]:
    """Steps for rows that are in loops, or that rows in loops reference, near or far."""
    components = [
        tuple(sorted(component, key=position.__getitem__))
        for component in strong_components(rows, parents)
    ]
    number = {row: at for at, component in enumerate(components) for row in component}
    is_loop = [
        len(component) > 1 or component[0] in parents.get(component[0], ())
        for component in components
    ]
    between = {
        at: [
            number[parent]
            for row in component
            for parent in parents.get(row, ())
            if number[parent] != at
        ]
        for at, component in enumerate(components)
    }
    generations, _ = _peel(range(len(components)), between)
    steps: list[RowStep[Row]] = []
    for generation in generations:
        by_position = sorted(generation, key=lambda at: position[components[at][0]])
        plain = tuple(components[at][0] for at in by_position if not is_loop[at])
        loops = tuple(components[at] for at in by_position if is_loop[at])
        if plain:
            steps.append(RowStep(plain))
        if loops:
            rows_in_loops = (row for loop in loops for row in loop)
            steps.append(RowStep(tuple(sorted(rows_in_loops, key=position.__getitem__)), loops))
    return steps
