"""Shared rows as they were: remembered, and what this process does to them meanwhile.

Before and after each statement that may write one of them the rows are read in the same
transaction, so that triggers, defaults and expressions are told too. What the tracker's own
statements have left is put back at cleanup; what somebody else has made of it since is not.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.sql.dml import Delete, Update

from tidyrows.capture import ambient
from tidyrows.capture.pending_commits import driver_of
from tidyrows.capture.where_clause import matched_keys
from tidyrows.errors import NoPrimaryKeyError, UnknownTableError
from tidyrows.execution import INTERNAL
from tidyrows.tracking import named_rows
from tidyrows.tracking.row_snapshots import PreservedRow, PreservedTable, is_same

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidyrows.capture.engine import Capture
    from tidyrows.capture.sink import Sink
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.tracking.row_snapshots import State
    from tidyrows.tracking.sessions import Sessions
    from tidyrows.tracking.store import Store

_WRITES = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(update|delete|insert|merge|replace|with)\b",
    re.IGNORECASE | re.DOTALL,
)
_QUOTES = str.maketrans("", "", '"`[]%\\')  # however a name is quoted and escaped
_UPSERTS = re.compile(r"\b(conflict|duplicate|replace)\b", re.IGNORECASE)
_KEPT = 2
"""How many states of our own are known per row: a COMMIT may fail, then the one before it holds."""


class Preserved:
    """The rows that one tracker preserves.

    Args:
        sessions: the tracker's.
        store: what it holds.
    """

    def __init__(self, sessions: Sessions, store: Store) -> None:
        self._sessions = sessions
        self._store = store
        self._tables: dict[TableName, PreservedTable] = {}
        self._ears: dict[str, _Ear] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._tables)

    def tables(self) -> list[PreservedTable]:
        """What is remembered, table by table."""
        with self._lock:
            return [self._tables[name] for name in sorted(self._tables)]

    def remember(self, select: sa.Select[Any]) -> int:
        """Remember what a query finds; see :meth:`ResourceTracker.preserve`."""
        if not isinstance(select, sa.Select):
            raise UnknownTableError(
                f"preserve takes a select(), and {select!r} is none. Write "
                f"tracker.preserve(select(Setting)).",
                table=select,
            )
        try:
            found, count = named_rows.rows_of_query(self._sessions, select)
        except NoPrimaryKeyError as error:
            raise NoPrimaryKeyError(
                f"The table {error.table} has no primary key, so no row of it can be preserved. "
                f"Give it one, or put its rows back yourself.",
                table=error.table,
            ) from None
        for table, keys in found:
            self._remember(table, keys)
        return count

    def _remember(self, table: KeyedTable, keys: list[Any]) -> None:
        ours = set(self._store.held_keys(table.name, keys))
        known = self._tables.get(table.name)
        new = [key for key in keys if key not in ours and not (known and key in known.rows)]
        if not new:
            return
        engines = self._sessions.engines
        with self._sessions.new_connection(table.table) as connection:
            if known is None:
                columns, always = _columns(connection, table)
                known = PreservedTable(table, columns, always)
            then = known.read(connection, new)
            capture = engines.capture(connection.engine)
        with self._lock:
            known = self._tables.setdefault(table.name, known)
            for key, values in then.items():
                known.rows.setdefault(key, PreservedRow(values))
            if capture.database not in self._ears:
                engine = engines.of(capture.database)
                self._ears[capture.database] = _Ear(self, capture, engine)

    def forget(self, table: PreservedTable, keys: Iterable[Any]) -> None:
        """Rows that are as they were."""
        with self._lock:
            for key in keys:
                table.rows.pop(key, None)
            if not table.rows:
                self._tables.pop(table.table.name, None)
            if not self._tables:
                while self._ears:
                    self._ears.popitem()[1].close()

    def mentioned(self, database: str, sql: str) -> list[PreservedTable]:
        """The tables whose rows a statement may write."""
        begins = _WRITES.match(sql)
        if begins is None:
            return []
        if begins[1].lower() == "insert" and _UPSERTS.search(sql) is None:
            return []
        plain = sql.translate(_QUOTES)
        return [
            table
            for name, table in list(self._tables.items())
            if name.database == database
            and re.search(
                rf"(?<!\w){re.escape(name.name.translate(_QUOTES))}(?!\w)", plain, re.IGNORECASE
            )
        ]

    def whose(self, capture: Capture) -> Sink | None:
        """The tracker for which this context writes; None where nobody can tell."""
        sinks = capture.sinks
        for sink in reversed(ambient.sinks()):
            if sink.active and sink in sinks:
                return sink
        own = self._sessions.engines.sink
        return None if any(each.active and each is not own for each in sinks) else own

    def is_ours(self, tracker: Sink) -> bool:
        """Whether a tracker is the one that preserves."""
        return tracker is self._sessions.engines.sink


def _columns(
    connection: sa.Connection, table: KeyedTable
) -> tuple[tuple[sa.ColumnClause[Any], ...], bool]:
    """Every column that can be written, those that no model knows too."""
    always = False
    columns = []
    schema, clause = table.name.schema or None, table.clause
    with warnings.catch_warnings():
        # a type that SQLAlchemy does not know: the model does, or the driver takes what it gave
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        found = sa.inspect(connection).get_columns(table.name.name, schema=schema)
    for described in found:
        if described.get("computed"):
            continue
        identity = described.get("identity")
        always = always or bool(identity and identity.get("always"))
        name = described["name"]
        known = clause.c.get(name)
        # the model knows the way to Python values; of what it does not know, the database's type
        columns.append(sa.column(name, described["type"] if known is None else known.type))
    return tuple(columns), always


class _Ear:
    """Hears what is written through one engine while rows of it are preserved."""

    def __init__(self, preserved: Preserved, capture: Capture, engine: sa.Engine) -> None:
        self._preserved = weakref.ref(preserved)
        self._capture = capture
        self._engine = engine
        self._before: weakref.WeakKeyDictionary[Any, list[_Look]] = weakref.WeakKeyDictionary()
        self._pending: weakref.WeakKeyDictionary[sa.Connection, list[_Written]] = (
            weakref.WeakKeyDictionary()
        )
        self._events = (
            ("before_cursor_execute", self.before_cursor_execute),
            ("after_cursor_execute", self.after_cursor_execute),
            ("commit", self.commit),
            ("commit_twophase", self.commit),
            ("rollback", self.rollback),
        )
        for name, listener in self._events:
            event.listen(engine, name, listener)

    def close(self) -> None:
        """Hear no more."""
        for name, listener in self._events:
            event.remove(self._engine, name, listener)

    def before_cursor_execute(
        self, connection: sa.Connection, _cursor: Any, sql: str, _given: Any, context: Any, _m: bool
    ) -> None:
        """How the rows are before the statement; somebody else may have changed what we wrote."""
        preserved = self._preserved()
        if preserved is None or context is None or INTERNAL in context.execution_options:
            return
        looks = [
            _look(connection, table, context)
            for table in preserved.mentioned(self._capture.database, sql)
        ]
        if not looks:
            return
        self._before[context] = looks
        pending = self._pending.get(connection, ())
        for look in looks:
            for key, row in look.rows.items():
                now = look.states.get(key)
                own = [*row.ours, *(each.state for each in pending if each.row is row)]
                if own and not any(is_same(now, state) for state in (row.then, *own)):
                    row.contested = True

    def after_cursor_execute(
        self,
        connection: sa.Connection,
        _cursor: Any,
        sql: str,
        _given: Any,
        context: Any,
        _m: bool,
    ) -> None:
        """How the rows are after the statement: what differs is its doing."""
        looks = self._before.pop(context, None) if context is not None else None
        preserved = self._preserved()
        if not looks or preserved is None:
            return
        writer = preserved.whose(self._capture)
        if writer is None:
            other: str | None = "a thread that belongs to no tracker"
        else:
            other = None if preserved.is_ours(writer) else f"the tracker {writer.context.tag}"
        begins = _WRITES.match(sql)
        renames = begins is not None and begins[1].lower() == "update"
        for look in looks:
            now = look.table.read(connection, list(look.rows))
            changed = [
                # an UPDATE takes no row away: this one is elsewhere, and another in its place
                # would be one too many
                _Written(row, now.get(key), "an UPDATE of its key" if lost else other)
                for key, row in look.rows.items()
                if not is_same(now.get(key), look.states.get(key))
                for lost in (renames and key not in now,)
            ]
            self._pending.setdefault(connection, []).extend(changed)
        if self._capture.dialect.in_transaction(driver_of(connection)) is False:
            self.commit(connection)

    def commit(self, connection: sa.Connection, *_: Any) -> None:
        """What was written is committed."""
        for written in self._pending.pop(connection, ()):
            if written.other is not None:
                written.row.other = written.other
            else:
                written.row.ours = [*written.row.ours, written.state][-_KEPT:]

    def rollback(self, connection: sa.Connection) -> None:
        """What was written is undone."""
        self._pending.pop(connection, None)


@dataclass(slots=True)
class _Written:
    row: PreservedRow
    state: State
    other: str | None


@dataclass(slots=True)
class _Look:
    table: PreservedTable
    rows: Mapping[Any, PreservedRow]
    states: Mapping[Any, tuple[Any, ...]]


def _look(connection: sa.Connection, table: PreservedTable, context: Any) -> _Look:
    """The rows that a statement may write; locked where it names them, as it would itself."""
    rows = dict(table.rows)
    statement = context.compiled.statement if context.compiled is not None else None
    lock = False
    if (
        isinstance(statement, (Update, Delete))
        and isinstance(statement.table, sa.Table)
        and statement.table.name == table.table.name.name
    ):
        keys = matched_keys(statement, context, table.table)
        if keys is not None:
            stored = [key[0] if len(key) == 1 else key for key in keys]
            if all(key in rows for key in stored):
                rows = {key: rows[key] for key in stored}
                lock = isinstance(statement, Update)
    return _Look(table, rows, table.read(connection, list(rows), lock=lock))
