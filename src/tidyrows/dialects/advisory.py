"""Role *advisory*: locks with a name, which belong to no table and no row."""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.dialects.bounds import DriverSocket, SilentServerError, checkout_within
from tidyrows.dialects.driver import DriverAccess
from tidyrows.errors import ArgumentError

if TYPE_CHECKING:
    from tidyrows.dialects.locks import Blocker

_BOUND = 5.0
"""Seconds that a server may take to answer, besides the time for which a lock is waited for."""

_inherited: list[sa.Connection] = []


class PoolerError(Exception):
    """What is to be held by a session cannot be, since a pooler shares the sessions."""


@dataclass(frozen=True, slots=True)
class LockName:
    """What to lock, and how.

    Attributes:
        text: the name that the project has given.
        shared: several may hold it at once, unless one holds it alone.
        session: not for a transaction, but for the length of a connection.
        label: who asks, for those who wait.
    """

    text: str
    shared: bool
    session: bool
    label: str

    @property
    def number(self) -> int:
        """The name as a number of 63 bits."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class HeldLock:
    """A lock that is held by a connection of its own, which the pool gets back with the release.

    Attributes:
        server_id: the server's number of the connection; None before, and where it has none.
    """

    def __init__(self, dialect: AdvisoryLocks, engine: sa.Engine, name: LockName) -> None:
        self.name = name
        self.server_id: int | None = None
        self._dialect = dialect
        self._engine = engine
        self._process = os.getpid()
        self._connection: sa.Connection | None = None

    @property
    def connection(self) -> sa.Connection | None:
        """What holds it; None before, after, and where it is a file."""
        return self._connection

    def acquire(self, timeout: float) -> list[Blocker] | None:
        """Acquire it within so many seconds; 0 does not wait.

        Returns:
            None where it is held now, else those who hold it, as far as the database shows.

        Raises:
            SilentServerError: the server does not answer.
            PoolerError: a lock of the session, through a pooler.
        """
        connection = checkout_within(self._engine, timeout + _BOUND)
        driver = connection.connection.dbapi_connection
        wire = DriverSocket(driver)
        try:
            with wire.bounded(timeout + _BOUND):
                if self._dialect.acquire_advisory(connection, self.name, timeout):
                    self.server_id = self._dialect.server_id(driver)
                    self._connection = connection
                    return None
                return self._dialect.advisory_holders(connection, self.name)
        except BaseException as error:
            connection.invalidate()  # nobody knows what it holds
            if wire.was_shut and isinstance(error, Exception):
                raise SilentServerError(
                    f"the server did not answer within {timeout + _BOUND:.1f} s, so the advisory "
                    f"lock {self.name.text!r} was given up"
                ) from error
            raise
        finally:
            wire.close()
            if self._connection is None:
                connection.close()

    def release(self) -> bool:
        """Release it; whether it was held until now. In a forked child nothing is done."""
        connection, self._connection = self._connection, None
        if connection is None:
            return True
        if self._process != os.getpid():
            # Collected here, it would end the parent's session.
            _inherited.append(connection)
            return True
        held = False
        try:
            driver = connection.connection.dbapi_connection
            with closing(DriverSocket(driver)) as wire, wire.bounded(_BOUND):
                held = self._dialect.release_advisory(connection, self.name)
        except (sa.exc.DBAPIError, self._engine.dialect.loaded_dbapi.Error):
            pass  # a connection that died holds no lock
        finally:
            if not held:
                connection.invalidate()
            connection.close()
        return held


class AdvisoryLocks(DriverAccess):
    """Locks with a name."""

    def advisory_lock(self, engine: sa.Engine, name: LockName) -> HeldLock:
        """The lock, not acquired yet."""
        return HeldLock(self, engine, name)

    def acquire_advisory(self, connection: sa.Connection, name: LockName, timeout: float) -> bool:
        """Acquire a lock on a connection that nobody else uses; whether it is held now.

        It waits so many seconds; 0 does not wait.
        """
        raise ArgumentError(
            f"tidyrows knows no advisory locks of {connection.dialect.name}. Its dialect may have "
            f"them: docs/dialects.md.",
            argument="bind",
        )

    def release_advisory(self, connection: sa.Connection, name: LockName) -> bool:
        """Release it; whether it was held."""
        return False

    def advisory_holders(self, connection: sa.Connection, name: LockName) -> list[Blocker]:
        """Who holds it now."""
        return []
