"""Role *errors*: what an error means, and what it did to its transaction."""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum, auto
from typing import Any, ClassVar

import sqlalchemy as sa

from tidyrows.dialects.driver import DriverAccess


class Fault(Enum):
    """What to do about an error."""

    TRANSIENT = auto()
    """Run the whole transaction again."""
    LOST = auto()
    """The connection is gone: run the whole transaction again, on a new one."""
    CONSTRAINT = auto()
    """A constraint was violated; after a DELETE, a foreign key: look for dependents again."""
    OTHER = auto()
    """Raise."""


class Loss(Enum):
    """What a failed statement did to the earlier rows of its transaction."""

    NOTHING = auto()
    DOUBT = auto()
    EVERYTHING = auto()


class Errors(DriverAccess):
    """Errors by the database's own codes; never by message, nor by SQLAlchemy's class."""

    transient_codes: ClassVar[frozenset[Any]] = frozenset()
    """Deadlock, lock timeout, serialization failure: the transaction may be run again."""
    lost_codes: ClassVar[frozenset[Any]] = frozenset()
    """The connection is gone, or there was none."""
    constraint_codes: ClassVar[frozenset[Any]] = frozenset()
    """A foreign key above all."""
    timeout_codes: ClassVar[frozenset[Any]] = frozenset()
    """A wait for a lock, or a statement, took too long."""
    permission_codes: ClassVar[frozenset[Any]] = frozenset()
    """The role may not do that."""

    @abstractmethod
    def driver_code(self, error: BaseException) -> Any:
        """The database's own code of a driver's error, as in the sets above; None if it has none.

        It is called with errors of any class.
        """

    def code(self, error: BaseException) -> Any:
        """As :meth:`driver_code`, also for SQLAlchemy's errors."""
        if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
            error = error.orig
        return self.driver_code(error)

    def fault(self, error: BaseException) -> Fault:
        """What to do about an error of SQLAlchemy or of the driver."""
        if isinstance(error, sa.exc.DBAPIError):
            if error.connection_invalidated:
                return Fault.LOST
            error = error.orig or error
        if self.is_database_missing(error):
            return Fault.OTHER  # it will not come back
        # asyncpg lets the socket's own error through when the server is down.
        return Fault.LOST if isinstance(error, ConnectionError) else self.driver_fault(error)

    def driver_fault(self, error: BaseException) -> Fault:
        """As :meth:`fault`, for an error of the driver: by its code."""
        code = self.driver_code(error)
        if code in self.transient_codes:
            return Fault.TRANSIENT
        if code in self.lost_codes:
            return Fault.LOST
        return Fault.CONSTRAINT if code in self.constraint_codes else Fault.OTHER

    def is_timeout(self, error: BaseException) -> bool:
        """Whether an error ended a wait: for a lock, or for the statement itself."""
        return self.code(error) in self.timeout_codes

    def is_permission_denied(self, error: BaseException) -> bool:
        """Whether the role lacks a right."""
        return self.code(error) in self.permission_codes

    def is_database_missing(self, error: BaseException) -> bool:
        """Whether the database does not exist (any more)."""
        return False

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """What a failed statement did to the earlier rows of its transaction."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.DOUBT
