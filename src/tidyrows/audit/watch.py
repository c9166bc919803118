"""One database: what has changed in it since the last look, whoever changed it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.audit.observations import HeardThere
from tidyrows.audit.tables import SMALL, TOGETHER, Difference, Table, reflected
from tidyrows.dialects import Fault, dialect_for
from tidyrows.ledger.table import NAME as LEDGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tidyrows.audit.reach import Reach, SharedReach
    from tidyrows.audit.sql_scan import Name
    from tidyrows.keys import TableName

T = TypeVar("T")

_LOCK_WAIT = 1.0
"""Seconds to wait for a table that somebody has locked: the suite shall not wait for the audit."""
_STATEMENT = 20.0


class Watch:
    """What is known of one database.

    Args:
        engine: of the suite.
        name: how its rows are named.
        reach: how it is looked at.
        say: takes what could not be looked at, and why.

    Attributes:
        fresh: it had no table when it was first met.
        gone: it is no longer there.
        keyless: the tables without a primary key, those too that were dropped meanwhile.
    """

    def __init__(
        self,
        engine: sa.Engine,
        name: str,
        reach: Reach | SharedReach,
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.fresh = True
        self.gone = False
        self.keyless: set[TableName] = set()
        self._dialect = dialect_for(engine)
        # An engine on a database in memory is not kept alive, and so neither is the database.
        self._engine = None if self._dialect.is_private(engine) else engine
        self._identity = self._dialect.identity(engine)
        self._sqlalchemy = engine.dialect
        self._say = say
        self._reach: Reach | SharedReach | None = reach
        self._tables: dict[TableName, Table] = {}
        self._list: list[list[str]] = []
        self._glances: dict[tuple[Any, ...], str] = {}
        self._mark: Any = None
        self._known = False

    def sees(self, row_table: TableName, key: Any) -> bool:
        """Whether a look would show what became of a row."""
        table = self._tables.get(row_table)
        return table is not None and table.sees(key)

    def go_by(self, reach: Reach | SharedReach) -> None:
        """Look by this way from now on."""
        self._reach = reach

    def release(self) -> None:
        """Close the connection: somebody may want to drop the database."""
        if self._reach is not None:
            try:
                self._reach.close()
            except Exception as error:  # noqa: BLE001 -- it is the audit's trouble, not the suite's
                self._say(f"{self.name}: the audit's connection does not close ({_short(error)})")
            self._mark = None  # SQLite's is a connection's own, and begins anew

    def let_go(self) -> None:
        """Keep nothing alive, until the database is met again."""
        self.release()
        if self._engine is None:
            self._reach = None

    def look(self, heard: HeardThere | None = None) -> list[Difference]:
        """What has changed since the last look; at the first nothing.

        Args:
            heard: what was heard of the database meanwhile; None for nothing.
        """
        identity = self._identity
        if self._engine is not None:
            identity = self._dialect.identity(self._engine)
        if identity != self._identity:
            return self._another(identity)
        if self._reach is None:
            return []
        try:
            return self._asked(self._reach, heard)
        except TimeoutError:
            # Whatever it waits for, the suite shall not wait for it after each test.
            self._reach = None
            self._say(f"{self.name} did not answer and was looked at no more")
        except Exception as error:  # noqa: BLE001 -- drivers and a project's own hooks may raise anything
            self._mark = None
            if self._engine is None and self._is_closed(error):
                self.gone = True
            else:
                self._say(f"{self.name} could not be looked at: {_short(error)}")
        return []

    def _asked(self, reach: Reach | SharedReach, heard: HeardThere | None) -> list[Difference]:
        try:
            return reach.call(lambda connection: self._look(connection, heard))
        except Exception as error:
            if self._engine is None or self._dialect.fault(error) is not Fault.LOST:
                raise
            # Somebody has closed all connections: what was done is this test's, not the next one's.
            return reach.call(lambda connection: self._look(connection, heard))

    def _is_closed(self, error: BaseException) -> bool:
        """Whether a database in memory has ended with its connection."""
        return self._sqlalchemy.is_disconnect(error, None, None)  # type: ignore[arg-type]

    def _another(self, identity: tuple[Any, ...] | None) -> list[Difference]:
        """The database was dropped, or made anew in its place."""
        self.release()
        self._identity, self._mark = identity, None
        self.gone = identity is None
        lost = [table.all_gone() for table in self._tables.values() if table.rows]
        self._tables = {}
        self._known = not self.gone
        return lost if self.gone else [*lost, *self.look(HeardThere(ddl=True))]

    def _look(self, connection: sa.Connection, heard: HeardThere | None) -> list[Difference]:
        if self._engine is None and self._dialect.is_begun(connection.connection.dbapi_connection):
            self._say(f"{self.name}: a transaction was open when it was to be looked at")
            return []
        mark = self._dialect.change_mark(connection, lock_timeout=_LOCK_WAIT)
        same = mark is not None and mark == self._mark
        connection.rollback()
        connection.connection.rollback()  # what the mark was asked in, the driver has begun
        if same and not (heard and heard.ddl):
            return []
        try:
            self._begin(connection)
            found = list(self._changes(connection, heard))
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
        """After an error that is of a table, and not of the connection or of the moment.

        Not by a savepoint: MariaDB's Aria tables do not take part in one.
        """
        fault = self._dialect.fault(error)
        if fault in {Fault.LOST, Fault.TRANSIENT} or self._dialect.is_timeout(error):
            raise error
        self._end(connection)
        self._begin(connection)

    def _changes(self, connection: sa.Connection, heard: HeardThere | None) -> Iterator[Difference]:
        if not self._known:
            self._tables = {table.name: table for table in self._reflect(connection)}
            for table in self._tables.values():
                self._read(connection, table, table.begin)
            self.fresh, self._known = not self._tables, True
            return
        # Where a change is there that nobody was heard to make, it is another process's.
        stranger = heard is None or not heard.writes or heard.unclear
        if (heard and heard.ddl) or (stranger and self._listed(connection) != self._list):
            yield from self._schema_changes(connection)
        written = {*heard.written} if heard and not stranger else None
        closely = [table for table in self._tables.values() if _is_among(table.name, written)]
        close = {table.name for table in closely}
        others = [table for table in self._suspicious(connection) if table.name not in close]
        for table in (*closely, *others):
            difference = self._read(connection, table, table.look)
            if difference and heard and heard.dropped and _is_among(table.name, heard.dropped):
                yield from difference.remade()
            elif difference:
                yield difference

    def _suspicious(self, connection: sa.Connection) -> list[Table]:
        """The tables to which, at a glance, rows were added, or from which some were taken."""
        found: list[Table] = []
        seen = [table for table in self._tables.values() if not table.unseen]
        for start in range(0, len(seen), TOGETHER):
            few = seen[start : start + TOGETHER]
            try:
                told = iter(connection.exec_driver_sql(self._glance(connection, few)).one())
            except sa.exc.DBAPIError as error:
                self._begin_again(connection, error)
                found += few  # a look tells which of them it was
                continue
            for table in few:
                expected = table.expected()
                if [next(told) for _each in expected] != expected:
                    found.append(table)
        return found

    def _glance(self, connection: sa.Connection, tables: list[Table]) -> str:
        """The statement that glances at these tables; to write it takes longer than to run it."""
        key = tuple((table.name, table.above) for table in tables)
        if key not in self._glances:
            statement = sa.select(*(look for table in tables for look in table.glance()))
            compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
            if len(self._glances) >= TOGETHER:
                self._glances.clear()
            self._glances[key] = str(compiled)
        return self._glances[key]

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
            elif (known.columns, known.key) != (table.columns, table.key):
                self._read(connection, table, table.begin)
                self._tables[name] = table

    def _read(
        self, connection: sa.Connection, table: Table, look: Callable[[sa.Connection], T]
    ) -> T | None:
        """A look at a table; one that cannot be read blinds the audit for itself alone."""
        unseen = table.unseen
        try:
            found = look(connection)
        except Exception as error:  # noqa: BLE001 -- a driver or a project's own converter may raise anything
            self._begin_again(connection, error)
            table.unseen = True
            why = (
                "this role may not read it"
                if self._dialect.is_permission_denied(error)
                else "not read"
            )
            self._say(f"{table.name}: {why} ({_short(error)})")
            return None
        if table.unseen and not unseen:
            self._say(
                f"{table.name} has more than {SMALL} rows and no number for a key: of its rows "
                f"only what this process did to them by key is known"
            )
        return found

    def _listed(self, connection: sa.Connection) -> list[list[str]]:
        """The names of all tables: cheaper than to reflect them."""
        inspector = sa.inspect(connection)
        schemas = self._dialect.application_schemas(connection)
        return [sorted(inspector.get_table_names(schema)) for schema in schemas]

    def _reflect(self, connection: sa.Connection) -> Iterable[Table]:
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


def _is_among(name: TableName, written: set[Name] | None) -> bool:
    """Whether a table may be one of those named; a name without its schema may be any schema's."""
    if written is None:
        return True
    return any(
        table.lower() == name.name.lower() and schema in {None, name.schema}
        for schema, table in written
    )


def _short(error: BaseException) -> str:
    told = getattr(error, "orig", None) or error
    return f"{type(told).__name__}: {str(told).strip().partition(chr(10))[0][:200]}"
