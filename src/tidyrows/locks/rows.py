"""Rows that are locked by a SELECT, with a bound for the wait and a name for whoever has them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.sql.util import find_tables

from tidyrows.arguments import SWITCH, checked, instance_of, number
from tidyrows.dialects import dialect_for
from tidyrows.errors import ArgumentError, LockTimeoutError, NotBoundError, SessionStateError
from tidyrows.greenlets import is_async, spawn, synchronous
from tidyrows.locks.monitor import LockMonitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    from tidyrows.dialects import Dialect

T = TypeVar("T")
_SELECT = instance_of(
    sa.Select, need="a SELECT of SQLAlchemy", example="select(Account).where(Account.id == 1)"
)
_TIMEOUT = number("2.0", least=0.0)


@overload
def locked(
    session: orm.Session | orm.scoped_session[Any] | sa.Connection,
    select: sa.Select[tuple[T]],
    *,
    timeout: float = ...,
    nowait: bool = ...,
    skip_locked: bool = ...,
) -> list[T]: ...


@overload
def locked(
    session: orm.Session | orm.scoped_session[Any] | sa.Connection,
    select: sa.Select[Any],
    *,
    timeout: float = ...,
    nowait: bool = ...,
    skip_locked: bool = ...,
) -> list[Any]: ...


@checked(select=_SELECT, timeout=_TIMEOUT, nowait=SWITCH, skip_locked=SWITCH)
def locked(
    session: orm.Session | orm.scoped_session[Any] | sa.Connection,
    select: sa.Select[Any],
    *,
    timeout: float = 2.0,
    nowait: bool = False,
    skip_locked: bool = False,
) -> list[Any]:
    """The rows of a SELECT, locked until the transaction ends, with a bound for the wait.

    The transaction can be used also after a wait in vain. A Session writes its changes first, and
    objects that it has already get the values that the rows have now. On SQLite, which locks no
    rows, the transaction becomes the one that may write.

    Args:
        session: a Session, scoped_session or Connection; its transaction holds the locks.
        select: which rows; with ``with_for_update(of=..., read=...)`` where these matter.
        timeout: how long to wait for each row, in seconds; whole ones on MySQL and MariaDB.
        nowait: do not wait; on SQLite as ``timeout=0``.
        skip_locked: leave out the rows that others have locked. Not on SQLite.

    Returns:
        Objects or values where the SELECT names one entity or column, else rows.

    Raises:
        LockTimeoutError: a row was not free; the error names the tables, and who has it.
        SessionStateError: the connection is in AUTOCOMMIT, where a lock ends at once.
        NotBoundError: ``session`` is none of these.
        ArgumentError: an argument has a value that it does not take, or the database has no such
            lock.

    Example:
        >>> (account,) = locked(session, select(Account).where(Account.id == 1), timeout=2)
        >>> account.balance -= 10
        >>> session.commit()
    """
    if is_async(session):
        raise SessionStateError(
            f"The {type(session).__name__} of locked() is asynchronous. Write await "
            f"locked_async(session, select)."
        )
    if nowait and skip_locked:
        raise ArgumentError(
            "locked(nowait=True, skip_locked=True): rows that are skipped are not waited for. "
            "Leave one out.",
            argument="nowait",
        )
    user = session() if isinstance(session, orm.scoped_session) else session
    if isinstance(user, orm.Session):
        user.flush()
        connection = user.connection(bind_arguments=_bind_arguments(select))
    elif isinstance(user, sa.Connection):
        connection = user
    else:
        raise NotBoundError(
            f"The locks of locked() belong to a transaction, and this {type(session).__name__} has "
            f"none. Write with Session(engine) as session: locked(session, select)."
        )
    how = {"nowait": nowait, "skip_locked": skip_locked}
    return _locked(user, connection, select, 0.0 if nowait else timeout, how)


@overload
async def locked_async(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
    select: sa.Select[tuple[T]],
    **how: Any,
) -> list[T]: ...


@overload
async def locked_async(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
    select: sa.Select[Any],
    **how: Any,
) -> list[Any]: ...


@checked(locked)
async def locked_async(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
    select: sa.Select[Any],
    **how: Any,
) -> list[Any]:
    """As :func:`locked`, for an AsyncSession, async_scoped_session or AsyncConnection.

    Args:
        session: its transaction holds the locks.
        select: as for ``locked``.
        how: ``timeout``, ``nowait``, ``skip_locked``, as for ``locked``.
    """
    source: Any = synchronous(session) if is_async(session) else session
    if hasattr(source, "registry"):
        source = source()

    def run() -> list[Any]:
        return locked(source, select, **how)

    return await spawn(run)


def _locked(
    user: orm.Session | sa.Connection,
    connection: sa.Connection,
    select: sa.Select[Any],
    timeout: float,
    how: dict[str, bool],
) -> list[Any]:
    dialect = dialect_for(connection)
    dialect.refuse_row_locks(**how)
    tables = _tables(select)
    if dialect.is_autocommit(connection):
        raise SessionStateError(
            "The connection of locked() is in AUTOCOMMIT, so the locks would end with the SELECT. "
            "Give one that has transactions."
        )
    given: Any = select._for_update_arg  # noqa: SLF001 -- it has no public name
    kept: dict[str, Any] = {**how}
    if given is not None:
        kept |= {"of": given.of, "read": given.read, "key_share": given.key_share}
    statement = select.with_for_update(**kept)
    monitor = LockMonitor(connection.engine, dialect)
    until = time.monotonic() + timeout
    try:
        with (
            monitor.watching(connection, None, timeout, lambda: until - time.monotonic()),
            dialect.waiting_for_rows(connection, tables, timeout),
        ):
            result: Any = user.execute(statement, execution_options={"populate_existing": True})
            one = len(select.column_descriptions) == 1
            return list((result.scalars() if one else result).all())
    except (sa.exc.DBAPIError, connection.dialect.loaded_dbapi.Error) as error:
        if dialect.code(error) not in dialect.lock_wait_codes:
            raise
        raise _timeout_error(tables, timeout, monitor, dialect) from error


def _timeout_error(
    tables: Sequence[sa.Table], timeout: float, monitor: LockMonitor, dialect: Dialect
) -> LockTimeoutError:
    names = ", ".join(table.fullname for table in tables)
    blockers = monitor.blockers
    when = f"within {timeout:g} s" if timeout else "at once"
    what = "A row of" if dialect.has_row_locks else "The database of"
    if blockers:
        by = f"Held by {'; by '.join(map(str, blockers))}."
    elif timeout:
        by = f"Nobody knows who holds it{f': {monitor.trouble}' if monitor.trouble else ''}."
    else:
        by = "Who holds it is found out only where it is waited for."
    return LockTimeoutError(
        f"{what} {names} was not free {when}. {by} Wait longer with timeout=, or end that "
        f"transaction.",
        lock=names,
        holders=blockers,
    )


def _tables(select: sa.Select[Any]) -> list[sa.Table]:
    """The tables whose rows are locked; those of subqueries are not."""
    tables = [
        table
        for clause in select.get_final_froms()
        for table in find_tables(clause, include_joins=True, include_aliases=True)
    ]
    named = [getattr(each, "element", each) for each in tables]
    found = list(dict.fromkeys(each for each in named if isinstance(each, sa.Table)))
    if not found:
        raise ArgumentError(
            "The SELECT of locked() names no table. Write select(Account) or "
            "select(accounts).where(...).",
            argument="select",
            value=select,
        )
    return found


def _bind_arguments(select: sa.Select[Any]) -> dict[str, Any]:
    """What leads a session with several databases to that of a SELECT."""
    entity: Any = select.column_descriptions[0].get("entity")  # not of a Table
    mapper = None if entity is None else sa.inspect(entity).mapper
    return {"clause": select} if mapper is None else {"mapper": mapper, "clause": select}
