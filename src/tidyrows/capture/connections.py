"""The sessions and connections that this process has open; a cleanup may have to wait for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.pool import _ConnectionFairy

from tidyrows.capture.unseen import WatchedConnection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.capture.destination import Destination
    from tidyrows.capture.unseen import UnseenInserts
    from tidyrows.dialects import Dialect


def driver_of(connection: sa.Connection) -> Any:
    """The DBAPI's connection, which knows whether it is in a transaction."""
    # Three properties tell the same; the public one connects again where the connection is gone.
    fairy: Any = connection._dbapi_connection or connection.connection  # noqa: SLF001
    return getattr(fairy, "_driver", None) or fairy.dbapi_connection


class OpenConnections:
    """The connections of one engine that are checked out of its pool."""

    def __init__(
        self,
        engine: sa.Engine,
        dialect: Dialect,
        destination: Destination,
        unseen: UnseenInserts,
    ) -> None:
        self._dialect = dialect
        self._destination = destination
        self._unseen = unseen
        self._url = engine.url
        self._out: set[Any] = set()
        event.listen(engine, "checkout", self.checkout)
        event.listen(engine, "checkin", self._checkin)
        event.listen(engine, "detach", self._checkin)

    def checkout(self, driver: Any, record: Any, fairy: Any) -> None:
        """A connection leaves the pool."""
        self._out.add(record)
        if type(fairy) is _ConnectionFairy:
            fairy.unseen = self._unseen  # type: ignore[attr-defined]  # what it is in a moment
            fairy.__class__ = WatchedConnection
        if not self._destination.is_settled:
            self._destination.look(driver, is_new=True)

    def add(self, connection: sa.Connection) -> None:
        """A connection was checked out before the listeners were there."""
        record = getattr(connection.connection, "_connection_record", None)  # no public name
        if record is not None:
            self._out.add(record)

    def _checkin(self, _driver: Any, record: Any) -> None:
        self._out.discard(record)
        self._unseen.uses.pop(record, None)

    def by_id(self, own: Any) -> dict[int, str]:
        """What has a transaction open, in words, by the server's id of its connection."""
        found: dict[int, str] = {}
        for record in list(self._out):
            driver = record.dbapi_connection
            if driver is not None and driver is not own and self._is_busy(driver):
                self._add(found, driver, "a connection that was not given back to the engine")
        for session in open_sessions():
            for connection in open_connections(session):
                if connection.engine.url == self._url and not connection.closed:
                    self._add(found, driver_of(connection), f"the session {session!r}")
        return found

    @property
    def is_busy(self) -> bool:
        """Whether a connection that is in use is in a transaction."""
        drivers = [record.dbapi_connection for record in list(self._out)]
        return any(
            self._dialect.in_transaction(driver) is True for driver in drivers if driver is not None
        )

    def _is_busy(self, driver: Any) -> bool:
        return self._dialect.in_transaction(driver) is not False

    def _add(self, found: dict[int, str], driver: Any, words: str) -> None:
        number = self._dialect.server_id(driver)
        if number is not None:
            found[number] = words


def open_sessions() -> Iterator[orm.Session]:
    """Every session of this process."""
    # The references, not the values: other threads make sessions while we look.
    for reference in orm.session._sessions.valuerefs():  # noqa: SLF001 -- as close_all_sessions() does
        session = reference()
        if session is not None:
            yield session


def open_connections(session: orm.Session) -> list[sa.Connection]:
    """The connections that a session's transaction has begun already."""
    if not session.in_transaction():
        return []
    transaction: Any = session.get_transaction()
    begun = getattr(transaction, "_connections", {})  # no public name; ``connection()`` would begin
    return [bind for bind in begun if isinstance(bind, sa.Connection)]
