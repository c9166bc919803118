"""What a template may say, and what is cut from a value that is too long."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from tidyrows.errors import ScopeError
from tidyrows.template import COUNTERS, check, counter_codes, fitted


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("user", "another run"),
        ("{run}{worker}", "another run"),
        ("{run}{n}", "another run"),
        ("{test}{n}", "another run"),
        ("{tag}{name}", "unknown field {name}"),
        ("{tag}{}", "unknown field {}"),
        ("{tag}{0}", "unknown field {0}"),
        ("{tag.x}", "unknown field {tag.x}"),
        ("{tag:>30}", "a format"),
        ("{tag!r}", "a format"),
        ("{tag", "cannot be read"),
        ("tag}", "cannot be read"),
    ],
)
def test_a_template_that_promises_nothing_is_refused_by_name(template, word):
    with pytest.raises(ScopeError) as caught:
        check(template)
    assert word in str(caught.value)
    assert repr(template) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "length", "pattern"),
    [
        ("user-{tag}", None, "user-{tag}"),
        ("user-{tag}", 21, "user-{tag}"),
        ("user-{tag}", 20, "user{tag}"),
        ("user-{tag}", 16, "{tag}"),
        ("user-{tag}-end", 23, "user-{tag}-e"),
        ("user-{tag}-end", 18, "us{tag}"),
        ("a{run}b{worker}c{n}d", 16, "a{run}b{worker}{n}"),
        ("{{x}}{tag}", 18, "{{x{tag}"),
        ("ünï{tag}", 18, "ün{tag}"),
    ],
)
def test_literal_text_behind_the_tag_is_cut_first_then_before_it(template, length, pattern):
    assert fitted(template, length) == pattern


def test_the_end_can_be_kept():
    assert fitted("user-{tag}@x.test", 25, keep_end=True) == "us{tag}@x.test"
    assert fitted("user-{tag}", 18, keep_end=True) == "us{tag}"
    with pytest.raises(ScopeError) as caught:
        fitted("user-{tag}@x.test", 22, keep_end=True)
    assert caught.value.need == 23


def test_a_column_too_short_for_the_tag_is_refused_with_its_name_and_both_lengths():
    with pytest.raises(ScopeError, match=r"users\.code holds 15 .* needs 16") as caught:
        fitted("c{tag}", 15, "users.code")
    assert (caught.value.column, caught.value.length, caught.value.need) == ("users.code", 15, 16)


def test_no_counter_is_the_beginning_of_another():
    """Else "{tag}1" could equal the "{tag}" of another template, in the same column."""
    codes = sorted(islice(counter_codes(), 200_000))
    assert len(codes) == len(set(codes))
    assert not any(after.startswith(code) for code, after in pairwise(codes))
    assert {len(code) for code in codes} == {1, 2, 3, 4, 5}
    assert COUNTERS == 27_065_816
