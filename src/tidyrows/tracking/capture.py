"""See every insert of an engine, and believe it when its transaction has committed.

One :class:`Capture` per engine listens to SQLAlchemy's connection events (DATABASE_FACTS 11). It
stays for the engine's life and is idle while no tracker is active: a COMMIT may arrive after its
block has ended, and must then still be heard.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Compiled
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import Delete, Insert, Update

from tidyrows.dialects import database_name, dialect_for
from tidyrows.rows import KeyedTable, TableName
from tidyrows.tracking import ambient, rawsql, returning, statements
from tidyrows.tracking.changes import Change, Kind, TransactionLog
from tidyrows.tracking.transactions import EVENTS, Transactions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidyrows.dialects import RealTable
    from tidyrows.tracking.tracker import ResourceTracker

_captures: weakref.WeakKeyDictionary[sa.Engine, Capture] = weakref.WeakKeyDictionary()
_captures_lock = threading.Lock()
INTERNAL = "tidyrows_internal"
"""The execution option of tidyrows' own statements, which nobody needs to hear."""


def root_engine(engine: sa.Engine) -> sa.Engine:
    """The engine behind ``engine.execution_options(...)``: they share pool and events."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


def capture_for(engine: sa.Engine) -> Capture:
    """The one capture of an engine, installed at the first call."""
    engine = root_engine(engine)
    with _captures_lock:
        capture = _captures.get(engine)
        if capture is None:
            capture = _captures[engine] = Capture(engine)
        return capture


class Capture:
    """What is heard on one engine.

    Attributes:
        database: how row keys name the engine's database.
        trackers: the active trackers bound to this engine as a whole.
        schema_version: counts the DDL that was seen; what is known of the schema may be stale.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.dialect = dialect_for(engine)
        self.trackers: list[ResourceTracker] = []
        self.schema_version = 0
        self.database = database_name(engine)
        self._transactions = Transactions(self.dialect)
        self._sessions: weakref.WeakKeyDictionary[
            sa.Connection, weakref.WeakSet[ResourceTracker]
        ] = weakref.WeakKeyDictionary()
        self._tables: dict[tuple[TableName, sa.Table], KeyedTable] = {}
        self._plain_tables: weakref.WeakSet[Any] = weakref.WeakSet()
        event.listen(engine, "before_execute", self._before_execute, retval=True)
        event.listen(engine, "after_execute", self._after_execute)
        for name in ("do_execute", "do_executemany"):
            event.listen(engine, name, self._do_execute)
        for name in EVENTS:
            event.listen(engine, name, getattr(self._transactions, name))
        self.dialect.guard_pool(engine)

    # -- who listens ---------------------------------------------------------------------------

    def add_holder(self, tracker: ResourceTracker) -> None:
        """From now on this tracker may hold rows of this engine."""
        self._forget_parent()
        self._transactions.add_holder(tracker)

    def attribute(self, connection: sa.Connection, tracker: ResourceTracker) -> None:
        """What this connection writes belongs to a session of ``tracker``."""
        self.add_holder(tracker)
        self._sessions.setdefault(connection, weakref.WeakSet()).add(tracker)

    def _owner(self, connection: sa.Connection) -> ResourceTracker | None:
        """The tracker that owns what is inserted on this connection now."""
        for tracker in reversed(ambient.trackers()):
            if tracker.active and self._hears(tracker, connection):
                return tracker
        sessions = self._sessions.get(connection)
        if sessions:
            active = [tracker for tracker in sessions if tracker.active]
            if len(active) == 1:
                return active[0]
        if len(self.trackers) == 1 and self.trackers[0].active:
            return self.trackers[0]
        for tracker in self.trackers:
            tracker.warn_once(
                "unattributed",
                "Rows were inserted in a thread that belongs to no tracker, while several trackers "
                "listen on this engine, so nobody knows whose they are and none will delete them. "
                "In that thread write UserFactory.scoped_to(tracker).create().",
            )
            break
        return None

    def _hears(self, tracker: ResourceTracker, connection: sa.Connection) -> bool:
        return tracker in self.trackers or tracker in self._sessions.get(connection, ())

    def _forget_parent(self) -> None:
        if self._transactions.forget_parent():
            self.trackers = []
            self._sessions = weakref.WeakKeyDictionary()

    # -- statements ----------------------------------------------------------------------------

    def _before_execute(
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Mapping[str, Any],
    ) -> tuple[Any, Any, Any]:
        if (
            isinstance(statement, Insert)
            and not self._transactions.idle
            and not self._is_plain(statement, multiparams)
            and self._owner(connection) is not None
        ):
            rows = multiparams or ([params] if params else [])
            statement = self._prepared_insert(connection, statement, rows, options)
        return statement, multiparams, params

    def _is_plain(self, insert: Insert, multiparams: Any) -> bool:
        """Whether SQLAlchemy will tell the key of its one row by itself; most inserts are such."""
        if len(multiparams) > 1 or not returning.is_plain(insert):
            return False
        table = insert.table
        if table not in self._plain_tables:
            if self.dialect.upsert(insert):
                return False
            self._plain_tables.add(table)
        return True

    def _prepared_insert(
        self,
        connection: sa.Connection,
        insert: Insert,
        parameters: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Insert:
        log = self._transactions.log(connection)
        found = self._target(connection, log, insert.table, options)
        if found is None:
            return insert
        target, real = found
        rewrite = returning.rewrite_insert(insert, parameters, target, real, self.dialect)
        if rewrite is None:
            return insert
        log.rewritten[id(rewrite.statement)] = rewrite
        return rewrite.statement

    def _after_execute(  # noqa: PLR0917 -- SQLAlchemy's signature
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        if self._transactions.idle or INTERNAL in options:
            return
        if isinstance(statement, Compiled):
            statement = statement.statement
        if isinstance(statement, Insert):
            self._inserted(connection, statement, options, result)
        elif isinstance(statement, (Update, Delete)):
            self._written(connection, statement, options, result)
        elif isinstance(statement, ExecutableDDLElement):
            self._ddl(connection)

    def _inserted(
        self,
        connection: sa.Connection,
        insert: Insert,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        owner = self._owner(connection)
        if owner is None:
            return
        log = self._transactions.log(connection)
        rewrite = log.rewritten.pop(id(insert), None) if log.rewritten else None
        found = self._target(connection, log, insert.table, options)
        if found is None:
            return
        target, _real = found
        if not target.key_columns:
            rows = statements.row_count(insert, result.context)
            if rows:
                change = Change(Kind.UNKEYED, target, [None] * rows, owner)
                self._transactions.add(connection, log, change)
            return
        told: tuple[list[tuple[Any, ...]], bool] | None
        reason = "its result does not tell which rows it made"
        if rewrite is not None and rewrite.refusal is not None:
            told, reason = None, rewrite.refusal
        elif rewrite is not None:
            told = returning.keys_from_rewritten(result, rewrite), rewrite.generated
        else:
            told = statements.keys_from_result(result, target, self.dialect)
        if told is None:
            owner.warn_once(
                ("untold", target.name),
                f"An INSERT into {target.name} is not tracked: {reason}. Take its rows with "
                f"tracker.track_query(select({target.table.name!r})...) or "
                f"tracker.track_rows({target.table.name!r} table, keys).",
            )
            return
        keys, generated = told
        whole = [key for key in keys if None not in key]
        if len(whole) != len(keys):
            owner.warn_once(
                ("null", target.name),
                f"A row of {target.name} has NULL in its primary key: no DELETE can name it, so it "
                f"is not tracked. Delete it yourself, or give the key a value.",
            )
        if whole:
            stored = [key[0] for key in whole] if len(target.key_columns) == 1 else whole
            self._transactions.add(
                connection, log, Change(Kind.INSERTED, target, stored, owner, generated=generated)
            )

    def _written(
        self,
        connection: sa.Connection,
        statement: Update | Delete,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        """Rows that are deleted, or whose key is changed, through a session or by key."""
        log = self._transactions.log(connection)
        found = self._target(connection, log, statement.table, options)
        if found is None or not found[0].key_columns:
            return
        target = found[0]
        self._transactions.settle()
        if not any(holder.holds(target.name) for holder in self._transactions.holders) and not any(
            change.table is target for change in log
        ):
            return
        context: Any = result.context
        single = len(target.key_columns) == 1
        if isinstance(statement, Delete):
            keys = statements.matched_keys(statement, context, target)
            if keys is None or context.rowcount == 0:
                return
            stored = [key[0] for key in keys] if single else keys
            change = Change(Kind.DELETED, target, stored, certain=context.rowcount == len(keys))
        else:
            pairs = statements.renamed_keys(statement, context, target)
            if pairs is None or context.rowcount == 0:
                return
            change = Change(
                Kind.RENAMED,
                target,
                [(old[0], new and new[0]) if single else (old, new) for old, new in pairs],
                certain=context.rowcount == len(pairs),
            )
        self._transactions.add(connection, log, change)

    def _do_execute(self, cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        """What only the cursor sees: raw strings, and an INSERT inside a SELECT's WITH.

        An event of the dialect, not of the connection: on every statement's way, it is cheaper.
        """
        if self._transactions.idle:
            return
        # Before the statement: sqlite3 may begin a transaction for it, and then nobody could tell
        # any more whether the RELEASE before it was a COMMIT.
        self._transactions.settle_on(context.root_connection)
        if context.isinsert or INTERNAL in context.execution_options:
            return
        if context.compiled is None or context.is_text:
            self._raw(context.root_connection, sql)
        elif sql[:4] == "WITH":
            self._say_raw_insert(context.root_connection, sql)

    def _raw(self, connection: sa.Connection, sql: str) -> None:
        log = self._transactions.log(connection)
        if self.dialect.session_setting(sql):
            log.targets.clear()
            connection.info["tidyrows_moved"] = True
        move = rawsql.transaction_move(sql)
        if move is not None:
            self._transactions.move(connection, *move)
        elif rawsql.is_ddl(sql):
            self._ddl(connection)
        self._say_raw_insert(connection, sql)

    def _say_raw_insert(self, connection: sa.Connection, sql: str) -> None:
        table = rawsql.inserted_table(sql)
        owner = self._owner(connection) if table is not None else None
        if owner is not None:
            owner.warn_once(
                ("raw", table),
                f"A raw SQL statement inserted into {table}: nobody can tell which rows it made, "
                f"so they are not tracked and cleanup will not delete them. Write it as "
                f"insert(table), or tell the tracker with tracker.track_query(select(...)) or "
                f"tracker.track_rows(table, keys).",
            )

    def _ddl(self, connection: sa.Connection) -> None:
        log = self._transactions.log(connection)
        log.targets.clear()
        connection.info.pop("tidyrows_targets", None)
        self.schema_version += 1
        if self.dialect.ddl_commits:
            self._transactions.commit_unasked(connection)

    # -- the real table ------------------------------------------------------------------------

    def _target(
        self,
        connection: sa.Connection,
        log: TransactionLog,
        table: Any,
        options: Mapping[str, Any],
    ) -> tuple[KeyedTable, RealTable] | None:
        """The real table that a statement writes to, resolved inside its transaction."""
        if not isinstance(table, sa.Table):
            return None
        translate = options.get("schema_translate_map")
        schema = table.schema
        if translate and schema in translate:
            schema = translate[schema]
        place = (table, schema)
        known = log.targets.get(place)
        if known is None:
            known = log.targets[place] = self._resolved(connection, table, schema)
        found: tuple[KeyedTable, RealTable] | None = known or None
        return found

    def _resolved(self, connection: sa.Connection, table: sa.Table, schema: str | None) -> Any:
        """Ask the database once per connection of the driver, or per transaction if it may move."""
        info = connection.info
        cache = info.setdefault("tidyrows_targets", {})
        found = None if "tidyrows_moved" in info else cache.get((table, schema))
        if found is None:
            real = self.dialect.resolve(connection, schema, table.name)
            if real is None or real.kind == "temporary":
                return ()
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

    # -- for trackers --------------------------------------------------------------------------

    def settle(self) -> None:
        """Believe every announced COMMIT that is over."""
        self._transactions.settle()

    def pending(self, owner: ResourceTracker) -> Iterator[Change]:
        """What this tracker's transactions have inserted and not committed."""
        return self._transactions.pending(owner)
