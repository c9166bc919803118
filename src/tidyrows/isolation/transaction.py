"""Level ``transaction``: all that a test writes is in one transaction, which is rolled back.

The test gets an engine whose connections are all one connection of the driver. See
:class:`~tidyrows.isolation.outer.OuterTransaction` for what becomes of their transactions.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.capture.changes import ROLLED_BACK
from tidyrows.capture.connections import driver_of
from tidyrows.capture.engine import root_engine
from tidyrows.dialects import database_name, dialect_for, inner_dialect
from tidyrows.dialects.bounds import checkout_within
from tidyrows.errors import IsolationError
from tidyrows.isolation.levels import Level
from tidyrows.isolation.outer import BOUND, OuterTransaction
from tidyrows.isolation.outside_commits import OutsideCommits
from tidyrows.isolation.stand_in import StandIn, StandInPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.dialects import Dialect
    from tidyrows.isolation.levels import Wanted


def inner_engine(engine: sa.Engine) -> sa.Engine:
    """An engine over a :class:`StandInPool`, for one test after another."""
    dialect = inner_dialect(engine)
    given = engine.get_execution_options()
    begun = dialect_for(engine).transaction_options
    options = {name: value for name, value in given.items() if name not in begun}
    inner = sa.Engine(
        StandInPool(dialect),
        dialect,
        engine.url,
        hide_parameters=engine.hide_parameters,
        execution_options={**options, ROLLED_BACK: True},
    )
    event.listen(inner, "before_cursor_execute", _before_cursor_execute, retval=True)
    event.listen(inner, "after_cursor_execute", _after_cursor_execute)
    event.listen(inner, "handle_error", _handle_error)
    event.listen(inner, "commit", _before_commit)  # before capture hears of it
    event.listen(inner, "rollback", _before_rollback)
    event.listen(inner, "engine_connect", partial(_number_savepoints, itertools.count(1)))
    event.listen(inner, "begin_twophase", _refuse_twophase)
    event.listen(inner, "set_connection_execution_options", _refuse_options)
    event.listen(inner, "set_engine_execution_options", _refuse_options)
    event.listen(inner, "invalidate", _invalidate)
    return inner


def _before_cursor_execute(
    connection: sa.Connection, _cursor: Any, sql: str, parameters: Any, _context: Any, _many: Any
) -> tuple[str, Any]:
    user = driver_of(connection)
    return user.outer.before(user, sql), parameters


def _after_cursor_execute(
    connection: sa.Connection, _cursor: Any, _sql: str, _parameters: Any, _context: Any, _many: Any
) -> None:
    driver_of(connection).outer.after()


def _before_commit(connection: sa.Connection) -> None:
    user = driver_of(connection)
    user.outer.before_commit(user)


def _before_rollback(connection: sa.Connection) -> None:
    if not (connection.closed or connection.invalidated):
        driver_of(connection).outer.verify()


def _number_savepoints(numbers: Iterator[int], connection: sa.Connection) -> None:
    """Each connection counts from one, and here all of them are in one transaction."""
    connection._Connection__savepoint_seq = 1000 * next(numbers)  # type: ignore[attr-defined]  # noqa: SLF001 -- no public name


def _handle_error(context: Any) -> None:
    connection = context.connection
    if connection is None or connection.invalidated or connection.closed or context.is_disconnect:
        return
    user = driver_of(connection)
    user.outer.saw_error(user, context.original_exception)


def _invalidate(user: Any, _record: Any, error: BaseException | None) -> None:
    if isinstance(user, StandIn) and error is not None:  # else by connection.invalidate()
        user.outer.lost(error)


def _refuse_twophase(_connection: sa.Connection, _xid: Any) -> NoReturn:
    raise IsolationError(
        "Level 'transaction' has no transactions in two phases: what is prepared outlives the one "
        "in which the test runs. Write isolate(engine, 'worker').",
        level="transaction",
    )


def _refuse_options(bind: sa.Engine | sa.Connection, options: dict[str, Any]) -> None:
    for name in sorted(dialect_for(bind).transaction_options & options.keys()):
        raise IsolationError(
            f"{name}={options[name]!r} is asked for in a block of isolate(engine, 'transaction'), "
            f"whose transaction has begun already. Set it on the engine that isolate() is given, "
            f"or write isolate(engine, 'worker').",
            level="transaction",
        )


def _refuse_another_loop(connection: sa.Connection) -> None:
    raw: Any = connection.connection.driver_connection
    loop = getattr(raw, "_loop", None)  # of asyncpg, aiomysql and asyncmy; no public name
    if loop is not None and loop is not asyncio.get_running_loop():
        fairy: Any = connection.connection
        fairy._close_special(transaction_reset=True)  # noqa: SLF001 -- nothing can be sent from here
        raise IsolationError(
            "The pool of the engine has connections of another event loop, which no driver can use "
            "in this one. Give each loop an engine of its own, end each loop with await "
            "engine.dispose(), or write create_async_engine(url, poolclass=NullPool).",
            level="transaction",
        )


# Kept for the life of the suite's engine: what SQLAlchemy and tidyrows compile and learn belongs
# to an engine.
_idle: WeakKeyDictionary[sa.Engine, list[sa.Engine]] = WeakKeyDictionary()


class TransactionLevel(Level):
    """One transaction, rolled back at the end."""

    name = "transaction"
    is_visible = False
    undoes_rows = True

    def __init__(self, engine: sa.Engine, wanted: Wanted) -> None:
        super().__init__(engine, wanted)
        self._inner: sa.Engine | None = None
        self._outside: OutsideCommits | None = None

    def open(self) -> sa.Engine:
        """Begin the transaction, on a connection of the suite's engine.

        Raises:
            IsolationError: the engine is in AUTOCOMMIT, or its database is locked.
        """
        outer = self._begin()
        kept = _idle.setdefault(root_engine(self.engine), [])
        inner = self._inner = kept.pop() if kept else inner_engine(self.engine)
        pool: Any = inner.pool
        pool.open(outer)
        self._outside = OutsideCommits.of(self.engine)
        return inner

    def _begin(self) -> OuterTransaction:
        dialect = dialect_for(self.engine)
        if dialect.has_server:
            connection = checkout_within(self.engine, BOUND)
        else:
            connection = self.engine.connect()
        try:
            if self.engine.dialect.is_async:
                _refuse_another_loop(connection)
            self._refuse_unusable(dialect, connection)
            return OuterTransaction(connection, dialect)
        except self.engine.dialect.loaded_dbapi.Error as error:
            blockers = (
                []
                if dialect.blockers_need_cursor
                else dialect.blockers(None, dialect.waiter(connection))
            )
            held = f", held by {'; '.join(map(str, blockers))}" if blockers else ""
            connection.close()
            raise IsolationError(
                f"The transaction of isolate(engine, 'transaction') could not begin on "
                f"{database_name(self.engine)}: {error}{held}. End what holds it, or write "
                f"isolate(engine, 'worker').",
                level=self.name,
            ) from error
        except BaseException:
            connection.close()
            raise

    def _refuse_unusable(self, dialect: Dialect, connection: sa.Connection) -> None:
        if dialect.is_autocommit(connection):
            raise IsolationError(
                "The engine is in AUTOCOMMIT, where every statement commits, so nothing can be "
                "rolled back. Give isolate() an engine without it, or write isolate(engine, "
                "'worker').",
                level=self.name,
            )
        if dialect.is_begun(connection.connection.dbapi_connection):
            raise IsolationError(
                f"The connection to {database_name(self.engine)} has a transaction open, so no "
                f"other can begin on it; all users of sqlite:// share one. Commit or roll back the "
                f"session or connection that has it, before isolate().",
                level=self.name,
            )

    def close(self) -> None:
        """Roll it back.

        Raises:
            IsolationError: something was committed, also by the suite's own engine, or could not
                be isolated.
        """
        inner, self._inner = self._inner, None
        if inner is None:
            return
        pool: Any = inner.pool
        outer: OuterTransaction = pool.shut()
        _idle.setdefault(root_engine(self.engine), []).append(inner)
        committed = self._outside.stop() if self._outside is not None else ""
        outer.end()
        if committed:
            raise IsolationError(
                f"The suite's own engine has committed within isolate(engine, 'transaction'), and "
                f"that is not rolled back: {committed}. Delete what is left, and write through "
                f"db.engine or db.session() there; or write isolate(engine, 'worker').",
                level=self.name,
            )
