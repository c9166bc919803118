"""SQLite's statements by key: native values in IN, OR of ANDs or BETWEEN; JSON to find."""

from __future__ import annotations

import json
import weakref
from itertools import chain
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.keyless_rows import stored_type
from tidyrows.dialects.keys import (
    ROW,
    RowsByKey,
    chunks,
    driver_values,
    integer_runs,
    marked_condition,
    quoted_names,
    run,
    selects_of_keys,
    typed_rows,
)
from tidyrows.dialects.statements import CycleForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.keys import Select
    from tidyrows.dialects.statements import KeysByTable, Proof
    from tidyrows.keys import KeyedTable

# Every SQLite takes 999 variables; more at once saves nothing.
_KEYS = 999
# An OR of more than 1000 terms is too deep a tree.
_COMPOSITE_KEYS = 250
# "+value" has no affinity, so that a column of text compares with it as text.
_JSON_KEYS = 50_000
_KEY_TYPE = "SELECT type FROM pragma_table_info(?, ?) WHERE name = ? COLLATE NOCASE"


class SQLiteStatements(Dialect):
    """Every transaction locks the whole file, so no row is locked by itself."""

    cycle_form = CycleForm.DEFERRED
    may_alter_keys = False
    rounded_types = ()  # a REAL is what was sent; what SQLAlchemy reads of it is rounded
    _for_update = ""
    deletes_keyless_rows = True

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._conflicts: weakref.WeakKeyDictionary[Any, frozenset[str]]
        self._conflicts = weakref.WeakKeyDictionary()
        self._of_integers: weakref.WeakKeyDictionary[KeyedTable, bool] = weakref.WeakKeyDictionary()

    def read_key(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """A number as the float that it is: SQLAlchemy would round it to the digits of the type."""
        kind = stored_type(column, self._dialect())
        return sa.type_coerce(column, sa.Float()) if isinstance(kind, sa.Numeric) else column

    def upsert(self, insert: sa.Insert) -> bool:
        """ON CONFLICT, OR IGNORE and the like, and conflict clauses of the table itself."""
        return super().upsert(insert) or bool(self._declared(insert.table))

    def inserted_proof(self, insert: sa.Insert, real: RealTable) -> Proof:
        """RETURNING of DO NOTHING and IGNORE yields the inserted rows; after DO UPDATE all."""
        prefixes = self._prefixes(insert)
        post = self._post_values(insert)
        sure = (
            prefixes <= {"OR IGNORE"}
            and post in {None, "on_conflict_do_nothing"}
            and self._declared(insert.table) <= {"IGNORE"}
        )
        return sure, None

    def _declared(self, table: Any) -> frozenset[str]:
        """ON CONFLICT clauses that the table's own definition carries."""
        known = self._conflicts.get(table)
        if known is None:
            constraints = getattr(table, "constraints", ())
            options = [
                value
                for item in (*table.columns, *constraints)
                for key, value in getattr(item, "dialect_kwargs", {}).items()
                if key.startswith("sqlite_on_conflict") and value
            ]
            known = frozenset(str(value).upper() for value in options) & {"IGNORE", "REPLACE"}
            self._conflicts[table] = known
        return known

    def reads_as_sent(self, column: sa.Column[Any]) -> bool:
        """What it stores otherwise has the same common form."""
        return True

    def may_reuse_key(self, connection: sa.Connection, table: KeyedTable, highest: int) -> bool:
        """Not where the table has AUTOINCREMENT, unless its counter was set back."""
        # The counters' table is there once a table with AUTOINCREMENT is, and holds only such.
        schema = quoted(table.name.schema)
        known = f"SELECT 1 FROM {schema}.sqlite_master WHERE name = 'sqlite_sequence'"
        if not self._query(connection, known):
            return True
        counter = f"SELECT max(seq) FROM {schema}.sqlite_sequence WHERE lower(name) = lower(?)"
        ((given,),) = self._query(connection, counter, table.name.name)
        return given is None or given < highest

    def guards_of_range(
        self, connection: sa.Connection, table: KeyedTable
    ) -> Sequence[sa.ColumnElement[bool]]:
        # Any column but the row id may hold any type: another row's 5.5 between 5 and 6.
        return [sa.func.typeof(table.key_clauses[0]) == "integer"]

    def rows_by_key(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[RowsByKey] | None:
        """IN or OR of ANDs, with native values: as fast as JSON, right for every type."""
        values = driver_values(table, connection.dialect, keys)
        if values is None:
            return None
        place, names = quoted_names(connection.dialect, table)
        parts = []
        for part in chunks(
            list(zip(*values, strict=True)), _KEYS if len(names) == 1 else _COMPOSITE_KEYS
        ):
            # No WITH: the driver counts rows only of statements that begin with DELETE.
            where = f" WHERE {marked_condition(names, len(part), '?')}"
            sent = tuple(chain.from_iterable(part))
            parts.append(RowsByKey(place + where, place + where, sent))
        return parts

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
        """Many keys in one statement, by ranges or as JSON, where the values allow it."""
        few = len(keys) <= _KEYS or len(table.key_columns) > 1
        values = None if few else driver_values(table, connection.dialect, keys)
        if values is None or not _fits_json(values[0]):
            return super().find(connection, table, keys, columns, lock=lock, first=first)
        place, (name,) = quoted_names(connection.dialect, table)
        quote = connection.dialect.identifier_preparer.quote
        listed = ", ".join(f"{ROW}.{quote(str(column.key))}" for column in columns)
        sent: Sequence[tuple[Any, ...]] | None = integer_runs(table, keys)
        if sent is None or not self.holds_integers(connection, table, None):
            sent = [(json.dumps(part),) for part in chunks(values[0], _JSON_KEYS)]
            wanted = f"{ROW}.{name} IN (SELECT +value FROM json_each(?))"
        else:
            wanted = f"{ROW}.{name} BETWEEN ? AND ? AND typeof({ROW}.{name}) = 'integer'"
        sql = f"SELECT {listed} FROM {place} AS {ROW} WHERE {wanted}{' LIMIT 1' if first else ''}"
        found: list[tuple[Any, ...]] = []
        for part in sent:
            result = self._run(connection, sql, part)
            found += typed_rows(result, columns, connection.dialect)
        return found

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Nothing: BEGIN IMMEDIATE excludes every other writer."""

    def delete_cycle(self, connection: sa.Connection, batch: KeysByTable) -> list[int]:
        """Defers foreign keys, RESTRICT too, until COMMIT, which fails over what was broken."""
        # It stays on to the transaction's end: OFF would forget what was deferred, and COMMIT would
        # leave orphans without a word.
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        return super().delete_cycle(connection, batch)

    # ----- rows without a key

    def read_exactly(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """As it is stored, whatever the column's type makes of it."""
        return sa.type_coerce(column, sa.types.NullType())

    def delete_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """By rowid, under a name that no column has."""
        names = {column.name.lower() for column in table.table.columns}
        free = [name for name in ("rowid", "_rowid_", "oid") if name not in names]
        if not free:
            raise LookupError(f"columns of {table.name} have all names of SQLite's own row id")
        rowid: sa.ColumnClause[Any] = sa.literal_column(free[0])
        condition = self._equals_row(table, table.clause, row)
        chosen = sa.select(rowid).select_from(table.clause).where(condition).limit(count)
        delete = sa.delete(table.clause).where(rowid.in_(chosen.correlate(None)))
        return run(connection, delete).rowcount

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        sent: Any = sa.bindparam(None, value, type_=sa.types.NullType())
        return self.read_exactly(column).collate("BINARY").is_not_distinct_from(sent)

    # ----- verification, which shares nothing with the statements above

    def holds_integers(self, connection: sa.Connection, table: KeyedTable, types: Any) -> bool:
        """Where the column has the affinity: text would compare with an integer as text."""
        known = self._of_integers.get(table)
        if known is None:
            place = (table.name.name, table.name.schema)
            rows = self._query(connection, _KEY_TYPE, *place, table.key_columns[0].name)
            known = self._of_integers[table] = any("INT" in row[0].upper() for row in rows)
        return known

    def select_keys(
        self, connection: sa.Connection, table: KeyedTable, types: Any, sent: Sequence[Any]
    ) -> list[Select]:
        return selects_of_keys(connection.dialect, table, sent, "?")


def _fits_json(values: list[Any]) -> bool:
    """JSON has no bytes, and SQLite's JSON neither exact floats nor NUL."""
    kinds = set(map(type, values))
    return kinds <= {int} or (kinds == {str} and "\0" not in "".join(values))


def quoted(name: str) -> str:
    """A name for SQL text."""
    return '"' + name.replace('"', '""') + '"'
