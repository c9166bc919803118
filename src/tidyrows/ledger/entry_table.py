"""The SQL of a ledger's table: its columns, its version, and statements about its entries."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from tidyrows.capture.changes import INTERNAL
from tidyrows.dialects import database_name, dialect_for
from tidyrows.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidyrows.worker import WorkerContext

VERSION = 1
"""Of the table's columns and of the bodies of its entries."""
LEDGER = "tidyrows"
"""The maker of rows that belong to no process: the version, the next integers."""
OPTIONS = {INTERNAL: True, "schema_translate_map": None}
"""Execution options of statements about a ledger: real names, and no tracker observes them."""
RUN, WORKER, TEST = 80, 40, 255
"""The characters of a run's, a worker's and a test's id that are written."""


class EntryTable:
    """The table of a ledger, and the statements about it.

    Attributes:
        seconds: what a connection about the ledger alone may take in all.
    """

    seconds = 60.0

    def __init__(self, engine: sa.Engine, name: str, schema: str | None) -> None:
        self.engine = engine
        self.name = name
        self.dialect = dialect_for(engine)
        self._schema = schema
        self._table: sa.Table | None = None
        self._inserts: dict[Any, tuple[str, Sequence[str] | None]] = {}

    @property
    def database(self) -> str:
        """The name of its database in row keys."""
        return database_name(self.engine)

    def is_same(self, other: EntryTable) -> bool:
        """Whether it is that table, in one database."""
        return (self.name, self._schema) == (other.name, other._schema)

    @property
    def is_private(self) -> bool:
        """Whether no other process can see the database, so that no entry is needed."""
        return self.dialect.is_private(self.engine)

    @property
    def place(self) -> tuple[str, str | None]:
        """The table's name and schema: no two ledgers of an engine have the same."""
        return self.name, self._schema

    def table_on(self, connection: sa.Connection) -> sa.Table:
        """The table, in its real schema; the connection knows the default one."""
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
                sa.Column("test", sa.String(TEST)),
                sa.Column("body", text, nullable=False),
                sa.Column("written", sa.Double, nullable=False),
                schema=sa.quoted_name(schema, quote=None) if schema else None,
                **self.dialect.table_options,
            )
            sa.Index(f"{self.name}_owner", table.c.owner, table.c.scope)
        return table

    def check(self, connection: sa.Connection) -> None:
        """Raise LedgerError unless the table exists, in this version."""
        table = self.table_on(connection)
        version = self.version(connection)
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

    def version(self, connection: sa.Connection) -> str | None:
        """The version of the table; None where there is none."""
        table = self.table_on(connection)
        with self.explaining_rights():
            if not sa.inspect(connection).has_table(table.name, schema=table.schema):
                return None
            found = connection.execute(
                sa.select(table.c.body).where(table.c.maker == LEDGER, table.c.seq == 0),
                execution_options=OPTIONS,
            ).scalar()
        return None if found is None else str(found)

    @contextmanager
    def explaining_rights(self) -> Iterator[None]:
        """Raise LedgerError, with the rights that are needed, where this role lacks one."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            if not self.dialect.is_permission_denied(error):
                self.dialect.explain_first_connection(error, self.engine)
                raise
            name = self.name if self._table is None else self._table.fullname
            raise LedgerError(
                f"This role may not use the ledger {name} in {self.database} as it has to: "
                f"{type(error.orig).__name__}. A tracker needs the rights SELECT, INSERT and "
                f"UPDATE on it, a cleanup and a sweep DELETE too, find_orphans SELECT alone. Have "
                f"somebody who may run GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO this "
                f"role; print(Ledger(engine).ddl()) shows what makes the table."
            ) from error
        except Exception as error:
            self.dialect.explain_first_connection(error, self.engine)
            raise

    def now(self, connection: sa.Connection) -> float:
        """The time by the database's clock, in seconds."""
        return float(connection.execute(sa.text(f"SELECT {self.dialect.clock}")).scalar_one())

    def execute(self, connection: sa.Connection, statement: Any) -> Any:
        """The result of a statement about the ledger; no tracker observes it."""
        return connection.execute(statement, execution_options=OPTIONS)

    @contextmanager
    def transaction(self, *, lock_timeout: float) -> Iterator[sa.Connection]:
        """A transaction about the ledger only, committed at its end."""
        dialect = self.dialect
        with (
            self.explaining_rights(),
            dialect.connect(self.engine, self.seconds) as connection,
        ):
            connection.execution_options(**OPTIONS)
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

    @contextmanager
    def looking(self) -> Iterator[sa.Connection]:
        """A connection to look into the ledger with; no wait is longer than ``seconds``."""
        with (
            self.explaining_rights(),
            self.dialect.looking(self.engine, self.seconds, **OPTIONS) as connection,
        ):
            yield connection

    def within(self, seconds: float) -> Self:
        """The same ledger, with connections that take no longer than so many seconds."""
        twin = copy(self)
        twin.seconds = min(seconds, self.seconds)
        return twin

    def insert(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write entries of :meth:`row` in one statement, in the transaction of their rows.

        The database's clock tells when they were ``written``, unless the rows do.
        """
        key = type(connection.dialect), len(rows), "written" in rows[0]
        sql, order = self._inserts.get(key) or self._insert_of(connection, key)
        values = {
            f"{name}{at}": value for at, row in enumerate(rows) for name, value in row.items()
        }
        sent: Any = values if order is None else tuple(map(values.__getitem__, order))
        connection.exec_driver_sql(sql, sent, execution_options=OPTIONS)

    def _insert_of(
        self, connection: sa.Connection, key: tuple[type, int, bool]
    ) -> tuple[str, Sequence[str] | None]:
        table = self.table_on(connection)
        clock: sa.ColumnElement[float] = sa.literal_column(self.dialect.clock)
        rows = [
            {
                column.name: clock
                if column.name == "written" and not key[2]
                else sa.bindparam(f"{column.name}{at}", type_=column.type)
                for column in table.columns
            }
            for at in range(key[1])
        ]
        compiled: Any = sa.insert(table).values(rows).compile(dialect=connection.dialect)
        made = self._inserts[key] = str(compiled), compiled.positiontup
        return made

    def row(
        self,
        process_id: str,
        scope: int,
        seq: int,
        kind: str,
        body: str,
        *,
        context: WorkerContext,
        place: tuple[str | None, str | None] = (None, None),
    ) -> dict[str, Any]:
        """An entry: of the tracker ``scope``, with its number, about rows of a schema and table."""
        schema, table = place
        return {
            "maker": process_id,
            "seq": seq,
            "owner": process_id,
            "scope": scope,
            "kind": kind,
            "schema_name": schema,
            "table_name": table,
            "run": context.run_id[:RUN],
            "worker": context.worker_id[:WORKER],
            "test": context.test_id and stored_test(context.test_id),
            "body": body,
        }

    def __repr__(self) -> str:
        return f"<Ledger {self.name} of {self.database}>"


def stored_test(test: str) -> str:
    """A test's id as it is entered; of a long one the beginning may be another test's, too."""
    if len(test) <= TEST:
        return test
    digest = sha256(test.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{test[: TEST - len(digest) - 1]}~{digest}"


def entry_order(table: sa.Table) -> list[sa.ColumnElement[Any]]:
    """The order of one owner's entries: those that other processes made first, then its own."""
    own = table.c.maker == table.c.owner
    foreign = sa.case((own, 0.0), else_=table.c.written)
    return [sa.case((own, 1), else_=0), foreign, table.c.seq]
