"""The ledger: one table, in the same database as the rows, that names every tracked row.

Each entry is written in the transaction whose rows it names, just before its COMMIT: no other form
of bookkeeping is exact under SIGKILL.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from tidyrows.arguments import checked, name, number, optional
from tidyrows.dialects import dialect_for
from tidyrows.errors import LedgerError
from tidyrows.greenlets import is_async, spawn, synchronous
from tidyrows.ledger.entry_table import LEDGER, OPTIONS, VERSION, EntryTable
from tidyrows.ledger.process import LedgerProcess
from tidyrows.production import PERMISSION, refuse_places, refuse_production

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.ext.asyncio import AsyncEngine

NAME = "tidyrows_ledger"
"""The table's default name."""

_processes: WeakKeyDictionary[sa.Engine, dict[Any, LedgerProcess]] = WeakKeyDictionary()
_lock = threading.RLock()


class Ledger(EntryTable):
    """A table that names the rows and resources of all workers, in the database of the rows.

    Give it to ``ResourceTracker(engine, ledger=...)``. The trackers of one process share one lock
    and one heartbeat per engine and table; both begin with the first tracker that starts.

    Args:
        engine: an Engine or an AsyncEngine of the database.
        name: the table.
        schema: the table's schema; the database's default schema by default.
        beat: seconds between two heartbeats.
        allow_production: as for :class:`ResourceTracker`.

    Attributes:
        name: the table.

    Raises:
        ProductionDatabaseError: the database looks like production.

    Example:
        >>> Ledger(engine).install()
        >>> tracker = ResourceTracker(engine, ledger=Ledger(engine))
    """

    @checked(
        name=name("tidyrows_ledger"),
        schema=optional(name("audit")),
        beat=number("2.0", above=0),
        allow_production=PERMISSION,
    )
    def __init__(
        self,
        engine: sa.Engine | AsyncEngine,
        *,
        name: str = NAME,
        schema: str | None = None,
        beat: float = 2.0,
        allow_production: bool | Collection[str] = False,
    ) -> None:
        bind = synchronous(engine) if is_async(engine) else engine
        if not isinstance(bind, sa.Engine):
            is_url = isinstance(engine, (str, sa.URL))
            raise LedgerError(
                f"A ledger is reached by an engine, not by a {type(engine).__name__}. Write "
                f"{'Ledger(create_engine(url))' if is_url else 'Ledger(engine)'}."
            )
        refuse_production(bind.url, allow_production)
        refuse_places(dialect_for(bind).places_by_url(bind), allow_production)
        self._allow_production = allow_production
        super().__init__(bind, name, schema)
        self.beat = beat

    def check(self, connection: sa.Connection) -> None:
        """Also raise ProductionDatabaseError where the connection leads to production."""
        if self._allow_production is not True:
            driver = connection.connection.dbapi_connection
            refuse_places(self.dialect.places_of(driver) or (), self._allow_production)
        super().check(connection)

    def install(self) -> None:
        """Create the table where it does not exist; safe when several workers do so at once.

        Raises:
            LedgerError: it exists in another version, or this role may not create tables; the
                error then shows the statements for a role that may.
        """
        with (
            self.explaining_rights(),
            self.dialect.connect(self.engine, self.seconds) as connection,
        ):
            connection.execution_options(**OPTIONS)
            table = self.table_on(connection)
            if self.version(connection) is None:
                connection.rollback()
                self._create(connection, table)
            connection.rollback()
            self.check(connection)

    async def install_async(self) -> None:
        """As :meth:`install`, for an AsyncEngine."""
        await spawn(self.install)

    def ddl(self) -> str:
        """The statements that :meth:`install` runs."""
        with self.looking() as connection:
            table = self.table_on(connection)
        return ";\n".join(self._statements(table)) + ";"

    def open(self) -> LedgerProcess:
        """This process in the ledger, with its lock held and its heartbeat running.

        Raises:
            LedgerError: the table does not exist, or has another version.
        """
        with _lock:
            process = self._process()
            if process is None:
                process = LedgerProcess(self, beat=self.beat)
                _processes.setdefault(self.engine, {})[self.place] = process
                if not self.dialect.heartbeat_in_file:
                    _listen()
            return process

    def close(self) -> None:
        """Release the lock and stop the heartbeat; the next tracker that starts begins anew.

        The entries stay, for a sweep. The end of the process does the same.
        """
        process = self._process()
        if process is not None:
            process.close()

    def _process(self) -> LedgerProcess | None:
        """This process in the ledger, the same for all trackers of an engine, if it is running."""
        with _lock:
            process = _processes.get(self.engine, {}).get(self.place)
            return process if process is not None and process.is_running else None

    def _statements(self, table: sa.Table) -> list[str]:
        dialect = self.engine.dialect
        made = CreateTable(table, if_not_exists=True).compile(dialect=dialect)
        indexes = [str(CreateIndex(each).compile(dialect=dialect)) for each in table.indexes]
        first_rows = [
            sa.insert(table).values(
                maker=LEDGER, seq=seq, owner=LEDGER, scope=0, kind=kind, body=body, written=0
            )
            for seq, kind, body in ((0, "version", str(VERSION)), (1, "integers", "0"))
        ]
        options = {"literal_binds": True}
        inserts = [str(i.compile(dialect=dialect, compile_kwargs=options)) for i in first_rows]
        return [str(made).strip(), *indexes, *inserts]

    def _create(self, connection: sa.Connection, table: sa.Table) -> None:
        """Each statement in a transaction of its own: another worker may be quicker."""
        failure: sa.exc.DBAPIError | None = None
        for statement in self._statements(table):
            try:
                connection.exec_driver_sql(statement.replace("%", "%%"))
                connection.commit()
            except sa.exc.DBAPIError as error:  # it exists by now, or it cannot be created
                connection.rollback()
                failure = failure or error
        if failure is not None and self.version(connection) is None:
            connection.rollback()
            ddl = ";\n".join(self._statements(table))
            raise LedgerError(
                f"This role cannot make the ledger {table.fullname} in {self.database}: "
                f"{type(failure.orig).__name__}. Give these statements to somebody who may, with "
                f"the rights SELECT, INSERT, UPDATE and DELETE on it for this role:\n{ddl};"
            ) from failure


# -- what needs a database alone -------------------------------------------------------------------

_ALONE = re.compile(r"\s*(?:create|alter|drop)\s+database\b", re.IGNORECASE)
"""CREATE DATABASE ... TEMPLATE, ALTER DATABASE ... RENAME, DROP DATABASE."""


def _listen() -> None:
    """Step aside where an engine is disposed of, and for such statements on any engine."""
    with _lock:
        if not sa.event.contains(sa.Engine, "engine_disposed", _after_dispose):
            sa.event.listen(sa.Engine, "engine_disposed", _after_dispose)
            sa.event.listen(sa.Engine, "before_cursor_execute", _before_statement)


def _after_dispose(engine: sa.Engine) -> None:
    for process in list(_processes.get(engine, {}).values()):
        process.step_aside()


def _before_statement(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
    if _ALONE.match(statement) is not None:
        for engine in list(_processes):
            _after_dispose(engine)
