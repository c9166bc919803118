"""All exceptions and warnings of tidyrows, with one base class each.

A message names the event, the object, the cause, and the next line to write. The objects are
attributes too, for programs that handle the error.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DontWrapMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class TidyRowsError(Exception):
    """Base of all errors of this library; keyword arguments become attributes."""

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        self.__dict__.update(attributes)


class ArgumentError(TidyRowsError, TypeError, ValueError):
    """An argument has a value that it does not take, or a name that the call does not have.

    Attributes:
        argument: its name.
        value: the value; None for an unknown name.
    """

    argument: str
    value: Any = None


class NotBoundError(TidyRowsError, TypeError):
    """The given object does not lead to a database."""


class NoSessionError(TidyRowsError, RuntimeError):
    """A factory was called where neither a tracker nor its Meta gives it a session.

    It is a RuntimeError too, since factory_boy raises a RuntimeError in this case.
    """


class SessionStateError(TidyRowsError):
    """A connection is closed, a transaction is the caller's to end, or a tracker runs already."""


class UnknownTableError(TidyRowsError):
    """The database does not have the table, or the object is not a table.

    Attributes:
        table: the given table or object.
    """

    table: Any = None


class NoPrimaryKeyError(TidyRowsError):
    """A row of a table without a primary key cannot be tracked by key.

    Attributes:
        table: the table's name.
    """

    table: str


class KeyShapeError(TidyRowsError, ValueError):
    """A key does not match the primary key of its table: wrong number, NULL, or wrong type.

    Attributes:
        table: the table's name.
        key: the given key.
    """

    table: str
    key: Any


class UntrackableRowError(TidyRowsError):
    """An object cannot be tracked: it is transient, pending, or not mapped."""


class ProductionDatabaseError(TidyRowsError):
    """The database or the environment looks like production, and that was not allowed.

    Attributes:
        matched: the first word that looks like production.
        found: pairs of ``host``, ``database`` or the name of an environment variable, and the name
            found there. A name that is listed in ``allow_production`` is allowed.
    """

    matched: str
    found: tuple[tuple[str, str], ...]


class ScopeError(TidyRowsError, ValueError):
    """A scoped value cannot be made unique: bad template, column too short, number too large.

    Attributes:
        column: the column, if known.
        length: the length of the column in characters, if known.
        need: the length of the value in characters, if known.
    """

    column: str | None = None
    length: int | None = None
    need: int | None = None


class BulkError(TidyRowsError):
    """A factory needs the row of each object, so it cannot have the rows of many written at once.

    Attributes:
        factory: the factory, which may be one of a SubFactory.
        declaration: what needs the row: the name of a declaration, a method, an option of Meta.
        reason: why it does.
    """

    factory: type[Any]
    declaration: str
    reason: str

    def __init__(
        self, called: type[Any], factory: type[Any], declaration: str, reason: str
    ) -> None:
        name = called.__name__
        super().__init__(
            f"{name}.create_bulk() writes the rows of many objects at once, and cannot honour "
            f"{factory.__name__}.{declaration}: {reason}. Write {name}.create_bulk(n, hooks=True), "
            f"which makes one object after the other, or {name}.create_batch(n).",
            factory=factory,
            declaration=declaration,
            reason=reason,
        )


class WorkerContextError(TidyRowsError, ValueError):
    """A run, worker or test id cannot be used; the message names the variable."""


class AutoFactoryError(TidyRowsError, ValueError):
    """A factory made from a model cannot guess a value; the call or a declaration must give it.

    Attributes:
        model: the model.
        table: the name of the table.
        column: the attribute that needs a value.
    """

    model: type
    table: str
    column: str


class ExternalResourceError(TidyRowsError, ValueError):
    """An external resource cannot be tracked, or its kind has another handler already.

    Attributes:
        kind: the kind of the resource.
    """

    kind: str


class DataFileError(TidyRowsError, ValueError):
    """A data file cannot be read, or has something that the factories or columns do not take.

    Attributes:
        file: its name; None for rows that cannot be written as a file.
        line: the line, from 1, if known.
        column: the character of the line, from 1, if known.
    """

    file: str | None = None
    line: int | None = None
    column: int | None = None


class LedgerError(TidyRowsError):
    """The ledger's table does not exist, has another version, or cannot be created or used.

    Also raised by a sweep for kept rows, if no rows are kept under the given name.
    """


class LivenessLockError(TidyRowsError):
    """Another process or connection has the lock that shows that this worker is alive.

    Attributes:
        number: the worker's number.
    """

    number: int

    def __init__(self, number: int, where: str) -> None:
        super().__init__(
            f"The lock of worker {number:016x} on {where} is held by another process or connection,"
            f" so this worker cannot show that it is alive. Its number is random: start again with"
            f" a new one, and never copy the number of a running worker.",
            number=number,
        )


class LockTimeoutError(TidyRowsError, TimeoutError):
    """An advisory lock was not free in time.

    Attributes:
        lock: its name.
        holders: a Blocker for each session or process that holds it, as far as the database shows.
    """

    lock: str
    holders: tuple[Any, ...] = ()


class LockLostError(TidyRowsError):
    """An advisory lock was lost inside its block: the connection that held it is gone.

    Attributes:
        lock: its name.
    """

    lock: str


class IsolationError(TidyRowsError, DontWrapMixin):
    """A level of isolation cannot give what is asked of it, or a test has broken out of it.

    Attributes:
        level: the level, if it is ``transaction``.
        escaped: the transaction was ended behind its back, so rows may be committed.
        rows: of these, the keys of those that were tracked.
        name: the name of the schema, database or file, if there is one.
        blockers: a Blocker for each session that is in the way.
    """

    level: str | None = None
    escaped: bool = False
    rows: tuple[Any, ...] = ()
    name: str | None = None
    blockers: tuple[Any, ...] = ()


class ConnectionBudgetError(TidyRowsError):
    """The server does not take the connections that the workers of a run need.

    Attributes:
        limit: the limit that is too low, as its database names it.
        free: connections that the run may have by this limit.
        workers: the number of workers that share them.
        need: connections that the run needs.
    """

    limit: str
    free: int
    workers: int
    need: int


class ServerAwayError(TidyRowsError, ConnectionError):
    """No database server answers at the address of a URL.

    Attributes:
        database: the address, without user and password.
    """

    database: str


class OncePerRunError(TidyRowsError):
    """What one worker makes for its run has failed, or its result cannot be passed on.

    Attributes:
        name: of the result.
        worker: the worker that made it; None where none has.
    """

    name: str | None = None
    worker: str | None = None


class DialectError(TidyRowsError):
    """A package's entry point for its database cannot be used.

    Attributes:
        entry_point: its group, name and value, as ``tidyrows.dialects: name = module:Class``.
    """

    entry_point: str

    def __init__(self, entry_point: str, why: str, remedy: str) -> None:
        text = f"The entry point [{entry_point}] {why}. {remedy}"
        super().__init__(text, entry_point=entry_point)


class TakenOverError(SessionStateError, LedgerError):
    """A sweep considered this worker dead, and has taken over its rows."""


class CleanupError(TidyRowsError):
    """Tracked rows are still there after cleanup; they stay tracked.

    Attributes:
        leftovers: one entry per row, with its key and the cause.
        report: the report of the cleanup.
    """

    leftovers: tuple[Any, ...]
    report: Any


class LeakedRowsError(TidyRowsError, AssertionError):
    """Rows of ours are still there, says ``assert_no_leaks``.

    Attributes:
        leaks: a ``LeakedRows`` for each table and maker.
    """

    leaks: tuple[Any, ...]


class TidyRowsWarning(UserWarning):
    """Base of all warnings of this library."""


class UntrackedRowsWarning(TidyRowsWarning):
    """Rows were inserted whose keys are unknown, so cleanup will not delete them."""


class LateCommitWarning(TidyRowsWarning):
    """Rows are committed after their tracker has stopped; they stay tracked."""


class _Unraised:
    """An error that Python reports and does not raise: ``sys.unraisablehook``."""

    def __init__(self, error: Warning) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


@contextmanager
def not_raised() -> Iterator[None]:
    """Where warnings are errors, report one all the same, and raise nothing.

    An error inside an event of a transaction keeps SQLAlchemy from ending that transaction, and
    the next user of the connection would commit it. A warning changes nothing that is committed.
    """
    try:
        yield
    except Warning as error:
        _Unraised(error)


def add_note(error: BaseException, text: str) -> None:
    """Attach a note to an error that will surface; print what the error does not take.

    An error that is a frozen dataclass, or whose ``__notes__`` is no list, raises another error
    in ``add_note``, which would surface in its place.
    """
    try:
        error.add_note(text)
        is_taken = text in error.__notes__
    except Exception:  # noqa: BLE001 -- whatever it is, the error itself must surface
        is_taken = False
    if not is_taken:
        with suppress(OSError, ValueError):  # stderr is closed
            print(f"{type(error).__name__} takes no note. {text}", file=sys.stderr)  # noqa: T201 -- it has no other place


def text_of(error: BaseException, form: Callable[[BaseException], str] = str) -> str:
    """The text of an error, also where its own ``__str__`` or ``__repr__`` fails."""
    try:
        return form(error)
    except Exception:  # noqa: BLE001 -- as traceback does
        return f"{type(error).__name__} without a text"
