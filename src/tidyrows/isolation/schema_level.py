"""The levels of isolation that give a test its own schema, database or file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidyrows.dialects import dialect_for
from tidyrows.isolation.blueprint import Blueprint
from tidyrows.isolation.lease import Lease, lease
from tidyrows.isolation.levels import Level
from tidyrows.production import refuse_places, refuse_production

if TYPE_CHECKING:
    import sqlalchemy as sa


class SchemaLevel(Level):
    """A schema that no other process has: built once, and emptied after each test."""

    name = "schema"
    undoes_rows = True
    _lease: Lease | None = None

    def open(self) -> sa.Engine:
        """An engine on the schema, which has the rows of the seed and no others."""
        self._refuse_production()
        blueprint = Blueprint(self.engine, self.wanted)
        self._lease = lease(self.engine, self.name, blueprint, self.wanted.context)
        self.schema = self._lease.space.name
        return self._lease.engine

    def close(self) -> None:
        """End the test's transactions, and give the schema the rows back that it was built with."""
        held, self._lease = self._lease, None
        if held is not None:
            held.empty()

    def _refuse_production(self) -> None:
        dialect, allowed = dialect_for(self.engine), self.wanted.allow_production
        refuse_production(self.engine.url, allowed)
        refuse_places(dialect.places_by_url(self.engine), allowed)
        if allowed is not True:
            with self.engine.connect() as connection:
                driver = connection.connection.dbapi_connection
                refuse_places(dialect.places_of(driver, rollback=True) or (), allowed)


class DatabaseLevel(SchemaLevel):
    """A database that no other process has."""

    name = "database"
