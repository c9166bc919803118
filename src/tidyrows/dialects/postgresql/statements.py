"""PostgreSQL's statements by key: the keys travel as arrays."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.aliases import KEYS
from tidyrows.dialects.base import Dialect
from tidyrows.dialects.keyless_rows import is_exact, stored_type
from tidyrows.dialects.keys import (
    asked,
    chunks,
    delete_plainly,
    delete_runs,
    driver_values,
    find_plainly,
    integer_runs,
    plain_condition,
    plain_rows,
    quoted_names,
    run,
)
from tidyrows.dialects.postgresql.arrays import (
    array_literal,
    keys_in_arrays,
    select_by_arrays,
)
from tidyrows.dialects.statements import CycleForm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.statements import Select
    from tidyrows.keys import KeyedTable

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


class PostgreSQLStatements(Dialect):
    """Arrays, and one statement for a whole cycle."""

    cycle_form = CycleForm.ONE_STATEMENT
    reuses_keys = False
    deletes_keyless_rows = True
    verified_at_once = _ARRAY_KEYS
    verified_together = 1000

    # ----- inserts

    @property
    def counts_when_closed(self) -> bool:
        """Only psycopg's forgets."""
        return self.driver != "psycopg"

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
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

    # ----- changes and locks

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> int:
        """``= ANY(array)``, a join with arrays, or BETWEEN; the column gives arrays their type."""
        runs = integer_runs(table, keys)
        if runs is not None:
            column = table.key_clauses[0]
            # A numeric column may hold a stranger's 5.5 between our 5 and 6.
            return delete_runs(connection, table, runs, column == sa.cast(column, sa.BigInteger))
        deleted = 0
        for part in chunks(keys, _ARRAY_KEYS):
            arrays = self._arrays(table, connection.dialect, part)
            if arrays is None:
                deleted += delete_plainly(connection, table, part)
            elif len(arrays) == 1:
                sql = f"DELETE FROM {self._any_of_array(connection, table)}"
                deleted += connection.exec_driver_sql(sql, tuple(arrays)).rowcount
            else:
                delete = sa.delete(table.clause).where(keys_in_arrays(table, arrays))
                deleted += run(connection, delete).rowcount
        return deleted

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
        """By arrays, as they are deleted."""
        found: list[tuple[Any, ...]] = []
        for part in chunks(keys, _ARRAY_KEYS):
            condition = self._condition(table, connection.dialect, part)
            if condition is None:
                found += find_plainly(connection, table, part, columns, lock=lock, first=first)
            else:
                statement = asked(sa.select(*columns).where(condition), lock, first)
                found += plain_rows(run(connection, statement))
        return found

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """By arrays; what is counted need not be sent."""
        for part in chunks(keys, _ARRAY_KEYS):
            arrays = self._arrays(table, connection.dialect, part)
            if arrays is None:
                super().lock(connection, table, part)
                continue
            if len(arrays) == 1:
                held = f"SELECT 1 FROM {self._any_of_array(connection, table)} FOR UPDATE"
                sql = f"SELECT count(*) FROM ({held}) AS {KEYS}"
                connection.exec_driver_sql(sql, tuple(arrays)).one()
                continue
            one: sa.ColumnElement[int] = sa.literal_column("1")
            rows = sa.select(one).select_from(table.clause).where(keys_in_arrays(table, arrays))
            count = sa.select(sa.func.count()).select_from(rows.with_for_update().subquery())
            run(connection, count).one()

    def set_null(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        names: Sequence[str],
    ) -> None:
        """By arrays, as they are deleted."""
        values = {table.clause.c[name]: sa.null() for name in names}
        for part in chunks(keys, _ARRAY_KEYS):
            condition = self._condition(table, connection.dialect, part)
            if condition is None:
                super().set_null(connection, table, part, names)
            else:
                run(connection, sa.update(table.clause).where(condition).values(values))

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
        # sa.text() takes a colon for a parameter, and doubles percent signs itself
        quoted = [
            f'"{name}"'
            for name in (
                name.replace('"', '""').replace(":", "\\:")
                for name in (str(table.schema), table.name, *values)
            )
        ]
        place, names = ".".join(quoted[:2]), ", ".join(quoted[2:])
        binds = []
        marks = []
        for number, (name, value) in enumerate(values.items()):
            if isinstance(value, sa.Null):
                marks.append("NULL")
            else:
                marks.append(f":v{number}")
                binds.append(sa.bindparam(f"v{number}", value, type_=table.c[name].type))
        sql = f"INSERT INTO {place} ({names}) OVERRIDING SYSTEM VALUE VALUES ({', '.join(marks)})"
        run(connection, sa.text(sql).bindparams(*binds))

    def delete_cycle(
        self, connection: sa.Connection, batch: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[int]:
        """One statement: constraints, RESTRICT too, are looked at after its last delete."""
        if len(batch) == 1 and len(batch[0][1]) <= _ARRAY_KEYS:
            (table, keys) = batch[0]
            if self._arrays(table, connection.dialect, keys) is not None:
                return [self.delete_by_keys(connection, table, keys)]
        counts = []
        for table, keys in batch:
            condition = self._condition(table, connection.dialect, keys) if keys else sa.false()
            if condition is None:
                condition = plain_condition(table, keys)
            deleted = (
                sa.delete(table.clause)
                .where(condition)
                .returning(sa.literal_column("1").label(None))
                .cte()
            )
            counts.append(sa.select(sa.func.count()).select_from(deleted).scalar_subquery())
        return list(run(connection, sa.select(*counts)).one())

    def _condition(
        self, table: KeyedTable, dialect: sa.Dialect, keys: Sequence[Any]
    ) -> sa.ColumnElement[bool] | None:
        """Which rows have these keys; None where a value cannot stand in an array."""
        arrays = self._arrays(table, dialect, keys)
        return None if arrays is None else keys_in_arrays(table, arrays)

    def _arrays(
        self, table: KeyedTable, dialect: sa.Dialect, keys: Sequence[Any]
    ) -> list[Any] | None:
        """The keys as the driver gets them, one array per key column; None as above."""
        values: list[Any] | None = driver_values(table, dialect, keys)
        # asyncpg encodes a list by the type that the server names; the others take text.
        if values is not None and self.driver != "asyncpg":
            values = list(map(array_literal, values))
        return None if values is None or None in values else values

    def _any_of_array(self, connection: sa.Connection, table: KeyedTable) -> str:
        """From the table's name on: the rows that have a key in the one array bound."""
        place, (name,) = quoted_names(connection.dialect, table)
        return f"{place} WHERE {name} = ANY({'$1' if self.driver == 'asyncpg' else '%s'})"

    # ----- rows without a key

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """As text, unless its type compares exactly: json and point have no equality."""
        kind = stored_type(column, self._dialect())
        if isinstance(kind, sa.Float):
            return sa.cast(column, sa.Double())  # a real is shown as another double than it is
        if is_exact(kind):
            return sa.type_coerce(column, kind)
        return sa.cast(column, sa.Text())

    def delete_equal_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """By ctid: chosen and locked once, in a WITH that is not evaluated again.

        A ctid is unique only together with the partition.
        """
        system: list[sa.ColumnClause[Any]] = [sa.column("tableoid"), sa.column("ctid")]
        own = [sa.column(column.name, column.type) for column in table.table.columns]
        clause = sa.table(table.table.name, *own, *system, schema=table.clause.schema)
        target: Any = clause.alias()  # beside the anonymous name of the WITH
        condition = self._equals_row(table, clause, row)
        deleted = 0
        while deleted < count:
            ours = (
                sa.select(clause.c.tableoid, clause.c.ctid)
                .where(condition)
                .limit(count - deleted)
                .with_for_update()
                .cte()
            )
            here = sa.and_(target.c.tableoid == ours.c.tableoid, target.c.ctid == ours.c.ctid)
            taken = run(connection, sa.delete(target).where(here)).rowcount
            if taken <= 0:
                break
            deleted += taken  # again: of rows that somebody changed meanwhile it takes no other
        return deleted

    def _equals(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        kind = stored_type(column, self._dialect())
        if isinstance(kind, sa.Float):
            double: sa.Double[float] = sa.Double()
            sent = sa.cast(sa.bindparam(None, value, type_=double), double)
            return sa.cast(column, double).is_not_distinct_from(sent)
        if is_exact(kind):
            sent = sa.cast(sa.bindparam(None, value, type_=kind), kind)
            return sa.type_coerce(column, kind).is_not_distinct_from(sent)
        shown = sa.cast(sa.bindparam(None, value, type_=sa.Text()), sa.Text())
        return sa.cast(column, sa.Text()).collate("C").is_not_distinct_from(shown)

    # ----- verification, which shares nothing with the statements above

    def _verification_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[list[str | None]]:
        """What the key columns of each table are cast to; from now on no row is hidden.

        Raises:
            sqlalchemy.exc.ProgrammingError: 42501, by a later SELECT of this transaction, where
                row-level security may hide rows.
        """
        if not tables:
            return []
        places = [(table.name.schema, table.table.name) for table in tables]
        sql = _KEY_TYPES.format(", ".join(["(%s, %s)"] * len(places)))
        rows = self._execute(connection, sql, *chain.from_iterable(places))
        types = {tuple(row[:3]): row[3] for row in rows}
        return [
            [types.get((*place, column.name)) for column in table.key_columns]
            for place, table in zip(places, tables, strict=True)
        ]

    def _holds_integers(
        self, connection: sa.Connection, table: KeyedTable, types: list[str | None]
    ) -> bool:
        return types[0] in {"smallint", "integer", "bigint"}

    def _can_select(self, types: list[str | None], values: list[list[Any]]) -> bool:
        return None not in types

    def _select_keys(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        types: list[str | None],
        sent: Sequence[Any],
    ) -> Iterator[Select]:
        """By JSON or the driver's own arrays, cast to the catalogue's types."""
        columns = [list(sent)] if len(types) == 1 else [list(c) for c in zip(*sent, strict=True)]
        typed = zip(types, columns, strict=True)
        arrays, params = zip(*(self._cast_array(*pair) for pair in typed), strict=True)
        yield select_by_arrays(connection.dialect, table, arrays), params

    def _cast_array(self, type_name: str | None, values: list[Any]) -> tuple[str, Any]:
        """SQL for an array of this type, and its parameter; not by way of ``array_literal``."""
        cast = str(type_name)
        if self.driver != "asyncpg":
            cast = cast.replace("%", "%%")
        if set(map(type, values)) <= {int, str}:  # twice as fast as the drivers' own arrays
            return f"ARRAY(SELECT CAST(json_array_elements_text(%s) AS {cast}))", json.dumps(values)
        return f"CAST(%s AS {cast}[])", values
