"""The runs after the first, by tests whose outcome is a function of what ran before them."""

from __future__ import annotations

import pytest

from tidyrows.audit import orders
from tidyrows.audit.findings import FindingKind
from tidyrows.audit.observer import DatabaseObservations, Observations
from tidyrows.audit.orders import OrderRuns, order_findings, suspects_of
from tidyrows.audit.row_history import Maker, RowHistory
from tidyrows.audit.runs import AuditRun
from tidyrows.audit.tables import Difference
from tidyrows.keys import RowKey, TableName

ORGS = TableName("here", "main", "orgs")


def no_history():
    return RowHistory(lambda _table, _key: True)


class SmallSuite:
    """A suite: the rule of a test says of those that ran before it whether it fails."""

    def __init__(self, names, seeds=(), *, changed=(), **rules):
        self.names, self.rules, self.changed = list(names), rules, tuple(changed)
        self.orders = dict(enumerate(seeds, 1))
        self.begun = []

    def run(self, name, order, seed=None):
        self.begun.append(name)
        order = list(self.orders.get(seed, order))
        rule = self.rules.get
        outcomes = {t: rule(t, lambda _b: False)(order[:n]) for n, t in enumerate(order)}
        return AuditRun(name, outcomes, seed, changed=self.changed)

    def audit(self, history=None, **more):
        history = history or no_history()
        first = AuditRun("as it is", self.run("as it is", self.names).failed)
        done = OrderRuns(first, self.orders, history, self.run, **more)
        done.run_all()
        self.notes = done.notes
        return {each.test: each for each in order_findings(done.runs, history)}


def left_by(*makers, table=ORGS):
    """A history in which these have left a row each, ``b`` has read those of ``a``."""
    history = no_history()
    for maker in makers:
        key = frozenset({(ord(maker),)})
        wrote = DatabaseObservations(written=frozenset({(None, "orgs")}))
        history.add(Maker(maker), [Difference(table, appeared=key)], Observations({"here": wrote}))
    read = DatabaseObservations(read=frozenset({(None, "orgs")}))
    loaded = {RowKey(table, (ord("a"),))}
    history.add(Maker("b"), [], Observations({"here": read}, loaded=loaded))
    return history


def test_a_test_that_needs_another_fails_alone_and_passes_after_that():
    """Its own order, and here each seed's, hides it: only the run by itself shows it."""
    tests = SmallSuite("cxab", ["axcb"], b=lambda before: "a" not in before)
    found = tests.audit(left_by("c", "a"))
    assert set(found) == {"b"}
    assert found["b"].text == "fails alone, passes after a"
    assert found["b"].proof == "proved by 2 runs on the database as it was"
    assert found["b"].others == ["a"]
    assert tests.begun[-2:] == ["b alone", "b after a"]


def test_a_test_that_fails_in_the_given_order_is_named_with_the_one_that_spoils_it():
    tests = SmallSuite("cab", ["bca"], b=lambda before: "a" in before)
    found = tests.audit(left_by("c", "a"))
    assert found["b"].text == "passes alone, fails after a"
    assert found["b"].cure == "let  delete what it makes: take the tidy fixture"


def test_without_a_table_in_common_the_tests_before_it_are_halved():
    """What it needs may be a global variable."""
    names = [f"n{n}" for n in range(40)]
    tests = SmallSuite([*names, "b"], b=lambda before: "n3" in before)
    found = tests.audit()
    assert found["b"].text == "passes alone, fails after n3"
    assert len(tests.begun) < 20


def test_two_tests_that_are_needed_together_are_said_to_be_several():
    tests = SmallSuite("acdb", ["bacd"], b=lambda before: not {"a", "c"} <= {*before})
    found = tests.audit()
    assert found["b"].text == "fails alone, passes in its own order"
    assert tests.notes == [
        "which one earlier test makes the difference for b was not found: there may be several"
    ]


def test_a_seed_in_which_it_fails_is_named_where_no_run_alone_tells():
    tests = SmallSuite("acb", ["bac", "abc"], b=lambda before: before == ["a"])
    found = tests.audit(has_time=lambda: False)
    assert found["b"].text.startswith("passes in its own order, fails with --tidy-audit-order 2")
    assert "(1 of 2 orders)" in found["b"].text
    assert "1 of 1 suspects were not run alone" in tests.notes


def test_what_always_ends_alike_is_no_matter_of_order():
    assert SmallSuite("ab", ["ba"], a=lambda _before: True).audit() == {}


@pytest.mark.parametrize(("changed", "cure"), [((), "what stays is no row"), (("x",), "take the")])
def test_what_ends_otherwise_in_the_very_same_order_does_not_pass_twice(changed, cure):
    again = iter([False, True])
    tests = SmallSuite("ab", b=lambda _before: next(again, True), changed=changed)
    found = tests.audit()["b"]
    assert found.kind is FindingKind.TWICE
    assert found.text == "passes the first time, fails once more in its own order"
    assert found.cure.startswith(cure)
    assert not any("alone" in name for name in tests.begun), "chance proves nothing"


def test_a_finding_says_that_it_stands_on_a_changed_database():
    tests = SmallSuite("ab", ["ba"], b=lambda before: "a" not in before, changed=["x"])
    assert tests.audit()["b"].proof == "proved by 2 runs on the same changed database"
    found = tests.audit(has_time=iter([True, False, False]).__next__)
    assert found["b"].proof == "proved by 2 runs on a changed database", "the first was not"


def test_runs_are_bounded(monkeypatch):
    monkeypatch.setattr(orders, "ALONE", 3)
    monkeypatch.setattr(orders, "SHORT", 5)
    names = [f"t{n}" for n in range(50)]
    tests = SmallSuite(names, [names[::-1]], **{t: lambda before: len(before) > 24 for t in names})
    tests.audit()
    assert len(tests.begun) <= 3 + 5
    assert any("suspects were not run alone" in each for each in tests.notes)


def test_suspects_are_those_that_share_tables_the_likeliest_first_and_three_at_most():
    """Rows that it read come first, then tables that it reads, then those that both write to."""
    history = no_history()

    def did(name, *, written="", read="", appeared=()):
        there = DatabaseObservations(
            written=frozenset((None, t) for t in written.split()),
            read=frozenset((None, t) for t in read.split()),
        )
        rows = [Difference(ORGS, appeared=frozenset({each}))] if (each := appeared) else []
        history.add(Maker(name), rows, Observations({"here": there}))

    did("rows", written="orgs", appeared=(1,))
    did("both", written="orgs users")
    did("one", written="users")
    did("writes", written="log")
    did("reads", read="orgs users log")
    did("nothing", written="other")
    there = DatabaseObservations(
        read=frozenset({(None, "orgs"), (None, "users")}), written=frozenset({(None, "log")})
    )
    history.add(Maker("b"), [], Observations({"here": there}, loaded={RowKey(ORGS, (1,))}))
    before = ["nothing", "reads", "writes", "one", "both", "rows"]
    assert suspects_of("b", before, history) == ["rows", "both", "one"]
    assert suspects_of("b", before[:3], history) == ["writes"]
