"""The graph of foreign keys: which table's rows go first, and which tables form a cycle.

Pure: foreign keys in, order and cycles out. It knows no database and no row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping


Place: TypeAlias = tuple[str, str]
"""A table's place: its real schema and its name."""


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """One foreign key. Two tables may hold several, and a table may reference itself."""

    name: str | None
    child: Place  # the table that holds the key
    child_columns: tuple[str, ...]
    parent: Place
    parent_columns: tuple[str, ...]  # in the order of the child's; not always the primary key
    # NO ACTION, RESTRICT, CASCADE, SET NULL or SET DEFAULT. The MySQL family's RESTRICT reads
    # NO ACTION: its catalogue shows no difference.
    on_delete: str = "NO ACTION"
    deferrable: bool = False
    initially_deferred: bool = False
    inherited: bool = False  # by a partition, from its table: that key finds the same rows
    # A key of the models only, which the database lacks, gives the order of deletes, no more.
    source: Literal["database", "models"] = "database"

    @property
    def is_self_reference(self) -> bool:
        """Whether the key's table references itself."""
        return self.child == self.parent

    @property
    def meaning(self) -> tuple[Place, Place, frozenset[tuple[str, str]]]:
        """What makes two keys the same one, whatever their names and the order of columns."""
        pairs = zip(self.child_columns, self.parent_columns, strict=True)
        return self.child, self.parent, frozenset(pairs)


def merge(database: Iterable[ForeignKey], models: Iterable[ForeignKey]) -> tuple[ForeignKey, ...]:
    """All keys of the database, and those of the models that the database does not have."""
    merged = list(database)
    known = {key.meaning for key in merged}
    for key in models:
        if key.meaning not in known:
            known.add(key.meaning)
            merged.append(key)
    return tuple(merged)


Node = TypeVar("Node", bound="Hashable")


class ForeignKeyGraph:
    """All foreign keys of a schema, and the order in which their tables' rows can go."""

    # What depends on the whole schema is computed here, once; the methods cost microseconds.

    def __init__(self, foreign_keys: Iterable[ForeignKey]) -> None:
        self.foreign_keys: tuple[ForeignKey, ...] = tuple(sorted(foreign_keys, key=_sort_key))
        self._outgoing: dict[Place, list[ForeignKey]] = defaultdict(list)
        self._incoming: dict[Place, list[ForeignKey]] = defaultdict(list)
        for key in self.foreign_keys:
            self._outgoing[key.child].append(key)
            self._incoming[key.parent].append(key)
        self._parents: dict[Place, tuple[Place, ...]] = {
            child: tuple(dict.fromkeys(key.parent for key in keys))
            for child, keys in self._outgoing.items()
        }
        self._places = frozenset(self._outgoing) | frozenset(self._incoming)
        self._rank: dict[Place, int] = {}
        self._component: dict[Place, int] = {}
        components = _children_first(self._places, self._parents)
        for number, component in enumerate(components):
            for place in component:
                self._rank[place] = len(self._rank)
                self._component[place] = number

    def rank(self, place: Place) -> int:
        """A table's number in the order of the whole schema, children before their parents.

        Tables without foreign keys come last and share one number: sort by number *and* place.
        """
        return self._rank.get(place, len(self._rank))

    def order(self, places: Iterable[Place]) -> list[tuple[Place, ...]]:
        """The given tables, each once, in groups that can be deleted one after the other.

        A group is one table, or the tables of a cycle *among the given ones*. Two callers get
        tables of different cycles in the same order, so their locks do not cross.
        """
        ordered = sorted(set(places), key=lambda place: (self.rank(place), place))
        groups: list[tuple[Place, ...]] = []
        # A table without foreign keys is a component of its own.
        for _component, found in groupby(ordered, lambda each: self._component.get(each, each)):
            members = tuple(found)
            groups += _children_first(members, self._parents) if len(members) > 1 else [members]
        return groups

    def is_cyclic(self, group: Iterable[Place]) -> bool:
        """Whether a group of :meth:`order` is a cycle, or one table that references itself."""
        first, *others = group
        return bool(others) or first in self._parents.get(first, ())

    def foreign_keys_between(self, places: Iterable[Place]) -> tuple[ForeignKey, ...]:
        """The keys from one of the places to one of them, self-references among them."""
        among = set(places)
        return tuple(
            key
            for place in sorted(among)
            for key in self._outgoing.get(place, ())
            if key.parent in among
        )

    def incoming(self, place: Place) -> tuple[ForeignKey, ...]:
        """The keys that reference this place: where its rows' dependents are."""
        return tuple(self._incoming.get(place, ()))

    def outgoing(self, place: Place) -> tuple[ForeignKey, ...]:
        """The keys that this place holds."""
        return tuple(self._outgoing.get(place, ()))


class PrecedenceGraph(Generic[Node]):
    """Which things must go before which others, given as pairs (earlier, later)."""

    def __init__(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        self._graph: nx.DiGraph[Node] = nx.DiGraph()
        self._graph.add_edges_from(sorted(pairs, key=str))

    def after(self, nodes: Iterable[Node]) -> set[Node]:
        """All that must not go before these nodes are gone."""
        known = [node for node in nodes if node in self._graph]
        return set().union(*(nx.descendants(self._graph, node) for node in known))

    def circles(self) -> list[set[Node]]:
        """The sets of nodes that must all go before each other, or one before itself."""
        return [
            members
            for members in nx.strongly_connected_components(self._graph)
            if len(members) > 1 or self._graph.has_edge(*members, *members)
        ]

    def path_around(self, members: set[Node], node: Node) -> list[Node]:
        """The shortest way around a circle, from one of its nodes to the same."""
        circle = self._graph.subgraph(members)
        paths = [nx.shortest_path(circle, later, node) for later in circle.successors(node)]
        return [node, *min(paths, key=lambda path: (len(path), str(path)))]


def strong_components(
    nodes: Iterable[Node], parents: Mapping[Node, Iterable[Node]]
) -> list[set[Node]]:
    """The sets of nodes that reach each other; most are one node. Parents elsewhere are ignored."""
    return list(nx.strongly_connected_components(_digraph(nodes, parents)))


def _children_first(
    places: Iterable[Place], parents: Mapping[Place, Iterable[Place]]
) -> list[tuple[Place, ...]]:
    """The strong components of these places alone, children first, ties by name."""
    graph = _digraph(places, parents)
    condensed = nx.condensation(graph)
    members: dict[int, tuple[Place, ...]] = {
        number: tuple(sorted(data["members"])) for number, data in condensed.nodes(data=True)
    }
    return [
        members[number]
        for number in nx.lexicographical_topological_sort(condensed, key=members.__getitem__)
    ]


def _digraph(nodes: Iterable[Node], parents: Mapping[Node, Iterable[Node]]) -> nx.DiGraph[Node]:
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    among = set(graph)
    graph.add_edges_from(
        (child, parent) for child in graph for parent in parents.get(child, ()) if parent in among
    )
    return graph


def _sort_key(key: ForeignKey) -> tuple[object, ...]:
    # two keys of one meaning differ in their name at most, and None does not compare with it
    return (key.child, key.parent, key.child_columns, key.parent_columns, key.name or "")


Row = TypeVar("Row", bound="Hashable")


@dataclass(frozen=True, slots=True)
class RowStep(Generic[Row]):
    """Rows that no row of a later step references; a step has loops only, or none."""

    rows: tuple[Row, ...]  # in the order given; without loops they can be deleted together
    # The rows that reference each other in a circle, circle by circle, or themselves: one reference
    # of each circle must be set to NULL first.
    loops: tuple[tuple[Row, ...], ...] = ()


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
