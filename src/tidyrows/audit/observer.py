"""Observes the SQL of every engine that the suite or its application opens in this process."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.engine import Compiled
from sqlalchemy.sql.dml import Delete, Insert, Update

from tidyrows.audit.keys import sent_key
from tidyrows.audit.observations import Observations, Operation
from tidyrows.audit.sql_scan import scan
from tidyrows.capture import inserts, returning, where_clause
from tidyrows.dialects import RealTable, dialect_for
from tidyrows.execution import INTERNAL
from tidyrows.keys import KeyedTable, RowKey, TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Pending = list[tuple[Operation, RowKey] | str]
"""What an open transaction has done, and the names of its savepoints between."""

_MANY = 10_000
"""Rows of one statement of which no more is remembered."""


class AuditObserver:
    """Hears all engines, those that are made later too, from open to close.

    Attributes:
        heard: what was heard since the last time that it was taken.
        models: the names of the mapped classes that were met, by table.
    """

    def __init__(self) -> None:
        self.observed = Observations()
        self.models: dict[str, str] = {}
        self._meet: Callable[[sa.Connection], str | None]
        self._leave: Callable[[], None]
        self._ignored: set[int] = set()
        self._process = os.getpid()
        self._names: weakref.WeakKeyDictionary[sa.Engine, str | None] = weakref.WeakKeyDictionary()
        self._pending: weakref.WeakKeyDictionary[sa.Connection, Pending]
        self._pending = weakref.WeakKeyDictionary()
        self._keyed: dict[tuple[str, sa.Table], KeyedTable] = {}
        self._hung: list[tuple[Any, str, Any]] = []

    def open(self, meet: Callable[[sa.Connection], str | None], leave: Callable[[], None]) -> None:
        """Begin to listen.

        Args:
            meet: called with each connection that is taken; returns how its database is named.
            leave: called before a statement that waits for all other connections to go.
        """
        self._meet, self._leave = meet, leave
        for name in (
            *("engine_connect", "before_cursor_execute", "after_execute", "commit", "rollback"),
            *("savepoint", "rollback_savepoint", "commit_twophase", "rollback_twophase"),
        ):
            self._hang(sa.Engine, name, getattr(self, f"_{name}"))
        for name in ("load", "refresh"):
            self._hang(orm.Mapper, name, self._loaded, raw=True)

    def close(self) -> None:
        """Listen no more."""
        while self._hung:
            event.remove(*self._hung.pop())

    def ignore_this_thread(self) -> None:
        """What is asked here is the audit's own."""
        self._ignored.add(threading.get_ident())

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """What this thread asks in the block is the audit's own."""
        self.ignore_this_thread()
        try:
            yield
        finally:
            self._ignored.discard(threading.get_ident())

    def _is_ignored(self) -> bool:
        """In the audit's own thread; and after a fork, where nobody takes what was heard."""
        return threading.get_ident() in self._ignored or os.getpid() != self._process

    def take(self) -> Observations:
        """What was heard since the last time."""
        heard, self.observed = self.observed, Observations()
        return heard

    def _hang(self, target: Any, name: str, hear: Any, **options: Any) -> None:
        event.listen(target, name, hear, **options)
        self._hung.append((target, name, hear))

    def _database(self, connection: sa.Connection) -> str | None:
        """The name of a connection's database; None where it is nobody's business."""
        if self._is_ignored() or INTERNAL in connection.get_execution_options():
            return None
        if connection.engine not in self._names:  # it was taken before the ear was opened
            self._names[connection.engine] = self._meet(connection)
        return self._names[connection.engine]

    # -- what SQLAlchemy calls -------------------------------------------------------------------

    def _engine_connect(self, connection: sa.Connection) -> None:
        if self._is_ignored():
            return
        self._names[connection.engine] = name = self._meet(connection)
        if name is not None:
            self.observed.of(name)

    def _before_cursor_execute(  # noqa: PLR0917 -- SQLAlchemy's signature
        self,
        connection: sa.Connection,
        cursor: Any,
        statement: str,
        parameters: Any,
        context: Any,
        executemany: bool,
    ) -> None:
        name = self._database(connection)
        found = scan(statement)
        if found.exclusive and not self._is_ignored():
            self._leave()
        if name is None:
            return
        there = self.observed.of(name)
        there.written |= found.written
        there.read |= found.read
        if not getattr(getattr(context, "compiled", None), "isinsert", False):
            there.unnamed_inserts |= {name for _schema, name in found.written}
        there.ddl |= found.ddl
        there.dropped |= found.dropped
        there.unclear |= found.unclear

    def _after_execute(  # noqa: PLR0917 -- SQLAlchemy's signature
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Any,
        result: Any,
    ) -> None:
        if isinstance(statement, Compiled):
            statement = statement.statement
        if not isinstance(statement, (Insert, Update, Delete)):
            return
        name = self._database(connection)
        if name is None or not isinstance(result, sa.CursorResult) or result.context is None:
            return
        table = returning.table_of(statement) if isinstance(statement, Insert) else statement.table
        target = self._target(connection, name, table, options)
        if target is None or not target.key_columns:
            return
        deed, keys = _done(statement, result, target, connection)
        rows = self._rows(connection, target, keys[:_MANY])
        if deed == "inserted":
            self.observed.inserted.update(rows)
            if not rows:
                self.observed.of(name).unnamed_inserts.add(target.name.name)
        done: Pending = [(deed, row) for row in rows]
        if dialect_for(connection).is_autocommit(connection):
            self.observed.committed += [each for each in done if not isinstance(each, str)]
        else:
            self._pending.setdefault(connection, []).extend(done)

    def _target(
        self, connection: sa.Connection, database: str, table: Any, options: Any
    ) -> KeyedTable | None:
        if not isinstance(table, sa.Table):
            return None
        translate = options.get("schema_translate_map") or {}
        schema = translate.get(table.schema, table.schema)
        return self._named(connection.engine, database, table, schema)

    def _named(
        self, engine: sa.Engine, database: str, table: sa.Table, schema: str | None
    ) -> KeyedTable:
        table = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
        place = schema or dialect_for(engine).default_schema(engine)
        found = self._keyed.get((place, table))
        if found is None or found.name.database != database:
            found = KeyedTable(TableName(database, place, table.name), table)
            self._keyed[place, table] = found
        return found

    def _rows(
        self, connection: sa.Connection, target: KeyedTable, keys: Sequence[Sequence[Any]]
    ) -> list[RowKey]:
        sent = [sent_key(target.key_columns, key, connection.dialect) for key in keys]
        return [RowKey(target.name, key) for key in sent if key is not None]

    def _loaded(self, state: Any, context: Any, names: Any = None) -> None:
        session = state.session
        if session is None or state.key is None:
            return
        mapper = state.mapper.base_mapper
        table = mapper.local_table
        if not isinstance(table, sa.Table) or len(mapper.primary_key) != len(state.key[1]):
            return
        self.models.setdefault(str(table.name), state.class_.__name__)
        try:
            bind = session.get_bind(mapper)
        except Exception:  # noqa: BLE001 -- a session that is told its bind otherwise, or is the project's own
            return
        name = self._names.get(bind.engine)
        if name is not None:
            target = self._named(bind.engine, name, table, table.schema)
            key = sent_key(mapper.primary_key, state.key[1], bind.dialect)
            if key is not None:
                self.observed.loaded.add(RowKey(target.name, key))

    # -- transactions ----------------------------------------------------------------------------

    def _commit(self, connection: sa.Connection) -> None:
        done = self._pending.pop(connection, [])
        self.observed.committed += [each for each in done if not isinstance(each, str)]

    def _rollback(self, connection: sa.Connection) -> None:
        self._pending.pop(connection, None)

    def _savepoint(self, connection: sa.Connection, name: str | None) -> None:
        if name is None:  # SQLAlchemy names it right after this event, by this counter
            name = f"sa_savepoint_{connection._Connection__savepoint_seq + 1}"  # type: ignore[attr-defined]  # noqa: SLF001 -- the event does not tell the name
        if connection in self._pending:
            self._pending[connection].append(name)

    def _rollback_savepoint(self, connection: sa.Connection, name: str, context: Any) -> None:
        pending = self._pending.get(connection, [])
        del pending[pending.index(name) if name in pending else 0 :]

    def _commit_twophase(self, connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
        self._commit(connection)

    def _rollback_twophase(self, connection: sa.Connection, xid: Any, is_prepared: bool) -> None:
        self._rollback(connection)


def _done(
    statement: Any, result: sa.CursorResult[Any], target: KeyedTable, connection: sa.Connection
) -> tuple[Operation, list[tuple[Any, ...]]]:
    """What a statement did, and the keys that it did it to, where they can be told."""
    if isinstance(statement, Insert):
        if not returning.is_plain(statement):
            return "inserted", []
        real = RealTable(target.name.schema, "table", plain=False)
        told = inserts.keys_from_result(statement, result, target, real, dialect_for(connection))
        return "inserted", inserts.nameable(told[0]) if told else []
    keys = where_clause.matched_keys(statement, result.context, target) or []
    deed: Operation = "updated" if isinstance(statement, Update) else "deleted"
    return deed, keys if result.context.rowcount else []
