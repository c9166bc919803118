"""Role *catalogue*: real tables, schemas, and what else is in the database's catalogue."""

from __future__ import annotations

import re
from abc import abstractmethod
from contextlib import closing, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import sqlalchemy as sa

from tidyrows.dialects.driver import DriverAccess, database_name
from tidyrows.schema.reflect import (
    reflect_columns,
    reflect_foreign_keys,
    without_reflection_warnings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place
    from tidyrows.schema.reflect import Columns


_FILLS = re.compile(
    r"""\b(?:INSERT\s+(?:LOW_PRIORITY\s+|DELAYED\s+|HIGH_PRIORITY\s+|IGNORE\s+|OR\s+\w+\s+)*
    (?:INTO\s+)?|REPLACE\s+(?:LOW_PRIORITY\s+|DELAYED\s+)?INTO\s+)
    ((?:[\w$.]+|"[^"]+"|`[^`]+`|\[[^\]]+\])+)\s*(?:\(|SELECT\b|VALUES?\b|SET\b|DEFAULT\b|AS\b)""",
    re.IGNORECASE | re.VERBOSE,
)


def filled_tables(body: str) -> tuple[str, ...]:
    """The tables that the body of a trigger inserts into, as written there without quotes."""
    names = (re.sub(r"""["`\[\]]""", "", name) for name in _FILLS.findall(body))
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class RealTable:
    """The table that a name in an INSERT means.

    Attributes:
        schema: the real schema (SQLite: ``main``, ``temp`` or the attached name).
        kind: ``other`` is a view, a foreign table, a virtual table.
        plain: whether a system column can prove that an upsert inserted.
        returns: whether RETURNING may be added to an INSERT; it needs more rights than INSERT, and
            a rule may have none.
        alters_keys: whether the database may store another key than was sent; RETURNING tells it.
        transactional: whether a ROLLBACK undoes what was written to it.
        moves_keys: whether a trigger changes keys of new rows later than RETURNING tells them.
        incarnation: as :meth:`Catalogue.incarnations` tells it; None where it is not known.
        fills: tables that triggers insert into at an INSERT, as their texts name them; "" for
            such as no text, but ``rows_inserted`` tells.
    """

    schema: str
    kind: Literal["table", "temporary", "other"]
    plain: bool
    returns: bool = True
    alters_keys: bool = False
    transactional: bool = True
    moves_keys: bool = False
    incarnation: str | None = field(default=None, compare=False)
    fills: tuple[str, ...] = ()


class Catalogue(DriverAccess):
    """Questions about tables and about the database as a whole."""

    long_text: ClassVar[sa.types.TypeEngine[str]] = sa.Text()
    """The type of a column for text of any length."""
    table_options: ClassVar[Mapping[str, Any]] = {}
    """Options of the ledger's Table, so that it stores any text."""

    counts_every_change: ClassVar[bool] = False
    """Whether ``rows_inserted`` counts rows that were changed or deleted, too."""

    runs_code: ClassVar[bool] = False
    """Whether a statement may run code of the database that inserts: a procedure, a function."""

    deletes_by_key: ClassVar[bool] = True
    """Whether rows are deleted by their keys later, so that another incarnation matters."""

    # ----- tables

    @abstractmethod
    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The table that this name means here and now; None where there is none.

        It is called inside the user's transaction, and must not make that fail.

        Args:
            connection: the user's.
            schema: None for an unqualified name.
            name: the table's name.
        """

    def incarnations(
        self,
        connection: sa.Connection,
        tables: Iterable[Place],
        highest: Mapping[Place, int] = MappingProxyType({}),
    ) -> dict[Place, str]:
        """What tells one life of a table from the next: ``table/contents``, in one statement.

        The part before the stroke changes when the table is created anew, and is empty where only
        the contents have a number. The part after it changes when all rows go at once, as with
        TRUNCATE; a statement that rebuilds the table, and keeps its rows, may change it too.
        Tables of which neither is known are left out. It must not make a transaction fail.

        ``highest`` has keys that the database has generated. Where it may generate such a key
        again, ``<`` is added: the numbers have begun anew.
        """
        return {}

    def unique_columns(
        self, connection: sa.Connection, tables: Iterable[Place]
    ) -> Iterable[tuple[str, str, str, str]]:
        """The columns that no two rows of a table can share: schema, table, index, column.

        A table has none where rows of other tables count as its own (inheritance).
        """
        inspector = sa.inspect(connection)
        for schema, name in tables:
            keys: list[Any] = []
            # a table may have been dropped; indexes of expressions do not count
            with without_reflection_warnings(), suppress(sa.exc.NoSuchTableError):
                primary = inspector.get_pk_constraint(name, schema)["constrained_columns"]
                keys = [{"column_names": primary}, *inspector.get_unique_constraints(name, schema)]
                keys += [
                    each
                    for each in inspector.get_indexes(name, schema)
                    if each["unique"] and not each.get("dialect_options")
                ]
            for number, key in enumerate(keys):
                if None not in key["column_names"]:
                    yield from (
                        (schema, name, str(number), str(column)) for column in key["column_names"]
                    )

    def tables_of_unique_key(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> set[Place]:
        """Those whose primary key, as their Table has it, names one row in the database."""
        indexes: dict[tuple[Place, str], set[str]] = {}
        places = [table.place for table in tables]
        for schema, name, index, column in self.unique_columns(connection, places):
            indexes.setdefault(((schema, name), index), set()).add(column.lower())
        keys = {t.place: {column.name.lower() for column in t.key_columns} for t in tables}
        return {place for (place, _), columns in indexes.items() if keys[place] >= columns}

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers, rules and policies that may keep a row although its DELETE raised nothing."""
        return []

    def grant(self, connection: sa.Connection, table: sa.FromClause) -> str:
        """The statement that gives this role what a cleanup needs of a table."""
        role = str(connection.execute(sa.text("SELECT CURRENT_USER")).scalar_one())
        preparer = connection.dialect.identifier_preparer
        name = preparer.format_table(table)
        return f"GRANT SELECT, UPDATE, DELETE ON {name} TO {self.role(preparer, role)}"

    def role(self, preparer: sa.sql.compiler.IdentifierPreparer, name: str) -> str:
        """The current user as GRANT names it."""
        return preparer.quote(name)

    def hidden_tables(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str]]:
        """Tables (schema, name) that may have rows which this role cannot see."""
        return set()

    def invalid_indexes(self, connection: sa.Connection, schema: str, table: str) -> set[str]:
        """Indexes of a table that exist and are not used, since they were never finished."""
        return set()

    def storage_tables(self, connection: sa.Connection, schema: str) -> set[str]:
        """Tables whose rows are those of another table, which is listed too (partitions)."""
        return set()

    def is_system_table(self, schema: str, name: str) -> bool:
        """Whether a table is the database's own: an entry of a ledger never leads a sweep to it."""
        return False

    def lesser_writers(self, connection: sa.Connection, table: Place) -> list[str]:
        """Roles that may write to a table and are no superusers; none unless this role is one."""
        return []

    def rows_inserted(
        self, dbapi_connection: Any, *, inside: bool = True
    ) -> tuple[dict[Place | None, int], dict[Place | None, int]] | None:
        """How many rows a session has inserted, by table, or under None of all tables together.

        Args:
            dbapi_connection: the session.
            inside: whether the question may begin a transaction, and leave it open.

        Returns:
            The counts now, and what they begin with after the open transaction; only differences
            mean something. None where nothing can tell. A dialect overrides
            :meth:`driver_rows_inserted`.
        """
        try:
            with closing(dbapi_connection.cursor()) as cursor:
                counts = self.driver_rows_inserted(dbapi_connection, cursor)
            if not inside:
                dbapi_connection.rollback()
        except self._dbapi.Error as error:
            lost = self._dialect().is_disconnect(error, dbapi_connection, None)
            return ({}, {}) if lost else None  # no COMMIT will succeed
        except sa.exc.MissingGreenlet:
            return None
        return counts

    def driver_rows_inserted(
        self, dbapi_connection: Any, cursor: Any
    ) -> tuple[dict[Place | None, int], dict[Place | None, int]] | None:
        """As :meth:`rows_inserted`; may raise the driver's errors."""
        return None

    # ----- foreign keys

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        """All foreign keys that tables of these schemas hold, wherever they point."""
        return reflect_foreign_keys(connection, schemas)

    def columns_of(
        self, connection: sa.Connection, places: Iterable[Place]
    ) -> Mapping[Place, Columns]:
        """The columns of these tables, in few statements for all of them.

        Views, and tables that do not exist, are left out.
        """
        return reflect_columns(connection, places)

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """The schemas of all tables that hold a foreign key to a table of one of these."""
        return set(schemas)

    # ----- schemas, and the database as a whole

    def default_schema(self, bind: sa.Engine | sa.Connection) -> str:
        """The schema of tables that are named without one (known after the first connect)."""
        return str(bind.dialect.default_schema_name or "")

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """The schemas in which an application has its tables."""
        return [self.default_schema(connection)]

    def is_private(self, engine: sa.Engine) -> bool:
        """Whether no other process can ever see the database."""
        return False

    def places_by_url(self, engine: sa.Engine) -> list[tuple[str, str]]:
        """What is known without a connection of where one would lead, beside the URL's own words.

        Pairs as of :meth:`places_of`, or the name of an environment variable and its value.
        """
        return []

    def places_of(
        self, dbapi_connection: Any, *, rollback: bool = False
    ) -> list[tuple[str, str]] | None:
        """Where a connection leads, as driver and server say: pairs such as ``("host", "db-1")``.

        A connection that was made past the URL (by a ``creator``, a listener, an environment
        variable) leads elsewhere. It is called once per engine, in the user's transaction or
        before it; then ``rollback`` ends the transaction that the question has begun. None where
        the question failed. A dialect overrides :meth:`driver_places`.
        """
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        try:
            with closing(dbapi_connection.cursor()) as cursor:
                found = self.driver_places(raw, cursor)
            if rollback and found:
                dbapi_connection.rollback()
        except self._dbapi.Error:
            return None
        return [(where, str(name)) for where, name in found if name]

    def driver_places(self, raw: Any, cursor: Any) -> list[tuple[str, Any]]:
        """As :meth:`places_of`, of the driver's own connection; may raise its errors."""
        return []

    def places_of_schema(self, connection: sa.Connection, schema: str) -> list[tuple[str, str]]:
        """The database or the file that a schema is by itself, as of :meth:`places_of`."""
        return []

    def missing_file(self, engine: sa.Engine) -> str | None:
        """The database's file, where it does not exist and connecting would make an empty one."""
        return None

    def identity(self, engine: sa.Engine) -> tuple[Any, ...] | None:
        """Equal for two engines on one database; another for a new database in its place.

        None where there is no database yet, or no longer.
        """
        return (database_name(engine),)

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """A value that stays the same on this connection as long as nobody commits a change.

        It is cheap, and may change without a reason. None where the database has none.

        Args:
            connection: one that nobody else uses; a transaction may be begun on it.
            lock_timeout: how long to wait where even that is locked, in seconds.
        """
        return None


def was_dropped(before: str, now: str) -> bool:
    """Whether the table of an incarnation is certainly gone, not only emptied or rebuilt."""
    return before.partition("/")[0] != now.partition("/")[0]
