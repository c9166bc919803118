"""Reading SQLite's foreign keys by its PRAGMA, which knows what the Inspector is not told."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.engine.interfaces import ReflectedForeignKeyConstraint

    from tidyrows.schema.reflect import ReflectedKeys


def pragma_foreign_keys(connection: sa.Connection, schema: str) -> ReflectedKeys:
    """One SQLite schema's foreign keys by table, as ``PRAGMA foreign_key_list`` tells them.

    The Inspector parses the text of CREATE TABLE for what ON DELETE does, and finds nothing where
    a column says ``REFERENCES parent ON DELETE CASCADE`` by itself. The PRAGMA knows; it does not
    know names and deferral, which SQLite's cycles need not (``defer_foreign_keys`` defers all).
    A parent's name and columns come back as the parent itself spells them.
    """
    quoted = connection.dialect.identifier_preparer.quote_identifier(schema)
    # a virtual table has no page; it holds no key, and asking for its columns needs its module
    is_real = "m.type = 'table' AND m.rootpage > 0 AND m.name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    tables: dict[str, list[ReflectedForeignKeyConstraint]] = {
        name: []
        for (name,) in connection.exec_driver_sql(
            f"SELECT m.name FROM {quoted}.sqlite_master AS m WHERE {is_real} ORDER BY m.name"
        )
    }
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    key_columns: dict[str, dict[int, str]] = defaultdict(dict)
    for table, column, key_position in connection.exec_driver_sql(
        "SELECT m.name, i.name, i.pk"
        f" FROM {quoted}.sqlite_master AS m CROSS JOIN pragma_table_info(m.name, ?) AS i"
        f" WHERE {is_real}",
        (schema,),
    ):
        columns[_fold(table)][_fold(column)] = column
        if key_position:
            key_columns[_fold(table)][key_position] = column
    spelled = {_fold(name): name for name in tables}
    keys: dict[tuple[str, int], ReflectedForeignKeyConstraint] = {}
    for (
        table,
        number,
        position,
        parent,
        child_column,
        parent_column,
        on_delete,
    ) in connection.exec_driver_sql(
        'SELECT m.name, f.id, f.seq, f."table", f."from", f."to", f.on_delete'
        f" FROM {quoted}.sqlite_master AS m JOIN pragma_foreign_key_list(m.name, ?) AS f"
        " WHERE m.type = 'table' ORDER BY m.name, f.id, f.seq",
        (schema,),
    ):
        folded = _fold(parent)
        key = keys.get((table, number))
        if key is None:
            key = keys[table, number] = {
                "name": None,
                "constrained_columns": [],
                "referred_schema": schema,
                "referred_table": spelled.get(folded, parent),
                "referred_columns": [],
                "options": {"ondelete": on_delete},
            }
            tables[table].append(key)
        key["constrained_columns"].append(child_column)
        # a key that names no columns means the parent's primary key, in its order
        named = parent_column or key_columns[folded].get(position + 1)
        if named is not None:
            key["referred_columns"].append(columns[folded].get(_fold(named), named))
    return tables


def _fold(name: str) -> str:
    """Fold ASCII letters only, as SQLite does where it compares names."""
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in name)
