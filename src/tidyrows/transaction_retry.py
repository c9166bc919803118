"""The project's own code as a whole transaction, retried where the database undid it.

A deadlock may have undone all of a transaction, so everything between BEGIN and COMMIT must run
again: it is a function that can be called twice.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy import event, orm

from tidyrows.arguments import checked
from tidyrows.capture.connections import open_connections
from tidyrows.capture.engine import root_engine
from tidyrows.dialects import Fault, Loss, dialect_for
from tidyrows.errors import ArgumentError, NotBoundError, SessionStateError, add_note, text_of
from tidyrows.greenlets import is_async, spawn, wait_for
from tidyrows.retry import RETRY, RetryPolicy
from tidyrows.tracking.binding import session_engine

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")
_LOST_TRANSACTION = "tidyrows.lost_transaction"  # in Connection.info: the error that undid all
_NO_ANSWER = (
    "tidyrows: the answer to the COMMIT was lost, so nobody knows whether it was committed, and it "
    "was not run again. Check whether the rows that it wrote are there"
)
_COMMITTED_IN_PART = (
    "tidyrows: this session commits in several databases, one after the other, so some may have "
    "committed; it was not run again. Check each, or give every database a session of its own"
)


@overload
def with_retries(bind: Any, fn: Callable[[Any], T], *, retry: RetryPolicy | None = None) -> T: ...


@overload
def with_retries(
    bind: Any, fn: None = None, *, retry: RetryPolicy | None = None
) -> Callable[[Callable[Concatenate[Any, P], T]], Callable[P, T]]: ...


@checked(retry=RETRY)
def with_retries(bind: Any, fn: Any = None, *, retry: RetryPolicy | None = None) -> Any:
    """Run ``fn`` as one transaction, and retry it after a transient error such as a deadlock.

    The transaction is committed when ``fn`` returns, and rolled back when it raises. Transient
    errors (deadlocks, lock timeouts, lost connections) are retried, without anything of the failed
    attempt; all other errors surface at once. Without ``fn``, this is a decorator.

    A COMMIT whose answer is lost is not retried, since it may have succeeded.

    Args:
        bind: a Session or scoped_session that is in no transaction; a sessionmaker, for a session
            per attempt; an Engine, for a connection per attempt. Or an asynchronous one of these:
            then ``fn`` is an ``async def``, and the result is awaited.
        fn: called with the session or connection; it must not commit.
        retry: the retry policy.

    Returns:
        The result of ``fn``.

    Raises:
        SessionStateError: the session is in a transaction already, which a retry would lose.
        NotBoundError: ``bind`` leads to no database.

    Example:
        >>> def pay(session):
        ...     account = session.get(Account, 1, with_for_update=True)
        ...     account.balance -= 10
        >>> with_retries(Session(engine), pay)
    """
    kinds = (sa.Engine, orm.Session, orm.scoped_session, orm.sessionmaker)
    asynchronous = is_async(bind) and not hasattr(bind, "sync_connection")
    if not (asynchronous or isinstance(bind, kinds)):
        raise NotBoundError(
            f"with_retries() needs a transaction of its own, and a {type(bind).__name__} gives "
            f"none. Write with_retries(session, fn), with a Session, scoped_session, sessionmaker "
            f"or Engine, or an asynchronous one of these."
        )
    policy = retry or RetryPolicy()

    def decorated(function: Any) -> Any:
        _refuse_function(function, asynchronous=asynchronous)
        if asynchronous:

            @wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                def call(source: Any) -> Any:
                    return wait_for(function(source, *args, **kwargs))

                return await spawn(_run, bind, call, policy)

            return awaited

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return _run(bind, lambda source: function(source, *args, **kwargs), policy)

        return called

    return decorated if fn is None else decorated(fn)()


def _refuse_function(fn: Any, *, asynchronous: bool) -> None:
    if not callable(fn):
        raise ArgumentError(
            f"with_retries() calls a function with the session, and {fn!r} is not a function. "
            f"Write with_retries(session, lambda session: ...).",
            argument="fn",
        )
    if inspect.iscoroutinefunction(fn) and not asynchronous:
        raise ArgumentError(
            f"{fn!r} is asynchronous and the session is not: give with_retries() an AsyncSession, "
            f"async_sessionmaker or AsyncEngine, or write a plain def.",
            argument="fn",
        )
    may_be_awaited = (  # what a lambda or a decorator returns
        not inspect.isfunction(fn)
        or inspect.iscoroutinefunction(fn)
        or fn.__name__ == "<lambda>"
        or hasattr(fn, "__wrapped__")
    )
    if asynchronous and not may_be_awaited:
        raise ArgumentError(
            f"{fn!r} is not asynchronous and the session is: write async def, and await what it "
            f"does with the session.",
            argument="fn",
        )


def _run(bind: Any, fn: Callable[[Any], Any], policy: RetryPolicy) -> Any:
    source, asynchronous = _synchronous(bind)

    def connection_of(session: orm.Session) -> Any:
        connection = session.connection()
        if not asynchronous:
            return connection
        from sqlalchemy.ext.asyncio import AsyncConnection  # noqa: PLC0415 -- needs the greenlet package

        return AsyncConnection._retrieve_proxy_for_target(connection)  # noqa: SLF001 -- how a listener gets it too

    def attempt() -> Any:
        if isinstance(source, orm.Session):
            given = bind if asynchronous else source
            return databases.transaction(source, lambda: fn(given))
        if isinstance(source, sa.Engine):
            with orm.Session(source) as session:
                return databases.transaction(session, lambda: fn(connection_of(session)))
        given = source()
        with getattr(given, "sync_session", given) as session:
            return databases.transaction(session, lambda: fn(given))

    if isinstance(source, orm.Session):
        if source.in_transaction():
            raise SessionStateError(
                f"{source!r} is in a transaction already (adding an object begins one). Its "
                f"changes would be lost with the first attempt that fails: write session.commit() "
                f"or session.rollback() before with_retries(), or make the changes inside of it."
            )
        databases = _Databases(session_engine(source))
    else:
        databases = _Databases(source if isinstance(source, sa.Engine) else None)
    # No context manager of contextlib: it sets __traceback__, and the function's error may refuse.
    try:
        return policy.run(attempt, is_transient=databases.is_transient)
    except Exception as error:
        databases.explain(error)
        raise


def _synchronous(bind: Any) -> tuple[Any, bool]:
    """The synchronous engine or session, and whether it belongs to an asynchronous one."""
    if isinstance(bind, orm.scoped_session):
        return bind(), False
    for name in ("sync_engine", "sync_session"):  # of an asynchronous registry too
        underneath = getattr(bind, name, None)
        if isinstance(underneath, (sa.Engine, orm.Session)):
            return underneath, True
    return bind, False  # a session maker


class _Databases:
    """The databases of one use of with_retries, and the meaning of their errors."""

    def __init__(self, engine: sa.Engine | None) -> None:
        self._engines = set() if engine is None else {engine}
        self._may_have_committed = False

    def is_transient(self, error: BaseException) -> bool:
        """Whether another attempt may succeed, and does nothing twice."""
        return not self._may_have_committed and any(
            dialect_for(engine).is_transient(error) for engine in self._engines
        )

    def explain(self, error: Exception) -> None:
        """Name the server of a first connection that failed."""
        for engine in self._engines if len(self._engines) == 1 else ():
            dialect_for(engine).explain_first_connection(error, engine)

    def _fault(self, error: BaseException) -> Fault:
        faults = [dialect_for(engine).fault(error) for engine in self._engines]
        return next((fault for fault in faults if fault is not Fault.OTHER), Fault.OTHER)

    def transaction(self, session: orm.Session, call: Callable[[], Any]) -> Any:
        """Call the function and commit; no retry if a part of it may be committed."""
        event.listen(session, "after_begin", self._after_begin)
        try:
            result = call()
            session.flush()
            connections = open_connections(session)
            for connection in connections:
                _raise_if_lost(connection)
            try:
                session.commit()
            except Exception as error:
                for connection in connections:
                    # SQLite's transaction is still open, and a pool may reset nothing.
                    if not (connection.invalidated or connection.closed):
                        with suppress(connection.dialect.loaded_dbapi.Error):
                            connection.connection.rollback()
                in_one = len(connections) == 1
                if not in_one or self._fault(error) is Fault.LOST:
                    self._may_have_committed = True
                    add_note(error, _NO_ANSWER if in_one else _COMMITTED_IN_PART)
                raise
        except BaseException as error:
            try:
                session.rollback()
            except Exception as failure:  # noqa: BLE001 -- the function's own error must surface
                text = text_of(failure, repr)
                add_note(error, f"Afterwards the session could not be rolled back: {text}")
            raise
        finally:
            event.remove(session, "after_begin", self._after_begin)
        return result

    def _after_begin(self, _session: Any, _transaction: Any, connection: sa.Connection) -> None:
        self._engines.add(connection.engine)
        engine = root_engine(connection.engine)
        if not event.contains(engine, "handle_error", _record_lost_transaction):
            event.listen(engine, "handle_error", _record_lost_transaction)
        connection.info.pop(_LOST_TRANSACTION, None)


# -- errors that the function has caught -----------------------------------------------------------


def _record_lost_transaction(context: Any) -> None:
    """Record an error that undid a whole transaction on its connection."""
    connection = context.connection
    if connection is None or connection.invalidated or connection.closed:
        return
    error = context.sqlalchemy_exception or context.original_exception
    driver = connection.connection.dbapi_connection
    if dialect_for(connection).loss(error, driver) is Loss.EVERYTHING:
        connection.info[_LOST_TRANSACTION] = error


def _raise_if_lost(connection: sa.Connection) -> None:
    """Before a COMMIT: raise an error that undid the transaction, if the function caught it.

    The MySQL family continues after a deadlock and would commit half of the transaction; others
    commit nothing and raise nothing.
    """
    if connection.invalidated:
        raise ConnectionError("the connection was lost, and the error of that was caught")
    lost = connection.info.pop(_LOST_TRANSACTION, None)
    if lost is not None:
        raise lost
    if dialect_for(connection).commit_is_void(connection):
        raise SessionStateError(
            "A statement failed in this transaction and its error was caught, so its COMMIT would "
            "persist nothing. Let the error pass, or put the statement into a savepoint: "
            "with session.begin_nested(): ..."
        )
