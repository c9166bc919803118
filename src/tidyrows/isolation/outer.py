"""One connection that several users have at once: their transactions are savepoints of one.

Each :class:`~tidyrows.isolation.parts.Part` begins at a savepoint and belongs to one inner
transaction, so a ROLLBACK undoes its own parts only, or is refused where that cannot be. An inner
transaction that only reads has no part.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from tidyrows.dialects import DriverSocket, Fault, Loss
from tidyrows.errors import IsolationError
from tidyrows.greenlets import in_greenlet
from tidyrows.isolation.parts import Part, Parts, reason, short
from tidyrows.isolation.turns import Turns, running_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from tidyrows.dialects import Dialect
    from tidyrows.isolation.stand_in import StandIn

BOUND = 10.0
"""Seconds for which the end of a test waits for the server."""
_INFO = "tidyrows_inner_info"
_UNSEEN = "a statement past SQLAlchemy"
_MIXED = (
    "cannot roll back {!r} alone: another session or connection has written since, {!r}, and that "
    "would be undone too. Two transactions that write at the same time are one here. End the first "
    "before the second begins, or write isolate(engine, 'worker')."
)
_numbers = itertools.count(1)


class OuterTransaction:
    """The one real transaction, which :meth:`end` rolls back.

    Attributes:
        driver: the DBAPI's connection.
        info: what SQLAlchemy's ``Connection.info`` is in the block, and in the next one.
        failure: what broke the isolation of this test; every later use raises it too.
    """

    def __init__(self, connection: sa.Connection, dialect: Dialect) -> None:
        self._connection = connection
        self._dialect = dialect
        self.driver: Any = connection.connection.dbapi_connection
        self.info: dict[Any, Any] = connection.info.setdefault(_INFO, {})
        self._loop = asyncio.get_running_loop() if connection.dialect.is_async else None
        self.turns = Turns(in_tasks=self._loop is not None)
        self._prefix, self._count = f"tidyrows_{next(_numbers)}_", 0
        self._base = f"{self._prefix}0"
        self._parts = Parts()
        self._commits = 0
        self._failed: StandIn | None = None  # with a statement since its last rollback
        self._is_over = self._is_begun = self._is_gone = self._changes_session = False
        self.close_sends = dialect.close_sends
        self._mark: str | None = None  # a savepoint before what may have ended the transaction
        self._last = "its beginning"
        self.failure: IsolationError | None = None
        self._begin()
        self._deferred = dialect.deferred_before(self.driver)

    def _begin(self) -> None:
        self._dialect.begin_outer(self.driver)
        self._dialect.send(self.driver, [f"SAVEPOINT {self._base}"])
        self._is_begun = True

    # -- what users do ------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise where the connection cannot be used (any more), or not from here."""
        if self._is_over:
            raise IsolationError(
                "A session or connection of a block that has ended is used: the transaction of "
                "isolate(engine, 'transaction') is rolled back. Use and close it in the block.",
                level="transaction",
            )
        if self.failure is not None:
            raise self.failure
        if self._loop is not None and self._loop is not running_loop():
            raise self._error(
                "is used from another event loop than the one that opened the block, and no driver "
                "can do that. Open the block in the loop of the test: give the fixture the test's "
                "loop scope, and call the application through httpx.AsyncClient(transport="
                "ASGITransport(app)) instead of a thread with a loop of its own."
            )

    def before(self, user: StandIn, sql: str) -> str:
        """SQLAlchemy is about to send a statement; returns what is sent instead.

        Others wait until :meth:`after`, or :meth:`saw_error`.
        """
        self.check_usable()
        with self._turn(sql):
            return self._before(user, sql)

    def after(self) -> None:
        """The answer to the statement has come."""
        self.turns.give()

    def asking(self) -> AbstractContextManager[None]:
        """For a question within a statement, or between two."""
        return self._turn("a question of tidyrows", kept=self.turns.is_mine)

    @contextmanager
    def _turn(self, sql: str, *, kept: bool = True) -> Iterator[None]:
        if not self.turns.take(sql):
            raise self._error(
                f"still runs {short(self.turns.sql)!r} of another task or thread, and one "
                f"connection sends one statement at a time."
            )
        try:
            yield
        except BaseException:
            kept = False
            raise
        finally:
            if not kept:
                self.turns.give()

    def _before(self, user: StandIn, sql: str) -> str:
        if user.is_undone:
            raise self._error(
                "takes no statement of this session or connection before its rollback(): an "
                "earlier one has failed."
            )
        self._verify()
        effect = self._dialect.effect(sql)
        if effect.begins and not self._parts.open_of(user):
            return "SELECT 1"  # of a begin listener
        if effect.ends or effect.begins:
            self._fail(
                f"cannot send {short(sql)!r}: that would end the one transaction in which the "
                f"test runs, and commit what it wrote. Nothing was sent. Commit by "
                f"session.commit() or connection.commit(); for DDL that commits write "
                f"isolate(engine, 'worker')."
            )
        if effect.savepoint is not None:
            return self._at_savepoint(user, sql, *effect.savepoint)
        if not effect.reads:
            self._last = sql
            self._changes_session |= effect.changes_session
        self._enter(user, sql, writes=not effect.reads)
        if not effect.is_quiet:
            self._set_mark()
        return sql

    def _at_savepoint(self, user: StandIn, sql: str, verb: str, name: str) -> str:
        """A savepoint of the user's own; returns what is sent."""
        if verb == "SAVEPOINT":
            self._enter(user, sql, needs_part=True).names.append(name)
            return sql
        here = self._parts.with_savepoint(user, name)
        if here is None:
            return sql  # the database says so
        later = self._parts.later_than(here)
        if verb == "RELEASE":
            del here.names[here.names.index(name) :]
            return "SELECT 1" if later else sql  # theirs would go with it
        if later:
            self._fail(_MIXED.format(short(sql), short(later[0].sql)))
        self._parts.cut(here, kept=True)
        if self._failed is user:
            self._failed = None
        return sql

    def before_unseen(self, user: StandIn) -> None:
        """The driver's connection is used past SQLAlchemy; a savepoint of its own may be open."""
        self.check_usable()
        with self._turn(_UNSEEN, kept=False):
            if self._mark is None or self._last != _UNSEEN or not self._parts.top_of(user):
                self._verify()
                self._last = _UNSEEN
                self._enter(user, _UNSEEN, writes=True)
                self._set_mark()

    def _set_mark(self) -> None:
        self._connection.info.pop(_INFO, None)  # its names may mean something else in the next one
        self._count += 1
        mark = f"{self._prefix}{self._count}"
        self._send([f"SAVEPOINT {mark}"])
        self._mark = mark

    def verify(self) -> None:
        """Raise where a statement since the last call has ended the transaction."""
        if self._mark is not None:
            with self._turn("RELEASE", kept=False):
                self._verify()

    def _verify(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None and self.failure is None and not self._is_aborted():
            self._send([f"RELEASE SAVEPOINT {mark}"])

    def _enter(
        self, user: StandIn, sql: str, *, writes: bool = False, needs_part: bool = False
    ) -> Any:
        """Let the next statement stand in a part of this user."""
        if not self._is_begun:
            self._begin()
        if self._failed is not None:
            self._part_from_failed(user)
        top, own = self._parts.top, self._parts.top_of(user)
        if own is not None:
            own.wrote |= writes
        elif top is not None or writes or needs_part:
            name = self._base
            if top is not None:
                self._count += 1
                name = f"{self._prefix}{self._count}"
                self._send([f"SAVEPOINT {name}"])
            self._parts.all.append(Part(user, name, sql, writes))
        user.in_inner_transaction |= writes
        return self._parts.top

    def _part_from_failed(self, user: StandIn) -> None:
        """Where a statement of another one has failed, that must not make this user's fail."""
        failed = self._failed
        if failed is None or failed is user or not self._is_aborted():
            return
        self._undo(failed)
        failed.is_undone = True

    def before_commit(self, user: StandIn) -> None:
        """Before anybody hears of the COMMIT: raise where there is nothing left to commit."""
        if self._is_over and user.in_inner_transaction:
            self.check_usable()
        if not self._is_over:
            self.check_usable()
            self.verify()

    def commit(self, user: StandIn) -> None:
        """COMMIT of an inner transaction."""
        if self._is_over and user.in_inner_transaction:
            self.check_usable()
        if not self._may_have_work(user):
            return
        self.check_usable()
        with self._turn("COMMIT", kept=False):
            self._verify()
            if self._has_work(user):
                self._commit(user)

    def _commit(self, user: StandIn) -> None:
        self._part_from_failed(user)
        if self._is_aborted():
            self._undo(user)  # as the server does it
            return
        if self._deferred is not None:
            try:
                self._dialect.check_deferred(self.driver, self._deferred, at_end=False)
            except BaseException:
                self._undo(user)
                raise
        self._commits += 1
        user.in_inner_transaction = False
        for part in self._parts.open_of(user):
            part.committed = True
        self._settle()

    def rollback(self, user: StandIn) -> None:
        """ROLLBACK of an inner transaction."""
        if self._may_have_work(user):
            self.check_usable()
            with self._turn("ROLLBACK", kept=False):
                self._verify()
                if self._has_work(user):
                    failed = self._failed if self._is_aborted() else user
                    self._undo(user)
                    if failed is not None and failed is not user and self._parts.open_of(failed):
                        self._undo(failed)  # else this ROLLBACK would mend it
                        failed.is_undone = True
        user.in_inner_transaction = user.is_undone = False
        if self._failed is user:
            self._failed = None

    def _undo(self, user: StandIn) -> None:
        own = self._parts.open_of(user)
        if not own:  # a read has failed
            self._send([f"ROLLBACK TO SAVEPOINT {self._base}"])
        elif any(part.wrote for part in own) or self._is_aborted():
            self._undo_from(own[0])
        else:
            self._parts.forget_open(user)
        user.in_inner_transaction = False
        if self._failed is user:
            self._failed = None
        self._settle()

    def _undo_from(self, first: Part) -> None:
        later = self._parts.later_than(first)
        if later:
            self._fail(_MIXED.format(short(first.sql), short(later[0].sql)))
        self._send([f"ROLLBACK TO SAVEPOINT {first.savepoint}"])
        self._parts.cut(first)

    def _settle(self) -> None:
        """Begin anew where all that was written is committed."""
        if self._parts.are_settled:
            if any(part.committed for part in self._parts.all):
                self._send(self._dialect.move_savepoint(self._base))
            self._parts.all.clear()

    def _may_have_work(self, user: StandIn) -> bool:
        """Without a question to the database."""
        if self._is_over or self.failure is not None or user.is_undone or not self._is_begun:
            return False
        if self._loop is not None and not in_greenlet():
            return False  # it is garbage, and nothing can be sent; the end undoes it
        return bool(self._parts.open_of(user)) or self._failed is user

    def _has_work(self, user: StandIn) -> bool:
        return bool(self._parts.open_of(user)) or (self._failed is user and self._is_aborted())

    def _is_aborted(self) -> bool:
        return self._dialect.is_aborted(self.driver, after_error=self._failed is not None)

    # -- what the database does ------------------------------------------------------------------

    def saw_error(self, user: StandIn, error: BaseException) -> None:
        """A statement has failed."""
        self.turns.give()
        if isinstance(error, IsolationError):
            return
        self._failed = user
        if not self._is_begun or self._dialect.loss(error, self.driver) is not Loss.EVERYTHING:
            return
        others = any(part.wrote and part.user is not user for part in self._parts.all)
        self._is_begun, self._failed = False, None
        for part in self._parts.all:
            part.user.in_inner_transaction = False
        self._parts.all.clear()
        if self._commits or others:
            self.failure = self.failure or self._error(
                f"was rolled back by the database as a whole, {reason(error)}, with what the test "
                f"had committed before. Write isolate(engine, 'worker') for a test in which that "
                f"happens."
            )

    def lost(self, error: BaseException) -> None:
        """The connection is broken, so the server rolls everything back."""
        self.turns.give()
        if isinstance(error, IsolationError):
            return
        self._is_gone = True
        self.failure = self.failure or self._error(
            f"is lost with its connection, {reason(error)}: all that the test wrote is rolled "
            f"back. Write isolate(engine, 'worker') for a test in which connections break."
        )

    def _send(self, statements: list[str]) -> None:
        try:
            self._dialect.send(self.driver, statements)
        except self._connection.dialect.loaded_dbapi.Error as error:
            if self._dialect.code(error) not in self._dialect.savepoint_gone_codes:
                raise
            self.failure = self._error(
                f"was ended behind its back: its savepoint is gone after {short(self._last)!r}. "
                f"What the test wrote before may be committed. That is done by COMMIT, ROLLBACK or "
                f"DDL in a procedure or past SQLAlchemy, and by executescript(). Write "
                f"isolate(engine, 'worker') for such a test.",
                escaped=True,
            )
            raise self.failure from error

    def _error(self, why: str, **more: Any) -> IsolationError:
        text = f"The transaction of isolate(engine, 'transaction') {why}"
        return IsolationError(text, level="transaction", **more)

    def _fail(self, why: str) -> NoReturn:
        self.failure = self._error(why)
        raise self.failure

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """Roll everything back, and give the connection back to the suite's engine.

        Raises:
            IsolationError: the isolation was broken, now or before; or rows that the test has
                committed violate a constraint that waits for the COMMIT.
        """
        connection = self._connection
        wire = DriverSocket(self.driver) if self._dialect.has_server else None
        if self.turns.is_others and not self._is_gone:
            self._is_gone = True
            self.failure = self.failure or self._error(
                f"still runs {short(self.turns.sql)!r} of another task or thread at the end of "
                f"the block. Its connection was closed, upon which the server rolls all back. "
                f"Await the task, or join the thread, in the block."
            )
            if wire is not None:
                wire.shut()
        try:
            with nullcontext() if wire is None else wire.bounded(BOUND):
                if not self._is_gone:
                    self._end()
        except Exception as error:  # noqa: BLE001 -- it becomes an IsolationError, or the server knows
            self._is_gone = True
            if self._dialect.fault(error) is not Fault.LOST or (wire and wire.was_shut):
                self.failure = self.failure or self._error(
                    f"could not be rolled back, {reason(error)}. Its connection was closed, upon "
                    f"which the server rolls it back. Await all tasks, and join all threads, that "
                    f"use the database."
                )
                if self.failure.__cause__ is None:
                    self.failure.__cause__ = error
        finally:
            if wire is not None:
                wire.close()
            self._is_over = True
            escaped = self.failure is not None and self.failure.escaped
            private = self._dialect.is_private(connection.engine)
            if self._is_gone or ((self._changes_session or escaped) and not private):
                connection.invalidate()
            connection.close()
        if self.failure is not None:
            raise self.failure

    def _end(self) -> None:
        try:
            if self._is_begun and self.failure is None:
                self._verify()
                self._check_end()
        except IsolationError:
            pass  # it is kept
        finally:
            self.driver.rollback()

    def _check_end(self) -> None:
        if not self._commits:
            return
        if self._parts or self._failed:
            self._send([f"ROLLBACK TO SAVEPOINT {self._base}"])
        try:
            self._dialect.check_deferred(self.driver, self._deferred, at_end=True)
        except self._connection.dialect.loaded_dbapi.Error as error:
            if self._dialect.driver_fault(error) is not Fault.CONSTRAINT:
                raise
            self._fail(
                f"has rows in it that no database would commit: {error}. The constraint waits for "
                f"the COMMIT, and here none comes."
            )
