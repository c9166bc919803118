"""Which real table a statement writes to: asked of the database, inside its transaction.

A ``schema_translate_map``, a search_path or USE decide what a name means. The
answer is kept per connection of the driver where nothing can have moved it, else per transaction.
Each block that has a ledger asks once whether known tables have been emptied or made anew since.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import Fault, Loss, RealTable, database_name
from tidyrows.keys import KeyedTable, TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.capture.ownership import EngineSinks
    from tidyrows.dialects import Dialect

Target = tuple[KeyedTable, RealTable]
_CACHE, _MOVED = "tidyrows_targets", "tidyrows_moved"


class RealTables:
    """The real tables of one engine.

    Attributes:
        database: how row keys name the engine's database.
        schema_version: counts the DDL that was seen; what is known of the schema may be stale.
    """

    def __init__(
        self,
        engine: sa.Engine,
        dialect: Dialect,
        sinks: EngineSinks,
        harmless: Callable[..., None],
        refuse: Callable[[sa.Connection, str], bool],
    ) -> None:
        self.database = database_name(engine)
        self.schema_version = 0
        self._dialect = dialect
        self._sinks = sinks
        self._harmless = harmless
        self._refuse = refuse
        self._tables: dict[tuple[TableName, sa.Table, bool], KeyedTable] = {}

    def find(
        self,
        connection: sa.Connection,
        known: dict[Any, Any],
        statement: sa.Insert | sa.Update | sa.Delete,
        options: Mapping[str, Any],
    ) -> Target | str | None:
        """The real table that a statement writes to; None for a temporary one.

        A text, the end of a sentence, says why it is not known.
        """
        table = table_of(statement)
        if not isinstance(table, sa.Table):
            return "it names no Table but a table() or an alias, without a primary key"
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
            version, block, cache = info.get(_CACHE, (None, None, {}))
            if version != self.schema_version or block != self._sinks.started:
                if not kept or version != self.schema_version:
                    cache = {}
                cache = self._still_there(connection, statement, cache)
                info[_CACHE] = (self.schema_version, self._sinks.started, cache)
            found = cache.get(place) if kept else None
            if found is None:
                found = self._resolved(connection, statement, table, schema)
                if isinstance(found, str):
                    return found
                # Not kept where it looks like production: another tracker may refuse it.
                if found is not None and not self._refuse(connection, found[1].schema):
                    cache[place] = found
            known[place] = found
        return known[place]  # type: ignore[no-any-return]

    def moved(self, connection: sa.Connection) -> None:
        """From now on names on this connection of the driver may mean something else."""
        connection.info[_MOVED] = True

    def _resolved(
        self, connection: sa.Connection, statement: Any, table: sa.Table, schema: str | None
    ) -> Target | str | None:
        try:
            real = self._dialect.resolve(connection, schema, table.name)
        except connection.dialect.loaded_dbapi.Error as error:
            self._raise_if_lost(connection, statement, error)
            # the caller's own statement will say it, as SQLAlchemy's error
            return f"the database does not say which table it is ({error})"
        if real is None:
            return "the database shows no table of this name here"
        if real.kind == "temporary":
            return None
        name = TableName(self.database, real.schema, table.name)
        target = self.keyed(name, table, transactional=real.transactional)
        if not real.alters_keys and self._dialect.rounds_keys(target):
            real = replace(real, alters_keys=True)
        return target, real

    def _still_there(
        self, connection: sa.Connection, statement: Any, cache: dict[Any, Target]
    ) -> dict[Any, Target]:
        """The targets that have not been emptied or made anew since they were found."""
        known = {target[0].place for target in cache.values() if target[1].incarnation}
        if not known:
            return cache
        try:
            now = self._dialect.incarnations(connection, known)
        except connection.dialect.loaded_dbapi.Error as error:
            self._raise_if_lost(connection, statement, error)
            return {}
        return {
            place: target
            for place, target in cache.items()
            if target[1].incarnation == now.get(target[0].place)
        }

    def _raise_if_lost(
        self, connection: sa.Connection, statement: Any, error: BaseException
    ) -> None:
        """Let a dead connection or a lost transaction be the caller's error, as SQLAlchemy would.

        The statement itself would now get another error, that the connection is closed; or be
        committed without what came before it.
        """
        lost = self._dialect.fault(error) is Fault.LOST
        driver = connection.connection.dbapi_connection
        if lost or self._dialect.loss(error, driver) is Loss.EVERYTHING:
            connection._handle_dbapi_exception(error, str(statement), None, None, None)  # noqa: SLF001 -- what it does to its own cursor's errors

    def keyed(self, name: TableName, table: sa.Table, *, transactional: bool = True) -> KeyedTable:
        """The one KeyedTable of a real table and a project's Table."""
        table = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
        place = (name, table, transactional)
        keyed = self._tables.get(place)
        if keyed is None:
            keyed = self._tables.setdefault(place, KeyedTable(*place))
        return keyed


def table_of(statement: sa.Insert | sa.Update | sa.Delete) -> Any:
    """The table that is written to; the ORM's bulk insert has one for each of a hierarchy."""
    return statement._annotations.get("_emit_insert_table", statement.table)  # noqa: SLF001 -- no public name
