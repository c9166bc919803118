"""The order of rows inside a cycle of tables, held against a delete done row by row."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tidyrows.schema.graph import levels

row = st.tuples(st.integers(0, 1), st.integers(0, 6))
rows = st.lists(row, max_size=14)
references = st.lists(st.tuples(row, row), max_size=25)


def reach(rows, references):
    found = {a: {p for c, p in references if c == a and p in rows} for a in rows}
    for middle, a in itertools.product(rows, rows):
        if middle in found[a]:
            found[a] |= found[middle]
    return found


@given(rows, references)
def test_every_row_is_in_the_steps_once(rows, references):
    steps = levels(rows, references).steps
    stepped = [r for step in steps for r in step.rows]
    assert sorted(stepped) == sorted(set(rows))


@given(rows, references)
def test_no_row_is_deleted_while_another_still_references_it(rows, references):
    """Except by rows of its own loop, which is what makes it one."""
    order = levels(rows, references)
    together = {r: loop for loop in order.loops for r in loop}
    left = set(rows)
    for step in order.steps:
        for child, parent in references:
            if child in left and parent in step.rows:
                assert step.loops
                assert child in together[parent]
        left -= set(step.rows)


@given(rows, references)
def test_loops_are_exactly_the_rows_that_reach_each_other(rows, references):
    among = set(rows)
    reached = reach(among, references)
    expected = {
        frozenset(b for b in among if b in reached[a] and a in reached[b])
        for a in among
        if a in reached[a]
    }
    order = levels(rows, references)
    assert {frozenset(loop) for loop in order.loops} == expected
    assert len(order.loops) == len(expected)
    for step in order.steps:
        assert not step.loops or sorted(step.rows) == sorted(itertools.chain(*step.loops))


@given(rows, references, st.randoms())
def test_the_steps_do_not_depend_on_the_order_of_the_references(rows, references, random):
    """And within a step rows stay in the order given: locks are taken in the same order by all."""
    shuffled = list(references)
    random.shuffle(shuffled)
    order = levels(rows, references)
    assert levels(rows, shuffled) == order
    given_order = list(dict.fromkeys(rows)).index
    for step in order.steps:
        assert list(step.rows) == sorted(step.rows, key=given_order)


@given(rows, references)
def test_without_loops_there_are_as_few_steps_as_the_longest_chain_has_rows(rows, references):
    order = levels(rows, references)
    if order.loops:
        return
    children = {r: [c for c, p in references if p == r and c in rows] for r in rows}

    def depth(r):
        return 1 + max(map(depth, children[r]), default=0)

    assert len(order.steps) == max(map(depth, rows), default=0)


def test_a_tree_goes_leaves_first():
    order = levels([1, 2, 3, 4], [(2, 1), (3, 1), (4, 3)])
    assert [step.rows for step in order.steps] == [(2, 4), (3,), (1,)]


def test_rows_around_a_loop_come_before_and_after_it():
    child, a, b, parent, other = ["child", "a", "b", "parent", "other"]
    order = levels(
        [parent, b, a, child, other], [(child, a), (a, b), (b, a), (b, parent), (other, other)]
    )
    assert [(step.rows, bool(step.loops)) for step in order.steps] == [
        (("child",), False),
        (("b", "a", "other"), True),
        (("parent",), False),
    ]
    assert order.loops == (("b", "a"), ("other",))


def test_loops_that_can_go_together_are_one_step_whose_rows_keep_their_order():
    """One statement breaks them all."""
    order = levels([1, 2, 3, 4], [(1, 3), (3, 1), (2, 4), (4, 2)])
    (step,) = order.steps
    assert step.rows == (1, 2, 3, 4)
    assert step.loops == ((1, 3), (2, 4))


def test_a_row_that_points_at_itself_is_a_loop():
    assert levels([1], [(1, 1)]).loops == ((1,),)


def test_a_chain_and_a_ring_of_twenty_thousand_rows_need_no_recursion():
    count = 20_000
    chain = [(i, i + 1) for i in range(count - 1)]
    assert [step.rows for step in levels(range(count), chain).steps] == [(i,) for i in range(count)]
    ring = levels(range(count), [*chain, (count - 1, 0)])
    assert [len(loop) for loop in ring.loops] == [count]
    assert len(ring.steps) == 1
