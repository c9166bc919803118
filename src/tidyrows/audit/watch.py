"""What has changed in each database since the last look, through any connection."""

from __future__ import annotations

import warnings
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.audit.baseline import TableState, changes
from tidyrows.audit.connections import SharedConnection
from tidyrows.audit.observer import DatabaseObservations
from tidyrows.audit.reads import MOST, reads_of
from tidyrows.audit.tables import (
    SMALL,
    TOGETHER,
    Difference,
    WatchedTable,
    plain_key,
    reflected,
)
from tidyrows.dialects import Fault, dialect_for
from tidyrows.keys import RowKey
from tidyrows.ledger.table import NAME as LEDGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from tidyrows.audit.baseline import Baseline, DatabaseChange
    from tidyrows.audit.connections import LookConnection
    from tidyrows.audit.names import WrittenName
    from tidyrows.audit.reads import TableRead
    from tidyrows.audit.row_history import Maker
    from tidyrows.audit.tables import Key
    from tidyrows.keys import TableName

T = TypeVar("T")


_LOCK_WAIT = 1.0
"""Seconds to wait for a table that somebody has locked: the suite must not wait for the audit."""
_STATEMENT = 20.0


class DatabaseWatch:
    """The state of one database at the last look."""

    def __init__(
        self,
        engine: sa.Engine,
        name: str,
        connection: LookConnection,
        note: Callable[[str], None],
    ) -> None:
        self.name = name
        self.fresh = True  # it had no table at the first look
        self.gone = False  # it no longer exists
        self.users: set[Maker] = set()  # who has sent statements to it
        self.keyless: set[TableName] = set()  # tables without a primary key, dropped ones included
        self._dialect = dialect_for(engine)
        # An engine on a database in memory is not kept alive, and so neither is the database.
        self._engine = None if self._dialect.is_private(engine) else engine
        self._identity = self._dialect.identity(engine)
        self._note = note
        self.connection: LookConnection | None = connection
        self._tables: dict[TableName, WatchedTable] = {}
        self._list: list[list[str]] = []
        self._mark: Any = None
        self._known = False
        self._baseline: Baseline = {}
        self.made_in_tests: set[TableName] = set()
        self.looks_for: Maker | None = None

    @property
    def is_own(self) -> bool:
        """Whether one test alone has made it for itself."""
        return self.fresh and len(self.users) == 1 and all(user.is_test for user in self.users)

    def sees(self, row_table: TableName, key: Any) -> bool:
        """Whether a look would show what became of a row."""
        table = self._tables.get(row_table)
        return table is not None and table.sees(key)

    def release(self) -> None:
        """Close the connection: the database may be about to be dropped."""
        if self.connection is not None:
            try:
                self.connection.close()
            except Exception as error:  # noqa: BLE001 -- it must not fail the suite
                self._note(f"{self.name}: the audit's connection does not close ({_short(error)})")
            self._mark = None  # SQLite's is a connection's own, and begins anew

    def suspend(self) -> None:
        """Keep nothing alive, until the suite uses the database again."""
        self.release()
        if self._engine is None:
            self.connection = None

    def look(self, observed: DatabaseObservations) -> list[Difference]:
        """What has changed since the last look; at the first nothing."""
        if self._engine is not None:
            identity = self._dialect.identity(self._engine)
            if identity != self._identity:
                return self._replaced(identity)
        return self._ask(lambda connection: self._look(connection, observed)) or []

    def _ask(self, work: Callable[[sa.Connection], T]) -> T | None:
        """Do it with the connection; None where that is not possible."""
        if self.connection is None:
            return None
        try:
            return self._call(self.connection, work)
        except TimeoutError:
            # Whatever it waits for, the suite must not wait for it after each test.
            self.connection = None
            self._note(f"{self.name} did not answer and was looked at no more")
        except Exception as error:  # noqa: BLE001 -- drivers and a project's own hooks may raise anything
            self._mark = None
            if isinstance(self.connection, SharedConnection) and self.connection.has_ended(error):
                self.gone = True
            else:
                self._note(f"{self.name} could not be looked at: {_short(error)}")
        return None

    def _call(self, own: LookConnection, work: Callable[[sa.Connection], T]) -> T:
        try:
            return own.call(work)
        except Exception as error:
            if self._engine is None or self._dialect.fault(error) is not Fault.LOST:
                raise
            # Somebody has closed all connections: what was done is this test's, not the next one's.
            return own.call(work)

    def _replaced(self, identity: tuple[Any, ...] | None) -> list[Difference]:
        """The database was dropped, or created again in its place."""
        self.release()
        self._identity, self._mark = identity, None
        self.gone = identity is None
        lost = [table.all_gone() for table in self._tables.values() if table.rows]
        self._tables = {}
        self._known = not self.gone
        return lost if self.gone else [*lost, *self.look(DatabaseObservations(ddl=True))]

    # -- what SELECTs have read --------------------------------------------------------------------

    def rows_read(
        self, selects: Sequence[tuple[str, Any]], of_others: Callable[[TableName], set[Key]]
    ) -> set[RowKey]:
        """The rows of others that these SELECTs, with their parameters, have read."""
        found: set[RowKey] = set()
        theirs: dict[TableName, set[Key]] = {}
        again: list[tuple[TableRead, Any, WatchedTable, set[Key]]] = []
        for sql, parameters in selects:
            for read in reads_of(sql):
                tables = [t for t in self._tables.values() if _is_among(t.name, {read.table})]
                if len(tables) != 1:
                    continue  # none that is looked at, or one of several schemas
                name = tables[0].name
                if name not in theirs:
                    theirs[name] = set(islice(of_others(name), MOST))
                if theirs[name] and read.rest is None:
                    found |= {RowKey(name, key) for key in theirs[name]}
                elif theirs[name] and tables[0].key:
                    again.append((read, parameters, tables[0], theirs[name]))
        return found | (self._ask(lambda connection: self._read_again(connection, again)) or set())

    def _read_again(
        self,
        connection: sa.Connection,
        selects: Sequence[tuple[TableRead, Any, WatchedTable, set[Key]]],
    ) -> set[RowKey]:
        if not selects or self._is_begun(connection):
            return set()
        quoted = connection.dialect.identifier_preparer.quote
        found: set[RowKey] = set()
        try:
            self._begin(connection)
            for read, parameters, table, others in selects:
                sql = read.again([*map(quoted, table.key)])
                try:
                    rows = connection.exec_driver_sql(sql, parameters or None).all()
                except Exception as error:  # noqa: BLE001 -- what cannot be run again is not understood
                    self._begin_again(connection, error)
                else:
                    found |= {RowKey(table.name, key) for key in others & {*map(plain_key, rows)}}
        finally:
            self._end(connection)
        return found

    # -- as it was ---------------------------------------------------------------------------------

    def changes(self) -> list[DatabaseChange]:
        """What is different from the database that the audit has met, tables and rows.

        Nothing where the database itself is gone, or another, or ends with this process.
        """
        if self._engine is None or self.gone or not self._known or self.is_own:
            return []
        if self._dialect.identity(self._engine) != self._identity:
            return []
        now = self._ask(self._state)
        self.release()
        return [] if now is None else [*changes(self._baseline, now, self.made_in_tests)]

    def _state(self, connection: sa.Connection) -> Baseline:
        try:
            self._begin(connection)
            found = self._read_all(connection)
            return self._states(connection, found.values())
        finally:
            self._end(connection)

    def _read_all(self, connection: sa.Connection) -> dict[TableName, WatchedTable]:
        tables = {table.name: table for table in self._reflect(connection)}
        for table in tables.values():
            self._read(connection, table, table.begin)
        return tables

    def _states(self, connection: sa.Connection, tables: Iterable[WatchedTable]) -> Baseline:
        counts = ((t, self._read(connection, t, t.count) if t.is_large else 0) for t in tables)
        return {t.name: TableState.of(t, number) for t, number in counts if number is not None}

    # -- looking -----------------------------------------------------------------------------------

    def _is_begun(self, connection: sa.Connection) -> bool:
        """Whether this is the suite's own connection, with a transaction open."""
        driver = connection.connection.dbapi_connection
        return self._engine is None and self._dialect.is_begun(driver)

    def _look(self, connection: sa.Connection, observed: DatabaseObservations) -> list[Difference]:
        if self._is_begun(connection):
            self._note(f"{self.name}: a transaction was open when it was to be looked at")
            return []
        mark = self._dialect.change_mark(connection, lock_timeout=_LOCK_WAIT)
        same = mark is not None and mark == self._mark
        connection.rollback()
        connection.connection.rollback()  # what the mark was asked in, the driver has begun
        if same and not observed.ddl:
            return []
        try:
            self._begin(connection)
            found = list(self._changes(connection, observed))
        finally:
            self._end(connection)
        self._mark = mark
        return found

    def _begin(self, connection: sa.Connection) -> None:
        self._dialect.begin_reading(
            connection, lock_timeout=_LOCK_WAIT, statement_timeout=_STATEMENT
        )

    def _end(self, connection: sa.Connection) -> None:
        connection.rollback()
        self._dialect.end_cleanup(connection)

    def _begin_again(self, connection: sa.Connection, error: Exception) -> None:
        """After an error of one table, and not of the connection or of the moment.

        Not by a savepoint: MariaDB's Aria tables do not take part in one.
        """
        fault = self._dialect.fault(error)
        if fault in {Fault.LOST, Fault.TRANSIENT} or self._dialect.is_timeout(error):
            raise error
        self._end(connection)
        self._begin(connection)

    def _changes(
        self, connection: sa.Connection, observed: DatabaseObservations
    ) -> Iterator[Difference]:
        if not self._known:
            self._tables = self._read_all(connection)
            self._baseline = self._states(connection, self._tables.values())
            self.fresh, self._known = not self._tables, True
            return
        # Where no statement of this process can have made the change, another process has.
        by_others = observed.unclear or not observed.writes
        if observed.ddl or (by_others and self._listed(connection) != self._list):
            yield from self._schema_changes(connection)
        tables = {
            table.name: table
            for table in self._tables.values()
            if by_others or _is_among(table.name, observed.written)
        }
        tables |= {table.name: table for table in self._counted_differently(connection)}
        for table in tables.values():
            difference = self._read(connection, table, table.look)
            if difference and _is_among(table.name, observed.dropped):
                yield from difference.remade()
            elif difference:
                yield difference

    def _counted_differently(self, connection: sa.Connection) -> list[WatchedTable]:
        """The tables whose number of rows, or highest key, is not as expected."""
        found: list[WatchedTable] = []
        seen = [table for table in self._tables.values() if not table.unseen]
        for start in range(0, len(seen), TOGETHER):
            few = seen[start : start + TOGETHER]
            questions = chain.from_iterable(table.counting(connection) for table in few)
            try:
                answers = iter(connection.exec_driver_sql(f"SELECT {', '.join(questions)}").one())
            except sa.exc.DBAPIError as error:
                self._begin_again(connection, error)
                found += few  # a look shows which of them it was
                continue
            for table in few:
                expected = table.expected()
                if [next(answers) for _each in expected] != expected:
                    found.append(table)
        return found

    def _schema_changes(self, connection: sa.Connection) -> Iterator[Difference]:
        """Tables that were dropped, made, or changed."""
        now = {table.name: table for table in self._reflect(connection)}
        for name in self._tables.keys() - now.keys():
            dropped = self._tables.pop(name)
            if dropped.rows:
                yield dropped.all_gone()
        for name, table in now.items():
            known = self._tables.get(name)
            if known is None:
                self._tables[name] = table
                if self.looks_for is not None and self.looks_for.is_test:
                    self.made_in_tests.add(name)
            elif (known.columns, known.key) != (table.columns, table.key):
                self._read(connection, table, table.begin)
                self._tables[name] = table

    def _read(
        self, connection: sa.Connection, table: WatchedTable, look: Callable[[sa.Connection], T]
    ) -> T | None:
        """Look at one table; an error hides this table only."""
        unseen = table.unseen
        try:
            found = look(connection)
        except Exception as error:  # noqa: BLE001 -- a driver or a project's own converter may raise anything
            self._begin_again(connection, error)
            table.unseen = True
            denied = self._dialect.is_permission_denied(error)
            why = "this role may not read it" if denied else "not read"
            self._note(f"{table.name}: {why} ({_short(error)})")
            return None
        if table.unseen and not unseen:
            self._note(
                f"{table.name} has more than {SMALL} rows and no number for a key: of its rows "
                f"only what this process did to them by key is known"
            )
        return found

    def _listed(self, connection: sa.Connection) -> list[list[str]]:
        """The names of all tables: cheaper than a reflection."""
        inspector = sa.inspect(connection)
        schemas = self._dialect.application_schemas(connection)
        return [sorted(inspector.get_table_names(schema)) for schema in schemas]

    def _reflect(self, connection: sa.Connection) -> Iterable[WatchedTable]:
        self._list = self._listed(connection)
        with warnings.catch_warnings():
            # A column of a type that SQLAlchemy does not know is read as the driver reads it.
            warnings.simplefilter("ignore", sa.exc.SAWarning)
            for schema in self._dialect.application_schemas(connection):
                parts = self._dialect.storage_tables(connection, schema)
                for table in reflected(connection, self.name, schema):
                    if table.name.name in parts or table.name.name.startswith(LEDGER):
                        continue
                    if not table.key:
                        self.keyless.add(table.name)
                    yield table


def _is_among(name: TableName, written: AbstractSet[WrittenName]) -> bool:
    """Whether a table may be one of those named; a name without its schema may be any schema's."""
    return any(
        table.lower() == name.name.lower() and schema in {None, name.schema}
        for schema, table in written
    )


def _short(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:200]}"
