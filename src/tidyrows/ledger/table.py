"""The ledger: one table in the same database that names every row before it can be forgotten.

Each entry is written in the transaction whose rows it names, just before its COMMIT: the one form
of bookkeeping that is exact under SIGKILL. What is entered, and by whom, is in
:mod:`tidyrows.ledger.entries` and :mod:`tidyrows.ledger.journal`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from tidyrows.dialects import database_name, dialect_for
from tidyrows.errors import LedgerError
from tidyrows.greenlets import is_async, spawn, synchronous
from tidyrows.ledger.process import OPTIONS, Owner, owner_of
from tidyrows.production import refuse_production

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidyrows.worker import WorkerContext

VERSION = 1
"""Of the table's form and of what its bodies say."""
NAME = "tidyrows_ledger"
"""The table, unless it is told otherwise."""
LEDGER = "tidyrows"
"""The maker of rows that are nobody's: the version, the next integers."""
RUN, WORKER, _TEST = 80, 40, 255
"""How much of a run's, a worker's and a test's id is written; a run is found by as much."""


class Ledger:
    """Rows and resources of all workers, in a table of the database that they are in.

    Give it to ``ResourceTracker(engine, ledger=...)``. Workers of one process share one lock and
    one heartbeat per engine and table; both begin with the first tracker that starts.

    Args:
        engine: reaches the database; an Engine or an AsyncEngine.
        name: the table.
        schema: where it is; the database's default schema by default.
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
        if beat <= 0:
            raise ValueError(f"beat={beat!r} is no time between heartbeats; give seconds, as 2.0.")
        refuse_production(bind.url, allow_production)
        self.engine = bind
        self.name = name
        self.beat = beat
        self.dialect = dialect_for(bind)
        self._schema = schema
        self._table: sa.Table | None = None
        self._inserts: dict[Any, tuple[str, Sequence[str] | None]] = {}

    @property
    def database(self) -> str:
        """How row keys name its database."""
        return database_name(self.engine)

    @property
    def is_private(self) -> bool:
        """Whether no other process can see the database, so that nothing need be entered."""
        return self.dialect.is_private(self.engine)

    # -- the table -----------------------------------------------------------------------------

    def install(self) -> None:
        """Make the table, where it is not there; safe when several workers do so at once.

        Raises:
            LedgerError: it is there in another version, or this role may not make tables; the
                error then shows the statements to give to whoever may.
        """
        with self.engine.connect().execution_options(**OPTIONS) as connection:
            table = self.table_on(connection)
            if self._version(connection) is None:
                connection.rollback()
                self._create(connection, table)
            connection.rollback()
            self.check(connection)

    async def install_async(self) -> None:
        """As :meth:`install`, for an AsyncEngine."""
        await spawn(self.install)

    def ddl(self) -> str:
        """The statements that :meth:`install` runs."""
        with self.engine.connect() as connection:
            table = self.table_on(connection)
        return ";\n".join(self._statements(table)) + ";"

    def table_on(self, connection: sa.Connection) -> sa.Table:
        """The table, by its real schema; the connection tells which one is the default."""
        table = self._table
        if table is None:
            schema = self._schema or connection.dialect.default_schema_name
            text = self.dialect.long_text
            table = self._table = sa.Table(
                self.name,
                sa.MetaData(),
                sa.Column("maker", sa.String(16), primary_key=True),
                sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
                sa.Column("owner", sa.String(16), nullable=False),
                sa.Column("scope", sa.Integer, nullable=False),
                sa.Column("kind", sa.String(16), nullable=False),
                sa.Column("schema_name", sa.String(255)),
                sa.Column("table_name", sa.String(255)),
                sa.Column("run", sa.String(RUN)),
                sa.Column("worker", sa.String(WORKER)),
                sa.Column("test", sa.String(_TEST)),
                sa.Column("body", text, nullable=False),
                sa.Column("written", sa.Double, nullable=False),
                schema=sa.quoted_name(schema, quote=None) if schema else None,
                **self.dialect.table_options,
            )
            sa.Index(f"{self.name}_owner", table.c.owner, table.c.scope)
        return table

    def check(self, connection: sa.Connection) -> None:
        """Raise unless the table is there, in this version.

        Raises:
            LedgerError: it is not.
        """
        table = self.table_on(connection)
        version = self._version(connection)
        if version is None:
            raise LedgerError(
                f"The database {self.database} has no ledger {table.fullname}. Write "
                f"Ledger(engine).install() once, before the first tracker starts."
            )
        if version != str(VERSION):
            raise LedgerError(
                f"The ledger {table.fullname} has version {version}, and this tidyrows writes "
                f"version {VERSION}. Sweep it with the tidyrows that made it, drop the table, then "
                f"write Ledger(engine).install()."
            )

    def _version(self, connection: sa.Connection) -> str | None:
        """The version of the table; None where there is none."""
        table = self.table_on(connection)
        with self.naming_rights():
            if not sa.inspect(connection).has_table(table.name, schema=table.schema):
                return None
            found = connection.execute(
                sa.select(table.c.body).where(table.c.maker == LEDGER, table.c.seq == 0),
                execution_options=OPTIONS,
            ).scalar()
        return None if found is None else str(found)

    @contextmanager
    def naming_rights(self) -> Iterator[None]:
        """Say which rights a role needs, where the database refuses it the ledger.

        Raises:
            LedgerError: this role lacks one of them.
        """
        try:
            yield
        except sa.exc.DBAPIError as error:
            if not self.dialect.lacks_right(error):
                raise
            name = self.name if self._table is None else self._table.fullname
            raise LedgerError(
                f"This role may not use the ledger {name} in {self.database} as it has to: "
                f"{type(error.orig).__name__}. A tracker needs the rights SELECT, INSERT and "
                f"UPDATE on it, a cleanup and a sweep DELETE too, find_orphans SELECT alone. Have "
                f"somebody who may run GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO this "
                f"role; print(Ledger(engine).ddl()) shows what makes the table."
            ) from error

    def _statements(self, table: sa.Table) -> list[str]:
        dialect = self.engine.dialect
        made = CreateTable(table, if_not_exists=True).compile(dialect=dialect)
        indexes = [str(CreateIndex(each).compile(dialect=dialect)) for each in table.indexes]
        return [str(made).strip(), *indexes, *self._first_rows(table)]

    def _first_rows(self, table: sa.Table) -> list[str]:
        """The version, and the next range of integers."""
        rows = [(0, "version", str(VERSION)), (1, "integers", "0")]
        statements = [
            sa.insert(table).values(
                maker=LEDGER, seq=seq, owner=LEDGER, scope=0, kind=kind, body=body, written=0
            )
            for seq, kind, body in rows
        ]
        return [
            str(each.compile(dialect=self.engine.dialect, compile_kwargs={"literal_binds": True}))
            for each in statements
        ]

    def _create(self, connection: sa.Connection, table: sa.Table) -> None:
        """Each statement in a transaction of its own: another worker may have been quicker."""
        failure: sa.exc.DBAPIError | None = None
        for statement in self._statements(table):
            try:
                connection.exec_driver_sql(statement.replace("%", "%%"))
                connection.commit()
            except sa.exc.DBAPIError as error:  # it is there by now, or it cannot be made
                connection.rollback()
                failure = failure or error
        if failure is not None and self._version(connection) is None:
            connection.rollback()
            ddl = ";\n".join(self._statements(table))
            raise LedgerError(
                f"This role cannot make the ledger {table.fullname} in {self.database}: "
                f"{type(failure.orig).__name__}. Give these statements to somebody who may, with "
                f"the rights SELECT, INSERT, UPDATE and DELETE on it for this role:\n{ddl};"
            ) from failure

    # -- this process --------------------------------------------------------------------------

    @property
    def place(self) -> tuple[str, str | None]:
        """What tells it from other ledgers of its engine."""
        return self.name, self._schema

    def open(self) -> Owner:
        """Who this process is in the ledger: its lock held and its heart beating.

        Raises:
            LedgerError: the table is not there, or has another version.
        """
        owner = owner_of(self)
        assert owner is not None  # noqa: S101 -- it was to be begun
        return owner

    def close(self) -> None:
        """Let go of the lock and stop the heart; a tracker that starts begins anew.

        What is entered stays there, for a sweep. A process that ends does the same.
        """
        owner = owner_of(self, begin=False)
        if owner is not None:
            owner.close()

    def now(self, connection: sa.Connection) -> float:
        """The time by the database's clock, in seconds."""
        return float(connection.execute(sa.text(f"SELECT {self.dialect.clock}")).scalar_one())

    # -- rows of the table ---------------------------------------------------------------------

    def run(self, connection: sa.Connection, statement: Any) -> Any:
        """The result of a statement about the ledger; no tracker hears it."""
        return connection.execute(statement, execution_options=OPTIONS)

    @contextmanager
    def alone(self, *, lock_timeout: float) -> Iterator[sa.Connection]:
        """A transaction about the ledger only, committed at its end.

        Raises:
            LedgerError: this role lacks a right.
        """
        dialect = self.dialect
        with (
            self.naming_rights(),
            self.engine.connect().execution_options(**OPTIONS) as connection,
        ):
            try:
                dialect.begin_cleanup(
                    connection, lock_timeout=lock_timeout, statement_timeout=lock_timeout + 5.0
                )
                yield connection
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            finally:
                dialect.end_cleanup(connection)

    def insert(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write entries in one statement, as the driver takes it.

        Args:
            connection: in the transaction that they belong to.
            rows: ``maker`` to ``body``, in each the same columns.
        """
        sql, order = self._insert_of(connection, len(rows))
        values = {
            f"{name}{at}": value for at, row in enumerate(rows) for name, value in row.items()
        }
        sent: Any = values if order is None else tuple(values[name] for name in order)
        connection.exec_driver_sql(sql, sent, execution_options=OPTIONS)

    def _insert_of(self, connection: sa.Connection, count: int) -> tuple[str, Sequence[str] | None]:
        key = type(connection.dialect), count
        made = self._inserts.get(key)
        if made is None:
            table = self.table_on(connection)
            clock: sa.ColumnElement[float] = sa.literal_column(self.dialect.clock)
            rows = [
                {
                    column.name: clock
                    if column.name == "written"
                    else sa.bindparam(f"{column.name}{at}", type_=column.type)
                    for column in table.columns
                }
                for at in range(count)
            ]
            compiled: Any = sa.insert(table).values(rows).compile(dialect=connection.dialect)
            made = self._inserts[key] = str(compiled), compiled.positiontup
        return made

    def row(
        self,
        owner: Owner,
        scope: int,
        seq: int,
        kind: str,
        body: str,
        *,
        context: WorkerContext,
        place: tuple[str | None, str | None] = (None, None),
    ) -> dict[str, Any]:
        """An entry as :meth:`insert` takes it.

        Args:
            owner: who makes it.
            scope: the number of the tracker.
            seq: its own number.
            kind: what the body is.
            body: JSON.
            context: whose rows it names.
            place: their schema and table.
        """
        schema, table = place
        return {
            "maker": owner.id,
            "seq": seq,
            "owner": owner.id,
            "scope": scope,
            "kind": kind,
            "schema_name": schema,
            "table_name": table,
            "run": context.run_id[:RUN],
            "worker": context.worker_id[:WORKER],
            "test": context.test_id and context.test_id[:_TEST],
            "body": body,
        }

    def __repr__(self) -> str:
        return f"<Ledger {self.name} of {self.database}>"


def in_order(table: sa.Table) -> list[sa.ColumnElement[Any]]:
    """How an owner's entries are sorted: what it has from others first, then its own."""
    own = table.c.maker == table.c.owner
    foreign = sa.case((own, 0.0), else_=table.c.written)
    return [sa.case((own, 1), else_=0), foreign, table.c.seq]
