"""The sessions of a tracker, and connections that see names as they do."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import UnboundExecutionError

from tidyrows.capture.changes import INTERNAL
from tidyrows.capture.engine import root_engine
from tidyrows.dialects import Fault, dialect_for
from tidyrows.errors import (
    NoPrimaryKeyError,
    NotBoundError,
    SessionStateError,
    UnknownTableError,
)
from tidyrows.greenlets import in_greenlet
from tidyrows.retry import RetryPolicy
from tidyrows.tracking.binding import listen_to_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from sqlalchemy import orm

    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.binding import Binding, Engines


T = TypeVar("T")


class Exclusive:
    """A block in which no other task uses a session.

    A hook that is a coroutine runs inside of such a block and may enter it again, in tasks too:
    :meth:`lend` lets them, one after the other, until the hook has ended.
    """

    _entered: ContextVar[tuple[Exclusive, ...]] = ContextVar("tidyrows_exclusive", default=())

    def __init__(self, lock: asyncio.Lock) -> None:
        self.lock = lock  # the session's
        self.inner = asyncio.Lock()  # for blocks of a hook; held here except while it is lent
        self.is_lent = False
        self.is_over = False
        self._held = lock  # the session's, or the inner one of an outer block

    async def __aenter__(self) -> None:
        for outer in reversed(self._entered.get()):
            if outer.lock is self.lock and not outer.is_over:
                await outer.inner.acquire()
                if not outer.is_over:  # else it has ended while this task waited
                    self._held = outer.inner
                    break
                outer.inner.release()
        else:
            await self.lock.acquire()
        await self.inner.acquire()
        self._token = self._entered.set((*self._entered.get(), self))

    async def __aexit__(self, *_error: object) -> None:
        self._entered.reset(self._token)
        self.is_over = True
        if not self.is_lent:  # else this task was cancelled, and another one has it
            self.inner.release()
        self._held.release()

    @classmethod
    async def lend(cls, awaitable: Awaitable[T]) -> T:
        """Await, in the innermost block of this context, which its result may enter again."""
        block = next(reversed(cls._entered.get()), None)
        if block is None or block.is_lent or block.is_over:  # not this task's own
            return await awaitable
        block.is_lent = True
        block.inner.release()
        try:
            return await awaitable
        finally:
            await block.inner.acquire()
            block.is_lent = False


class Sessions:
    """The session of each thread: the caller's, or one that is opened and closed here.

    Attributes:
        opened: the sessions that were opened here, by thread.
        patience: the seconds that a connection of :meth:`new_connection` may take in all.
        incarnations: of each table that the user named, when it was named last.
    """

    def __init__(self, binding: Binding, engines: Engines) -> None:
        self.binding = binding
        self.engines = engines
        self.opened: dict[int, orm.Session] = {}
        self.patience = RetryPolicy.deadline
        self.incarnations: weakref.WeakKeyDictionary[KeyedTable, str | None]
        self.incarnations = weakref.WeakKeyDictionary()
        self._callers_transaction: orm.SessionTransaction | None = None
        self._watched: weakref.WeakSet[orm.Session] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self._block = object()  # another one in each block
        self._locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]
        self._locks = weakref.WeakKeyDictionary()

    def begin(self) -> None:
        """A block begins: listen; a transaction that is open now is the caller's to end."""
        self._block = object()
        self.engines.refuse_known()
        session = self.binding.callers_session()
        if session is not None:
            self._callers_transaction = session.get_transaction()
        self._undo = self.binding.listen(self.engines)

    def stop_listening(self) -> None:
        """Listen no more."""
        self._block = object()
        while self._undo:
            self._undo.pop()()
        self._watched.clear()

    def forget_parent(self) -> None:
        """In a forked child: what is open is the parent's."""
        self.opened.clear()
        self._watched.clear()
        self._undo = []

    def watch(self, session: orm.Session) -> None:
        """Own what this session writes too, whatever it is bound to."""
        if session in self._watched:
            return
        self._watched.add(session)
        bound = self.binding.bind
        heard = root_engine(bound) if isinstance(bound, sa.Engine) else None
        self._undo.append(listen_to_session(session, self.engines, heard))

    def open(self) -> orm.Session:
        """This thread's session."""
        session = self.binding.open_session()
        if self.binding.owns_session:
            self.opened[threading.get_ident()] = session
        return session

    def release(self) -> None:
        """End what is open, so that a cleanup need not wait for its locks."""
        while self.opened:
            _thread, own = self.opened.popitem()
            try:
                own.close()
            except sa.exc.DBAPIError:  # its connection is dead, and so is its transaction
                own.invalidate()
        session = self.binding.callers_session()
        if session is not None and session.in_transaction():
            if session.get_transaction() is self._callers_transaction:
                raise SessionStateError(
                    f"The session {session!r} is in a transaction that began before the block, so "
                    f"it is yours to end. Write session.commit() or session.rollback() before the "
                    f"block ends, then call cleanup() again; all rows stay tracked."
                )
            try:
                session.rollback()
            except sa.exc.DBAPIError as error:
                if self.engines.fault(error) is not Fault.LOST:
                    raise
                session.rollback()  # the connection is known to be dead by now

    # -- asynchronous --------------------------------------------------------------------------

    def refuse_blocking(self, write: str) -> None:
        """Raise where a task would have to block on the database."""
        if self.binding.is_async and not in_greenlet():
            if write.endswith("(...)"):
                write = f"await tracker.run_sync(lambda tracker: tracker.{write})"
            raise SessionStateError(
                f"This tracker is bound to something that is asynchronous, and a "
                f"synchronous call cannot wait for it. Write {write}."
            )

    def exclusive(self) -> Exclusive:
        """For ``async with``: in the block no other task uses the session.

        A hook that is a coroutine asks for this inside of its factory's block, and gets it.
        """
        loop = asyncio.get_running_loop()
        lock = self._locks.get(loop)
        if lock is None:
            lock = self._locks[loop] = asyncio.Lock()
        return Exclusive(lock)

    # -- connections ---------------------------------------------------------------------------

    def _callers(self) -> orm.Session | None:
        return None if self.binding.owns_session else self.binding.open_session()

    @contextmanager
    def new_connection(
        self, table: sa.Table, session: orm.Session | None = None
    ) -> Iterator[sa.Connection]:
        """A connection of its own, which sees what is committed."""
        session = session or self._callers()
        bind: sa.Engine | sa.Connection | None = None
        if session is not None:
            with suppress(UnboundExecutionError):
                bind = session.get_bind(clause=table)
        if bind is None:
            bind = self.binding.source()
        if bind is None:
            raise NotBoundError(
                f"The tracker's session has no engine to look {table.fullname} up on. Use "
                f"ResourceTracker(engine) for the engine that has it."
            )
        translate = bind.get_execution_options().get("schema_translate_map")
        dialect, options = dialect_for(bind.engine), {INTERNAL: True}
        with dialect.looking(bind.engine, self.patience, **options) as connection:
            if translate is not None:
                connection.execution_options(schema_translate_map=translate)
            yield connection

    def real_table(self, table: sa.Table, near: orm.Session | None = None) -> KeyedTable:
        """The real table, named as a session names it: on its connection if in a transaction.

        Outside of a transaction the database is asked once in each block.
        """
        refuse_keyless(table)
        session = near or self._callers()
        if session is not None and session.in_transaction():
            return self.real_table_on(session.connection(bind_arguments={"clause": table}), table)
        with self.new_connection(table, session) as connection:
            translate = connection.get_execution_options().get("schema_translate_map") or {}
            place = table, translate.get(table.schema, table.schema)
            known = self.engines.capture(connection.engine).tables.named(connection, self._block)
            if place not in known:
                known[place] = self.real_table_on(connection, table)
            return known[place]

    def real_table_on(self, connection: sa.Connection, table: sa.Table) -> KeyedTable:
        """The real table that a name means on this connection."""
        capture = self.engines.capture(connection.engine)
        translate = connection.get_execution_options().get("schema_translate_map") or {}
        schema = translate.get(table.schema, table.schema)
        real = capture.dialect.resolve(connection, schema, table.name)
        if real is None:
            raise UnknownTableError(
                f"The database {capture.database} has no table {table.fullname}. Create it "
                f"(metadata.create_all(engine)), or bind the tracker to the database that has it.",
                table=table,
            )
        self.engines.refuse_known()
        self.engines.refuse_places(capture.dialect.places_of_schema(connection, real.schema))
        keyed = capture.tables.keyed(connection, table, real)
        self.incarnations[keyed] = real.incarnation
        return keyed


def refuse_keyless(table: sa.Table) -> None:
    """Raise if no row of a table can be named."""
    if not table.primary_key.columns:
        raise NoPrimaryKeyError(
            f"The table {table.fullname} has no primary key, so no row of it can be named. Delete "
            f"its rows yourself, or give it a primary key.",
            table=table.fullname,
        )
