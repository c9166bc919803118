"""What the other rooms may ask of a database, and the careful answers for an unknown one."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import ref

import sqlalchemy as sa

from tidyrows.dialects.database_names import database_name
from tidyrows.dialects.keys import chunks as _chunks
from tidyrows.dialects.keys import (
    delete_plainly,
    driver_values,
    exists_sql,
    find_plainly,
    look_plainly,
    plain_chunks,
    plain_condition,
    run,
    those_there,
)
from tidyrows.dialects.liveness_lock import PATIENCE, Life
from tidyrows.dialects.whole_rows import same_row
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from tidyrows.dialects.blocker import Blocker
    from tidyrows.keys import KeyedTable


class Fault(Enum):
    """What an error means for the transaction it came from."""

    TRANSIENT = auto()
    """Run the whole transaction again."""
    LOST = auto()
    """The connection is gone: run the whole transaction again, on a new one."""
    CONSTRAINT = auto()
    """A constraint spoke, for a delete a foreign key: look for dependents again."""
    OTHER = auto()
    """Raise."""


class Loss(Enum):
    """What a failed statement did to the earlier rows of its transaction."""

    NOTHING = auto()
    DOUBT = auto()
    EVERYTHING = auto()


class CommitOutcome(Enum):
    """What a COMMIT that raised left behind."""

    OPEN = auto()
    """The transaction is still open on the connection."""
    GONE = auto()
    """Certainly rolled back."""
    DOUBT = auto()
    """Ask the database."""


class CycleForm(Enum):
    """How the rows of a foreign-key cycle are deleted."""

    ONE_STATEMENT = auto()
    """``delete_cycle`` takes them in one statement."""
    DEFERRED = auto()
    """``delete_cycle`` takes them one table after another; what is violated speaks at COMMIT."""
    LEVELS = auto()
    """Row by row level with ``delete_by_keys``; ``delete_cycle`` is not for this database."""


@dataclass(frozen=True, slots=True)
class RealTable:
    """What a name in an INSERT really meant.

    Attributes:
        schema: the real schema (SQLite: ``main``, ``temp`` or the attached name).
        kind: ``other`` is a view, a foreign table, a virtual table.
        plain: whether a system column can prove that an upsert inserted.
        returns: whether RETURNING may be added to an INSERT; it needs more rights than INSERT, and
            a rule may have none.
    """

    schema: str
    kind: Literal["table", "temporary", "other"]
    plain: bool
    returns: bool = True


_PROBES = 100
Look = tuple[str, tuple[Any, ...]]
"""A SELECT in the driver's words, and what it is sent with."""
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
# Prefixes of an INSERT after which it still inserts its row or fails.
_HARMLESS = frozenset({"", "LOW_PRIORITY", "HIGH_PRIORITY", "DELAYED", "OR ABORT", "OR ROLLBACK"})
# Any DDL may give an unqualified name a new meaning (CREATE TEMP TABLE hides a table).
_SETTING = re.compile(
    r"(?:\s|;|--[^\n]*\n|/\*.*?\*/)*"
    r"(?:set|reset|discard|use|attach|detach|create|drop|alter|do|call)\b",
    re.IGNORECASE | re.DOTALL,
)


class Dialect:
    """A database that tidyrows knows nothing about: plain SQL, and doubt wherever it can matter.

    The capture side is called inside the user's transaction; nothing there may fail it. The
    cleanup side runs on a connection that nobody else uses: ``begin_cleanup`` begins its
    transaction, the caller commits or rolls back, ``end_cleanup`` restores the session.
    """

    name: ClassVar[str] = "generic"
    reuses_keys: ClassVar[bool] = True
    ddl_commits: ClassVar[bool] = False
    cycle_form: ClassVar[CycleForm] = CycleForm.LEVELS
    explicit_zero_is_generated: ClassVar[bool] = False
    foreign_key_pragmas: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    """Whether ``delete_rows`` can tell rows without a key apart, and takes no more than asked."""
    locks_rows: ClassVar[bool] = True
    """Whether a lock that somebody holds leaves other rows free."""
    release_commits: ClassVar[bool] = False
    """Whether the RELEASE of an outermost savepoint may be a COMMIT."""
    long_text: ClassVar[sa.types.TypeEngine[str]] = sa.Text()
    """The type of a column for text of any length."""
    table_options: ClassVar[Mapping[str, Any]] = {}
    """What a Table of our own is made with, so that it takes any text."""
    probed_together: ClassVar[int] = 20
    """Up to how many keys all tables that may reference them are asked in one statement."""
    clock: ClassVar[str] = "EXTRACT(EPOCH FROM CURRENT_TIMESTAMP)"
    """SQL for the server's time in seconds since 1970, with fractions, in any time zone."""
    beats_in_file: ClassVar[bool] = False
    """Whether a worker's last beat is told by :meth:`file_beat_age`, not by a row."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self.driver: str = dialect.driver
        self._dbapi: Any = dialect.loaded_dbapi
        # Weak, since the registry of dialects is keyed by this very object.
        self._dialect = ref(dialect)
        self._exists_sql: dict[tuple[tuple[KeyedTable, int], ...], str] = {}

    # ----- errors ------------------------------------------------------------------------------

    def fault(self, error: BaseException) -> Fault:
        """What an error means; SQLAlchemy's errors and bare ones of the driver."""
        if isinstance(error, sa.exc.DBAPIError):
            if error.connection_invalidated:
                return Fault.LOST
            error = error.orig or error
        if self.lacks_database(error):
            return Fault.OTHER  # it will not come back
        # asyncpg lets the socket's own error through when the server is down.
        return Fault.LOST if isinstance(error, ConnectionError) else self._fault_of(error)

    def _fault_of(self, error: BaseException) -> Fault:
        return Fault.OTHER

    def waited(self, error: BaseException) -> bool:
        """Whether an error ended a wait: for a lock, or for the statement itself."""
        return False

    def lacks_right(self, error: BaseException) -> bool:
        """Whether an error says that the role may not do what it was told to."""
        return False

    def lacks_database(self, error: BaseException) -> bool:
        """Whether an error says that there is no such database any more."""
        return False

    asks_for_blockers: ClassVar[bool] = True
    """Whether :meth:`blockers` needs a cursor."""

    def server_id(self, dbapi_connection: Any) -> int | None:
        """How the server names a connection, without asking it; None where that is not known."""
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        try:
            return self._server_id(raw)
        except (AttributeError, TypeError, self._dbapi.Error):  # closed already, or never begun
            return None

    def _server_id(self, raw: Any) -> int | None:
        return None

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether the server still works for a connection whose client is gone."""
        return False

    def waits_as(self, connection: sa.Connection) -> Any:
        """What :meth:`blockers` must know of a connection that may wait; None for nothing to see.

        Asked before, in the connection's own thread.
        """
        return self.server_id(connection.connection.dbapi_connection)

    def blockers(self, cursor: Any, waiting: Any) -> list[Blocker]:
        """Whose locks a connection waits for now.

        Args:
            cursor: of another connection, where ``asks_for_blockers``.
            waiting: what :meth:`waits_as` said of the connection that waits.
        """
        return []

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """What a failed statement did to the earlier rows of its transaction."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.DOUBT

    def commit_is_void(self, connection: sa.Connection) -> bool:
        """Just before a COMMIT: will it persist nothing, and say nothing?"""
        return False

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """What a COMMIT that raised left behind."""
        return CommitOutcome.DOUBT

    # ----- the user's transaction --------------------------------------------------------------

    def commits_by_itself(self, connection: sa.Connection) -> bool:
        """Whether it is in AUTOCOMMIT: no savepoint, and a failed insert undoes only itself."""
        driver = connection.connection.dbapi_connection
        # SQLite's driver can be in autocommit while an event of the engine's user has sent BEGIN.
        if driver is None or self.in_transaction(driver):
            return False
        try:
            return connection.dialect.detect_autocommit_setting(driver)
        except NotImplementedError:
            return False

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """Whether a transaction is open, as the driver sees it, without asking the server.

        None where the driver cannot tell.
        """
        return None

    def is_begun(self, dbapi_connection: Any) -> bool:
        """Whether somebody has begun a transaction that can be told from the driver's own."""
        return bool(self.in_transaction(dbapi_connection))

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The table that this name means here and now; None where there is none."""
        if schema is None:
            schema = connection.dialect.default_schema_name or ""
        return RealTable(schema, "table", plain=False)

    def session_setting(self, sql: str) -> bool:
        """May this raw SQL change what an unqualified table name means?"""
        return _SETTING.match(sql) is not None

    def before_savepoint(self, connection: sa.Connection) -> None:
        """Make sure that a SAVEPOINT to come stands inside a transaction."""

    def guard_pool(self, engine: sa.Engine) -> None:
        """Keep a transaction that a failed COMMIT left open from the pool's next user.

        SQLAlchemy believes it over and returns the connection as it is, after SQLite's BUSY as
        after a commit listener that raised on any database; the next user would commit its rows.
        """
        # Not event.contains: it does not know the listeners of a pool that dispose() made anew.
        if self._end_leftover not in engine.pool.dispatch.reset:
            sa.event.listen(engine.pool, "reset", self._end_leftover)

    def _end_leftover(self, dbapi_connection: Any, record: Any, state: Any) -> None:
        if state.transaction_was_reset and self.in_transaction(dbapi_connection):
            dbapi_connection.rollback()

    # ----- inserts -----------------------------------------------------------------------------

    @property
    def counts_when_closed(self) -> bool:
        """Whether a cursor still tells its row count once SQLAlchemy has closed it."""
        return True

    @property
    def returning(self) -> bool:
        """Whether INSERT has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_returning", False))

    @property
    def executemany_returning(self) -> bool:
        """Whether INSERT of many rows has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_executemany_returning", False))

    def delete_returning(self, *, several_tables: bool) -> bool:
        """Whether DELETE has RETURNING, also where its condition reads other tables."""
        flag = "delete_returning_multifrom" if several_tables else "delete_returning"
        return bool(getattr(self._dialect(), flag, False))

    def upsert(self, insert: sa.Insert) -> bool:
        """May this INSERT leave a row out, or hit one that was there before?"""
        return self._post_values(insert) is not None or bool(self._prefixes(insert))

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
        """How an upsert proves which rows it inserted.

        Returns:
            ``(False, None)``: it cannot, so no row of it may be registered. ``(True, None)``:
            exactly the rows that RETURNING yields. ``(True, column)``: the rows where this
            column, added to RETURNING, is true.
        """
        return False, None

    def _post_values(self, insert: sa.Insert) -> str | None:
        clause = getattr(insert, "_post_values_clause", None)
        return None if clause is None else str(clause.__visit_name__)

    def _prefixes(self, insert: sa.Insert) -> frozenset[str]:
        """The prefixes that this database would see and that are not known to be harmless."""
        found = set()
        for prefix, only in getattr(insert, "_prefixes", ()):
            if only in {None, "*", getattr(self._dialect(), "name", None)}:
                found.add(" ".join(_COMMENT.sub(" ", str(prefix)).upper().split()))
        return frozenset(found - _HARMLESS)

    # ----- cleanup -----------------------------------------------------------------------------

    def gives_again(self, connection: sa.Connection, table: KeyedTable, highest: int) -> bool:
        """Whether a number up to ``highest`` that it once generated here may come again."""
        return self.reuses_keys

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """Begin the cleanup's own transaction, whatever state the connection was left in.

        Call ``end_cleanup`` afterwards even where this raised.

        Args:
            connection: one that nobody else uses, without a transaction.
            lock_timeout: how long a statement may wait for a lock, in seconds; 0 for not at all.
            statement_timeout: how long a statement may run, in seconds, where the database can.
            foreign_keys: have foreign keys enforced, where the database does so only when asked.

        Raises:
            SessionStateError: a transaction is open on the connection.
        """
        self._refuse_open_transaction(connection)
        connection.begin()

    def begin_reading(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
    ) -> None:
        """As ``begin_cleanup``, for a transaction that only looks and takes no write lock."""
        self.begin_cleanup(
            connection, lock_timeout=lock_timeout, statement_timeout=statement_timeout
        )

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Restore the session, after commit or rollback; the connection may be broken."""

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> int:
        """Delete the rows of these keys, in the order given; the number of rows deleted."""
        return delete_plainly(connection, table, keys)

    def existing_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any]:
        """Which of these keys still name a row, by the database's own comparison.

        It shares nothing with ``delete_by_keys``: what one gets wrong the other must see.
        """
        return those_there(keys, keys, lambda part: look_plainly(connection, table, part))

    def existing_of_each(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[list[Any]]:
        """``existing_keys`` of several tables, in their order.

        Usually nothing is left of any, so that is asked first, of many at once.
        """
        looks = self._looks(connection, tables) if len(tables) > 1 else [None] * len(tables)
        closer = {number for number, look in enumerate(looks) if look is None}
        together = [(number, *look) for number, look in enumerate(looks) if look is not None]
        for part in _chunks(together, _PROBES):
            sql = ", ".join(f"EXISTS({select})" for _number, select, _values in part)
            sent = tuple(value for *_rest, values in part for value in values)
            row = self._exists(connection, f"SELECT {sql}", sent)
            closer |= {number for (number, *_rest), there in zip(part, row, strict=True) if there}
        return [
            self.existing_keys(connection, table, keys) if number in closer else []
            for number, (table, keys) in enumerate(tables)
        ]

    def _looks(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[Look | None]:
        """For each table one SELECT that finds its rows, for the driver; None where none does."""
        return [None] * len(tables)

    def find(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        columns: Sequence[sa.ColumnElement[Any]],
        *,
        lock: bool = False,
        first: bool = False,
    ) -> list[tuple[Any, ...]]:
        """Columns of the rows of these keys, in as few statements as the database allows.

        Args:
            connection: in the cleanup's transaction.
            table: its "primary key" may be any columns to look by, unique or not.
            keys: the values to look for.
            columns: of the table's clause, as Python values of their types.
            lock: hold the rows against change; one that is changed while this waits is looked at
                as it is then.
            first: any one row is enough.
        """
        return find_plainly(connection, table, keys, columns, lock=lock, first=first)

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Hold the rows of these keys against change, and against new rows that reference them."""
        for part in plain_chunks(table, keys):
            condition = plain_condition(table, part)
            run(connection, sa.select(*table.key_clauses).where(condition).with_for_update()).all()

    def first_found(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[int]:
        """Which of these tables hold a row of one of their keys: positions in ``tables``."""
        found: list[int] = []
        few: list[tuple[int, KeyedTable, int, list[Any]]] = []
        sent: dict[Any, list[Any] | None] = {}  # foreign keys of one parent share their values
        for number, (table, keys) in enumerate(tables):
            if not keys:
                continue
            if len(keys) > self.probed_together:
                flat = None
            else:
                same = (id(keys), *(id(column.type) for column in table.key_clauses))
                if same not in sent:
                    sent[same] = _flat(driver_values(table, connection.dialect, keys))
                flat = sent[same]
            if flat is not None:
                few.append((number, table, len(keys), flat))
            elif self.find(connection, table, keys, table.key_clauses, first=True):
                found.append(number)
        for part in _chunks(few, _PROBES):
            asked = tuple((table, count) for _number, table, count, _values in part)
            sql = self._exists_sql.get(asked)
            if sql is None:
                if len(self._exists_sql) >= _PROBES:
                    self._exists_sql.clear()
                sql = self._exists_sql[asked] = exists_sql(connection.dialect, asked)
            values = tuple(value for *_rest, flat in part for value in flat)
            row = self._exists(connection, sql, values)
            found += [number for (number, *_rest), there in zip(part, row, strict=True) if there]
        return sorted(found)

    def _exists(self, connection: sa.Connection, sql: str, sent: tuple[Any, ...]) -> Sequence[Any]:
        return connection.exec_driver_sql(sql, sent).one()

    def set_null(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        names: Sequence[str],
    ) -> None:
        """Set these columns of the rows to NULL."""
        values = {table.clause.c[name]: sa.null() for name in names}
        for part in plain_chunks(table, keys):
            condition = plain_condition(table, part)
            run(connection, sa.update(table.clause).where(condition).values(values))

    def insert_exactly(
        self,
        connection: sa.Connection,
        table: sa.TableClause,
        values: Mapping[str, Any],
        *,
        always: bool,
    ) -> None:
        """Insert one row with just these values, those of generated keys too.

        Args:
            connection: in the cleanup's transaction.
            table: fully qualified, with the columns' types.
            values: by column; all that can be written.
            always: the database would make a value of one of them itself, unless told otherwise.
        """
        run(connection, sa.insert(table).values(values))

    def delete_cycle(
        self, connection: sa.Connection, batch: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[int]:
        """Delete rows whose tables, or table, form a cycle; counts in the order given.

        Not for databases whose ``cycle_form`` is LEVELS: there it is no more than one delete
        after another.
        """
        return [self.delete_by_keys(connection, table, keys) for table, keys in batch]

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """The schemas of all tables that hold a foreign key to a table of one of these."""
        return set(schemas)

    def inherited_foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str, str | None]]:
        """Keys that partitions have from their table: schema, table and name of each."""
        return set()

    def hidden_tables(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str]]:
        """Tables of which this role may not be shown every row, though rows are there."""
        return set()

    def invalid_indexes(self, connection: sa.Connection, schema: str, table: str) -> set[str]:
        """Indexes of a table that are there and not used, since they were never finished."""
        return set()

    def what_keeps(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """What may keep a row of this table although its DELETE raised nothing, by name."""
        return []

    def enforces_foreign_keys(self, connection: sa.Connection) -> bool:
        """Whether ON DELETE does what it says, and a delete that breaks a key fails."""
        return True

    def without_foreign_keys(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """The block runs without foreign keys, where the database can; then drop the connection."""
        return nullcontext()

    # ----- who is alive ------------------------------------------------------------------------

    def life(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> Life:
        """A lock that shows that a worker is alive, not taken yet; it holds the engine weakly.

        Args:
            engine: how to connect; none of its pool's connections is taken.
            number: the worker's own, random, from 1 to 2**63 - 1.
            patience: how long to wait for the lock where it is not free, in seconds.
        """
        return Life()

    def is_private(self, engine: sa.Engine) -> bool:
        """Whether no other process can ever see the database."""
        return False

    def missing_file(self, engine: sa.Engine) -> str | None:
        """The database's file, where it is not there, and connecting would make an empty one."""
        return None

    def is_alive(self, connection: sa.Connection, number: int) -> bool | None:
        """Whether anybody holds this worker's lock now; None where nobody can tell.

        The lock is not touched. A connection that dropped is no death: look at the beats too.
        """
        return None

    def file_beat_age(self, connection: sa.Connection, number: int) -> float | None:
        """How many seconds ago this worker's file was touched; None where there is no file.

        Only where :attr:`beats_in_file` is true.
        """
        return None

    def remove_life(self, connection: sa.Connection, number: int) -> None:
        """Delete what a dead worker's lock left behind; nothing where anybody holds it."""

    def remove_lives(self, connection: sa.Connection) -> None:
        """The same of all workers, those too that died before they had said their number."""

    # ----- what has changed --------------------------------------------------------------------

    def identity(self, engine: sa.Engine) -> tuple[Any, ...] | None:
        """What two engines on one database have in common, and a new one in its place has not.

        None where there is no database yet, or no longer.
        """
        return (database_name(engine),)

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """What stays the same on this connection as long as nobody commits a change; cheap to ask.

        It may change without a reason. None where the database does not tell.

        Args:
            connection: one that nobody else uses; a transaction may be begun on it.
            lock_timeout: how long to wait where even that is locked, in seconds.
        """
        return None

    def usual_schema(self, bind: sa.Engine | sa.Connection) -> str:
        """The schema of tables that are named without one (known after the first connect)."""
        return str(bind.dialect.default_schema_name or "")

    def own_schemas(self, connection: sa.Connection) -> list[str]:
        """The schemas in which an application keeps its tables."""
        return [self.usual_schema(connection)]

    def parts(self, connection: sa.Connection, schema: str) -> set[str]:
        """The tables of a schema whose rows are those of another table, which is listed too."""
        return set()

    # ----- rows without a key ------------------------------------------------------------------

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """What to read of a column so that ``delete_rows`` can find the row by it."""
        return column

    def delete_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """Delete up to ``count`` rows that equal this one in every column; how many there were.

        Only where :attr:`whole_rows` is true.

        Args:
            connection: in the cleanup's transaction.
            table: it needs no primary key.
            row: the values in the order of the table's columns, as ``read_exactly`` read them.
            count: the most that may go.
        """
        raise NotImplementedError

    def count_rows(self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any]) -> int:
        """How many rows equal this one in every column."""
        condition = same_row(table, table.clause, row, self._same)
        counted = sa.select(sa.func.count()).select_from(table.clause).where(condition)
        return int(run(connection, counted).scalar_one())

    def _same(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        return column.is_not_distinct_from(value)

    def _refuse_open_transaction(self, connection: sa.Connection) -> None:
        raw = connection.connection.dbapi_connection
        if connection.in_transaction() or self.in_transaction(raw):
            raise SessionStateError(
                f"The connection to {database_name(connection.engine)} that cleanup was given has "
                "a transaction open, which is not tidyrows' to end. Commit or roll back the "
                "session or connection that holds it (with sqlite:// in memory all of them share "
                "one connection), then clean up."
            )


def _flat(values: list[list[Any]] | None) -> list[Any] | None:
    """Driver values, one list per column, key by key."""
    if values is None or len(values) == 1:
        return None if values is None else values[0]
    return [value for key in zip(*values, strict=True) for value in key]
