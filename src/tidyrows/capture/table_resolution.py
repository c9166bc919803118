"""Which real table a statement writes to: asked of the database, inside its transaction.

A ``schema_translate_map``, a search_path or USE decide what a name means. The
answer is kept per connection of the driver where nothing can have moved it, else per transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import RealTable, database_name
from tidyrows.keys import KeyedTable, TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.dialects import Dialect

Target = tuple[KeyedTable, RealTable]
_CACHE, _MOVED = "tidyrows_targets", "tidyrows_moved"


class NowhereError(Exception):
    """The real table is not known; the message says why, as the end of a sentence."""


class Places:
    """The real tables of one engine.

    Attributes:
        database: how row keys name the engine's database.
        version: counts the DDL that was seen; what is known of the schema may be stale.
    """

    def __init__(self, engine: sa.Engine, dialect: Dialect, harmless: Callable[..., None]) -> None:
        self.database = database_name(engine)
        self.version = 0
        self._dialect = dialect
        self._harmless = harmless
        self._tables: dict[tuple[TableName, sa.Table], KeyedTable] = {}

    def find(
        self,
        connection: sa.Connection,
        known: dict[Any, Any],
        table: Any,
        options: Mapping[str, Any],
    ) -> Target | None:
        """The real table that a statement writes to; None for a temporary one."""
        if not isinstance(table, sa.Table):
            raise NowhereError("it names no Table but a table() or an alias, without a primary key")
        translate = options.get("schema_translate_map")
        schema = table.schema
        if translate and schema in translate:
            schema = translate[schema]
        place = (table, schema)
        if place not in known:
            info = connection.info
            kept = _MOVED not in info
            for listener in connection.engine.pool.dispatch.checkout:
                # another one may set a search_path past SQLAlchemy's events
                kept = kept and listener == self._harmless
            version, cache = info.get(_CACHE, (None, {}))
            if version != self.version:
                cache = {}
                info[_CACHE] = (self.version, cache)
            found: Target | None = cache.get(place) if kept else None
            known[place] = found or self._resolved(connection, table, schema, cache)
        return known[place]  # type: ignore[no-any-return]

    def moved(self, connection: sa.Connection) -> None:
        """From now on names on this connection of the driver may mean something else."""
        connection.info[_MOVED] = True

    def changed(self) -> None:
        """The schema was changed: tables may be elsewhere."""
        self.version += 1

    def _resolved(
        self,
        connection: sa.Connection,
        table: sa.Table,
        schema: str | None,
        cache: dict[Any, Target],
    ) -> Target | None:
        try:
            real = self._dialect.resolve(connection, schema, table.name)
        except connection.dialect.loaded_dbapi.Error as error:
            # the caller's own statement will say it, as SQLAlchemy's error
            raise NowhereError(f"the database does not say which table it is ({error})") from error
        if real is None:
            raise NowhereError("the database shows no table of this name here")
        if real.kind == "temporary":
            return None
        name = TableName(self.database, real.schema, table.name)
        found = cache[table, schema] = self.keyed(name, table), real
        return found

    def keyed(self, name: TableName, table: sa.Table) -> KeyedTable:
        """The one KeyedTable of a real table and a project's Table."""
        table = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
        keyed = self._tables.get((name, table))
        if keyed is None:
            keyed = self._tables.setdefault((name, table), KeyedTable(name, table))
        return keyed
