"""``world``: the zoo's tables, and an asynchronous driver to them.

``space_engine``, ``any_driver_space_engine``: what ``isolate()`` keeps through them is dropped.
"""

from __future__ import annotations

import pytest

from harness.asynchronous import World
from harness.spaces import lease_of_this_process_ends
from tidyrows.isolation.prune import prune


@pytest.fixture
def world(zoo_database, driver):
    return World(zoo_database, driver)


def _pruned(engine):
    yield engine
    lease_of_this_process_ends()
    prune(engine, older_than=0)


@pytest.fixture
def space_engine(engine):
    yield from _pruned(engine)


@pytest.fixture
def any_driver_space_engine(any_driver_engine):
    yield from _pruned(any_driver_engine)
