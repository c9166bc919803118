"""Joining what the database has with what the models declare."""

from dataclasses import replace

import pytest

from tidyrows.schema.graph import ForeignKey, merge

AUTHOR = ForeignKey(
    name="book_author_fkey",
    child=("public", "book"),
    child_columns=("author_id",),
    parent=("public", "author"),
    parent_columns=("id",),
    on_delete="CASCADE",
)
PAIR = ForeignKey(
    name=None,
    child=("public", "line"),
    child_columns=("a", "b"),
    parent=("public", "pair"),
    parent_columns=("x", "y"),
)


def from_models(key, **changes):
    return replace(key, source="models", **changes)


def test_a_key_of_both_sides_is_kept_once_as_the_database_tells_it():
    declared = from_models(AUTHOR, name=None, on_delete="NO ACTION", deferrable=True)
    assert merge([AUTHOR], [declared]) == (AUTHOR,)


def test_a_key_of_the_models_alone_is_kept_as_a_hint():
    """Without it, a database created without foreign keys would be emptied in any order."""
    hint = from_models(AUTHOR)
    assert merge([PAIR], [hint]) == (PAIR, hint)
    assert merge([], [hint, hint]) == (hint,)


def test_a_key_of_the_database_alone_is_kept():
    assert merge([AUTHOR], []) == (AUTHOR,)


def test_two_keys_of_the_database_over_the_same_columns_are_both_kept():
    """Each has its own ON DELETE, and both happen."""
    second = replace(AUTHOR, name="again", on_delete="RESTRICT")
    assert merge([AUTHOR, second], []) == (AUTHOR, second)


def test_the_order_of_a_keys_columns_does_not_matter_but_their_pairing_does():
    turned = from_models(PAIR, child_columns=("b", "a"), parent_columns=("y", "x"))
    crossed = from_models(PAIR, parent_columns=("y", "x"))
    assert merge([PAIR], [turned]) == (PAIR,)
    assert merge([PAIR], [crossed]) == (PAIR, crossed)


@pytest.mark.parametrize(
    "changes",
    [
        {"child_columns": ("editor_id",)},
        {"parent_columns": ("number",)},
        {"child": ("other", "book")},
        {"parent": ("other", "author")},
    ],
)
def test_keys_that_differ_in_a_table_or_column_are_two(changes):
    other = from_models(AUTHOR, **changes)
    assert merge([AUTHOR], [other]) == (AUTHOR, other)


def test_a_key_knows_whether_its_table_references_itself():
    assert not AUTHOR.is_self_reference
    assert replace(AUTHOR, parent=AUTHOR.child).is_self_reference
