"""Which real table a statement writes to: asked of the database, inside its transaction.

A ``schema_translate_map``, a search_path or USE decide what a name means. The
answer is kept per connection of the driver where nothing can have moved it, else per transaction.
psycopg and psycopg2 tell of each RETURNING from which table it returns.
Each block asks once whether known tables have been emptied or made anew since.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import Fault, Loss, RealTable, database_name
from tidyrows.keys import KeyedTable, TableName
from tidyrows.schema.reflect import with_real_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.capture.ownership import EngineSinks
    from tidyrows.capture.transaction_log import TransactionLog
    from tidyrows.dialects import Dialect

Target = tuple[KeyedTable, RealTable]
_CACHE, _KNOWN, _MOVED = "tidyrows_targets", "tidyrows_known", "tidyrows_moved"
_NAMED = "tidyrows_named"
_KEPT = "_tidyrows_targets"


class _Kept(dict[Any, Any]):
    """What is known of one Table object, kept by the Table so that both are forgotten together."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # a pickled MetaData does not need tidyrows


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
        table = statement._annotations.get("_emit_insert_table", statement.table)  # noqa: SLF001 -- table_of()
        if not isinstance(table, sa.Table):
            return "it names no Table but a table() or an alias, without a primary key"
        translate = options.get("schema_translate_map")
        schema = table.schema
        if translate and schema in translate:
            schema = translate[schema]
        place = (table, schema)
        if place not in known:
            info = connection.info
            if _KNOWN not in info:
                self._dialect.watch_names(connection, partial(forget_names, info))
            info[_KNOWN] = known
            # another listener may set a search_path past SQLAlchemy's events
            checkout = list(connection.engine.pool.dispatch.checkout)
            kept = _MOVED not in info and checkout == [self._harmless]
            version, block, cache = info.get(_CACHE, (None, None, {}))
            if version != self.schema_version or block != self._sinks.started:
                if not kept or version != self.schema_version:
                    cache = {}
                cache = self._still_there(connection, statement, cache)
                info[_CACHE] = (self.schema_version, self._sinks.started, cache)
            real = cache.get((table.name, schema)) if kept else None
            held = real and getattr(table, _KEPT, {}).get((self.database, real.schema))
            if held and held[0] is real and held[1] == self.schema_version:
                known[place] = held[2]
                return held[2]  # type: ignore[no-any-return]
            found = self._asked(connection, statement, table, schema, real, cache)
            if isinstance(found, str):
                return found
            known[place] = found
        return known[place]  # type: ignore[no-any-return]

    def counts_inserts(self, connection: sa.Connection, *parts: str) -> bool:
        """Whether an INSERT into what is named so, in parts, is counted as the rows that it makes.

        What the trigger of a view makes is not, nor what a trigger of a table puts elsewhere.
        """
        *schema, name = parts
        real = self._dialect.resolve(connection, schema[-1] if schema else None, name)
        if real is None or real.kind == "other":
            return False
        return not (real.alters_keys or real.moves_keys)

    def find_again(
        self,
        connection: sa.Connection,
        known: dict[Any, Any],
        statement: sa.Insert,
        options: Mapping[str, Any],
        found: Target,
    ) -> Target:
        """As :meth:`find`, after the table was probably emptied; all connections ask again."""
        self._sinks.started += 1
        known.clear()
        again = self.find(connection, known, statement, options)
        return found if again is None or isinstance(again, str) else again

    def named(self, connection: sa.Connection, block: object) -> dict[Any, KeyedTable]:
        """What a block has learnt of names on this connection of the driver; to be added to.

        It is empty where the names may mean something else by now.
        """
        info, now = connection.info, (block, self.schema_version)
        since, known = info.get(_NAMED, (None, {}))
        moved = _MOVED in info or list(connection.engine.pool.dispatch.checkout) != [self._harmless]
        if moved or since != now:
            known = {}
            info[_NAMED] = now, known
        return known  # type: ignore[no-any-return]

    def moved(self, connection: sa.Connection) -> None:
        """From now on names on this connection of the driver may mean something else."""
        connection.info[_MOVED] = True

    def find_moved(
        self,
        connection: sa.Connection,
        log: TransactionLog,
        statement: sa.Insert,
        options: Mapping[str, Any],
        told: str,
    ) -> Target | str | None:
        """As :meth:`find`, after a name has turned out to mean the table of another number.

        Nobody knows since when, so the rows before it in the transaction are in doubt.
        """
        log.mark_uncertain()
        log.targets.clear()
        self.moved(connection)
        found = self.find(connection, log.targets, statement, options)
        if isinstance(found, tuple) and not (found[1].incarnation or told).startswith(told):
            return "the statement wrote to another table than its name means now"
        return found

    def _asked(  # noqa: PLR0917 -- one call for all
        self,
        connection: sa.Connection,
        statement: Any,
        table: sa.Table,
        schema: str | None,
        real: RealTable | None,
        cache: dict[Any, RealTable],
    ) -> Target | str | None:
        """What :meth:`find` does where the database, or the Table, has to be asked first."""
        try:
            if real is None:
                real = self._dialect.resolve(connection, schema, table.name)
                if real is None:
                    return "the database shows no table of this name here"
                if real.kind == "temporary":
                    return None
                # Not kept where it looks like production: another tracker may refuse it.
                if not self._refuse(connection, real.schema):
                    cache[table.name, schema] = real
            return self._target(connection, table, real)
        except connection.dialect.loaded_dbapi.Error as error:
            self._raise_if_lost(connection, statement, error)
            # the caller's own statement will say it, as SQLAlchemy's error
            return f"the database does not say which table it is ({error})"
        except (sa.exc.DBAPIError, sa.exc.NoSuchTableError) as error:  # of SQLAlchemy's Inspector
            if getattr(error, "connection_invalidated", False):
                raise
            return f"the database does not tell its columns ({getattr(error, 'orig', error)})"

    def _target(self, connection: sa.Connection, table: sa.Table, real: RealTable) -> Target:
        """The real table with the columns of a Table object, which keeps the answer."""
        kept = _kept(table)
        known, version, target = kept.get((self.database, real.schema), (None, None, None))
        same = known == real and known.incarnation == real.incarnation
        if not same or version != self.schema_version:
            keyed = self.keyed(connection, table, real)
            completed = bool(keyed.key_columns) and not table.primary_key.columns
            alters = real.alters_keys or completed or self._dialect.rounds_keys(keyed)
            target = keyed, replace(real, alters_keys=alters)
        kept[self.database, real.schema] = real, self.schema_version, target
        return target  # type: ignore[no-any-return]

    def _still_there(
        self, connection: sa.Connection, statement: Any, cache: dict[Any, RealTable]
    ) -> dict[Any, RealTable]:
        """The real tables that have not been emptied or made anew since they were found."""
        known = {}
        for (name, _schema), real in cache.items():
            if real.incarnation:
                known[real.schema, name] = real.incarnation
        if not known or not self._dialect.deletes_by_key:
            return cache
        try:
            now = self._dialect.incarnations(connection, known)
        except connection.dialect.loaded_dbapi.Error as error:
            self._raise_if_lost(connection, statement, error)
            return {}
        if now == known:
            return cache
        return {
            name: real
            for name, real in cache.items()
            if real.incarnation == now.get((real.schema, name[0]))
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

    def keyed(self, connection: sa.Connection, table: sa.Table, real: RealTable) -> KeyedTable:
        """The one KeyedTable of a real table and a project's Table.

        Where the Table has no primary key, the database is asked for its columns and its key.

        Raises:
            sqlalchemy.exc.DBAPIError: the database does not tell its columns.
        """
        whole = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
        if real.kind == "table" and not whole.primary_key.columns:
            whole = with_real_columns(connection, whole, real.schema)
        name = TableName(self.database, real.schema, table.name)
        columns = tuple(column.name for column in whole.columns)
        place = (name, real.transactional, columns, tuple(whole.primary_key.columns.keys()))
        keyed: KeyedTable = _kept(table).setdefault(
            place, KeyedTable(name, whole, real.transactional)
        )
        return keyed


def _kept(table: sa.Table) -> dict[Any, Any]:
    own = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
    kept: dict[Any, Any] = vars(own).setdefault(_KEPT, _Kept())
    return kept


def forget_names(info: dict[Any, Any]) -> None:
    """Names on the connection of the driver with this ``info`` may mean something else by now."""
    info[_MOVED] = True
    info.get(_KNOWN, {}).clear()


def table_of(statement: sa.Insert | sa.Update | sa.Delete) -> Any:
    """The table that is written to; the ORM's bulk insert has one for each of a hierarchy."""
    return statement._annotations.get("_emit_insert_table", statement.table)  # noqa: SLF001 -- no public name
