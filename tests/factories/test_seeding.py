"""Random values follow the seed of a block; what makes values unique follows none."""

from __future__ import annotations

import datetime as dt
import random
import warnings

import factory.fuzzy
import factory.random
import pytest
from faker.generator import random as of_faker

from tidyrows import Scoped, ScopedInteger, TrackedFactory, Unique
from tidyrows.factories import seeding
from tidyrows.factories.seeding import ONE_WORKER, BaseSeed, Seeded, worker_id

DRAWN = BaseSeed("7", is_given=False)
GIVEN = BaseSeed("7", is_given=True)
GENERATORS = (factory.random.randgen, of_faker, random)


class Things(TrackedFactory[dict]):
    class Meta:
        model = dict

    name = factory.Faker("name")
    city = factory.Faker("city", locale="de_DE")
    word = factory.Faker("word", locale="ja_JP")
    token = factory.Faker("uuid4")
    fuzzy = factory.fuzzy.FuzzyInteger(10**9)
    text = factory.fuzzy.FuzzyText()
    number = factory.LazyFunction(lambda: random.randrange(10**9))
    plain = factory.LazyFunction(lambda: factory.random.randgen.randrange(10**9))


@pytest.fixture(autouse=True)
def unseeded(monkeypatch):
    """As in a suite that does not seed factory_boy, and outside of this test's own seed."""
    monkeypatch.setattr(factory.random.randgen, "state_set", False)


def states():
    return [each.getstate() for each in GENERATORS]


def drawn(*key, base=DRAWN, count=3):
    with Seeded(base, *key):
        return Things.build_batch(count)


def test_everything_that_factory_boy_draws_follows_the_seed():
    first = drawn("test_a")
    for each in GENERATORS:
        each.random()
    assert drawn("test_a") == first
    assert drawn("test_a", base=GIVEN) == first
    others = [
        drawn("test_b"),
        drawn("test_a", base=BaseSeed("8", is_given=False)),
        drawn("test", "a"),
    ]
    for other in others:
        assert not [name for name in first[0] if other[0][name] == first[0][name]]
    assert len({first[0][name] for name in ("fuzzy", "number", "plain")}) == 3


def test_afterwards_the_generators_go_on_as_if_nothing_had_been():
    before = states()
    with pytest.raises(KeyError), Seeded(DRAWN, "outer") as outer:
        assert not outer.has_drawn
        between = states()
        with Seeded(DRAWN, "inner") as inner:
            random.random()
            assert inner.has_drawn
        assert inner.has_drawn
        assert states() == between
        raise KeyError
    assert states() == before
    assert not outer.has_drawn
    assert not factory.random.randgen.state_set


def test_what_makes_values_unique_follows_no_seed():
    class Own(Things):
        scoped = Scoped("user-{tag}")
        unique = Unique(factory.Faker("user_name"))
        integer = ScopedInteger()
        sequence = factory.Sequence(lambda n: n)

    with Seeded(DRAWN, "test_a"):
        first = Own.build()
    with Seeded(DRAWN, "test_a"):
        second = Own.build()
    assert first["name"] == second["name"]
    for name in ("scoped", "unique", "integer", "sequence"):
        assert first[name] != second[name]
    assert first["unique"].partition("-")[0] == second["unique"].partition("-")[0]


def test_nothing_is_seeded_where_no_tracked_factory_is_defined(monkeypatch):
    monkeypatch.setattr(seeding, "TrackedFactory", type("TrackedFactory", (), {}))
    before = states()
    with Seeded(GIVEN, "test_a"):
        assert states() == before


def test_a_suite_that_seeds_factory_boy_itself_is_left_alone_unless_a_seed_is_given():
    factory.random.reseed_random("the suite's own")
    before = states()
    with Seeded(DRAWN, "test_a") as block:
        assert states() == before
    assert not block.has_drawn
    drawn("test_a", base=GIVEN)
    assert states() == before
    assert factory.random.randgen.state_set


def test_a_seed_that_a_test_sets_itself_is_its_own_until_its_end():
    with Seeded(DRAWN, "test_a"):
        factory.random.reseed_random(1)
        random.seed(1)
        first = Things.build()
        factory.random.reseed_random(1)
        random.seed(1)
        assert Things.build() == first
    assert not factory.random.randgen.state_set, "or the next tests would be left alone"


@pytest.mark.parametrize("base", [DRAWN, GIVEN])
def test_a_seed_that_a_shared_fixture_sets_stays_unless_a_seed_is_given(base):
    with Seeded(base, "session", is_shared=True) as block:
        factory.random.reseed_random(1)
        theirs = states()
    assert block.is_overridden == (not base.is_given)
    assert (states() == theirs) == (not base.is_given)


def test_dates_up_to_today_do_not_warn():
    with warnings.catch_warnings(), Seeded(DRAWN, "test_a"):
        warnings.simplefilter("error")
        factory.fuzzy.FuzzyDate(dt.date(2000, 1, 1))


def test_the_worker_is_a_part_of_the_seed_of_what_tests_share(monkeypatch):
    for name in ("TIDYROWS_WORKER", "PYTEST_XDIST_WORKER", "TIDYROWS_WORKER_INDEX"):
        monkeypatch.delenv(name, raising=False)
    found = [worker_id()]
    for name, value in (("_WORKER_INDEX", "3"), ("_WORKER", "gw4")):
        monkeypatch.setenv(f"TIDYROWS{name}", value)
        found.append(worker_id())
    assert found == [ONE_WORKER, "w3", "gw4"]


def test_the_seed_of_a_process_is_read_once(monkeypatch):
    monkeypatch.setattr("tidyrows.factories.seeding._of_process", None)
    monkeypatch.setenv("TIDYROWS_SEED", "42")
    assert BaseSeed.of_process() == ("42", True)
    monkeypatch.setattr("tidyrows.factories.seeding._of_process", None)
    monkeypatch.delenv("TIDYROWS_SEED")
    one = BaseSeed.of_process()
    assert not one.is_given
    assert BaseSeed.of_process() is one
