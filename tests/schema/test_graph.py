"""The order of tables and their cycles, held against plain reachability."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph, PrecedenceGraph

PLACES = [(schema, table) for schema in ("a", "b") for table in "stuvw"]


def key(child, parent, *, column="p", name=None):
    return ForeignKey(name, child, (column,), parent, ("id",))


def graph_of(*edges):
    return ForeignKeyGraph(key(("s", child), ("s", parent)) for child, parent in edges)


def places(text):
    return [("s", name) for name in text.split()]


def names(groups):
    return [" ".join(name for _, name in group) for group in groups]


edges = st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)), max_size=25)
subsets = st.lists(st.sampled_from([*PLACES, ("c", "lonely"), ("c", "alone")]), max_size=10)


def reach(edges, among):
    """For each place, what it references through these places, near or far."""
    found = {place: {p for c, p in edges if c == place and p in among} for place in among}
    for middle, place in itertools.product(among, among):
        if middle in found[place]:
            found[place] |= found[middle]
    return found


@given(edges, subsets)
def test_every_place_is_in_the_order_once(edges, subset):
    graph = ForeignKeyGraph(itertools.starmap(key, edges))
    ordered = list(itertools.chain.from_iterable(graph.order(subset)))
    assert sorted(ordered) == sorted(set(subset))


@given(edges, subsets)
def test_groups_are_exactly_the_cycles_among_the_given_places(edges, subset):
    graph = ForeignKeyGraph(itertools.starmap(key, edges))
    among = set(subset)
    reached = reach(edges, among)
    expected = {
        frozenset({a} | {b for b in among if b in reached[a] and a in reached[b]}) for a in among
    }
    groups = graph.order(subset)
    assert {frozenset(group) for group in groups} == expected
    for group in groups:
        assert graph.is_cyclic(group) == any(place in reached[place] for place in group)
        assert list(group) == sorted(group)


@given(edges, subsets)
def test_children_come_before_their_parents_wherever_no_cycle_forbids_it(edges, subset):
    graph = ForeignKeyGraph(itertools.starmap(key, edges))
    group_of = {p: at for at, group in enumerate(graph.order(subset)) for p in group}
    for child, parent in edges:
        if child in group_of and parent in group_of:
            assert group_of[child] <= group_of[parent]


@given(edges, subsets, st.randoms())
def test_places_of_different_cycles_are_in_the_order_of_the_whole_schema(edges, subset, random):
    """Two cleanups that delete in different orders deadlock; none may depend on its own subset."""
    graph = ForeignKeyGraph(itertools.starmap(key, edges))
    whole = graph.order([*PLACES, ("c", "lonely"), ("c", "alone")])
    at = {place: number for number, group in enumerate(whole) for place in group}
    shuffled = list(subset)
    random.shuffle(shuffled)
    assert graph.order(shuffled) == graph.order(subset)
    numbers = [at[place] for group in graph.order(subset) for place in group]
    assert numbers == sorted(numbers)


@given(edges, st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_keys(edges, random):
    shuffled = list(edges)
    random.shuffle(shuffled)
    one = ForeignKeyGraph(itertools.starmap(key, edges))
    two = ForeignKeyGraph(itertools.starmap(key, shuffled))
    assert one.order(PLACES) == two.order(PLACES)
    assert [one.rank(place) for place in PLACES] == [two.rank(place) for place in PLACES]


@given(edges, subsets)
def test_keys_between_places_are_those_with_both_ends_among_them(edges, subset):
    keys = [key(child, parent, column=str(at)) for at, (child, parent) in enumerate(edges)]
    between = ForeignKeyGraph(keys).foreign_keys_between(subset)
    assert len(between) == len(set(between))
    assert set(between) == {k for k in keys if k.child in subset and k.parent in subset}


def test_order_reads_as_one_would_delete_by_hand():
    graph = graph_of(("line", "order"), ("order", "customer"), ("line", "product"))
    assert names(graph.order(places("customer line order product"))) == [
        "line",
        "order",
        "customer",
        "product",
    ]


def test_children_go_first_even_where_the_table_between_is_not_given():
    """The rows of the table between are somebody's dependents, and come up in a later round."""
    graph = graph_of(("z", "m"), ("m", "a"))
    assert names(graph.order(places("a z"))) == ["z", "a"]


def test_a_cycle_that_runs_through_a_table_not_given_is_none():
    graph = graph_of(("a", "b"), ("b", "c"), ("c", "a"))
    assert names(graph.order(places("a b c"))) == ["a b c"]
    assert names(graph.order(places("a b"))) == ["a", "b"]
    assert names(graph.order(places("b c"))) == ["b", "c"]
    assert names(graph.order(places("a c"))) == ["c", "a"]


def test_a_table_that_references_itself_is_a_cycle_alone():
    graph = graph_of(("tree", "tree"), ("leaf", "tree"))
    groups = graph.order(places("leaf tree"))
    assert names(groups) == ["leaf", "tree"]
    assert [graph.is_cyclic(group) for group in groups] == [False, True]


def test_every_key_between_two_tables_is_kept():
    """A table that names billing and delivery address must be looked through twice."""
    billing = key(("s", "order"), ("s", "address"), column="billing_id")
    delivery = key(("s", "order"), ("s", "address"), column="delivery_id", name="delivery")
    graph = ForeignKeyGraph([delivery, billing])
    assert graph.incoming(("s", "address")) == (billing, delivery)
    assert graph.outgoing(("s", "order")) == (billing, delivery)
    assert graph.incoming(("s", "order")) == ()
    assert graph.outgoing(("s", "nowhere")) == ()
    assert graph.foreign_keys == (billing, delivery)


def test_tables_of_one_name_in_two_schemas_are_two():
    graph = ForeignKeyGraph([key(("a", "item"), ("b", "item"))])
    assert graph.order([("b", "item"), ("a", "item")]) == [(("a", "item"),), (("b", "item"),)]
    assert not graph.is_cyclic([("a", "item")])


def test_tables_without_foreign_keys_come_last_by_name():
    graph = graph_of(("y", "z"))
    assert names(graph.order(places("b z a y"))) == ["y", "z", "a", "b"]
    assert graph.rank(("s", "a")) == graph.rank(("s", "b")) == 2


def test_an_empty_graph_orders_by_name():
    graph = ForeignKeyGraph([])
    assert graph.order([]) == []
    assert names(graph.order(places("b a"))) == ["a", "b"]


def test_a_chain_of_three_thousand_tables_needs_no_recursion():
    count = 3000
    chain = [key(("s", f"t{i:05}"), ("s", f"t{i + 1:05}")) for i in range(count)]
    graph = ForeignKeyGraph(chain)
    assert graph.rank(("s", "t00000")) == 0
    assert graph.rank(("s", f"t{count:05}")) == count


# --- what must go before what


def test_what_comes_later_is_followed_through_and_the_unknown_has_nothing_after_it():
    graph = PrecedenceGraph([("a", "b"), ("b", "c"), ("x", "c")])
    assert graph.after(["a"]) == {"b", "c"}
    assert graph.after(["x", "c", "unknown"]) == {"c"}
    assert graph.circles() == []


def test_a_circle_is_found_with_its_shortest_way_around():
    graph = PrecedenceGraph([("a", "b"), ("b", "c"), ("c", "a"), ("b", "a"), ("c", "d")])
    assert graph.circles() == [{"a", "b", "c"}]
    assert graph.path_around({"a", "b", "c"}, "a") == ["a", "b", "a"]
    assert graph.path_around({"a", "b", "c"}, "c") == ["c", "a", "b", "c"]


def test_what_goes_before_itself_is_a_circle():
    graph = PrecedenceGraph([("a", "a"), ("a", "b")])
    assert graph.circles() == [{"a"}]
    assert graph.path_around({"a"}, "a") == ["a", "a"]
