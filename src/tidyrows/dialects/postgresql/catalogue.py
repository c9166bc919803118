"""PostgreSQL's catalogue, its blockers, and its advisory locks for live workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.locks import PATIENCE, Blocker, ConnectionLock, LivenessLock, LockStatements

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey

# pg_table_is_visible honours search_path, pg_temp first. Unlike to_regclass, this cannot raise.
_RESOLVE = """
SELECT n.nspname, CAST(c.relkind AS pg_catalog.text), CAST(c.relpersistence AS pg_catalog.text),
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
_SUPPRESSORS = """
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


class PostgreSQLCatalogue(Dialect):
    """By the catalogue, which every role may read."""

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """The table behind the name, by the search_path of this transaction."""
        if schema is None:
            rows = self._query(connection, _RESOLVE + _VISIBLE, name)
        else:
            rows = self._query(connection, _RESOLVE + _IN_SCHEMA, name, schema, schema)
        if not rows:
            return None
        real_schema, kind, persistence, returns = rows[0]
        if kind not in {"r", "p"}:
            return RealTable(real_schema, "other", plain=False, returns=returns)
        temporary = persistence == "t"
        return RealTable(
            real_schema,
            "temporary" if temporary else "table",
            plain=kind == "r",  # the root of a partitioned table has no system columns to return
            returns=returns,
        )

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        return {row[0] for row in self._execute(connection, _REFERENCING, list(schemas))}

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, rules, and the policies of row-level security."""
        place = (table.name.schema, table.table.name)
        return [row[0] for row in self._execute(connection, _SUPPRESSORS, *place * 3)]

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        """With those marked that a partition has from its partitioned table."""
        schemas = list(schemas)
        keys = super().foreign_keys(connection, schemas)
        inherited = {tuple(row) for row in self._execute(connection, _INHERITED, schemas)}
        return tuple(
            replace(key, inherited=True) if (*key.child, key.name) in inherited else key
            for key in keys
        )

    def hidden_tables(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> set[tuple[str, str]]:
        """Those with row-level security, unless this role is above it."""
        return {(row[0], row[1]) for row in self._execute(connection, _HIDDEN, list(schemas))}

    def invalid_indexes(self, connection: sa.Connection, schema: str, table: str) -> set[str]:
        """What a CREATE INDEX CONCURRENTLY that failed leaves behind."""
        return {row[0] for row in self._execute(connection, _INVALID, schema, table)}

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """Which transactions are over: whoever changes anything, in any database, has a number."""
        return self._query(connection, _SNAPSHOT)

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """All but the system's own."""
        return [name for (name,) in self._query(connection, _OWN_SCHEMAS)]

    def storage_tables(self, connection: sa.Connection, schema: str) -> set[str]:
        """Partitions: their rows are the partitioned table's."""
        return {name for (name,) in self._query(connection, _PARTITIONS, schema)}


# Process 0 is a prepared transaction, which no session holds any more.
_BLOCKERS = """
SELECT b.pid, a.usename, a.application_name, pg_catalog.host(a.client_addr), a.state,
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8, a.query,
       pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(b.pid), ', ')
FROM (SELECT DISTINCT unnest(pg_catalog.pg_blocking_pids({waiter})) AS pid) b
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid ORDER BY 1"""
_PREPARED = """
SELECT gid, owner, extract(epoch FROM pg_catalog.clock_timestamp() - prepared)::float8
FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()"""

# For this transaction only: a pooler shares sessions. From no table, which would be
# locked for as long. PostgreSQL 17 is the first that ends long transactions.
_BEGIN_LIVENESS = """
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


class PostgreSQLLocks(Dialect):
    """``pg_blocking_pids``, and an advisory lock of a transaction that stays open."""

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        cursor.execute("SET statement_timeout = 1500")
        cursor.execute(_BLOCKERS.format(waiter=int(waiter)))
        found = []
        for pid, user, application, host, state, seconds, query, waits_for in cursor.fetchall():
            if pid == 0:
                found += _prepared(cursor)
                continue
            doing = state
            if waits_for:
                doing = f"{state or 'waiting'}, itself waiting for pid {waits_for},"
            age = None if seconds is None else float(seconds)
            found.append(
                Blocker(int(pid), user, application or None, host, doing, age, query or None)
            )
        return found

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """An advisory lock of a transaction that stays open; it holds no snapshot meanwhile."""
        # Not a session's lock: behind a pooler sessions belong to nobody, while an open transaction
        # keeps its server connection, and ends with its client.
        acquire = f"SELECT pg_catalog.pg_try_advisory_xact_lock({int(number)})"
        # Acquired again where it is held already: as good a proof as any.
        statements = LockStatements(
            "READ COMMITTED", begin=_BEGIN_LIVENESS, acquire=acquire, is_held=acquire, release=None
        )
        return ConnectionLock(engine, number, statements, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        """By the list of locks, which everybody may read."""
        high, low = divmod(int(number), 2**32)
        return bool(self._query(connection, _ALIVE.format(high=high, low=low)))


def _prepared(cursor: Any) -> list[Blocker]:
    cursor.execute(_PREPARED)
    prepared = cursor.fetchall()
    return [
        Blocker(
            0,
            user=owner,
            state=f"prepared transaction {gid!r}",
            seconds=float(age),
            certain=len(prepared) == 1,
        )
        for gid, owner, age in prepared
    ]
