"""Advisory locks: workers that share a database agree on a name, and no row or table is locked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import UnboundExecutionError

from tidyrows.arguments import SWITCH, checked, name, number
from tidyrows.dialects import LockName, PoolerError, dialect_for
from tidyrows.errors import (
    ArgumentError,
    LockLostError,
    LockTimeoutError,
    NotBoundError,
    SessionStateError,
    UnknownTableError,
    add_note,
)
from tidyrows.greenlets import is_async, spawn, synchronous
from tidyrows.worker import CONTEXT, WorkerContext, session_label

if TYPE_CHECKING:
    from types import TracebackType

    from tidyrows.dialects import HeldLock

_NAME = name("seed-currencies")
_TIMEOUT = number("10.0", least=0.0)
_own: WeakSet[HeldLock] = WeakSet()
"""What this process holds."""


class AdvisoryLock:
    """A lock with a name, held for the length of a ``with`` or ``async with`` block.

    The block gets True where the lock is held. It may be entered more than once.
    """

    def __init__(
        self, bind: Any, name: str, timeout: float | None, context: WorkerContext, **how: bool
    ) -> None:
        self._is_async = is_async(bind)
        self._engine = engine_of(bind)
        self._timeout = timeout
        self._name = LockName(name, label=session_label(context), **how)
        self._held: list[HeldLock] = []

    def __repr__(self) -> str:
        kind = "shared, " if self._name.shared else ""
        return f"advisory_lock({self._name.text!r}, {kind}{'held' if self._held else 'not held'})"

    def __enter__(self) -> bool:
        if self._is_async:
            raise SessionStateError(
                f"The engine of advisory_lock({self._name.text!r}) is asynchronous. Write async "
                f"with advisory_lock(engine, {self._name.text!r}): ..."
            )
        return self._acquire()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        self._release(error)

    async def __aenter__(self) -> bool:
        return await spawn(self._acquire)

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        await spawn(self._release, error)

    def _acquire(self) -> bool:
        dialect = dialect_for(self._engine)
        held = dialect.advisory_lock(self._engine, self._name)
        try:
            holders = held.acquire(self._timeout or 0.0)
        except sa.exc.DBAPIError as error:
            dialect.explain_first_connection(error, self._engine)
            raise
        except PoolerError as error:
            raise ArgumentError(
                f"{error} Leave session=True away: the lock is then a transaction's, which a "
                f"pooler leaves alone.",
                argument="session",
                value=True,
            ) from None
        if holders is None:
            self._held.append(held)
            _own.add(held)
            return True
        if self._timeout is None:
            return False
        mine = {each.server_id for each in _own if each.name.text == self._name.text}
        parts = [
            f"The advisory lock {self._name.text!r} was not free within {self._timeout:g} s.",
            f"It is held by {'; by '.join(map(str, holders))}." if holders else "It is free now.",
        ]
        if not mine.isdisjoint(each.pid for each in holders):
            parts.append("This process holds it itself: leave that block first.")
        else:
            parts.append("Wait longer with timeout=, or end what holds it.")
        raise LockTimeoutError(" ".join(parts), lock=self._name.text, holders=tuple(holders))

    def _release(self, error: BaseException | None) -> None:
        if not self._held or self._held.pop().release():
            return
        lost = (
            f"The advisory lock {self._name.text!r} was lost inside its block, since its "
            f"connection or file is gone: another worker may have had it too. Repeat what the "
            f"block did, and find out what ended the connection."
        )
        if error is None:
            raise LockLostError(lost, lock=self._name.text)
        add_note(error, f"tidyrows: {lost}")


@checked(name=_NAME, timeout=_TIMEOUT, shared=SWITCH, session=SWITCH, context=CONTEXT)
def advisory_lock(
    bind: Any,
    name: str,
    *,
    timeout: float = 10.0,
    shared: bool = False,
    session: bool = False,
    context: WorkerContext | None = None,
) -> AdvisoryLock:
    """Hold a lock by name while a block runs; all processes on the database see it.

    The lock has a connection of its own, from the engine's pool, so that no COMMIT or ROLLBACK of
    the block ends it. On SQLite it is a locked file beside the database.

    Args:
        bind: an Engine, or what leads to one: a Connection, Session, sessionmaker, scoped_session,
            or an asynchronous one of these.
        name: any text; a name is known in one database (on MySQL and MariaDB, one server's).
        timeout: how long to wait, in seconds.
        shared: several may hold it at once (32 on MySQL and MariaDB), unless one holds it alone.
        session: on PostgreSQL, leave no transaction open meanwhile. Such a lock belongs to the
            connection to the server, and is refused behind a pooler such as PgBouncer.
        context: who asks, for the message of those who wait.

    Raises:
        LockTimeoutError: it was not free in time; the error names who holds it.
        LockLostError: at the end of the block, if its connection had been lost.
        NotBoundError: ``bind`` leads to no database, or to several.
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> with advisory_lock(engine, "seed-currencies", timeout=10):
        ...     seed_currencies()
    """
    where = context or WorkerContext.current()
    return AdvisoryLock(bind, name, timeout, where, shared=shared, session=session)


@checked(name=_NAME, shared=SWITCH, session=SWITCH, context=CONTEXT)
def try_advisory_lock(
    bind: Any,
    name: str,
    *,
    shared: bool = False,
    session: bool = False,
    context: WorkerContext | None = None,
) -> AdvisoryLock:
    """As :func:`advisory_lock`, without a wait: the block gets whether the lock is held.

    Example:
        >>> with try_advisory_lock(engine, "rebuild-index") as held:
        ...     if held:
        ...         rebuild_index()
    """
    where = context or WorkerContext.current()
    return AdvisoryLock(bind, name, None, where, shared=shared, session=session)


class LockManager:
    """The advisory locks of the commonest cases, on one database.

    Args:
        bind: as for :func:`advisory_lock`.
        timeout: how long each lock is waited for, in seconds.
        context: as for :func:`advisory_lock`.

    Example:
        >>> locks = LockManager(engine)
        >>> with locks.creating(Currency):
        ...     session.merge(Currency(code="EUR"))
        ...     session.commit()
    """

    @checked(timeout=_TIMEOUT, context=CONTEXT)
    def __init__(
        self, bind: Any, *, timeout: float = 10.0, context: WorkerContext | None = None
    ) -> None:
        engine_of(bind)  # refused at once
        self._bind = bind
        self._timeout = timeout
        self._context = context

    def lock(self, name: str, *, shared: bool = False) -> AdvisoryLock:
        """A lock by name."""
        return advisory_lock(
            self._bind, name, timeout=self._timeout, shared=shared, context=self._context
        )

    def creating(self, model: Any) -> AdvisoryLock:
        """For rows of a model or table that exist once for all workers: alone in the block."""
        return self.lock(_table_lock(model))

    def reading(self, model: Any) -> AdvisoryLock:
        """For those who need these rows as they are: together, while nobody is ``creating``."""
        return self.lock(_table_lock(model), shared=True)


def _table_lock(model: Any) -> str:
    table = sa.inspect(model, raiseerr=False)
    table = getattr(table, "local_table", table)
    if not isinstance(table, sa.Table):
        raise UnknownTableError(
            f"{model!r} is neither a mapped class nor a Table. Write locks.creating(User), or "
            f"locks.lock('a name').",
            table=model,
        )
    return f"rows of {table.fullname}"


def engine_of(bind: Any, call: str = "An advisory lock") -> sa.Engine:
    """The engine that a bind leads to.

    Raises:
        NotBoundError: it leads to none, or to several.
    """
    source = synchronous(bind) if is_async(bind) else bind
    if isinstance(source, orm.scoped_session) or hasattr(source, "registry"):
        source = source()
    if isinstance(getattr(source, "kw", None), dict):
        source = source.kw.get("bind")
    try:
        source = source.get_bind() if isinstance(source, orm.Session) else source
    except UnboundExecutionError:
        source = None
    if isinstance(source, (sa.Engine, sa.Connection)):
        return source.engine
    raise NotBoundError(
        f"{call} needs one database, and this {type(bind).__name__} does not lead to one. Give an "
        f"Engine, as in advisory_lock(engine, 'a name')."
    )
