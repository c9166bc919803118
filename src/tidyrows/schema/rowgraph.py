"""The order of single rows where tables form a cycle, and the loops among them.

For databases that check a foreign key row by row. Most cycles of tables hold no cycle of rows, for
example a tree of categories.
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
    """Rows that no row of a later step references; a step has loops only, or none."""

    rows: tuple[Row, ...]  # in the order given; without loops they can be deleted together
    # The rows that reference each other in a circle, circle by circle, or themselves: one reference
    # of each circle must be set to NULL first.
    loops: tuple[tuple[Row, ...], ...] = ()

    @property
    def loop(self) -> bool:
        """Whether these rows are loops."""
        return bool(self.loops)


@dataclass(frozen=True, slots=True)
class RowOrder(Generic[Row]):
    """Every row once, in steps that can be deleted one after the other, children first."""

    steps: tuple[RowStep[Row], ...]

    @property
    def loops(self) -> tuple[tuple[Row, ...], ...]:
        """All loops, in the order of the steps."""
        return tuple(loop for step in self.steps for loop in step.loops)


def levels(rows: Iterable[Row], references: Iterable[tuple[Row, Row]]) -> RowOrder[Row]:
    """Put rows in as few steps as possible, so that no row goes while another references it.

    ``references`` are pairs of child and parent; one with a row that is not among ``rows`` is
    ignored.
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
    """Generations of rows that no row left references, and the rows left at the end."""
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
    """Steps for rows in loops, and for all that these reference."""
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
