"""unittest's test cases in this very process: what they show, and in which order things go."""

from __future__ import annotations

import io
import json
import random
import signal
import sys
import unittest

import factory.random
import pytest
import sqlalchemy as sa

from harness.targets import on
from tidyrows.factories import seeding
from tidyrows.testing import TidyTestCase
from tidyrows.testing.unittest_case import RESIDUE

pytestmark = on("sqlite")  # unittest's machinery, which is the same everywhere


@pytest.fixture
def things(engine):
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(40)),
    )
    table.metadata.create_all(engine)
    return Things(engine, table)


class Things:
    """A table of things."""

    def __init__(self, engine, table):
        self.engine = engine
        self.table = table

    def add(self, name):
        with self.engine.begin() as connection:
            connection.execute(sa.insert(self.table).values(name=name))

    def names(self):
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.select(self.table.c.name).order_by("id")))


def run(*cases):
    """How the tests of these classes ended."""
    result = unittest.TestResult()
    load = unittest.TestLoader().loadTestsFromTestCase
    unittest.TestSuite(map(load, cases)).run(result)
    return result


def test_a_mixin_that_sets_up_the_class_and_calls_no_super_has_the_rows_of_the_class(things):
    seen = []

    class Mixin:
        @classmethod
        def setUpClass(cls):
            things.add("of the class")
            seen.append(len(cls.tidy_class.tracker))

    class Case(Mixin, TidyTestCase):
        tidy_engine = things.engine

        def test_it(self):
            assert things.names() == ["of the class"]

    class Other(Mixin):
        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            things.add("of the other")

    class Both(Case, Other):
        def test_it(self):
            assert things.names() == ["of the class", "of the other"]

    assert run(Case, Both).wasSuccessful()
    assert seen == [1, 1]
    assert things.names() == []


def test_rows_go_after_teardown_and_all_cleanups_and_those_of_a_late_cleanup_too(things):
    seen = []

    class Case(TidyTestCase):
        tidy_engine = things.engine

        def setUp(self):
            self.addCleanup(lambda: seen.append(things.names()))
            self.addCleanup(things.add, "late")

        def tearDown(self):
            seen.append(things.names())
            raise LookupError("the tearDown's own")

        def test_it(self):
            things.add("test")

    ((_, told),) = run(Case).errors
    assert "the tearDown's own" in told
    assert seen == [["test"], ["test", "late"]]
    assert things.names() == []


def test_a_failure_shows_the_line_of_the_test_and_none_of_ours(things):
    class Case(TidyTestCase):
        tidy_engine = things.engine

        def test_it(self):
            self.fail("by the test")

        def test_sub(self):
            with self.subTest("one"):
                self.fail("by the subtest")

    for _, told in run(Case).failures:
        assert 'self.fail("by the' in told
        assert "case.py" not in told


def test_an_interrupt_in_the_middle_of_a_cleanup_leaves_nothing(things):
    class Case(TidyTestCase):
        tidy_engine = things.engine

        def test_it(self):
            things.add("test")

            @sa.event.listens_for(sa.Engine, "before_cursor_execute")
            def interrupt(connection, cursor, statement, *rest):
                if statement.startswith("DELETE"):
                    sa.event.remove(sa.Engine, "before_cursor_execute", interrupt)
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(Case)
    Case.doClassCleanups()  # as the end of the process would
    assert things.names() == []


def test_random_values_follow_the_seed_of_the_process(things, monkeypatch):
    """Under pytest they follow that of pytest, which is off here."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", printed)
    monkeypatch.setattr(factory.random.randgen, "state_set", False)
    monkeypatch.setattr(seeding, "_of_process", None)
    monkeypatch.setenv("TIDYROWS_SEED", "77")
    monkeypatch.setattr(RESIDUE, "forward", None)
    drawn = {}

    def draw():
        return [factory.random.randgen.random(), random.random()]

    class Case(TidyTestCase):
        tidy_engine = things.engine

        @classmethod
        def setUpClass(cls):
            drawn.setdefault("class", []).append(draw())

        def setUp(self):
            drawn.setdefault(self.id(), []).append(draw())

        def test_it(self):
            drawn.setdefault("test", []).append(draw())
            self.fail("by the test")

        def test_other(self):
            pass

    class Reversed(unittest.TestLoader):
        sortTestMethodsUsing = staticmethod(lambda one, other: (one < other) - (one > other))  # noqa: N815 -- unittest's name

    before = factory.random.randgen.getstate(), random.getstate()
    for loader in (unittest.TestLoader(), Reversed()):
        ended = unittest.TestResult()
        loader.loadTestsFromTestCase(Case).run(ended)
        assert len(ended.failures) == 1
    assert before == (factory.random.randgen.getstate(), random.getstate())
    assert [first == second for first, second in drawn.values()] == [True] * 4
    assert len({json.dumps(first) for first, _ in drawn.values()}) == 4
    RESIDUE.print()
    assert "TIDYROWS_SEED=77 repeats the random values of the failed tests" in printed.getvalue()
