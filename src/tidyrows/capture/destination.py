"""Where the connections of an engine lead, for trackers that refuse production.

A ``creator``, a listener, ``connect_args`` or the environment may lead past the engine's URL, so a
connection itself is asked, once per engine: the first one that is used.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

from tidyrows.production import looks_like_production

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from tidyrows.dialects import Dialect

Places: TypeAlias = list[tuple[str, str]]
Refuser: TypeAlias = "Callable[[Places], None]"


class Destination:
    """Where one engine leads.

    Attributes:
        is_settled: the next connection need not be asked.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._places: Places | None = None
        self._refusers: list[weakref.WeakMethod[Refuser]] = []
        self.is_settled = True

    def refuse_with(self, refuse: Refuser) -> None:
        """From now on call a method with the places to which connections and schemas lead."""
        self._refusers.append(weakref.WeakMethod(refuse))
        self.is_settled = self._places is not None

    @property
    def places(self) -> Places:
        """What a connection has said; empty before the first."""
        return self._places or []

    def look(self, driver: Any, *, is_new: bool = False) -> None:
        """Ask a connection of the driver where it leads; raise if that is refused.

        Args:
            driver: the connection.
            is_new: nobody has used it since it left the pool.
        """
        if self._places is None:
            ends = is_new and self._dialect.in_transaction(driver) is not True
            self._places = self._dialect.places_of(driver, rollback=ends)
        if self._places is not None:
            self._refuse(self._places)
            self.is_settled = True

    def refuse_schema(self, connection: sa.Connection, schema: str) -> bool:
        """Raise if a schema leads to what is refused; whether somebody might refuse it."""
        if not self.is_settled:
            self.look(connection.connection.dbapi_connection)
        places = self._dialect.places_of_schema(connection, schema) if self._refusers else []
        self._refuse(places)
        return any(looks_like_production(name) for _where, name in places)

    def _refuse(self, places: Places) -> None:
        for reference in self._refusers[:]:
            refuse = reference()
            if refuse is None:
                self._refusers.remove(reference)
            else:
                refuse(places)
