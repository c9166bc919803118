"""Your own code as a whole transaction, run again where the database undid it.

A deadlock may have undone all of a transaction, so it is the whole that must run again: everything
between BEGIN and COMMIT, in a function that can be called twice.
"""

from __future__ import annotations

import inspect
import weakref
from functools import wraps
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event, orm

from tidyrows.capture.connections import open_connections
from tidyrows.capture.engine import root_engine
from tidyrows.dialects import Fault, Loss, dialect_for
from tidyrows.errors import NotBoundError, SessionStateError
from tidyrows.greenlets import is_async, spawn, wait_for
from tidyrows.retry import RetryPolicy
from tidyrows.tracking.binding import session_engine

if TYPE_CHECKING:
    from collections.abc import Callable

_LOST = "tidyrows.lost"
_UNKNOWN = (
    "tidyrows: the answer to the COMMIT was lost, so nobody knows whether it was committed, and it "
    "was not run again. Look whether what it wrote is there"
)

_IN_PART = (
    "tidyrows: this session commits in several databases, one after the other, so some may have "
    "committed; it was not run again. Look in each, or give every database a session of its own"
)


def with_retries(bind: Any, fn: Any = None, *, retry: RetryPolicy | None = None) -> Any:
    """Run ``fn`` as one transaction, and run it again where a deadlock or the like undid it.

    It is committed when ``fn`` returns, and rolled back where it raises. Errors that may pass by
    themselves (deadlocks, lock timeouts, lost connections) mean another attempt, which begins with
    nothing of the one before; all others surface at once. Without ``fn`` it is a decorator.

    A COMMIT without an answer is not run again, since it may have succeeded.

    Args:
        bind: a Session or scoped_session that is in no transaction; a sessionmaker, for a session
            per attempt; an Engine, for a connection. Or one of their asynchronous kin: then ``fn``
            is an ``async def``, and what is returned is to be awaited.
        fn: called with the session or connection; it must not commit.
        retry: how often and how patiently.

    Returns:
        What ``fn`` returned.

    Raises:
        SessionStateError: the session is in a transaction already: another attempt would lose it.
        NotBoundError: ``bind`` leads to no database.

    Example:
        >>> def pay(session):
        ...     account = session.get(Account, 1, with_for_update=True)
        ...     account.balance -= 10
        >>> with_retries(Session(engine), pay)
    """
    if isinstance(bind, (sa.Engine, orm.Session, orm.scoped_session, orm.sessionmaker)):
        asynchronous = False
    elif is_async(bind) and not hasattr(bind, "sync_connection"):
        asynchronous = True
    else:
        raise NotBoundError(
            f"with_retries() needs a transaction of its own, and a {type(bind).__name__} gives "
            f"none. Write with_retries(session, fn), with a Session, scoped_session, sessionmaker "
            f"or Engine, or one of their asynchronous kin."
        )
    policy = retry or RetryPolicy()
    if fn is None:
        return lambda function: _decorated(bind, function, policy, asynchronous=asynchronous)
    _refuse_function(fn, asynchronous=asynchronous)
    if asynchronous:
        return spawn(_run, bind, lambda source: wait_for(fn(source)), policy)
    return _run(bind, fn, policy)


def _decorated(bind: Any, fn: Any, policy: RetryPolicy, *, asynchronous: bool) -> Any:
    _refuse_function(fn, asynchronous=asynchronous)
    if asynchronous:

        @wraps(fn)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return await spawn(
                _run, bind, lambda source: wait_for(fn(source, *args, **kwargs)), policy
            )

        return awaited

    @wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        return _run(bind, lambda source: fn(source, *args, **kwargs), policy)

    return called


def _refuse_function(fn: Any, *, asynchronous: bool) -> None:
    if not callable(fn):
        raise TypeError(
            f"with_retries() calls a function with the session, and {fn!r} is none. Write "
            f"with_retries(session, lambda session: ...)."
        )
    if inspect.iscoroutinefunction(fn) and not asynchronous:
        raise TypeError(
            f"{fn!r} is asynchronous and the session is not: give with_retries() an AsyncSession, "
            f"async_sessionmaker or AsyncEngine, or write a plain def."
        )
    if asynchronous and inspect.isfunction(fn) and not _may_be_awaited(fn):
        raise TypeError(
            f"{fn!r} is not asynchronous and the session is: write async def, and await what it "
            f"does with the session."
        )


def _may_be_awaited(fn: Any) -> bool:
    """Whether a call of it may return something to await: a lambda may."""
    return (
        inspect.iscoroutinefunction(fn) or fn.__name__ == "<lambda>" or hasattr(fn, "__wrapped__")
    )


def _run(bind: Any, fn: Callable[[Any], Any], policy: RetryPolicy) -> Any:
    source, asynchronous = _synchronous(bind)
    if isinstance(source, sa.Engine):
        seen = _Seen([source])
        attempt = lambda: _on_connection(source, fn, seen, asynchronous)  # noqa: E731 -- one of three
    elif isinstance(source, orm.Session):
        _refuse_busy(source)
        seen = _Seen([session_engine(source)])
        attempt = lambda: _on_session(source, bind if asynchronous else source, fn, seen)  # noqa: E731
    else:
        seen = _Seen([])
        attempt = lambda: _on_new_session(source, fn, seen)  # noqa: E731
    return policy.run(attempt, is_transient=seen.passes)


def _synchronous(bind: Any) -> tuple[Any, bool]:
    """What is underneath; a session maker is taken as it is."""
    if isinstance(bind, orm.scoped_session):
        return bind(), False
    for name in ("sync_engine", "sync_session"):  # of an asynchronous registry too
        underneath = getattr(bind, name, None)
        if isinstance(underneath, (sa.Engine, orm.Session)):
            return underneath, True
    return bind, False


def _refuse_busy(session: orm.Session) -> None:
    if session.in_transaction():
        raise SessionStateError(
            f"{session!r} is in a transaction already (adding an object begins one). What that has "
            f"done would be lost with the first attempt that fails: write session.commit() or "
            f"session.rollback() before with_retries(), or do that work inside of it."
        )


class _Seen:
    """The engines of one call, and what their errors mean."""

    def __init__(self, engines: list[sa.Engine | None]) -> None:
        self._engines = {engine for engine in engines if engine is not None}
        self.unanswered = False

    def passes(self, error: BaseException) -> bool:
        """Whether another attempt may end better, and does nothing twice."""
        return not self.unanswered and self.fault(error) in {Fault.TRANSIENT, Fault.LOST}

    def fault(self, error: BaseException) -> Fault:
        faults = [dialect_for(engine).fault(error) for engine in self._engines]
        return next((fault for fault in faults if fault is not Fault.OTHER), Fault.OTHER)

    def begun(self, _session: Any, _transaction: Any, connection: sa.Connection) -> None:
        """A session has begun a transaction on a connection."""
        self._engines.add(connection.engine)
        _note_losses(connection.engine)
        connection.info.pop(_LOST, None)

    def commit(self, commit: Callable[[], None], *, together: bool = True) -> None:
        """Send the COMMIT; note if it is not answered, or if only a part may have succeeded."""
        try:
            commit()
        except Exception as error:
            if not together or self.fault(error) is Fault.LOST:
                self.unanswered = True
                error.add_note(_UNKNOWN if together else _IN_PART)
            raise


def _on_session(session: orm.Session, given: Any, fn: Callable[[Any], Any], seen: _Seen) -> Any:
    event.listen(session, "after_begin", seen.begun)
    try:
        result = fn(given)
        session.flush()
        connections = open_connections(session)
        for connection in connections:
            _raise_if_undone(connection)
        seen.commit(session.commit, together=len(connections) == 1)
    except BaseException:
        session.rollback()
        raise
    finally:
        event.remove(session, "after_begin", seen.begun)
    return result


def _on_new_session(maker: Any, fn: Callable[[Any], Any], seen: _Seen) -> Any:
    given = maker()
    session = getattr(given, "sync_session", given)
    try:
        return _on_session(session, given, fn, seen)
    finally:
        session.close()


def _on_connection(
    engine: sa.Engine, fn: Callable[[Any], Any], seen: _Seen, asynchronous: bool
) -> Any:
    with engine.connect() as connection:
        connection.begin()
        seen.begun(None, None, connection)
        try:
            result = fn(_wrapped(connection) if asynchronous else connection)
            _raise_if_undone(connection)
            seen.commit(connection.commit)
        except BaseException:
            _roll_back(connection)
            raise
    return result


def _wrapped(connection: sa.Connection) -> Any:
    from sqlalchemy.ext.asyncio import AsyncConnection  # noqa: PLC0415 -- needs the greenlet package

    return AsyncConnection._retrieve_proxy_for_target(connection)  # noqa: SLF001 -- how a listener gets it too


def _roll_back(connection: sa.Connection) -> None:
    """Really: SQLAlchemy thinks it over after a COMMIT that failed, and SQLite's is not."""
    try:
        connection.rollback()
        if not (connection.invalidated or connection.closed):
            connection.connection.rollback()
    except (sa.exc.DBAPIError, connection.dialect.loaded_dbapi.Error):
        connection.invalidate()


# -- what a function may have swallowed -----------------------------------------------------------

_listening: weakref.WeakSet[sa.Engine] = weakref.WeakSet()


def _note_losses(engine: sa.Engine) -> None:
    """Have errors that undid a whole transaction noted on its connection."""
    engine = root_engine(engine)
    if engine not in _listening:
        _listening.add(engine)
        event.listen(engine, "handle_error", _note_loss)


def _note_loss(context: Any) -> None:
    connection = context.connection
    if connection is None or connection.invalidated or connection.closed:
        return
    error = context.sqlalchemy_exception or context.original_exception
    driver = connection.connection.dbapi_connection
    if dialect_for(connection).loss(error, driver) is Loss.EVERYTHING:
        connection.info[_LOST] = error


def _raise_if_undone(connection: sa.Connection) -> None:
    """Before a COMMIT: what was done before an error that the function has swallowed is gone.

    The MySQL family carries on after a deadlock and would commit half; others
    commit nothing and say nothing.
    """
    if connection.invalidated:
        raise ConnectionError("the connection was lost, and the error of that was caught")
    lost = connection.info.pop(_LOST, None)
    if lost is not None:
        raise lost
    if dialect_for(connection).commit_is_void(connection):
        raise SessionStateError(
            "A statement failed in this transaction and its error was caught, so its COMMIT would "
            "persist nothing. Let the error pass, or put the statement into a savepoint: "
            "with session.begin_nested(): ..."
        )
