"""The graph of foreign keys: which table's rows go first, and which tables form a cycle.

Pure: foreign keys in, order and cycles out. It knows no database and no row.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
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
        self._rank: dict[Place, int] = {}
        self._component: dict[Place, int] = {}
        components = _children_first({**self._outgoing, **self._incoming}, self._parents)
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


def _children_first(
    places: Iterable[Place], parents: Mapping[Place, Iterable[Place]]
) -> list[tuple[Place, ...]]:
    """The strong components of these places alone, children first, ties by name."""
    graph: nx.DiGraph[Place] = nx.DiGraph()
    graph.add_nodes_from(places)
    graph.add_edges_from(
        (child, parent)
        for child in list(graph)
        for parent in parents.get(child, ())
        if parent in graph
    )
    condensed = nx.condensation(graph)
    members: dict[int, tuple[Place, ...]] = {
        number: tuple(sorted(data["members"])) for number, data in condensed.nodes(data=True)
    }
    return [
        members[number]
        for number in nx.lexicographical_topological_sort(condensed, key=members.__getitem__)
    ]


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
    graph: nx.DiGraph[Row] = nx.DiGraph()
    graph.add_nodes_from(position)
    graph.add_edges_from(
        (child, parent) for child, parent in references if child in position and parent in position
    )

    def in_order(some: Iterable[Row]) -> tuple[Row, ...]:
        return tuple(sorted(some, key=position.__getitem__))

    steps: list[RowStep[Row]] = []
    with suppress(nx.NetworkXUnfeasible):  # raised at the end, where loops are left
        for free in nx.topological_generations(graph):
            steps.append(RowStep(in_order(free)))  # noqa: PERF401 -- those before the error count
    graph.remove_nodes_from([row for step in steps for row in step.rows])
    # What is left are the rows in loops, and all that these reference.
    condensed = nx.condensation(graph)
    for generation in nx.topological_generations(condensed):
        components = [in_order(condensed.nodes[number]["members"]) for number in generation]
        components.sort(key=lambda rows: position[rows[0]])
        loops = tuple(
            rows for rows in components if len(rows) > 1 or graph.has_edge(rows[0], rows[0])
        )
        looped = in_order(chain.from_iterable(loops))
        plain = in_order(set().union(*components).difference(looped))
        steps += [RowStep(plain)] if plain else []
        steps += [RowStep(looped, loops)] if loops else []
    return RowOrder(tuple(steps))
