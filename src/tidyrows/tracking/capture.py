"""See every insert of an engine, and believe it when its transaction has committed.

One :class:`Capture` per engine listens to SQLAlchemy's connection events (DATABASE_FACTS 11). It
stays for the engine's life and is idle while no tracker is active: a COMMIT may arrive after its
block has ended, and must then still be heard.

The engine's ``commit`` event fires *before* the real COMMIT and nothing fires after it. So the
event only announces: the changes become true at the next thing that happens on the connection, or
when somebody asks, unless an error said otherwise in between.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Compiled
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import Delete, Insert, Update

from tidyrows.dialects import CommitOutcome, Loss, dialect_for
from tidyrows.rows import KeyedTable, TableName
from tidyrows.tracking import ambient, rawsql, statements
from tidyrows.tracking.changes import Announcement, Change, Kind, TransactionLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidyrows.dialects import RealTable
    from tidyrows.tracking.tracker import ResourceTracker

_captures: weakref.WeakKeyDictionary[sa.Engine, Capture] = weakref.WeakKeyDictionary()
_captures_lock = threading.Lock()
INTERNAL = "tidyrows_internal"
"""The execution option of tidyrows' own statements, which nobody needs to hear."""

_EXECUTIONS = ("before_execute", "after_execute")
_TRANSACTIONS = (
    "begin",
    "commit",
    "rollback",
    "savepoint",
    "release_savepoint",
    "rollback_savepoint",
    "begin_twophase",
    "prepare_twophase",
    "commit_twophase",
    "rollback_twophase",
)


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


def database_name(engine: sa.Engine) -> str:
    """The database as row keys name it: no user, no password; unique for one in memory."""
    url = engine.url
    if url.database in {None, "", ":memory:"}:
        return f"{url.get_backend_name()}://#{id(root_engine(engine).pool):x}"
    host = f"{url.host}:{url.port}" if url.port else url.host or ""
    return f"{url.get_backend_name()}://{host}/{url.database}"


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
        self._logs: weakref.WeakKeyDictionary[sa.Connection, TransactionLog] = (
            weakref.WeakKeyDictionary()
        )
        self._sessions: weakref.WeakKeyDictionary[
            sa.Connection, weakref.WeakSet[ResourceTracker]
        ] = weakref.WeakKeyDictionary()
        self._announced: list[Announcement] = []
        self._prepared: dict[Any, list[Change]] = {}
        self._holders: weakref.WeakSet[ResourceTracker] = weakref.WeakSet()
        self._tables: dict[tuple[TableName, sa.Table], KeyedTable] = {}
        self._lock = threading.RLock()
        self._pid = os.getpid()
        for name in (*_EXECUTIONS, *_TRANSACTIONS):
            listen = getattr(self, f"_{name}")
            event.listen(engine, name, listen, retval=name == "before_execute")
        event.listen(engine, "handle_error", self._handle_error)
        self.dialect.guard_pool(engine)

    # -- who listens ---------------------------------------------------------------------------

    def add_holder(self, tracker: ResourceTracker) -> None:
        """From now on this tracker may hold rows of this engine."""
        self._forget_parent()
        self._holders.add(tracker)

    def attribute(self, connection: sa.Connection, tracker: ResourceTracker) -> None:
        """What this connection writes in its present checkout belongs to a session of ``tracker``."""
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

    def _deaf(self) -> bool:
        return not self._holders or self._pid != os.getpid()

    def _forget_parent(self) -> None:
        """After a fork the child owns nothing: what was pending is its parent's."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.trackers = []
            self._logs.clear()
            self._sessions.clear()
            self._announced = []
            self._prepared = {}
            self._holders.clear()

    # -- statements ----------------------------------------------------------------------------

    def _log(self, connection: sa.Connection) -> TransactionLog:
        log = self._logs.get(connection)
        if log is None:
            with self._lock:
                log = self._logs[connection] = TransactionLog()
        return log

    def _before_execute(
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Mapping[str, Any],
    ) -> tuple[Any, Any, Any]:
        if isinstance(statement, Insert) and not self._deaf():
            self._settle(connection)
            owner = self._owner(connection)
            if owner is not None:
                statement = self._prepared_insert(
                    connection, owner, statement, multiparams, options
                )
        return statement, multiparams, params

    def _prepared_insert(
        self,
        connection: sa.Connection,
        owner: ResourceTracker,
        insert: Insert,
        multiparams: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Insert:
        owner.refuse_production(connection.engine)
        found = self._target(connection, insert.table, options)
        if found is None:
            return insert
        target, real = found
        rewrite = statements.rewrite_insert(insert, multiparams, target, real, self.dialect)
        if rewrite is None:
            return insert
        self._log(connection).rewritten[id(rewrite.statement)] = rewrite
        return rewrite.statement

    def _after_execute(
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        if self._deaf() or INTERNAL in options:
            return
        if isinstance(statement, Compiled):
            statement = statement.statement
        if isinstance(statement, Insert):
            self._inserted(connection, statement, options, result)
        elif isinstance(statement, (Update, Delete)):
            self._written(connection, statement, options, result)
        elif isinstance(statement, (str, sa.TextClause)):
            self._raw(connection, str(statement))
        elif isinstance(statement, ExecutableDDLElement):
            self._ddl(connection)
        elif result is not None and result.context is not None:
            self._insert_in_cte(connection, result.context)

    def _inserted(
        self,
        connection: sa.Connection,
        insert: Insert,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        log = self._log(connection)
        rewrite = log.rewritten.pop(id(insert), None)
        found = self._target(connection, insert.table, options)
        owner = self._owner(connection)
        if found is None or owner is None:
            return
        target, _real = found
        if not target.key_columns:
            rows = max(len(getattr(result.context, "compiled_parameters", ())), 1)
            self._add(connection, log, Change(Kind.UNKEYED, target, [None] * rows, owner))
            return
        told: tuple[list[tuple[Any, ...]], bool] | None
        reason = "its result does not tell which rows it made"
        if rewrite is not None and rewrite.refusal is not None:
            told, reason = None, rewrite.refusal
        elif rewrite is not None:
            told = statements.keys_from_rewritten(result, rewrite), False
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
            self._add(
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
        found = self._target(connection, statement.table, options)
        if found is None or not found[0].key_columns:
            return
        target = found[0]
        log = self._log(connection)
        if not any(holder.holds(target.name) for holder in self._holders) and not any(
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
        self._add(connection, log, change)

    def _raw(self, connection: sa.Connection, sql: str) -> None:
        log = self._log(connection)
        if self.dialect.session_setting(sql):
            log.targets.clear()
            connection.info["tidyrows_moved"] = True
        if rawsql.ends_or_splits_transaction(sql):
            for change in log:
                change.certain = False
        elif rawsql.is_ddl(sql):
            self._ddl(connection)
        self._say_raw_insert(connection, sql)

    def _insert_in_cte(self, connection: sa.Connection, context: Any) -> None:
        sql = getattr(context, "statement", None)
        if isinstance(sql, str) and sql[:4] == "WITH":
            self._say_raw_insert(connection, sql)

    def _say_raw_insert(self, connection: sa.Connection, sql: str) -> None:
        table = rawsql.inserted_table(sql)
        owner = self._owner(connection) if table is not None else None
        if owner is not None:
            owner.warn_once(
                ("raw", table),
                f"A raw SQL statement inserted into {table}: nobody can tell which rows it made, so "
                f"they are not tracked and cleanup will not delete them. Write it as "
                f"insert(table), or tell the tracker with tracker.track_query(select(...)) or "
                f"tracker.track_rows(table, keys).",
            )

    def _ddl(self, connection: sa.Connection) -> None:
        log = self._log(connection)
        log.targets.clear()
        connection.info.pop("tidyrows_targets", None)
        self.schema_version += 1
        if self.dialect.ddl_commits and log:
            self._believe(log.take())

    def _add(self, connection: sa.Connection, log: TransactionLog, change: Change) -> None:
        if not log and self.dialect.in_transaction(self._driver(connection)) is False:
            self._believe([change])  # autocommit: the statement has committed already
        else:
            log.add(change)

    # -- the real table ------------------------------------------------------------------------

    def _target(
        self, connection: sa.Connection, table: Any, options: Mapping[str, Any]
    ) -> tuple[KeyedTable, RealTable] | None:
        """The real table that a statement writes to, resolved inside its transaction."""
        if not isinstance(table, sa.Table):
            return None
        translate = options.get("schema_translate_map")
        schema = table.schema
        if translate and schema in translate:
            schema = translate[schema]
        log = self._log(connection)
        known = log.targets.get((table, schema))
        if known is None:
            known = log.targets[table, schema] = self._resolved(connection, table, schema)
        found: tuple[KeyedTable, RealTable] | None = known or None
        return found

    def _resolved(self, connection: sa.Connection, table: sa.Table, schema: str | None) -> Any:
        """Ask the database once per connection of the driver, or per transaction if it may move."""
        info = connection.info
        cache = info.setdefault("tidyrows_targets", {})
        real = None if "tidyrows_moved" in info else cache.get((schema, table.name))
        if real is None:
            real = self.dialect.resolve(connection, schema, table.name)
            if real is None or real.kind == "temporary":
                return ()
            cache[schema, table.name] = real
        return self.keyed(TableName(self.database, real.schema, table.name), table), real

    def keyed(self, name: TableName, table: sa.Table) -> KeyedTable:
        """The one KeyedTable of a real table and a project's Table."""
        table = table.metadata.tables.get(table.key, table)  # without the ORM's annotations
        keyed = self._tables.get((name, table))
        if keyed is None:
            keyed = self._tables.setdefault((name, table), KeyedTable(name, table))
        return keyed

    # -- transactions --------------------------------------------------------------------------

    @staticmethod
    def _driver(connection: sa.Connection) -> Any:
        return connection.connection.dbapi_connection

    def _begin(self, connection: sa.Connection) -> None:
        if not self._deaf():
            self._settle(connection)
            with self._lock:
                self._logs.pop(connection, None)

    def _begin_twophase(self, connection: sa.Connection, _xid: Any) -> None:
        self._begin(connection)

    def _commit(self, connection: sa.Connection) -> None:
        if self._deaf():
            return
        self._settle(connection)
        log = self._logs.get(connection)
        if not log:
            return
        if self.dialect.commit_is_void(connection):
            log.take()  # nothing will be persisted, and no error will say so
            return
        self._announce(connection, log.take())

    def _announce(self, connection: sa.Connection, changes: list[Change]) -> None:
        with self._lock:
            self._announced.append(
                Announcement(changes, weakref.ref(connection), self._driver(connection))
            )

    def _rollback(self, connection: sa.Connection) -> None:
        if self._deaf():
            return
        self._settle(connection)
        log = self._logs.get(connection)
        if not log:
            return
        changes = log.take()
        if connection.invalidated or connection.closed:
            return  # the connection is gone, and its transaction with it
        if self.dialect.in_transaction(self._driver(connection)) is False:
            self._doubt(changes)  # somebody ended the transaction behind SQLAlchemy's back

    def _savepoint(self, connection: sa.Connection, name: str | None) -> None:
        if self._deaf():
            return
        self._settle(connection)
        if name is None:  # SQLAlchemy names it right after this event, by this counter
            name = f"sa_savepoint_{connection._Connection__savepoint_seq + 1}"  # type: ignore[attr-defined]  # private: the event does not tell the name
        self._log(connection).savepoint(name)

    def _release_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        if self._deaf():
            return
        self._settle(connection)
        log = self._log(connection)
        log.release(name)
        log.release_unsure = True

    def _rollback_savepoint(self, connection: sa.Connection, name: str, _context: None) -> None:
        if self._deaf():
            return
        self._settle(connection)
        self._log(connection).rollback_to(name)

    def _prepare_twophase(self, connection: sa.Connection, xid: Any) -> None:
        if not self._deaf():
            log = self._logs.get(connection)
            if log:
                self._prepared[xid] = log.take()

    def _commit_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:  # noqa: FBT001 - SQLAlchemy's signature
        if self._deaf():
            return
        log = self._logs.get(connection)
        changes = self._prepared.pop(xid, []) + (log.take() if log else [])
        if changes:
            self._announce(connection, changes)

    def _rollback_twophase(self, connection: sa.Connection, xid: Any, _is_prepared: bool) -> None:  # noqa: FBT001 - SQLAlchemy's signature
        if self._deaf():
            return
        self._prepared.pop(xid, None)
        log = self._logs.get(connection)
        if log:
            log.take()

    def _handle_error(self, context: Any) -> None:
        connection = context.connection
        if connection is None or self._deaf():
            return
        error = context.sqlalchemy_exception or context.original_exception
        lost = context.is_disconnect
        with self._lock:
            announced = [a for a in self._announced if a.connection() is connection]
            for announcement in announced:
                self._announced.remove(announcement)
        for announcement in announced:
            outcome = (
                CommitOutcome.DOUBT if lost else self.dialect.commit_outcome(error, connection)
            )
            if outcome is CommitOutcome.OPEN:
                self._log(connection).restore(announcement.changes)
            elif outcome is CommitOutcome.DOUBT:
                self._doubt(announcement.changes)
        log = self._logs.get(connection)
        if announced or not log:
            return
        driver = None if connection.invalidated else self._driver(connection)
        loss = Loss.EVERYTHING if lost else self.dialect.loss(error, driver)
        if loss is Loss.EVERYTHING:
            log.take()
        elif loss is Loss.DOUBT:
            for change in log:
                change.certain = False

    # -- believing -----------------------------------------------------------------------------

    def _settle(self, connection: sa.Connection) -> None:
        """Something happens on this connection, so what was announced on it is over."""
        if self._announced:
            with self._lock:
                mine = [a for a in self._announced if a.connection() is connection]
                for announcement in mine:
                    self._announced.remove(announcement)
            for announcement in mine:
                self._believe(announcement.changes)
        log = self._logs.get(connection)
        if log is not None and log.release_unsure:
            self._settle_release(connection, log)

    def _settle_release(self, connection: sa.Connection, log: TransactionLog) -> None:
        """On SQLite the release of the outermost savepoint commits where no BEGIN came before."""
        log.release_unsure = False
        if connection.closed or connection.invalidated:
            return
        if self.dialect.in_transaction(self._driver(connection)) is False:
            self._believe(log.take())

    def settle(self) -> None:
        """Believe every announced COMMIT that is over, whoever sent it."""
        if self._pid != os.getpid():
            return
        with self._lock:
            logs = list(self._logs.items())
        for connection, log in logs:
            if log.release_unsure:
                self._settle_release(connection, log)
        with self._lock:
            over = [a for a in self._announced if self._is_over(a)]
            for announcement in over:
                self._announced.remove(announcement)
        for announcement in over:
            self._believe(announcement.changes)

    def _is_over(self, announcement: Announcement) -> bool:
        connection = announcement.connection()
        if connection is None or connection.closed or connection.invalidated:
            return True
        under_way = self.dialect.in_transaction(announcement.driver)
        if under_way is None:
            return announcement.thread == threading.get_ident()
        return not under_way

    def _believe(self, changes: list[Change]) -> None:
        """The database has committed these."""
        for change in changes:
            if not change.certain:
                self._doubt([change])
            elif change.kind is Kind.DELETED:
                for holder in list(self._holders):
                    holder.forget(change.table, change.keys)
            elif change.kind is Kind.RENAMED:
                for holder in list(self._holders):
                    holder.rename(change.table, change.keys)
            elif change.owner is not None and change.kind is Kind.UNKEYED:
                change.owner.take_unkeyed(change.table, len(change.keys))
            elif change.owner is not None:
                change.owner.take(change.table, change.keys)

    def _doubt(self, changes: list[Change]) -> None:
        """Nobody knows whether the database has committed these."""
        for change in changes:
            if change.kind is Kind.INSERTED and change.owner is not None:
                change.owner.take_in_doubt(change.table, change.keys, generated=change.generated)
            elif change.kind is Kind.DELETED:
                for holder in list(self._holders):
                    holder.doubt(change.table, change.keys)
            elif change.kind is Kind.RENAMED:
                for holder in list(self._holders):
                    holder.doubt(change.table, [key for pair in change.keys for key in pair if key])
            elif change.owner is not None:
                change.owner.take_unkeyed(change.table, len(change.keys))

    def pending(self, owner: ResourceTracker) -> Iterator[Change]:
        """What this tracker's transactions have inserted and not committed."""
        with self._lock:
            logs, announced = list(self._logs.values()), list(self._announced)
        for log in logs:
            yield from (change for change in log if change.owner is owner)
        for announcement in announced:
            yield from (change for change in announcement.changes if change.owner is owner)
