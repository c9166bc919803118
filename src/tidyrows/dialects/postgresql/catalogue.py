"""PostgreSQL's catalogue: the real table of a name, and what may hide or keep rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.catalogue import RealTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.schema import ForeignKey

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
        """By the catalog, which every role may read."""
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
