"""Preserved rows: their values as they were, and what this process writes to them.

Before and after each statement that may write one of them the rows are read in the same
transaction, so that effects of triggers, defaults and expressions are known too. Cleanup puts a row
back that has the values which the tracker's own statements left, and no row that has others.
"""

from __future__ import annotations

import re
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.sql.dml import Delete, Update

from tidyrows.capture.affected_rows import matched_keys
from tidyrows.capture.changes import INTERNAL
from tidyrows.capture.connections import driver_of
from tidyrows.capture.ownership import entered_sinks
from tidyrows.dialects.keys import plain_chunks, plain_condition
from tidyrows.errors import NoPrimaryKeyError, UnknownTableError
from tidyrows.schema.reflect import without_reflection_warnings
from tidyrows.tracking import named_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.capture.changes import Sink
    from tidyrows.capture.engine import Capture
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.tracking.sessions import Sessions
    from tidyrows.tracking.store import Store

_WRITES = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(update|delete|insert|merge|replace|with)\b",
    re.IGNORECASE | re.DOTALL,
)
_QUOTES = str.maketrans("", "", '"`[]%\\')  # however a name is quoted and escaped
_UPSERTS = re.compile(r"\b(conflict|duplicate|replace)\b", re.IGNORECASE)
_STATES_KEPT = 2  # of our own, per row: where a COMMIT fails, the state before it holds
# by real names; no sink is given what it does
_INTERNAL_READ = {"schema_translate_map": None, INTERNAL: True}

State = tuple[Any, ...] | None
"""The values of a row, column by column; None where there is no row."""


@dataclass(slots=True, eq=False)
class PreservedRow:
    """One row.

    Attributes:
        original: the values to put back.
        own_states: what committed statements of the tracker left, newest last.
        contested: somebody else changed it after the tracker did.
        other_writer: who else changed it in this process, if anybody did.
    """

    original: tuple[Any, ...]
    own_states: list[State] = field(default_factory=list)
    contested: bool = False
    other_writer: str | None = None


@dataclass(slots=True, eq=False)
class PreservedTable:
    """Rows of one table, by key.

    ``columns`` are all that can be written; ``always``: one of them is GENERATED ALWAYS.
    """

    table: KeyedTable
    columns: tuple[sa.ColumnClause[Any], ...]
    always: bool
    rows: dict[Any, PreservedRow] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        """A regular expression for the table's name in SQL without quotes."""
        return rf"(?<!\w){re.escape(self.table.name.name.translate(_QUOTES))}(?!\w)"

    def read(
        self, connection: sa.Connection, keys: Sequence[Any], *, lock: bool = False
    ) -> dict[Any, tuple[Any, ...]]:
        """The values of the rows of these keys now, by key."""
        wanted = [*self.table.key_clauses, *self.columns]
        width = len(self.table.key_clauses)
        states: dict[Any, tuple[Any, ...]] = {}
        for part in plain_chunks(self.table, keys):
            statement = sa.select(*wanted).where(plain_condition(self.table, part))
            if lock:
                statement = statement.with_for_update()
            for row in connection.execute(statement, execution_options=_INTERNAL_READ):
                key = tuple(row[:width])
                states[key[0] if width == 1 else key] = tuple(row[width:])
        return states


_Look: TypeAlias = tuple[PreservedTable, dict[Any, PreservedRow], dict[Any, tuple[Any, ...]]]
"""Rows of a table that a statement may write, and their values before it."""


def is_same(one: State, other: State) -> bool:
    """Whether two states of a row are equal."""
    if one is None or other is None:
        return one is other
    return all(map(same_value, one, other))


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of a column are equal; NaN is NaN."""
    try:
        return bool(one == other or (one != one and other != other))  # noqa: PLR0124 -- only NaN does so
    except Exception:  # noqa: BLE001 -- a project's own type may raise anything (arrays have no truth)
        return repr(one) == repr(other)


class Preserved:
    """The rows that one tracker preserves."""

    def __init__(self, sessions: Sessions, store: Store) -> None:
        self._sessions = sessions
        self._store = store
        self._tables: dict[TableName, PreservedTable] = {}
        self._observers: dict[str, _WriteObserver] = {}
        self._lock = threading.Lock()

    @property
    def tracker(self) -> Sink:
        """The tracker that preserves the rows."""
        return self._sessions.engines.sink

    def __bool__(self) -> bool:
        return bool(self._tables)

    def tables(self) -> list[PreservedTable]:
        """The preserved rows, table by table."""
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
            if capture.database not in self._observers:
                engine = engines.by_database[capture.database]
                self._observers[capture.database] = _WriteObserver(self, capture, engine)

    def forget(self, table: PreservedTable, keys: Iterable[Any]) -> None:
        """Preserve these rows no longer."""
        with self._lock:
            for key in keys:
                table.rows.pop(key, None)
            if not table.rows:
                self._tables.pop(table.table.name, None)
            if not self._tables:
                while self._observers:
                    self._observers.popitem()[1].close()


def _columns(
    connection: sa.Connection, table: KeyedTable
) -> tuple[tuple[sa.ColumnClause[Any], ...], bool]:
    """Every column that can be written, those that are in no model too."""
    always = False
    columns = []
    schema, clause = table.name.schema or None, table.clause
    # a type that SQLAlchemy does not know: the model does, or the driver accepts its own values
    with without_reflection_warnings():
        found = sa.inspect(connection).get_columns(table.name.name, schema=schema)
    for described in found:
        if described.get("computed"):
            continue
        identity = described.get("identity")
        always = always or bool(identity and identity.get("always"))
        name = described["name"]
        known = clause.c.get(name)
        # the model's type makes Python values; a column without a model has the database's type
        columns.append(sa.column(name, described["type"] if known is None else known.type))
    return tuple(columns), always


class _WriteObserver:
    """Observes what is written through one engine while rows of its database are preserved."""

    def __init__(self, preserved: Preserved, capture: Capture, engine: sa.Engine) -> None:
        self._preserved = weakref.ref(preserved)
        self._capture = capture
        self._engine = engine
        # by the context of a statement, its tables with the rows and their values before it
        self._before: weakref.WeakKeyDictionary[Any, list[_Look]] = weakref.WeakKeyDictionary()
        # by connection, what its transaction wrote: a row, its new values, who wrote if not we
        self._pending: weakref.WeakKeyDictionary[
            sa.Connection, list[tuple[PreservedRow, State, str | None]]
        ] = weakref.WeakKeyDictionary()
        self._events = (
            ("before_cursor_execute", self._before_cursor_execute),
            ("after_cursor_execute", self._after_cursor_execute),
            ("commit", self._commit),
            ("commit_twophase", self._commit),
            ("rollback", self._rollback),
        )
        for name, listener in self._events:
            event.listen(engine, name, listener)

    def close(self) -> None:
        """Remove the listeners."""
        for name, listener in self._events:
            event.remove(self._engine, name, listener)

    def _before_cursor_execute(
        self, connection: sa.Connection, _cursor: Any, sql: str, _given: Any, context: Any, _m: bool
    ) -> None:
        """Read the rows before the statement: somebody else may have changed what we wrote."""
        preserved = self._preserved()
        if preserved is None or context is None or INTERNAL in context.execution_options:
            return
        if _verb(sql) is None:
            return
        plain = sql.translate(_QUOTES)
        looks = [
            _look(connection, table, context)
            for table in preserved.tables()
            if table.table.name.database == self._capture.database
            and re.search(table.pattern, plain, re.IGNORECASE)
        ]
        if not looks:
            return
        self._before[context] = looks
        pending = self._pending.get(connection, ())
        for _table, rows, states in looks:
            for key, row in rows.items():
                now = states.get(key)
                own = [*row.own_states, *(state for each, state, _ in pending if each is row)]
                if own and not any(is_same(now, state) for state in (row.original, *own)):
                    row.contested = True

    def _after_cursor_execute(
        self, connection: sa.Connection, _cursor: Any, sql: str, _given: Any, context: Any, _m: bool
    ) -> None:
        """Read the rows after the statement: it wrote what differs."""
        looks = self._before.pop(context, None) if context is not None else None
        preserved = self._preserved()
        if not looks or preserved is None:
            return
        other = self._other_writer(preserved.tracker)
        for table, rows, states in looks:
            now = table.read(connection, list(rows))
            for key, row in rows.items():
                if is_same(now.get(key), states.get(key)):
                    continue
                # an UPDATE removes no row: this one has another key, and inserting it again would
                # make a second one
                renamed = _verb(sql) == "update" and key not in now
                written = (row, now.get(key), "an UPDATE of its key" if renamed else other)
                self._pending.setdefault(connection, []).append(written)
        if self._capture.dialect.in_transaction(driver_of(connection)) is False:
            self._commit(connection)

    def _commit(self, connection: sa.Connection, *_: Any) -> None:
        for row, state, other in self._pending.pop(connection, ()):
            if other is not None:
                row.other_writer = other
            else:
                row.own_states = [*row.own_states, state][-_STATES_KEPT:]

    def _rollback(self, connection: sa.Connection) -> None:
        self._pending.pop(connection, None)

    def _other_writer(self, own: Sink) -> str | None:
        """Who writes in this context; None where it is the tracker that preserves."""
        sinks = self._capture.sinks
        for sink in reversed(entered_sinks()):
            if sink.active and sink in sinks:
                return None if sink is own else f"the tracker {sink.context.tag}"
        alone = not any(sink.active and sink is not own for sink in sinks)
        return None if alone else "a thread that belongs to no tracker"


def _verb(sql: str) -> str | None:
    """The verb of a statement that may write rows which are there; None of any other."""
    begins = _WRITES.match(sql)
    if begins is None or (begins[1].lower() == "insert" and _UPSERTS.search(sql) is None):
        return None
    return begins[1].lower()


def _look(connection: sa.Connection, table: PreservedTable, context: Any) -> _Look:
    """Read the rows that a statement may write; lock those that an UPDATE names, as it would."""
    rows = dict(table.rows)
    statement = context.compiled.statement if context.compiled is not None else None
    lock = False
    if (
        isinstance(statement, (Update, Delete))
        and isinstance(statement.table, sa.Table)
        and statement.table.name == table.table.name.name
    ):
        named = matched_keys(statement, context, table.table) or ()
        keys = [key[0] if len(key) == 1 else key for key in named]
        if keys and all(key in rows for key in keys):
            rows = {key: rows[key] for key in keys}
            lock = isinstance(statement, Update)
    return table, rows, table.read(connection, list(rows), lock=lock)
