"""factory.Sequence: factory_boy's own with one worker, interleaved with several."""

from __future__ import annotations

import factory
import pytest
from factory.alchemy import SQLAlchemyModelFactory

from harness.models import Animal, Dog
from tidyrows.capture.ownership import entered
from tidyrows.factories import TrackedFactory
from tidyrows.worker import WorkerContext


class Ambient:
    active = True
    is_foreign = False

    def __init__(self, index, count):
        self.context = WorkerContext("sequences", f"gw{index}", index, None, count)


@pytest.fixture
def worker():
    """Make a worker ambient for the rest of the test."""
    blocks = []

    def enter(index, count):
        block = entered(Ambient(index, count))
        block.__enter__()
        blocks.append(block)

    yield enter
    for block in reversed(blocks):
        block.__exit__(None, None, None)


@pytest.fixture(params=[TrackedFactory, SQLAlchemyModelFactory])
def either(request):
    """The same factory on both bases: what they count must be equal."""
    return make(request.param)


def make(base):
    class AnimalFactory(base):
        class Meta:
            model = Animal

        name = factory.Sequence(lambda n: n)

        @classmethod
        def _setup_next_sequence(cls):
            return 5

    return AnimalFactory


def names(made, size=3):
    return [one.name for one in made.build_batch(size)]


def test_with_one_worker_it_counts_as_factory_boy_does(either, worker):
    worker(0, 1)

    class DogFactory(either):
        class Meta:
            model = Dog

    assert names(either) == [5, 6, 7]
    assert names(DogFactory) == [8, 9, 10]
    assert either.build(__sequence=77).name == 77
    assert names(either, 1) == [11]
    with pytest.raises(ValueError, match="descendant"):
        DogFactory.reset_sequence(0)
    DogFactory.reset_sequence(1, force=True)
    assert names(either) == [1, 2, 3]
    either.reset_sequence()
    assert names(either) == [5, 6, 7]


def test_with_several_workers_each_has_numbers_of_its_own(worker):
    worker(3, 8)
    animals = make(TrackedFactory)
    assert names(animals) == [8, 1008, 2008]
    animals.reset_sequence(100)
    assert names(animals) == [103, 1103, 2103]
    assert animals.build(__sequence=77).name == 77
    assert names(animals, 1) == [3103]


def test_a_replaced_worker_repeats_nobody(worker):
    """After a crash of one of two workers there is a gw2."""
    counted = []
    for index in range(3):
        worker(index, 2)
        counted += names(make(TrackedFactory), 5)
    assert len(set(counted)) == 15


def test_inherited_factories_share_one_interleaved_counter(worker):
    worker(3, 8)
    animals = make(TrackedFactory)

    class DogFactory(animals):
        class Meta:
            model = Dog

    assert names(DogFactory, 2) + names(animals, 1) == [8, 1008, 2008]


def test_the_worker_is_asked_when_a_number_is_wanted(worker):
    animals = make(TrackedFactory)
    worker(0, 1)
    assert names(animals, 1) == [5]
    worker(4, 8)
    assert names(animals, 1) == [10]
