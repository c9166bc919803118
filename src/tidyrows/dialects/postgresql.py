"""PostgreSQL, with psycopg, psycopg2 and asyncpg, and with care for drivers unknown."""

from __future__ import annotations

import json
import re
from contextlib import closing
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.aliases import KEYS
from tidyrows.dialects.arrays import (
    any_of_array,
    array_literal,
    keys_in_arrays,
    select_by_arrays,
)
from tidyrows.dialects.base import CommitOutcome, CycleForm, Dialect, Fault, Look, Loss, RealTable
from tidyrows.dialects.blockers import blockers_on_postgresql
from tidyrows.dialects.keys import (
    as_sent,
    asked,
    chunks,
    delete_plainly,
    delete_runs,
    driver_values,
    find_plainly,
    integer_runs,
    look_plainly,
    plain_condition,
    plain_rows,
    run,
    those_there,
)
from tidyrows.dialects.liveness_lock import PATIENCE, ConnectionLife, Life, LockWords
from tidyrows.dialects.whole_rows import is_exact, same_row, stored_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.dialects.blocker import Blocker
    from tidyrows.keys import KeyedTable

_TRANSIENT = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
_WAITED = frozenset({"55P03", "57014"})
_IN_ERROR = "25P02"
_NO_RIGHT = "42501"
_NO_DATABASE = "3D000"
_NO_DATABASE_TEXT = re.compile(r'FATAL: +database ".*" does not exist')
# libpq's PGTransactionStatusType, which psycopg and psycopg2 both hand on.
_IDLE, _INERROR, _UNKNOWN = 0, 3, 4
# One array stays far below the 1 GB that a value may hold; fewer statements are faster.
_ARRAY_KEYS = 200_000
_LOOKED_TOGETHER = 1000  # keys of a table that are looked for together with those of others

# pg_table_is_visible honours search_path, pg_temp first. Unlike to_regclass, this cannot raise.
_RESOLVE = """
SELECT n.nspname, c.relkind, c.relpersistence,
       pg_catalog.has_table_privilege(c.oid, 'SELECT')
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_rewrite w
                       WHERE w.ev_class = c.oid AND w.ev_type IN ('3', '4'))
       AND (NOT pg_catalog.row_security_active(c.oid)
            OR EXISTS (SELECT FROM pg_catalog.pg_policy p
                       WHERE p.polrelid = c.oid AND p.polcmd IN ('r', '*')))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = CAST(%s AS pg_catalog.name) AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND """
_VISIBLE = "pg_catalog.pg_table_is_visible(c.oid)"
_IN_SCHEMA = (
    "n.oid = CASE CAST(%s AS pg_catalog.text) WHEN 'pg_temp' "
    "THEN pg_catalog.pg_my_temp_schema() ELSE "
    "(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = CAST(%s AS pg_catalog.name)) END"
)
_BEGINNING = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE"
# A role left on a pooled connection goes, where the login has its rights anyway (INHERIT).
_SETTINGS = """
SELECT pg_catalog.set_config('lock_timeout', %s, true),
       pg_catalog.set_config('statement_timeout', COALESCE(
           CAST(%s AS pg_catalog.text), pg_catalog.current_setting('statement_timeout')), true),
       pg_catalog.set_config('role', CASE WHEN r.rolinherit THEN 'none'
                             ELSE pg_catalog.current_setting('role') END, true)
FROM pg_catalog.pg_roles r WHERE r.rolname = session_user"""
# These send several statements without parameters in one go.
_SEVERAL_AT_ONCE = frozenset({"psycopg", "psycopg2"})
# Row-level security hides rows from SELECT too; switched off, it raises 42501 instead.
# The typmod -1 gives types without a length: a cast must never cut a key.
_KEY_TYPES = """
SELECT n.nspname, c.relname, a.attname, pg_catalog.format_type(a.atttypid, -1),
       pg_catalog.set_config('row_security', 'off', true)
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE (n.nspname, c.relname) IN ({}) AND a.attnum > 0 AND NOT a.attisdropped"""

_REFERENCING = """
SELECT DISTINCT n.nspname FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
JOIN pg_catalog.pg_namespace m ON m.oid = p.relnamespace
WHERE k.contype = 'f' AND m.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_INHERITED = """
SELECT n.nspname, c.relname, k.conname FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_constraint o ON o.oid = k.conparentid AND o.conrelid <> k.conrelid
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE k.contype = 'f' AND n.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_HIDDEN = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relrowsecurity AND pg_catalog.row_security_active(c.oid)
      AND n.nspname = ANY(CAST(%s AS pg_catalog.text[]))"""

_INVALID = """
SELECT i.relname FROM pg_catalog.pg_index x
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
JOIN pg_catalog.pg_class c ON c.oid = x.indrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE NOT x.indisvalid AND n.nspname = %s AND c.relname = %s"""

# Of a trigger's type, 2 is BEFORE and 8 is DELETE; '4' is the DELETE of a rule.
_KEEPS = """
SELECT 'trigger "' || t.tgname || '"' FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND NOT t.tgisinternal AND t.tgtype & 10 = 10
UNION ALL
SELECT 'rule "' || w.rulename || '"' FROM pg_catalog.pg_rewrite w
JOIN pg_catalog.pg_class c ON c.oid = w.ev_class
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND w.ev_type = '4'
UNION ALL
SELECT 'row-level security policy "' || p.polname || '"' FROM pg_catalog.pg_policy p
JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND p.polcmd IN ('d', 'r', '*')
      AND pg_catalog.row_security_active(c.oid)
ORDER BY 1"""

# For this transaction only: behind a pooler the session is not ours. From no table, which would be
# locked for as long. PostgreSQL 17 is the first that ends long transactions.
_LIFE = """
SELECT pg_catalog.set_config('application_name', 'tidyrows: a worker is alive', true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
       pg_catalog.set_config('statement_timeout', '0', true),
       CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
            THEN pg_catalog.set_config('transaction_timeout', '0', true) END"""
# The halves of a lock's number are listed apart, with 1 for a number in one piece.
_ALIVE = """
SELECT 1 FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_database d ON d.oid = l.database
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
      AND l.classid = CAST('{high}' AS pg_catalog.oid)
      AND l.objid = CAST('{low}' AS pg_catalog.oid)
      AND d.datname = pg_catalog.current_database()"""

# Its older name, which all versions know.
_SNAPSHOT = "SELECT CAST(pg_catalog.txid_current_snapshot() AS pg_catalog.text)"
_OWN_SCHEMAS = """
SELECT nspname FROM pg_catalog.pg_namespace
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
      AND pg_catalog.has_schema_privilege(oid, 'USAGE')
ORDER BY nspname"""
_PARTITIONS = """
SELECT relname FROM pg_catalog.pg_class
WHERE relispartition AND relnamespace = (
    SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = %s)"""


class PostgreSQL(Dialect):
    """Codes are SQLSTATEs; a transaction that saw an error persists nothing and says nothing."""

    name = "postgresql"
    reuses_keys = False
    whole_rows = True
    cycle_form = CycleForm.ONE_STATEMENT
    clock = "CAST(extract(epoch FROM pg_catalog.clock_timestamp()) AS double precision)"

    # ----- errors ------------------------------------------------------------------------------

    def _fault_of(self, error: BaseException) -> Fault:
        # Before the code is looked for: SQLAlchemy makes it anew for asyncpg, without one.
        if type(error).__name__ == "InvalidCachedStatementError":
            return Fault.TRANSIENT
        code = _code(error)
        if code is None:
            # Only what happens to the connection itself comes without a code: server down,
            # too many connections, killed between two statements.
            lost = self._dbapi is not None and isinstance(error, self._dbapi.OperationalError)
            return Fault.LOST if lost else Fault.OTHER
        if code in _TRANSIENT:
            return Fault.TRANSIENT
        if code.startswith(("08", "57P0")) or code == "25P03":
            return Fault.LOST
        return Fault.CONSTRAINT if code.startswith("23") else Fault.OTHER

    def waited(self, error: BaseException) -> bool:
        """A lock timeout, NOWAIT, or a statement timeout."""
        return _code(error) in _WAITED

    def lacks_right(self, error: BaseException) -> bool:
        """insufficient_privilege."""
        return _code(error) == _NO_RIGHT

    def lacks_database(self, error: BaseException) -> bool:
        """invalid_catalog_name; libpq tells of a refused connection in words only."""
        code = _code(error)
        return code == _NO_DATABASE if code else bool(_NO_DATABASE_TEXT.search(str(error)))

    def _server_id(self, raw: Any) -> int | None:
        if self.driver == "psycopg":
            return int(raw.pgconn.backend_pid) or None
        ask = getattr(raw, "get_backend_pid", None) or raw.get_server_pid
        return int(ask())

    def is_busy(self, connection: sa.Connection, server_id: int) -> bool:
        """Whether its session is there, in the middle of a statement or a transaction."""
        sql = (
            "SELECT 1 FROM pg_catalog.pg_stat_activity "
            f"WHERE pid = {int(server_id)} AND state IS DISTINCT FROM 'idle'"
        )
        return bool(self._ask(connection, sql))

    def blockers(self, cursor: Any, waiting: int) -> list[Blocker]:
        """By pg_blocking_pids."""
        cursor.execute("SET statement_timeout = 1500")
        return blockers_on_postgresql(cursor, waiting)

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """A rollback to a savepoint saves the rest; without one, ``commit_is_void`` sees it."""
        return Loss.EVERYTHING if self.fault(error) is Fault.LOST else Loss.NOTHING

    def commit_is_void(self, connection: sa.Connection) -> bool:
        """True in an aborted transaction, whose COMMIT is a silent ROLLBACK."""
        status = self._status(connection.connection.dbapi_connection)
        if status is not None:
            return status == _INERROR
        try:
            self._ask(connection, "SELECT 1")
        except self._dbapi.Error as error:
            return _code(error) == _IN_ERROR
        return False

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """A COMMIT that the server refused is rolled back; one without an answer is in doubt."""
        if connection.closed or connection.invalidated:
            return CommitOutcome.DOUBT
        if self.in_transaction(connection.connection.dbapi_connection):
            return CommitOutcome.OPEN
        refused = self.fault(error) is not Fault.LOST and _code(error) is not None
        return CommitOutcome.GONE if refused else CommitOutcome.DOUBT

    # ----- the user's transaction --------------------------------------------------------------

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """The transaction status of libpq; None on a broken connection and for other drivers."""
        status = self._status(dbapi_connection)
        return None if status is None or status == _UNKNOWN else status != _IDLE

    def _status(self, dbapi_connection: Any) -> int | None:
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        if self.driver == "psycopg":
            return int(raw.pgconn.transaction_status)
        if self.driver == "psycopg2":
            return int(raw.get_transaction_status())
        return None

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The table behind the name, by the search_path of this transaction."""
        if schema is None:
            rows = self._ask(connection, _RESOLVE + _VISIBLE, name)
        else:
            rows = self._ask(connection, _RESOLVE + _IN_SCHEMA, name, schema, schema)
        if not rows:
            return None
        real_schema, kind, persistence = (_text(value) for value in rows[0][:3])
        returns = bool(rows[0][3])
        if kind not in {"r", "p"}:
            return RealTable(real_schema, "other", plain=False, returns=returns)
        temporary = persistence == "t"
        return RealTable(
            real_schema,
            "temporary" if temporary else "table",
            plain=kind == "r",  # the root of a partitioned table has no system columns to return
            returns=returns,
        )

    def session_setting(self, sql: str) -> bool:
        """SET, RESET and their kin, DDL, and ``SELECT set_config(...)``."""
        return super().session_setting(sql) or "set_config" in sql

    # ----- inserts -----------------------------------------------------------------------------

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

    # ----- cleanup -----------------------------------------------------------------------------

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """READ COMMITTED, READ WRITE, timeouts and no role, all for this transaction only."""
        self._refuse_open_transaction(connection)
        if getattr(connection.connection.dbapi_connection, "autocommit", False):
            connection.execution_options(isolation_level="READ COMMITTED")
        limits = [
            None if seconds is None else _milliseconds(seconds)
            for seconds in (lock_timeout, statement_timeout)
        ]
        if self.driver in _SEVERAL_AT_ONCE:
            written = tuple("NULL" if limit is None else f"'{limit}'" for limit in limits)
            connection.exec_driver_sql(f"{_BEGINNING}; {_SETTINGS % written}").close()
        else:
            connection.exec_driver_sql(_BEGINNING)
            self._driver_sql(connection, _SETTINGS, *limits)

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

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """By the catalog, which every role may read."""
        rows = self._driver_sql(connection, _REFERENCING, list(schemas))
        return {_text(row[0]) for row in rows}

    def what_keeps(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, rules, and the policies of row-level security."""
        place = (table.name.schema, table.table.name)
        return [_text(row[0]) for row in self._driver_sql(connection, _KEEPS, *place * 3)]

    def inherited_foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str, str | None]]:
        """A key of a partition leads back to that of the table it is a partition of."""
        rows = self._driver_sql(connection, _INHERITED, list(schemas))
        return {(_text(row[0]), _text(row[1]), _text(row[2])) for row in rows}

    def hidden_tables(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str]]:
        """Those with row-level security, unless this role is above it."""
        rows = self._driver_sql(connection, _HIDDEN, list(schemas))
        return {(_text(row[0]), _text(row[1])) for row in rows}

    def invalid_indexes(self, connection: sa.Connection, schema: str, table: str) -> set[str]:
        """What a CREATE INDEX CONCURRENTLY that failed leaves behind."""
        rows = self._driver_sql(connection, _INVALID, schema, table)
        return {_text(row[0]) for row in rows}

    def _exists(self, connection: sa.Connection, sql: str, sent: tuple[Any, ...]) -> Sequence[Any]:
        (row,) = self._driver_sql(connection, sql, *sent)
        answer: Sequence[Any] = row
        return answer

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
        # text() takes a colon for a parameter, and doubles percent signs itself
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
        values = driver_values(table, dialect, keys)
        arrays = None if values is None else [self._array(column) for column in values]
        return None if arrays is None or None in arrays else arrays

    def _any_of_array(self, connection: sa.Connection, table: KeyedTable) -> str:
        return any_of_array(connection.dialect, table, self._marked("%s"))

    def _array(self, values: list[Any]) -> Any:
        # asyncpg encodes a list by the type that the server names; the others take text.
        return values if self.driver == "asyncpg" else array_literal(values)

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """As text, unless its type compares exactly: json and point have no equality."""
        kind = stored_type(column, self._own())
        if isinstance(kind, sa.Float):
            return sa.cast(column, sa.Double())  # a real is shown as another double than it is
        if is_exact(kind):
            return sa.type_coerce(column, kind)
        return sa.cast(column, sa.Text())

    def delete_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """By ctid: chosen and locked once, in a WITH that is not evaluated again.

        A ctid is unique only together with the partition.
        """
        system: list[sa.ColumnClause[Any]] = [sa.column("tableoid"), sa.column("ctid")]
        own = [sa.column(column.name, column.type) for column in table.table.columns]
        clause = sa.table(table.table.name, *own, *system, schema=table.clause.schema)
        target: Any = clause.alias()  # beside the anonymous name of the WITH
        condition = same_row(table, clause, row, self._same)
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

    def _same(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        kind = stored_type(column, self._own())
        if isinstance(kind, sa.Float):
            double: sa.Double[float] = sa.Double()
            sent = sa.cast(sa.bindparam(None, value, type_=double), double)
            return sa.cast(column, double).is_not_distinct_from(sent)
        if is_exact(kind):
            sent = sa.cast(sa.bindparam(None, value, type_=kind), kind)
            return sa.type_coerce(column, kind).is_not_distinct_from(sent)
        text = sa.cast(sa.bindparam(None, value, type_=sa.Text()), sa.Text())
        return sa.cast(column, sa.Text()).collate("C").is_not_distinct_from(text)

    def _own(self) -> Any:
        return self._dialect()

    def existing_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any]:
        """Asks with JSON or the driver's own arrays, cast to the catalog's types.

        Raises:
            sqlalchemy.exc.ProgrammingError: 42501 where row-level security may hide rows.
        """
        found: list[Any] = []
        (types,) = self._key_types(connection, [table])
        for part in chunks(keys, _ARRAY_KEYS):
            values = driver_values(table, connection.dialect, part)
            if values is None or None in types:
                found += those_there(part, part, lambda few: look_plainly(connection, table, few))
                continue
            sent = as_sent(values)
            found += those_there(part, sent, lambda few: self._look(connection, table, types, few))
        return found

    def _looks(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[Look | None]:
        """As ``existing_keys`` asks; the catalog is asked once for all."""
        looks: list[Look | None] = []
        known = self._key_types(connection, [table for table, _keys in tables])
        for (table, keys), types in zip(tables, known, strict=True):
            values = None
            if 0 < len(keys) <= _LOOKED_TOGETHER and None not in types:
                values = driver_values(table, connection.dialect, keys)
            look = None if values is None else self._selected(connection, table, types, values)
            looks.append(look)
        return looks

    def _key_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[list[str | None]]:
        """What the key columns of each table are cast to; from now on no row is hidden."""
        places = [(table.name.schema, table.table.name) for table in tables]
        sql = _KEY_TYPES.format(", ".join(["(%s, %s)"] * len(places)))
        rows = self._driver_sql(connection, sql, *(name for place in places for name in place))
        types = {tuple(map(_text, row[:3])): _text(row[3]) for row in rows}
        return [
            [types.get((*place, column.name)) for column in table.key_columns]
            for place, table in zip(places, tables, strict=True)
        ]

    def _look(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        types: list[str | None],
        sent: Sequence[Any],
    ) -> list[tuple[Any, ...]]:
        columns = [list(sent)] if len(types) == 1 else [list(c) for c in zip(*sent, strict=True)]
        sql, params = self._selected(connection, table, types, columns)
        return [tuple(row) for row in self._driver_sql(connection, sql, *params)]

    def _selected(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        types: list[str | None],
        columns: list[list[Any]],
    ) -> Look:
        typed = zip(types, columns, strict=True)
        arrays, params = zip(*(self._cast_array(*pair) for pair in typed), strict=True)
        return select_by_arrays(connection.dialect, table, arrays), params

    def _cast_array(self, type_name: str | None, values: list[Any]) -> tuple[str, Any]:
        """SQL for an array of this type, and its parameter; not by way of ``array_literal``."""
        cast = str(type_name)
        if self.driver != "asyncpg":
            cast = cast.replace("%", "%%")
        if set(map(type, values)) <= {int, str}:  # twice as fast as the drivers' own arrays
            return f"ARRAY(SELECT CAST(json_array_elements_text(%s) AS {cast}))", json.dumps(values)
        return f"CAST(%s AS {cast}[])", values

    # ----- who is alive ------------------------------------------------------------------------

    def life(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> Life:
        """An advisory lock of a transaction that stays open; it holds no snapshot meanwhile.

        Not a session's lock: behind a pooler sessions belong to nobody, while an open transaction
        keeps its server connection, and ends with its client.
        """
        take = f"SELECT pg_catalog.pg_try_advisory_xact_lock({int(number)})"
        # Taken again where it is held already: as good a proof as any.
        words = LockWords("READ COMMITTED", begin=_LIFE, take=take, keep=take, release=None)
        return ConnectionLife(engine, number, words, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        """By the list of locks, which everybody may read."""
        high, low = divmod(int(number), 2**32)
        return bool(self._ask(connection, _ALIVE.format(high=high, low=low)))

    # ----- raw SQL -----------------------------------------------------------------------------

    # ----- what has changed --------------------------------------------------------------------

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """Which transactions are over: whoever changes anything, in any database, has a number."""
        return self._ask(connection, _SNAPSHOT)

    def own_schemas(self, connection: sa.Connection) -> list[str]:
        """All but the system's own."""
        return [_text(name) for (name,) in self._ask(connection, _OWN_SCHEMAS)]

    def parts(self, connection: sa.Connection, schema: str) -> set[str]:
        """Partitions: their rows are the partitioned table's."""
        return {_text(name) for (name,) in self._ask(connection, _PARTITIONS, schema)}

    def _ask(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """Past SQLAlchemy's events, on the connection's own cursor."""
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(self._marked(sql), values)
            return list(cursor.fetchall())

    def _driver_sql(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        return list(connection.exec_driver_sql(self._marked(sql), values).all())

    def _marked(self, sql: str) -> str:
        if self.driver != "asyncpg":
            return sql
        pieces = sql.split("%s")
        marks = [f"{piece}${number}" for number, piece in enumerate(pieces[:-1], 1)]
        return "".join(marks) + pieces[-1]


def _code(error: BaseException) -> str | None:
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        error = error.orig
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code if isinstance(code, str) else None


def _text(value: Any) -> str:
    """The catalog's "char" columns come as bytes from some drivers."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))  # 0 would mean for ever
