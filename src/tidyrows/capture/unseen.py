"""Rows that were inserted past SQLAlchemy: by the driver's cursor, a procedure, a function.

A connection that has left its pool notices when other code than SQLAlchemy uses the driver. From
then on, and after raw SQL that runs code of the database, the database's own counters are compared
before each COMMIT with what capture has seen. Other connections are never asked.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.pool import _ConnectionFairy

from tidyrows.capture.affected_rows import after_statement
from tidyrows.capture.changes import Inserted, InsertedWhole, Untracked
from tidyrows.capture.table_resolution import forget_names
from tidyrows.errors import not_raised
from tidyrows.keys import unresolved_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tidyrows.capture.changes import Change, Sink
    from tidyrows.capture.ownership import EngineSinks
    from tidyrows.dialects import Dialect
    from tidyrows.schema.graph import Place

Counts: TypeAlias = "Mapping[Place | None, int]"

_OWN = frozenset({"sqlalchemy", "tidyrows"})
_own_modules: dict[int, Mapping[str, Any]] = {}  # by id the names of those that have asked
# Methods of the drivers' connections that send statements.
_SENDING = frozenset(
    {"execute", "executemany", "executescript", "query", "transaction", "pipeline", "copy"}
)


def _is_foreign(names: Mapping[str, Any]) -> bool:
    """Whether a module's names are those of other code than SQLAlchemy's and ours."""
    if names.get("__name__", "").partition(".")[0] not in _OWN:
        return True
    _own_modules[id(names)] = names  # kept, so that no other module gets its id
    return False


class WatchedConnection(_ConnectionFairy):
    """The pool's proxy of a connection, which notices when the driver is used past SQLAlchemy.

    Attributes:
        unseen: told of the first such use.
    """

    unseen: UnseenInserts
    _driver: Any = _ConnectionFairy.__dict__["dbapi_connection"]  # SQLAlchemy's slot
    # What __getattr__ would find, without a call of its own.
    commit: Any = property(attrgetter("_driver.commit"))
    rollback: Any = property(attrgetter("_driver.rollback"))

    def cursor(self, *args: Any, **options: Any) -> Any:
        """A cursor of the driver."""
        asking = sys._getframe(1).f_globals  # noqa: SLF001 -- which code asks
        if id(asking) not in _own_modules and _is_foreign(asking):
            self.unseen.begin(self)
        return self._driver.cursor(*args, **options)

    @property
    def dbapi_connection(self) -> Any:  # a slot of SQLAlchemy's
        """The DBAPI's connection."""
        driver, asking = self._driver, sys._getframe(1).f_globals  # noqa: SLF001 -- as above
        if id(asking) not in _own_modules and _is_foreign(asking):
            self.unseen.begin(self)
        return driver

    @dbapi_connection.setter
    def dbapi_connection(self, driver: Any) -> None:
        self._driver = driver

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as SQLAlchemy does
        """The driver's own connection."""
        if _is_foreign(sys._getframe(1).f_globals):  # noqa: SLF001 -- as above
            self.unseen.begin(self)
        record = self._connection_record
        return record and record.driver_connection

    def __getattr__(self, key: str) -> Any:
        if key in _SENDING:
            self.unseen.begin(self)
        return getattr(self._driver, key)


def ignore_driver(connection: sa.Connection) -> None:
    """Notice nothing of this connection, which only tidyrows uses: its statements are cheaper."""
    fairy: Any = connection.connection
    if fairy.__class__ is WatchedConnection:
        fairy.__class__ = _ConnectionFairy  # type: ignore[assignment]  # as SQLAlchemy made it


class UsedConnection(WatchedConnection):
    """A connection whose driver was used past SQLAlchemy: its COMMIT may be asked for there too."""

    def commit(self) -> None:
        """COMMIT, by whoever asks for it."""
        if _is_foreign(sys._getframe(1).f_globals):  # noqa: SLF001 -- SQLAlchemy has an event
            self.unseen.before_commit(self)
        self._driver.commit()
        self.unseen.begin_anew(self)

    def rollback(self) -> None:
        """ROLLBACK, by whoever asks for it."""
        self._driver.rollback()
        self.unseen.begin_anew(self)


@dataclass(slots=True)
class _Use:
    """A connection that is used past SQLAlchemy.

    Attributes:
        counts: what the database's counters were when that began; None where it could not tell.
        seen: the inserts of the open transaction that capture had seen by then.
        found: the rows that were found before the last savepoint.
        by_driver: a cursor of the driver may be kept, into later transactions too.
        is_exact: no statement has failed, which may be counted all the same.
        is_stale: a savepoint was rolled back, and with it rows that are counted.
        statement: a statement of SQLAlchemy under way, and the counters before it.
    """

    counts: Counts | None
    seen: Counter[Place]
    by_driver: bool
    found: Counter[Place | None] = field(default_factory=Counter)
    is_exact: bool = True
    is_stale: bool = False
    statement: tuple[Any, Counts | None] = (None, None)


class UnseenInserts:
    """Compares the counters of one engine's database with what capture has seen.

    Attributes:
        database: how row keys name the engine's database.
        uses: the connections that are used past SQLAlchemy, by their entries in the pool.
        late: warnings that a pool would swallow.
    """

    def __init__(
        self,
        dialect: Dialect,
        sinks: EngineSinks,
        changes_of: Callable[[Any], Iterable[Change]],
    ) -> None:
        self._dialect = dialect
        self._sinks = sinks
        self._changes_of = changes_of
        self.database = ""
        self.uses: dict[Any, _Use] = {}
        self.late: list[tuple[Sink, Place | None, int | None, str]] = []

    def begin(self, fairy: Any, *, by_driver: bool = True, moves_names: bool = True) -> None:
        """From now on statements may be sent that capture does not see.

        Args:
            fairy: the pool's proxy of the connection.
            by_driver: False for a statement of SQLAlchemy that is about to be sent, and may run
                code of the database.
            moves_names: whether names of tables may mean something else afterwards.
        """
        record = _record_of(fairy)
        # SQLAlchemy asks a new connection through a proxy of another kind.
        if record is None or not isinstance(fairy, _ConnectionFairy):
            return
        if moves_names:
            forget_names(record.info)
        if self._sinks.idle:
            return
        use = self.uses.get(record)
        if use is None:
            self.uses[record] = self._use(record, by_driver=by_driver)
        elif use.is_stale:
            self._begin_after_savepoint(record, use)
        if by_driver and (use is None or not use.by_driver):
            self.uses[record].by_driver = True
            fairy.unseen = self  # type: ignore[attr-defined]  # what it is in a moment
            fairy.__class__ = UsedConnection

    def begin_anew(self, fairy: Any) -> None:
        """The transaction of a connection has ended."""
        record = _record_of(fairy)
        if record in self.uses:
            self.uses[record] = self._use(record, by_driver=True)

    def begun(self, connection: sa.Connection) -> None:
        """SQLAlchemy begins a transaction: what ran in the one before is over."""
        record = _record_of(connection)
        if record in self.uses and not self.uses[record].by_driver:
            del self.uses[record]

    def unlogged(self, connection: sa.Connection, changes: Iterable[Change]) -> None:
        """Rows of changes that are not in the log, or no longer, are counted, and were seen."""
        use = self.uses.get(_record_of(connection))
        if use is not None:
            use.seen.subtract(_rows_of(changes))

    def savepoint(self, connection: sa.Connection) -> None:
        """A savepoint is about to be set: what was inserted before stays if it is rolled back."""
        record = _record_of(connection)
        use = self.uses.get(record)
        if use is not None and not use.is_stale:
            use.found = self._found(record, use, self._counts(record))
            self._begin_after_savepoint(record, use)

    def rollback_savepoint(self, connection: sa.Connection) -> None:
        """A savepoint is about to be rolled back; the counters will not be."""
        use = self.uses.get(_record_of(connection))
        if use is not None:
            use.is_stale = True

    def failed(self, connection: sa.Connection) -> None:
        """A statement of SQLAlchemy has failed."""
        use = self.uses.get(_record_of(connection))
        if use is not None:
            use.is_exact = False

    def statement(self, context: Any, sql: str) -> None:
        """SQLAlchemy is about to send a statement: what it changes is seen."""
        record = _record_of(context.root_connection)
        use = self.uses.get(record)
        if use is None:
            return
        if use.by_driver:
            forget_names(record.info)
        if use.is_stale and not sql.startswith("ROLLBACK"):  # to the savepoint
            self._begin_after_savepoint(record, use)
        if not self._dialect.counts_every_change or use.statement[0] is context:
            return  # or one of its several batches
        use.statement = context, self._counts(record)

        def seen() -> None:
            (_context, before), now = use.statement, self._counts(record)
            if use.counts is not None and before is not None and now is not None:
                use.counts = {None: use.counts[None] + now[None] - before[None]}
            use.statement = None, None

        after_statement(context, seen)

    def before_commit(self, connection: Any) -> None:
        """A COMMIT is about to be sent: warn of what was inserted and not seen.

        Args:
            connection: of SQLAlchemy, or the pool's proxy of a connection.
        """
        record = _record_of(connection)
        use = self.uses.get(record)
        owner = self._sinks.owner(connection) if use is not None else None
        if use is not None and owner is not None:
            for warning in self._warnings(record, use, self._counts(record)):
                with not_raised():
                    self._warn(owner, *warning)

    def returned(self, driver: Any, record: Any) -> None:
        """A connection goes back to its pool; what it committed by itself has not been said yet."""
        use = self.uses.pop(record, None)
        if use is None or self._dialect.in_transaction(driver):  # the pool rolls it back
            return
        counts, owner = self._counts(record), self._sinks.owner(self)  # type: ignore[arg-type]  # nobody's
        if counts is not None and owner is not None:
            self.late += [(owner, *each) for each in self._warnings(record, use, counts)]

    def warn_late(self) -> None:
        """Warn of what was found as a connection went back to its pool."""
        while self.late:
            self._warn(*self.late.pop())

    def _warn(self, owner: Sink, place: Place | None, count: int | None, message: str) -> None:
        stand_in = unresolved_table(self.database, *(place or ("",)))
        owner.note_untracked(Untracked(stand_in, count=count))
        owner.warn_once(("unseen", place), message)

    def _use(self, record: Any, *, by_driver: bool) -> _Use:
        driver = record.dbapi_connection
        # A statement under way stands in the transaction that the question begins: that matters
        # behind a pooler, which gives each transaction another session.
        begun = not by_driver or self._dialect.in_transaction(driver) is not False
        counts = self._dialect.rows_inserted(driver, inside=begun)
        return _Use(counts and counts[0 if begun else 1], self._seen(record), by_driver)

    def _begin_after_savepoint(self, record: Any, use: _Use) -> None:
        use.counts, use.seen, use.is_stale = self._counts(record), self._seen(record), False

    def _counts(self, record: Any) -> Counts | None:
        counts = self._dialect.rows_inserted(record.dbapi_connection)
        return counts and counts[0]

    def _seen(self, record: Any) -> Counter[Place]:
        """How many rows the open transaction has inserted, by table, as capture saw them."""
        return _rows_of(self._changes_of(record))

    def _found(self, record: Any, use: _Use, now: Counts | None) -> Counter[Place | None]:
        """How many rows were inserted and not seen, by table or in all."""
        found, before = Counter(use.found), use.counts or {}
        seen: Counter[Place] = Counter()
        if not self._dialect.counts_every_change:
            seen = self._seen(record)
            seen.subtract(use.seen)
        for place, count in (now or {}).items():
            start = before.get(place, 0)
            rows = count - start if count >= start else count  # or they have begun anew meanwhile
            rows -= seen[place] if place is not None else seen.total()
            found[place] += max(rows, 0)
        return +found

    def _warnings(
        self, record: Any, use: _Use, now: Counts | None
    ) -> Iterable[tuple[Place | None, int | None, str]]:
        """Of each table, or of all, how many rows at most, and what a warning must say."""
        if now is None:
            yield None, None, _NOBODY_KNOWS
        exact = use.counts is not None and use.is_exact and not use.is_stale
        for place, rows in self._found(record, use, now).items():
            told = f"{rows}" if exact else f"up to {rows}"
            yield place, rows, _message(told, place, self._dialect)
        use.counts, use.seen, use.found = now, self._seen(record), Counter()


def _rows_of(changes: Iterable[Change]) -> Counter[Place]:
    rows: Counter[Place] = Counter()
    for change in changes:
        if isinstance(change, (Inserted, InsertedWhole)):
            rows[change.table.place] += len(change.keys)
    return rows


def _record_of(connection: Any) -> Any:
    """The entry in the pool of a connection of SQLAlchemy, or of the pool's proxy of one."""
    fairy = connection.connection if isinstance(connection, sa.Connection) else connection
    return fairy._connection_record  # noqa: SLF001 -- no public name


_NOBODY_KNOWS = (
    "The driver was used past SQLAlchemy, and the database cannot tell which rows that inserted: "
    "they are not tracked. Take them with tracker.track_query(select(...))."
)


def _message(count: str, place: Place | None, dialect: Dialect) -> str:
    verb = "inserted, changed or deleted" if dialect.counts_every_change else "inserted"
    if place is None:
        where = ", and the database does not tell in which tables"
        named = "table"
    else:
        where, named = f" in {'.'.join(place)}", place[1]
    return (
        f"{count} row(s) were {verb} past SQLAlchemy{where}: by the driver's own cursor, a "
        f"procedure, a function or a trigger. They are not tracked; cleanup deletes those that "
        f"reference tracked rows. Take the others with tracker.track_query(select({named})...)."
    )
