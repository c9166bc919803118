"""Every exception and warning that tidyrows raises, under one base.

Each message says what happened, to which object, why, and the next line to write. The objects
themselves are attributes, so that a program can read what a person can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class TidyRowsError(Exception):
    """Base of all errors of this library."""


class NotBoundError(TidyRowsError, TypeError):
    """A tracker was given nothing that leads to a database."""


class NoSessionError(TidyRowsError, RuntimeError):
    """A factory was called where neither a tracker nor its own Meta gives it a session.

    It is a RuntimeError too, since that is what factory_boy raises in this place.
    """


class SessionStateError(TidyRowsError):
    """A connection is closed, a transaction is not tidyrows' to end, or a tracker runs already."""


class UnknownTableError(TidyRowsError):
    """A model or table that the database does not have, or an object that is no table.

    Attributes:
        table: what was given or looked for.
    """

    def __init__(self, message: str, *, table: Any = None) -> None:
        super().__init__(message)
        self.table = table


class NoPrimaryKeyError(TidyRowsError):
    """A row of a table without a primary key cannot be named, so it cannot be tracked.

    Attributes:
        table: the table's name.
    """

    def __init__(self, message: str, *, table: str) -> None:
        super().__init__(message)
        self.table = table


class KeyShapeError(TidyRowsError, ValueError):
    """A key does not fit the primary key of its table: wrong number, NULL, or wrong type.

    Attributes:
        table: the table's name.
        key: the key as given.
    """

    def __init__(self, message: str, *, table: str, key: Any) -> None:
        super().__init__(message)
        self.table = table
        self.key = key


class UntrackableRowError(TidyRowsError):
    """An object cannot be tracked as it is: transient, pending, or not mapped at all."""


class ProductionDatabaseError(TidyRowsError):
    """The database or the environment looks like production, and nobody allowed it.

    Attributes:
        matched: the first word that looks like production.
        found: what is not allowed, as pairs: ``host``, ``database`` or the name of an environment
            variable, and the name that stands there. Listed in ``allow_production``, the names
            are fine.
    """

    def __init__(
        self, message: str, *, matched: str, found: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.matched = matched
        self.found = tuple(found)


class ScopeError(TidyRowsError, ValueError):
    """A scoped value cannot be made unique: bad template, column too short, number too large.

    Attributes:
        column: the column, where it is known.
        length: what the column holds, in characters, where it is known.
        need: what the value needs, in characters, where it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        column: str | None = None,
        length: int | None = None,
        need: int | None = None,
    ) -> None:
        super().__init__(message)
        self.column = column
        self.length = length
        self.need = need


class WorkerContextError(TidyRowsError, ValueError):
    """A run, worker or test id that cannot be used; the message names the variable."""


class ExternalResourceError(TidyRowsError, ValueError):
    """An external resource that cannot be tracked, or a kind that has another handler already.

    Attributes:
        kind: the kind of the resource.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class LedgerError(TidyRowsError):
    """The ledger's table is not there, has another version, cannot be made or cannot be used.

    Also where a sweep is asked for a name that nothing is kept under.
    """


class LifeTakenError(TidyRowsError):
    """The lock that shows that a worker is alive is held by somebody else.

    Attributes:
        number: the worker's number.
    """

    def __init__(self, number: int, where: str) -> None:
        super().__init__(
            f"The lock of worker {number:016x} on {where} is held by another process or connection,"
            f" so this worker cannot show that it is alive. Its number is random: start again with"
            f" a new one, and never copy the number of a running worker."
        )
        self.number = number


class TakenOverError(SessionStateError, LedgerError):
    """A sweep took this worker for dead, and has taken its rows over."""


class CleanupError(TidyRowsError):
    """Rows of ours are still there after cleanup; they stay tracked.

    Attributes:
        leftovers: one entry per row, with its key and the cause.
        report: the whole report of the cleanup.
    """

    def __init__(self, message: str, *, leftovers: Sequence[Any], report: Any) -> None:
        super().__init__(message)
        self.leftovers = tuple(leftovers)
        self.report = report


class TidyRowsWarning(UserWarning):
    """Base of all warnings of this library."""


class UntrackedRowsWarning(TidyRowsWarning):
    """Rows were inserted that tidyrows could not name, so cleanup will not delete them."""


class LateCommitWarning(TidyRowsWarning):
    """Rows are committed after their tracker has stopped; they stay tracked."""
