"""What the users of one connection of the driver have in its place, and the pool that lends it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy.pool import Pool

from tidyrows.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

_OWN = frozenset({"sqlalchemy", "tidyrows"})
# What has a cursor method of its own between the asking code and this one.
_PROXIES = frozenset({"sqlalchemy.pool.base", "tidyrows.capture.unseen"})

# Methods of the drivers' cursors that send statements.
_SENDING = frozenset(
    {"callproc", "copy", "copy_expert", "copy_from", "copy_to", "execute", "executemany"}
    | {"executescript", "stream"}
)


class StandIn:
    """The driver's connection, as one of its users has it.

    ``commit``, ``rollback`` and ``close`` end the inner transaction only; all else is the driver's.

    Attributes:
        outer: the OuterTransaction that it belongs to.
        lent: the driver's connection.
        in_inner_transaction: something was written, and neither committed nor rolled back.
        is_undone: it was rolled back before its user asked for it, since a statement had failed.
    """

    outer: Any
    lent: Any
    in_inner_transaction: bool
    is_undone: bool

    def __init__(self, outer: Any) -> None:
        self.__dict__.update(
            outer=outer, lent=outer.driver, in_inner_transaction=False, is_undone=False
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lent, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.lent, name, value)

    def claim(self) -> None:
        """Statements are sent that SQLAlchemy does not tell of."""
        self.outer.before_unseen(self)

    def cursor(self, *args: Any, **options: Any) -> Any:
        """A cursor of the driver."""
        frame = sys._getframe(1)  # noqa: SLF001 -- which code asks
        name = frame.f_globals.get("__name__", "")
        if name in _PROXIES and frame.f_back is not None:
            name = frame.f_back.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        if package in _OWN:
            self.outer.check_usable()
        else:
            self.claim()
        cursor = self.lent.cursor(*args, **options)
        if self.outer.close_sends:
            cursor.close = partial(self._close_in_turn, cursor)
        if package == "sqlalchemy":
            return cursor
        return (
            _AskingCursor(cursor, self) if package == "tidyrows" else _ClaimingCursor(cursor, self)
        )

    def _close_in_turn(self, cursor: Any) -> None:
        """Close a cursor while no other thread's statement runs."""
        del cursor.close  # there was the driver's, and is again
        with self.outer.asking():
            cursor.close()

    def execute(self, *args: Any) -> Any:
        """As the connections of SQLite's driver have it."""
        self.claim()
        return self.lent.execute(*args)

    def executemany(self, *args: Any) -> Any:
        """As above."""
        self.claim()
        return self.lent.executemany(*args)

    def executescript(self, *args: Any) -> Any:
        """As above; the driver commits first, which is noticed later."""
        self.claim()
        return self.lent.executescript(*args)

    @contextmanager
    def transaction(self, *args: Any, **options: Any) -> Iterator[Any]:
        """As the connections of psycopg have it: it commits, where it is not within another."""
        commits = not self.in_inner_transaction
        self.claim()
        try:
            with self.lent.transaction(*args, **options) as transaction:
                yield transaction
        except BaseException:
            if commits:
                self.rollback()
            raise
        if commits:
            self.commit()

    def commit(self) -> None:
        """Commit the inner transaction."""
        self.outer.commit(self)

    def rollback(self) -> None:
        """Roll the inner transaction back."""
        self.outer.rollback(self)

    def close(self) -> None:
        """Roll the inner transaction back; the driver's connection stays."""
        self.outer.rollback(self)

    terminate = close


class _Cursor:
    """A cursor of the driver, as one of the users of its connection has it."""

    def __init__(self, cursor: Any, user: StandIn) -> None:
        self.__dict__.update(_cursor=cursor, _user=user)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cursor, name, value)


class _AskingCursor(_Cursor):
    """For questions of tidyrows, of which SQLAlchemy does not tell: each has its turn."""

    def execute(self, *args: Any) -> Any:
        """Wait while another thread's statement runs."""
        with self._user.outer.asking():
            return self._cursor.execute(*args)


class _ClaimingCursor(_Cursor):
    """For code past SQLAlchemy, which may keep it into the user's next inner transaction."""

    def __getattr__(self, name: str) -> Any:
        if name in _SENDING:
            self._user.claim()
        return getattr(self._cursor, name)

    def __iter__(self) -> Any:
        return iter(self._cursor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._cursor.close()


class StandInPool(Pool):
    """Gives stand-ins of one connection, as many as are asked for.

    Attributes:
        outer: whose connection; None between two tests.
    """

    outer: Any = None

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(self._make, dialect=dialect)
        self._is_asyncio = dialect.is_async  # of each pool, not of the class
        self._idle: list[Any] = []

    def open(self, outer: Any) -> None:
        """Give stand-ins of this connection from now on."""
        self.outer = outer

    def shut(self) -> Any:
        """Give none from now on; returns whose connection it was."""
        outer, self.outer = self.outer, None
        self._idle = []
        return outer

    def _make(self) -> Any:
        if self.outer is None:
            raise IsolationError(
                "The engine of isolate(engine, 'transaction') is used outside of its block. Use "
                "db.engine in the block, and the suite's own engine elsewhere.",
                level="transaction",
            )
        self.outer.check_usable()
        return StandIn(self.outer)

    def _do_get(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            record: Any = self._create_connection()
            vars(record)["info"] = self.outer.info  # what is known of the one connection
            return record

    def _do_return_conn(self, record: Any) -> None:
        stand_in = record.dbapi_connection
        if stand_in is not None:
            stand_in.rollback()  # SQLAlchemy sends none after a COMMIT that has failed
        if stand_in is None or stand_in.outer is self.outer:  # else it is left from another test
            self._idle.append(record)

    def recreate(self) -> StandInPool:
        """The same one: engine.dispose() ends nothing of the test."""
        return self

    def dispose(self) -> None:
        """Nothing is closed."""

    def status(self) -> str:
        """In words."""
        return f"stand-ins of one connection, {len(self._idle)} of them idle"
