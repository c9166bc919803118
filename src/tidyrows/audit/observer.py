"""Observes the SQL of every engine that the suite or its application opens in this process.

Committed rows come from capture, as a tracker's do. Capture does not know what is read, or what raw
SQL writes to: the ORM's loads and the tables that SQL strings name are observed here. The strings
that go to the driver are scanned, so raw SQL and SQLAlchemy's are the same. A table too many costs
one more look at it, and causes no finding.
"""

from __future__ import annotations

import os
import re
import weakref
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event, orm

from tidyrows.audit.names import NAME, WrittenName, written_name
from tidyrows.audit.reads import reads_of
from tidyrows.audit.tables import plain_key
from tidyrows.capture.changes import INTERNAL, ROLLED_BACK, Inserted, Touched
from tidyrows.capture.engine import capture_for
from tidyrows.capture.raw_sql import first_word, is_ddl
from tidyrows.dialects import dialect_for
from tidyrows.keys import RowKey, TableName
from tidyrows.observe.all_engines import AllEngines, ObservingSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.audit.tables import Key
    from tidyrows.capture.changes import Change

_WRITES = re.compile(
    r"\b(?:INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*(?:INTO\s+)?"
    r"|REPLACE\s+INTO\s+|MERGE\s+INTO\s+|COPY\s+"
    r"|UPDATE\s+(?:OR\s+\w+\s+)?(?:ONLY\s+)?"
    r"|DELETE\s+FROM\s+(?:ONLY\s+)?|TRUNCATE\s+(?:TABLE\s+)?(?:ONLY\s+)?)" + NAME,
    re.IGNORECASE,
)
_EMPTIES = re.compile(
    r"\b(?:DELETE\s+FROM|TRUNCATE(?:\s+TABLE)?)\s+(?:ONLY\s+)?" + NAME, re.IGNORECASE
)
_DROPS = re.compile(
    rf"\bDROP\s+TABLE\s+(?:IF\s+EXISTS\s+)?({NAME}(?:\s*,\s*{NAME})*)", re.IGNORECASE
)
_READS = re.compile(rf"\b(?:FROM|JOIN)\s+{NAME}", re.IGNORECASE)
# A statement that begins with one of these may write and name no table: a procedure, a block.
_UNCLEAR = frozenset({"CALL", "DO", "EXEC", "EXECUTE", "LOAD"})
# CREATE DATABASE may name another database as its template, to which nobody may be connected.
_EXCLUSIVE = re.compile(r"\s*(?:DROP|ALTER|CREATE)\s+(?:DATABASE|SCHEMA)\b", re.IGNORECASE)


@dataclass(slots=True)
class DatabaseObservations:
    """What one SQL string does, or all that were sent to one database."""

    written: frozenset[WrittenName] = frozenset()
    read: frozenset[WrittenName] = frozenset()
    ddl: bool = False  # it may create or drop tables
    dropped: frozenset[WrittenName] = frozenset()
    emptied: frozenset[WrittenName] = frozenset()  # some of its rows were deleted
    unclear: bool = False  # it may write, and does not name the table
    exclusive: bool = False  # it may need a database to which nobody is connected

    @property
    def writes(self) -> bool:
        """Whether a statement of this process may have written."""
        return bool(self.written) or self.ddl or self.unclear

    def add(self, other: DatabaseObservations) -> None:
        """Add what another SQL string does."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) | getattr(other, each.name))


@lru_cache(maxsize=4096)
def scan(sql: str) -> DatabaseObservations:
    """Scan one SQL string."""
    written = frozenset(written_name(match[1]) for match in _WRITES.finditer(sql))
    return DatabaseObservations(
        written=written,
        read=frozenset(written_name(match[1]) for match in _READS.finditer(sql)) - written,
        ddl=is_ddl(sql),
        dropped=frozenset(written_name(n) for m in _DROPS.finditer(sql) for n in m[1].split(",")),
        emptied=frozenset(written_name(match[1]) for match in _EMPTIES.finditer(sql)),
        unclear=first_word(sql) in _UNCLEAR,
        exclusive=_EXCLUSIVE.match(sql) is not None,
    )


@dataclass(slots=True)
class Observations:
    """What was observed of all databases."""

    databases: dict[str, DatabaseObservations] = field(default_factory=dict)
    loaded: set[RowKey] = field(default_factory=set)  # by the ORM
    inserted: set[RowKey] = field(default_factory=set)  # committed or not
    # ``inserted``, ``updated`` or ``deleted``
    committed: list[tuple[str, RowKey]] = field(default_factory=list)
    unnamed_inserts: set[str] = field(default_factory=set)  # tables; the keys are not known
    # by the text of SQL and parameters: the database, the SQL and the parameters of a SELECT
    selects: dict[tuple[str, str, str], tuple[str, str, Any]] = field(default_factory=dict)

    def of(self, database: str) -> DatabaseObservations:
        """The observations of one database."""
        return self.databases.setdefault(database, DatabaseObservations())


_MOST = 10_000
"""How many rows of one statement are remembered."""
_SELECTS = 200
"""How many SELECTs of one test are remembered."""


class AuditObserver(ObservingSink):
    """Observes all engines from ``open`` to ``close``."""

    is_shared = False  # it hears too of changes to the rows that trackers of several tests hold

    def __init__(self) -> None:
        super().__init__()
        self.observed = Observations()
        self.models: dict[str, str] = {}
        self._meet: Callable[[sa.Connection], str | None]
        self._release: Callable[[], None]
        self._engines = AllEngines(self._accept, lambda _engine: self)
        self._process = os.getpid()
        self._names: weakref.WeakKeyDictionary[sa.Engine, str | None] = weakref.WeakKeyDictionary()
        self._captured: dict[str, tuple[str, weakref.ref[sa.Engine]]] = {}
        self._listeners: list[tuple[Any, str, Any]] = []

    def open(
        self, meet: Callable[[sa.Connection], str | None], release: Callable[[], None]
    ) -> None:
        """Begin to observe."""
        self._meet, self._release = meet, release
        self._listen(sa.Engine, "engine_connect", self._connected)
        self._listen(sa.Engine, "before_cursor_execute", self._executing)
        self._listen(orm.Session, "pending_to_persistent", self._flushed)
        for name in ("load", "refresh"):
            self._listen(orm.Mapper, name, self._loaded, raw=True)
        self._engines.start()

    def close(self) -> None:
        """Remove the listeners."""
        for engine in self._engines.known:
            sinks = capture_for(engine).sinks
            sinks.observers = tuple(each for each in sinks.observers if each is not self)
        self._engines.stop()
        while self._listeners:
            event.remove(*self._listeners.pop())

    def pop_observed(self) -> Observations:
        """What was observed since the last call."""
        for engine in self._engines.known:
            capture_for(engine).resolve()
        observed, self.observed = self.observed, Observations()
        return observed

    def _listen(self, target: Any, name: str, function: Any, **options: Any) -> None:
        event.listen(target, name, function, **options)
        self._listeners.append((target, name, function))

    # -- connections -----------------------------------------------------------------------------

    def _accept(self, engine: sa.Engine) -> bool:
        sinks = capture_for(engine).sinks
        sinks.add(self)
        sinks.observers = (*sinks.observers, self)
        return True

    def _connected(self, connection: sa.Connection) -> str | None:
        """A connection is taken from its pool; returns the name of its database."""
        engine = connection.engine
        unobserved = not {INTERNAL, ROLLED_BACK}.isdisjoint(engine.get_execution_options())
        if unobserved or os.getpid() != self._process:
            return None  # the audit's own; or after a fork, where the audit's thread is missing
        self._names[engine] = name = self._meet(connection)
        if name is not None:
            self._captured[capture_for(engine).database] = name, weakref.ref(engine)
            self.observed.of(name)
        return name

    def _database(self, connection: sa.Connection) -> str | None:
        """The name of a connection's database; None where that is not looked at."""
        unobserved = not {INTERNAL, ROLLED_BACK}.isdisjoint(connection.get_execution_options())
        if unobserved or os.getpid() != self._process:
            return None
        if connection.engine not in self._names:  # the connection is older than the observer
            return self._connected(connection)
        return self._names[connection.engine]

    def _executing(  # noqa: PLR0917 -- SQLAlchemy's signature
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
        if found.exclusive and os.getpid() == self._process:
            self._release()
        if name is not None:
            there = self.observed.of(name)
            if not executemany:
                self._remember(name, statement, parameters, there)
            there.add(found)

    def _remember(self, name: str, sql: str, parameters: Any, there: DatabaseObservations) -> None:
        """Remember a SELECT, but for those of tables whose rows this test has deleted."""
        reads = reads_of(sql) if len(self.observed.selects) < _SELECTS else ()
        if reads and not there.emptied & {read.table for read in reads}:
            place = name, sql, repr(parameters)
            self.observed.selects.setdefault(place, (name, sql, parameters))

    # -- what capture reports ----------------------------------------------------------------------

    def apply(self, change: Change) -> Change:
        """Rows were inserted, updated or deleted, and that is committed."""
        if isinstance(change, (Inserted, Touched)) and change.table.key_columns:
            operation = change.verb if isinstance(change, Touched) else "inserted"
            rows = self._rows(change)
            self.observed.committed += [(operation, row) for row in rows]
            if operation == "inserted":
                self.observed.inserted.update(rows)
        return change

    def _rows(self, change: Change) -> list[RowKey]:
        database, reference = self._captured.get(change.table.name.database, ("", None))
        engine = None if reference is None else reference()
        if engine is None:
            return []
        table = replace(change.table.name, database=database)
        columns = change.table.key_columns
        keys = change.keys[:_MOST]
        whole = keys if len(columns) > 1 else [(key,) for key in keys]
        sent = [_sent_key(columns, key, engine.dialect) for key in whole]
        return [RowKey(table, key) for key in sent if key is not None]

    def warn_once(self, subject: Any, message: str) -> None:
        """Rows were inserted whose keys are not known: reads of their table are not reported."""
        if isinstance(subject, tuple):
            name = subject[1]
            self.observed.unnamed_inserts.add(
                name.name if isinstance(name, TableName) else written_name(str(name))[1]
            )

    # -- what the ORM reports ----------------------------------------------------------------------

    def _flushed(self, session: orm.Session, instance: Any) -> None:
        """An object was inserted; whether it is committed does not matter here."""
        row = self._row_of(session, sa.inspect(instance))
        if row is not None:
            self.observed.inserted.add(row)

    def _loaded(self, state: Any, context: Any, names: Any = None) -> None:
        row = self._row_of(state.session, state)
        if row is not None:
            self.models.setdefault(row.table.name, state.class_.__name__)
            self.observed.loaded.add(row)

    def _row_of(self, session: orm.Session | None, state: Any) -> RowKey | None:
        """The row of an object in the table of its base class."""
        mapper = state.mapper.base_mapper
        table = mapper.local_table
        if (
            session is None
            or state.key is None
            or not isinstance(table, sa.Table)
            or len(mapper.primary_key) != len(state.key[1])
        ):
            return None
        try:
            bind = session.get_bind(mapper)
        except Exception:  # noqa: BLE001 -- a session of the project's own class may find its bind in another way
            return None
        name = self._names.get(bind.engine)
        key = None if name is None else _sent_key(mapper.primary_key, state.key[1], bind.dialect)
        if name is None or key is None:
            return None
        schema = table.schema or dialect_for(bind.engine).default_schema(bind.engine)
        return RowKey(TableName(name, schema, table.name), key)


def _sent_key(
    columns: Iterable[sa.Column[Any]], values: Sequence[Any], dialect: sa.Dialect
) -> Key | None:
    """A key as the project's types send it to the driver; None where a type refuses it.

    The ORM has the Python values of the project's types, a look at a table has the driver's.
    """
    if any(value is None for value in values):
        return None
    processors = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]
    try:
        return plain_key(
            value if process is None else process(value)
            for process, value in zip(processors, values, strict=True)
        )
    except Exception:  # noqa: BLE001 -- a project's own type may not take back what it has made
        return None
