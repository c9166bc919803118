"""In which order rows and external resources go, as far as that can be said without looking.

Pure: ties and foreign keys in, who waits for whom out.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidyrows.external import ExternalResource
from tidyrows.keys import RowKey, TableName
from tidyrows.schema.graph import strong_components

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.external import Item, Tie


@dataclass(frozen=True, slots=True)
class Circle:
    """Things that each must go before the next, and the last before the first.

    Attributes:
        members: all that are caught in it.
        path: one way around it, from a resource to the same.
    """

    members: frozenset[Item]
    path: tuple[Item, ...]

    def __str__(self) -> str:
        return " before ".join(map(str, self.path))


class Order:
    """Who waits for whom.

    A table stands for those of its rows that no tie names. Which row references which is not
    looked up: a row of a child table may reference any row of the parent table.

    Args:
        ties: the resources.
        references: which table references which, child first.
    """

    def __init__(
        self, ties: Sequence[Tie], references: Iterable[tuple[TableName, TableName]]
    ) -> None:
        self._next: dict[Item, set[Item]] = defaultdict(set)
        self._named: dict[TableName, set[RowKey]] = defaultdict(set)
        for tie in ties:
            for item in (*tie.after, *tie.before):
                if isinstance(item, RowKey):
                    self._named[item.table].add(item)
        for tie in ties:
            for item in tie.after:
                for each in self._rows_of(item):
                    self._next[each].add(tie.resource)
            for item in tie.before:
                self._next[tie.resource].update(self._rows_of(item))
        for child, parent in references:
            parents = self._rows_of(parent)
            for each in self._rows_of(child):
                self._next[each].update(parents - {each})
        self.circles = [
            Circle(frozenset(members), self._around(members))
            for members in strong_components(self._nodes(), self._next)
            if self._turns(members)
        ]

    def node(self, row: RowKey) -> Item:
        """What a row is in this order: itself where a tie names it, else its table."""
        return row if row in self._named.get(row.table, ()) else row.table

    def later(self, resources: Iterable[ExternalResource]) -> set[Item]:
        """Everything that must not go before these resources are gone."""
        found: set[Item] = set()
        queue: deque[Item] = deque(resources)
        while queue:
            new = self._next.get(queue.popleft(), set()) - found
            found |= new
            queue.extend(new)
        return found

    def _rows_of(self, item: Item) -> set[Item]:
        if not isinstance(item, TableName):
            return {item}
        return {item, *self._named.get(item, ())}

    def _nodes(self) -> set[Item]:
        return {*self._next, *(item for items in self._next.values() for item in items)}

    def _turns(self, members: set[Item]) -> bool:
        """Whether these are a circle; one of foreign keys alone is no matter of the order here."""
        first = next(iter(members))
        return any(isinstance(each, ExternalResource) for each in members) and (
            len(members) > 1 or first in self._next.get(first, ())
        )

    def _around(self, members: set[Item]) -> tuple[Item, ...]:
        start = min(
            (each for each in members if isinstance(each, ExternalResource)),
            key=lambda resource: resource.number,
        )
        came_from: dict[Item, Item] = {}
        queue: deque[Item] = deque([start])
        while start not in came_from:
            here = queue.popleft()
            for each in sorted(self._next[here] & members, key=str):
                if each not in came_from:
                    came_from[each] = here
                    queue.append(each)
        path: list[Item] = [start]
        while len(path) == 1 or path[-1] is not start:
            path.append(came_from[path[-1]])
        return tuple(reversed(path))


def order_of(
    ties: Sequence[Tie],
    references: Sequence[tuple[TableName, TableName]],
    tracked: Iterable[TableName],
) -> Order:
    """The order that all foreign keys allow, or where they leave none, those of tracked tables.

    A key from or to a table without tracked rows matters only where the application wrote rows
    into it; those are found when rows are deleted, and then keep what they must.
    """
    order = Order(ties, references)
    if order.circles:
        known = set(tracked)
        order = Order(ties, [pair for pair in references if known.issuperset(pair)])
    return order
