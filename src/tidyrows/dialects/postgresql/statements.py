"""PostgreSQL's statements by key: the keys travel as arrays."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BIT, INTERVAL

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.keyless_rows import is_exact, stored_type
from tidyrows.dialects.keys import (
    KEYS,
    ROW,
    RowsByKey,
    driver_values,
    keys_beside,
    plain_condition,
    quoted_names,
    run,
)
from tidyrows.dialects.statements import CycleForm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.keys import Select
    from tidyrows.dialects.statements import KeysByTable, Proof
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import Place


def rows_in_arrays(dialect: sa.Dialect, table: KeyedTable, arrays: Sequence[Any]) -> RowsByKey:
    """The rows that have the keys in these arrays, one array per key column."""
    place, names = quoted_names(dialect, table)
    if len(names) == 1:
        # PostgreSQL gives the parameter the column's own type (citext, enum, CHAR(n)).
        where = f" WHERE {place}.{names[0]} = ANY(%s)"
        return RowsByKey(place + where, place + where, tuple(arrays))
    # unnest cannot infer a type, so an array of no rows lends it the column's. This also hides the
    # length from the planner, which then walks the index in the order of the keys: three times as
    # fast as its hash join, and two cleanups cannot meet crosswise.
    alias = keys_beside(table)
    empty = f"(SELECT array_agg({ROW}.{{}}) FROM {place} AS {ROW} WHERE false)"
    typed = ", ".join(f"coalesce({empty.format(name)}, %s)" for name in names)
    listed = ", ".join(f"k{number}" for number in range(len(names)))
    equal = " AND ".join(f"{place}.{name} = {alias}.k{n}" for n, name in enumerate(names))
    keys = f"unnest({typed}) AS {alias}({listed}) WHERE {equal}"
    return RowsByKey(f"{place}, {keys}", f"{place} USING {keys}", tuple(arrays))


def select_by_arrays(dialect: sa.Dialect, table: KeyedTable, arrays: Sequence[str]) -> str:
    """SQL for the driver: the keys that are there, given SQL for one array per key column."""
    place, names = quoted_names(dialect, table)
    if len(names) == 1:
        key = f"{ROW}.{names[0]}"
        return f"SELECT {key} FROM {place} AS {ROW} WHERE {key} = ANY({arrays[0]})"
    listed = ", ".join(f"{ROW}.{name}" for name in names)
    sent = ", ".join(f"k{number}" for number in range(len(names)))
    equal = " AND ".join(f"{ROW}.{name} = {KEYS}.k{number}" for number, name in enumerate(names))
    return (
        f"SELECT {listed} FROM unnest({', '.join(arrays)}) AS {KEYS}({sent}) "
        f"JOIN {place} AS {ROW} ON {equal}"
    )


def array_literal(values: Sequence[Any]) -> str | None:
    """The values as ``{1,2}`` or ``{"a","b"}``; None where one of them has no sure text form.

    Sure means: the same in every session, whatever its settings.
    """
    kinds = set(map(type, values))
    if len(kinds) != 1:
        return None
    write = _WRITERS.get(kinds.pop())
    if write is None:
        return None
    texts = list(map(write, values))
    return None if None in texts else "{" + ",".join(texts) + "}"  # type: ignore[arg-type]  # None is excluded just before


def _has_sure_text(column: sa.ColumnClause[Any], values: Iterable[Any]) -> bool:
    """Whether a text column holds these values as an array would: an INSERT makes 10 of 10.0."""
    kind = column.type._type_affinity  # noqa: SLF001 -- nothing public sees through TypeDecorators
    return kind is not sa.String or _SURE_TEXTS.issuperset(map(type, values))


_SURE_TEXTS = {int, str, UUID, date, bytes}


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


_WRITERS: dict[type, Callable[[Any], str | None]] = {
    int: str,
    str: _quoted,
    UUID: str,
    Decimal: lambda value: str(value) if value.is_finite() else None,
    date: lambda value: value.isoformat(),
    # A timestamp column would ignore the offset in text, but not in a typed value.
    datetime: lambda value: None if value.tzinfo else _quoted(value.isoformat(" ")),
    bytes: lambda value: f'"\\\\x{value.hex()}"',
    bool: lambda value: "t" if value else "f",
    float: repr,
}


# A partitioned table has no file; TRUNCATE gives its partitions new ones. RESTART gives a sequence
# a new one, setval does not. 1259 is pg_class.
INCARNATION = """
CAST(c.oid AS pg_catalog.text) || '/' || CAST(c.relfilenode AS pg_catalog.text) || COALESCE((
    SELECT pg_catalog.string_agg('.' || CAST(s.relfilenode AS pg_catalog.text), '' ORDER BY s.oid)
    FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S'
    WHERE d.refobjid = c.oid AND d.deptype IN ('a', 'i')
          AND d.refclassid = 1259 AND d.classid = 1259), '')"""
# The numbers of the primary key have begun anew, where what was generated is above the latest.
_BEGUN_ANEW = """
CASE WHEN EXISTS (
    SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_sequence q ON q.seqrelid = d.objid
    JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisprimary
    WHERE d.refobjid = c.oid AND d.refobjsubid = i.indkey[0] AND d.deptype IN ('a', 'i')
          AND d.refclassid = 1259 AND d.classid = 1259 AND q.seqincrement > 0 AND NOT q.seqcycle
          AND CASE WHEN pg_catalog.has_sequence_privilege(d.objid, 'USAGE, SELECT')
              THEN COALESCE(pg_catalog.pg_sequence_last_value(d.objid), 0) < {} END
) THEN '<' ELSE '' END"""
_INCARNATIONS = f"""
SELECT n.nspname, c.relname, {INCARNATION} || {_BEGUN_ANEW.format("w.h")}
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN unnest(CAST(%s AS pg_catalog.name[]), CAST(%s AS pg_catalog.name[]),
            CAST(%s AS pg_catalog.int8[])) AS w(s, t, h)
  ON n.nspname = w.s AND c.relname = w.t"""

_UNIQUE = """
SELECT n.nspname, c.relname, CAST(i.indexrelid AS pg_catalog.text), a.attname
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
  AND a.attnum = ANY((CAST(i.indkey AS pg_catalog.int2[]))[0:i.indnkeyatts - 1])
JOIN unnest(CAST(%s AS pg_catalog.name[]), CAST(%s AS pg_catalog.name[])) AS w(s, t)
  ON n.nspname = w.s AND c.relname = w.t
WHERE i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
  AND (c.relkind = 'p'
       OR NOT EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhparent = c.oid))"""

# One array stays far below the 1 GB that a value may hold; fewer statements are faster.
_ARRAY_KEYS = 200_000

# Row-level security hides rows from SELECT too; switched off, it raises 42501 instead.
# The typmod -1 gives types without a length: a cast must never cut a key.
_KEY_TYPES = """
SELECT n.nspname, c.relname, a.attname, pg_catalog.format_type(a.atttypid, -1),
       pg_catalog.set_config('row_security', 'off', true)
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE (n.nspname, c.relname) IN ({}) AND a.attnum > 0 AND NOT a.attisdropped"""

# A partition's rows are its root's. Counters of earlier transactions are among these until the
# session hands them over, which PostgreSQL does once a second, and 15 when it is asked to.
INSERTED = """
SELECT n.nspname, r.relname,
       CAST(sum(pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid)) AS pg_catalog.int8)
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_class r ON r.oid = COALESCE(pg_catalog.pg_partition_root(c.oid), c.oid)
JOIN pg_catalog.pg_namespace n ON n.oid = r.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_'
      AND pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid) > 0
GROUP BY n.nspname, r.relname"""
HAND_OVER = "SELECT CAST(pg_catalog.pg_stat_force_next_flush() AS pg_catalog.text)"
HANDS_OVER = (15,)  # the first version that has it


class PostgreSQLStatements(Dialect):
    """Arrays, and one statement for a whole cycle."""

    cycle_form = CycleForm.ONE_STATEMENT
    _count_locked = f"SELECT count(*) FROM (SELECT 1 FROM {{}} FOR UPDATE) AS {KEYS}"
    reuses_keys = False
    guards_deletes = True
    rounded_types = (*Dialect.rounded_types, INTERVAL, BIT)
    deletes_keyless_rows = True
    verified_at_once = _ARRAY_KEYS
    verified_together = 1000

    # ----- inserts

    def inserted_proof(self, insert: sa.Insert, real: RealTable) -> Proof:
        """DO NOTHING returns what it inserted; after DO UPDATE only a new row has no xmax."""
        if self._prefixes(insert):
            return False, None
        match self._post_values(insert):
            case "on_conflict_do_nothing":
                return True, None
            case "on_conflict_do_update" if real.plain:
                xmax: sa.ColumnElement[int] = sa.literal_column("xmax", sa.Integer)
                return True, xmax == sa.literal_column("0", sa.Integer)
        return False, None

    # ----- incarnations

    def incarnations(
        self,
        connection: sa.Connection,
        tables: Iterable[Place],
        highest: Mapping[Place, int] = MappingProxyType({}),
    ) -> dict[Place, str]:
        """The table's oid, its file and those of its sequences, which TRUNCATE replaces."""
        tables = list(tables)
        schemas, names = zip(*tables, strict=True)
        keys = [highest.get(place) for place in tables] if highest else [None] * len(tables)
        asked = list(map(str, schemas)), list(map(str, names)), keys
        found = {}
        for schema, name, incarnation in self._query(connection, _INCARNATIONS, *asked):
            found[schema, name] = incarnation
        return found

    def guard(self, incarnation: str, highest: int) -> str:
        """Its snapshot is taken when the DELETE has locked the table."""
        oid = int(incarnation.partition("/")[0])
        what = INCARNATION
        if highest:
            what = f"{INCARNATION} || {_BEGUN_ANEW.format(int(highest))}"
        return f"(SELECT {what} FROM pg_catalog.pg_class c WHERE c.oid = {oid}) = '{incarnation}'"

    def unique_columns(
        self, connection: sa.Connection, tables: Iterable[Place]
    ) -> Iterable[tuple[str, str, str, str]]:
        """A unique index of a table is not one of the tables that inherit from it."""
        schemas, names = (list(map(str, each)) for each in zip(*tables, strict=True))
        return self._query(connection, _UNIQUE, schemas, names)

    # ----- changes and locks

    def insert_exactly(
        self,
        connection: sa.Connection,
        table: sa.TableClause,
        values: Mapping[str, Any],
        *,
        always: bool,
    ) -> None:
        """OVERRIDING SYSTEM VALUE where a key is GENERATED ALWAYS AS IDENTITY."""
        if not always:
            super().insert_exactly(connection, table, values, always=always)
            return
        marks, binds = [], []
        for number, (name, value) in enumerate(values.items()):
            if isinstance(value, sa.Null):
                marks.append("NULL")
            else:
                marks.append(f":v{number}")
                binds.append(sa.bindparam(f"v{number}", value, type_=table.c[name].type))
        source = sa.text(f"OVERRIDING SYSTEM VALUE VALUES ({', '.join(marks)})")
        insert = sa.insert(table).from_select(list(values), source.bindparams(*binds).columns())
        run(connection, insert)

    def delete_cycle(self, connection: sa.Connection, batch: KeysByTable) -> list[int]:
        """One statement: constraints, RESTRICT too, are checked after its last delete."""
        deletes, counts = [], []
        sent: tuple[Any, ...] = ()
        for number, (table, keys) in enumerate(batch):
            parts = self.rows_by_key(connection, table, keys) if keys else []
            if parts is None:
                return self._delete_cycle_plainly(connection, batch)
            for rows in parts:
                deletes.append(f"deleted_{number} AS (DELETE FROM {rows.delete} RETURNING 1)")
                sent += rows.sent
            counts.append(f"(SELECT count(*) FROM deleted_{number})" if parts else "0")
        sql = f"WITH {', '.join(deletes)} SELECT {', '.join(counts)}"
        return list(self._run(connection, sql, sent).one())

    def _delete_cycle_plainly(self, connection: sa.Connection, batch: KeysByTable) -> list[int]:
        one: sa.Label[int] = sa.literal_column("1").label(None)
        counts = []
        for table, keys in batch:
            condition = plain_condition(table, keys) if keys else sa.false()
            deleted = sa.delete(table.clause).where(condition).returning(one).cte()
            counts.append(sa.select(sa.func.count()).select_from(deleted).scalar_subquery())
        return list(run(connection, sa.select(*counts)).one())

    # ----- how keys travel

    def rows_by_key(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[RowsByKey] | None:
        """By one array per key column; None where a value cannot stand in an array."""
        values: list[Any] | None = driver_values(table, connection.dialect, keys)
        # asyncpg encodes a list by the type that the server names; the others send text.
        if values is not None and not all(map(_has_sure_text, table.key_clauses, values)):
            return None
        if values is not None and self.driver != "asyncpg":
            values = list(map(array_literal, values))
        if values is None or None in values:
            return None
        return [rows_in_arrays(connection.dialect, table, values)]

    def guards_of_range(
        self, connection: sa.Connection, table: KeyedTable
    ) -> Sequence[sa.ColumnElement[bool]]:
        # A numeric column may hold another row's 5.5 between 5 and 6.
        column = table.key_clauses[0]
        return [column == sa.cast(column, sa.BigInteger)]

    # ----- rows without a key

    def read_exactly(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """As text, unless its type compares exactly: json and point have no equality."""
        kind = stored_type(column, self._dialect())
        if isinstance(kind, sa.Float):
            return sa.cast(column, sa.Double())  # a real is shown as another double than it is
        if is_exact(kind):
            return sa.type_coerce(column, kind)
        return sa.cast(column, sa.Text()).collate("C")

    def delete_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """By ctid and partition: chosen and locked once, in a WITH that is not evaluated again."""
        system: list[sa.ColumnClause[Any]] = [sa.column("tableoid"), sa.column("ctid")]
        own = [sa.column(column.name, column.type) for column in table.table.columns]
        clause = sa.table(table.table.name, *own, *system, schema=table.clause.schema)
        target: Any = clause.alias()  # beside the anonymous name of the WITH
        condition = self._equals_row(table, clause, row)
        deleted = 0
        while deleted < count:
            chosen = (
                sa.select(clause.c.tableoid, clause.c.ctid)
                .where(condition)
                .limit(count - deleted)
                .with_for_update()
                .cte()
            )
            here = sa.and_(target.c.tableoid == chosen.c.tableoid, target.c.ctid == chosen.c.ctid)
            gone = run(connection, sa.delete(target).where(here)).rowcount
            if gone <= 0:
                break
            deleted += gone  # again: a row that was changed during the wait is not deleted
        return deleted

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        exact = self.read_exactly(column)
        sent = sa.cast(sa.bindparam(None, value, type_=exact.type), exact.type)
        return exact.is_not_distinct_from(sent)

    # ----- verification, which shares nothing with the statements above

    def verification_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[list[str | None]]:
        """What key columns are cast to; SELECT raises 42501 now where security may hide rows."""
        if not tables:
            return []
        places = [(table.name.schema, table.table.name) for table in tables]
        sql = _KEY_TYPES.format(", ".join(["(%s, %s)"] * len(places)))
        types = {}
        for schema, name, column, type_name, _off in self._execute(
            connection, sql, *chain(*places)
        ):
            types[schema, name, column] = type_name
        return [
            [types.get((*place, column.name)) for column in table.key_columns]
            for place, table in zip(places, tables, strict=True)
        ]

    def holds_integers(
        self, connection: sa.Connection, table: KeyedTable, types: list[str | None]
    ) -> bool:
        return types[0] in {"smallint", "integer", "bigint"}

    def select_keys(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        types: list[str | None],
        sent: Sequence[Any],
    ) -> list[Select] | None:
        columns = [sent] if len(types) == 1 else list(zip(*sent, strict=True))
        if None in types or not all(map(_has_sure_text, table.key_clauses, columns)):
            return None
        arrays, params = zip(*map(self._cast_array, types, map(list, columns)), strict=True)
        return [(select_by_arrays(connection.dialect, table, arrays), params)]

    def _cast_array(self, type_name: str | None, values: list[Any]) -> tuple[str, Any]:
        """SQL for an array of this type, and its parameter; not by way of ``array_literal``."""
        cast = str(type_name)
        if self.driver != "asyncpg":
            cast = cast.replace("%", "%%")
        if set(map(type, values)) <= {int, str}:  # twice as fast as the drivers' own arrays
            return f"ARRAY(SELECT CAST(json_array_elements_text(%s) AS {cast}))", json.dumps(values)
        return f"CAST(%s AS {cast}[])", values
