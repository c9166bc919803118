"""SQLite's catalogue: its files, the tables in them, and their foreign keys."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.driver import database_name
from tidyrows.dialects.sqlite.locks import is_in_memory, named_files
from tidyrows.schema.reflect import reflect_foreign_keys

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa
    from sqlalchemy.engine.interfaces import ReflectedForeignKeyConstraint

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey
    from tidyrows.schema.reflect import ReflectedKeys


def pragma_foreign_keys(connection: sa.Connection, schema: str) -> ReflectedKeys:
    """One schema's foreign keys by table, as ``PRAGMA foreign_key_list`` lists them.

    The Inspector finds no ON DELETE where a column says ``REFERENCES parent ON DELETE CASCADE`` by
    itself. The PRAGMA lacks names and deferral, which are not needed. A parent's name and columns
    come back as the parent itself spells them.
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
    rows = connection.exec_driver_sql(
        'SELECT m.name, f.id, f.seq, f."table", f."from", f."to", f.on_delete'
        f" FROM {quoted}.sqlite_master AS m JOIN pragma_foreign_key_list(m.name, ?) AS f"
        " WHERE m.type = 'table' ORDER BY m.name, f.id, f.seq",
        (schema,),
    )
    for table, number, position, parent, child_column, parent_column, on_delete in rows:
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


# Of CREATE TRIGGER; AFTER and UPDATE suppress nothing. BEFORE is the default.
_BEFORE_DELETE = re.compile(r"(?<!AFTER)\s+DELETE\s+ON\b", re.IGNORECASE)


class SQLiteCatalogue(Dialect):
    """By PRAGMAs and ``sqlite_master``; a schema is an attached file."""

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """An unqualified name means temp, then main, then what is attached, in that order."""
        attached = [row[1] for row in self._query(connection, "PRAGMA database_list")]
        # temp is listed only once it has been used
        places = ["temp", *(place for place in attached if place != "temp")]
        if schema is not None:
            places = [place for place in places if place.lower() == schema.lower()]
        for place in places:
            master = f"{quoted(place)}.sqlite_{'temp_' if place == 'temp' else ''}master"
            rows = self._query(
                connection,
                f"SELECT type, sql FROM {master} "
                "WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
                name,
            )
            if rows:
                kind, sql = rows[0]
                if kind == "view" or str(sql).upper().startswith("CREATE VIRTUAL"):
                    return RealTable(place, "other", plain=False)
                return RealTable(place, "temporary" if place == "temp" else "table", plain=False)
        return None

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE: RAISE(IGNORE) skips the row."""
        rows = self._query(
            connection,
            f"SELECT name, sql FROM {quoted(table.name.schema)}.sqlite_master "
            "WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name",
            table.name.name,
        )
        return [f'trigger "{name}"' for name, sql in rows if _BEFORE_DELETE.search(str(sql))]

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        return reflect_foreign_keys(connection, schemas, read=pragma_foreign_keys)

    def is_private(self, engine: sa.Engine) -> bool:
        return is_in_memory(engine.url)

    def missing_file(self, engine: sa.Engine) -> str | None:
        """By the URL, since a look through a connection would be too late."""
        if engine.url.host or self.is_private(engine):
            return None
        named = named_files(engine.url)
        try:
            return None if any(Path(each).exists() for each in named) else named[-1]
        except OSError:  # no right to look: connecting gives the reason
            return None

    def identity(self, engine: sa.Engine) -> tuple[Any, ...] | None:
        """The file and its inode: a file that was deleted and made anew is another database."""
        if self.is_private(engine):
            return (database_name(engine),)
        for each in named_files(engine.url):
            with suppress(OSError):
                found = Path(each).stat()
                return str(Path(each).absolute()), found.st_dev, found.st_ino
        return None

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """Counts the commits of other connections, and the changes of this one."""
        (busy,) = self._query(connection, "PRAGMA busy_timeout")[0]
        self._query(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        try:
            attached = [
                name for _n, name, path in self._query(connection, "PRAGMA database_list") if path
            ]
            versions = [
                self._query(connection, f"PRAGMA {quoted(each)}.data_version") for each in attached
            ]
        finally:
            self._query(connection, f"PRAGMA busy_timeout = {busy}")
        raw: Any = connection.connection.driver_connection
        return versions, getattr(raw, "total_changes", 0)

    def default_schema(self, bind: sa.Engine | sa.Connection) -> str:
        """The file that was opened, not one that was attached."""
        return "main"

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """What is attached, too."""
        listed = self._query(connection, "PRAGMA database_list")
        return [name for _number, name, _path in listed if name != "temp"]

    def storage_tables(self, connection: sa.Connection, schema: str) -> set[str]:
        """The tables in which a virtual table keeps its rows; unknown before SQLite 3.37."""
        listed = self._query(connection, "PRAGMA table_list")
        return {name for place, name, kind, *_ in listed if (place, kind) == (schema, "shadow")}


def quoted(name: str) -> str:
    """A name for SQL text."""
    return '"' + name.replace('"', '""') + '"'
