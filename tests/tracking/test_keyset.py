"""The keys of one table: a set that keeps integers small, in whatever order they come."""

from __future__ import annotations

import random
import tracemalloc
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidyrows.tracking import keyset
from tidyrows.tracking.keyset import KeySet

KEYS = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.text(max_size=2),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "drop many", "count"]), st.lists(KEYS))))
def test_it_is_a_set(steps):
    ours, plain = KeySet(), set()
    for step, keys in steps:
        typed = {(type(key), key) for key in keys}
        if step == "add":
            ours.update(keys)
            plain |= typed
        elif step == "drop many":
            ours.difference_update(keys)
            plain -= typed
        elif step == "drop" and keys:
            ours.discard(keys[0])
            plain.discard((type(keys[0]), keys[0]))
        else:
            assert len(ours) == len(plain)
    assert {(type(key), key) for key in ours} == plain
    assert len(ours) == len(plain)
    assert {(type(key), key) for key in ours.in_order()} == plain
    assert all(key in ours for _, key in plain)
    twin = ours.copy()
    twin.update([10**6])
    assert 10**6 not in ours or (int, 10**6) in plain


@pytest.mark.parametrize("count", [10, keyset._RUN, keyset._RUN * 3 + 7])
def test_the_order_is_the_same_however_they_came(count):
    keys = list(range(-5, count))
    shuffled = keys * 2
    random.Random(7).shuffle(shuffled)
    ours = KeySet(shuffled)
    assert ours.in_order() == keys
    assert len(ours) == len(keys)
    ours.update([3, 10**9, 2])
    assert ours.in_order() == [*keys, 10**9]


def test_mixed_keys_have_an_order_too():
    keys = [uuid.UUID(int=3), uuid.UUID(int=1), "b", "a", (2, "x"), (1, "y"), None]
    assert KeySet(keys).in_order() == KeySet(reversed(keys)).in_order()


@pytest.mark.parametrize("count", [400_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_integers_take_ten_bytes_each_and_twenty_at_any_moment(order, count):
    keys = list(range(count))
    if order == "descending":
        keys.reverse()
    elif order == "shuffled":
        random.Random(7).shuffle(keys)
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        ours = KeySet(keys)
        assert len(ours) == count
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held - before < 10 * count
    assert peak - before < 20 * count
