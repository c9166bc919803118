"""The levels of isolation that give a test its own schema, database or file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tidyrows.isolation.blueprint import Blueprint
from tidyrows.isolation.levels import Level
from tidyrows.isolation.own_loop import in_own_loop
from tidyrows.isolation.pool import lease, refuse_production_of

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.isolation.lease import Lease


class SchemaLevel(Level):
    """A schema that no other process has: built once, and emptied after each test."""

    name = "schema"
    undoes_rows = True
    _lease: Lease | None = None

    def open(self) -> sa.Engine:
        """An engine on the schema, which has the rows of the seed and no others."""
        # It has connected after that, so that the server's version is known.
        refuse_production_of(self.engine, self.wanted.allow_production)
        blueprint = Blueprint(self.engine, self.wanted)
        find = partial(lease, self.engine, self.name, blueprint, self.wanted.context)
        self._lease = in_own_loop(self.engine, find)
        self.schema = self._lease.space.name
        return self._lease.engine

    def close(self) -> None:
        """End the test's transactions, and give the schema the rows back that it was built with."""
        held, self._lease = self._lease, None
        if held is not None:
            held.end_transactions()
            in_own_loop(self.engine, held.empty)


class DatabaseLevel(SchemaLevel):
    """A database that no other process has."""

    name = "database"
