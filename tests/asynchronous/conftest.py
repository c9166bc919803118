"""``world``: the zoo's tables, and an asynchronous driver to them."""

from __future__ import annotations

import pytest

from harness.asynchronous import World


@pytest.fixture
def world(zoo_database, driver):
    return World(zoo_database, driver)
