"""``world``: the zoo's tables, and an asynchronous driver to them."""

from __future__ import annotations

import pytest

from harness import asynchronous
from harness.bystanders import Bystanders, snapshot


class World:
    """A database with strangers' rows in it.

    Attributes:
        engine: synchronous, to look and to disturb with.
    """

    def __init__(self, database, driver):
        self.database, self.driver = database, driver
        self.backend = database.backend
        self.engine = database.engine()
        self.bystanders = Bystanders(self.engine)

    def run(self, main):
        return asynchronous.run(self.database, self.driver, main)

    def added(self):
        """How many rows each table has that it did not have at first."""
        rows = snapshot(self.engine).added_since(self.bystanders.expected)
        return {name.rpartition(".")[2]: len(each) for name, each in rows.items() if each}


@pytest.fixture
def world(zoo_database, driver):
    return World(zoo_database, driver)
