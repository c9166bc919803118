"""Role *capacity*: how many connections a server takes, and the names that they have there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa

from tidyrows.dialects.driver import Errors, Fault


@dataclass(frozen=True, slots=True)
class ConnectionLimit:
    """A number of connections that cannot be exceeded.

    Attributes:
        name: what sets it, as ``CONNECTION LIMIT of role app``.
        most: connections in all.
        used: of these, in use by others than the workers of this run.
        remedy: the line that raises it, with ``{}`` for the number.
    """

    name: str
    most: int
    used: int
    remedy: str

    @property
    def free(self) -> int:
        """Connections that are left for the run."""
        return max(0, self.most - self.used)


class Capacity(Errors):
    """Limits of connections, and their names."""

    renames_connections: ClassVar[bool] = False
    """Whether the name of a connection can be changed."""

    def connection_limits(
        self, connection: sa.Connection, *, run: str, workers: int
    ) -> list[ConnectionLimit]:
        """All limits that apply to more connections like this one; the default knows none.

        Args:
            connection: as the workers connect, under one of their names.
            run: what the names of the run's connections begin with.
            workers: the number of the run's workers.
        """
        return []

    def name_connection(self, arguments: dict[str, Any], name: str) -> bool:
        """Add a name to the driver's arguments for a connection.

        Returns:
            Whether it was added; the project may have set another.
        """
        return False

    def environ(self, name: str) -> dict[str, str]:
        """Environment variables by which the connections of another process get a name."""
        return {}

    def rename_connection(self, dbapi_connection: Any, name: str) -> None:
        """Change the name of a connection without a transaction, in one round trip at most."""

    def is_server_away(self, error: BaseException) -> bool:
        """Whether a connection failed since no server answers there."""
        if isinstance(error, OSError):
            return True
        failed = isinstance(error, sa.exc.DBAPIError) and self.fault(error) is Fault.LOST
        return failed and not self.is_server_full(error)

    def is_server_full(self, error: BaseException) -> bool:
        """Whether the server takes no more connections now."""
        return False
