"""Foreign keys and columns of a database of the MySQL family, in few statements.

SQLAlchemy's Inspector sends SHOW CREATE TABLE for each table.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tidyrows.schema.reflect import (
    Columns,
    inspector_foreign_keys,
    without_reflection_warnings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa
    from sqlalchemy.engine.interfaces import ReflectedForeignKeyConstraint

    from tidyrows.schema.graph import Place
    from tidyrows.schema.reflect import ReflectedKeys

# The current user, as the tables of privileges spell it.
_ME = "CONCAT('''', REPLACE(CURRENT_USER(), '@', '''@'''), '''')"
SHOWN_TRIGGERS = f"""
SELECT EXISTS (SELECT 1 FROM information_schema.user_privileges
               WHERE privilege_type = 'TRIGGER' AND grantee = {_ME})
       OR EXISTS (SELECT 1 FROM information_schema.schema_privileges
                  WHERE privilege_type = 'TRIGGER' AND grantee = {_ME} AND %s LIKE table_schema)
       OR EXISTS (SELECT 1 FROM information_schema.table_privileges
                  WHERE privilege_type = 'TRIGGER' AND grantee = {_ME}
                        AND table_schema = %s AND table_name = %s)
"""
"""Whether this user is shown the triggers of a table."""
# information_schema hides the foreign keys of a table on which a user has the SELECT right alone.
_SHOWN = f"""
SELECT EXISTS (SELECT 1 FROM information_schema.user_privileges
               WHERE privilege_type = 'DELETE' AND grantee = {_ME})
       OR EXISTS (SELECT 1 FROM information_schema.schema_privileges
                  WHERE privilege_type = 'DELETE' AND grantee = {_ME} AND %s LIKE table_schema)"""
_TABLES = """
SELECT table_name FROM information_schema.tables
WHERE table_schema = %s AND table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')"""
# With constants for both schemas, the server opens no other schema's files.
_FOREIGN_KEYS = """
SELECT c.table_name, c.constraint_name, c.referenced_table_schema, c.referenced_table_name,
       r.delete_rule, c.column_name, c.referenced_column_name
FROM information_schema.key_column_usage AS c
JOIN information_schema.referential_constraints AS r
  ON r.constraint_name = c.constraint_name AND r.table_name = c.table_name
WHERE c.table_schema = %s AND r.constraint_schema = %s
ORDER BY c.table_name, c.constraint_name, c.ordinal_position"""
_COLUMNS = """
SELECT c.table_name, c.column_name, c.column_type, c.is_nullable = 'YES',
       COALESCE(c.generation_expression, '') <> '', s.seq_in_index
FROM information_schema.columns AS c
JOIN information_schema.tables AS t
  ON t.table_schema = c.table_schema AND t.table_name = c.table_name
LEFT JOIN information_schema.statistics AS s
  ON s.table_schema = c.table_schema AND s.table_name = c.table_name
     AND s.column_name = c.column_name AND s.index_name = 'PRIMARY'
WHERE c.table_schema = %s AND t.table_schema = %s
      AND t.table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')
ORDER BY c.table_name, c.ordinal_position"""


def read_foreign_keys(connection: sa.Connection, schema: str) -> ReflectedKeys:
    """One schema's foreign keys by table, as SQLAlchemy's Inspector reads them."""
    if not connection.exec_driver_sql(_SHOWN, (schema,)).scalar_one():
        return inspector_foreign_keys(connection, schema)
    names = connection.exec_driver_sql(_TABLES, (schema,)).scalars()
    tables: dict[str, list[ReflectedForeignKeyConstraint]] = {name: [] for name in names}
    rows = connection.exec_driver_sql(_FOREIGN_KEYS, (schema, schema))
    for (table, name, *parent, rule), found in groupby(rows, itemgetter(0, 1, 2, 3, 4)):
        pairs = [(row[5], row[6]) for row in found]
        tables.setdefault(table, []).append(
            {
                "name": name,
                "constrained_columns": [child for child, _parent in pairs],
                "referred_schema": parent[0],
                "referred_table": parent[1],
                "referred_columns": [referred for _child, referred in pairs],
                # what a key without an action says, too
                "options": {} if rule == "RESTRICT" else {"ondelete": rule},
            }
        )
    return tables


def read_columns(connection: sa.Connection, places: Iterable[Place]) -> dict[Place, Columns]:
    """The columns of these tables, in one statement for each schema."""
    wanted = set(places)
    found: dict[Place, Columns] = {}
    for schema in sorted({schema for schema, _name in wanted}):
        rows = connection.exec_driver_sql(_COLUMNS, (schema, schema))
        for name, columns in groupby(rows, itemgetter(0)):
            if (schema, name) in wanted:
                found[schema, name] = _columns(connection, list(columns))
    return found


def _columns(connection: sa.Connection, rows: list[Any]) -> Columns:
    # The Inspector's own parser reads SHOW CREATE TABLE: this is one with what is needed here.
    dialect: Any = connection.dialect
    lines = ",\n".join(f"  `{number}` {row[2]}" for number, row in enumerate(rows))
    with without_reflection_warnings():
        parsed = dialect._tabledef_parser.parse(f"CREATE TABLE `t` (\n{lines}\n) ", "utf8mb4")  # noqa: SLF001 -- there is no public way from a type's text to a type
    key = sorted((row for row in rows if row[5]), key=itemgetter(5))
    return Columns(
        {rows[int(each["name"])][1]: each["type"] for each in parsed.columns},
        tuple(row[1] for row in key),
        frozenset(row[1] for row in rows if row[3] and not row[4] and not row[5]),
    )
