"""See every insert of an engine, and tell its sink when its transaction has committed.

One :class:`Capture` per engine listens to SQLAlchemy's connection events. It
stays for the engine's life and is idle while no tracker is active: a COMMIT may arrive after its
block has ended, and must then still be heard.
"""

from __future__ import annotations

import os
import threading
import weakref
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Compiled
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import Delete, Insert, Update

from tidyrows.capture import inserts, returning, where_clause
from tidyrows.capture.changes import Change, DeletedWhole, Inserted, InsertedWhole
from tidyrows.capture.connections import OpenConnections
from tidyrows.capture.cursor import EVENTS as CURSOR_EVENTS
from tidyrows.capture.cursor import CursorEvents
from tidyrows.capture.fingerprints import Recorder
from tidyrows.capture.ownership import Ownership
from tidyrows.capture.sink import INTERNAL
from tidyrows.capture.table_resolution import NowhereError, Places
from tidyrows.capture.transactions import EVENTS, Transactions
from tidyrows.dialects import Fault, Loss, dialect_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tidyrows.capture.returning import Rewrite
    from tidyrows.capture.sink import Sink
    from tidyrows.capture.table_resolution import Target
    from tidyrows.capture.transaction_log import TransactionLog
    from tidyrows.keys import KeyedTable

# Weak on both sides: an engine's own events keep its capture, which leads back to the engine.
_captures: weakref.WeakKeyDictionary[sa.Engine, weakref.ref[Capture]] = weakref.WeakKeyDictionary()
_captures_lock = threading.Lock()


def root_engine(engine: sa.Engine) -> sa.Engine:
    """The engine behind ``engine.execution_options(...)``: they share pool and events."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


def capture_for(engine: sa.Engine) -> Capture:
    """The one capture of an engine, installed at the first call."""
    engine = root_engine(engine)
    with _captures_lock:
        known = _captures.get(engine)
        capture = known() if known is not None else None
        if capture is None:
            capture = Capture(engine)
            _captures[engine] = weakref.ref(capture)
        return capture


def share_capture(twin: sa.Engine, engine: sa.Engine) -> None:
    """Let another engine to the same database stand for this one; it is not listened to."""
    capture = capture_for(engine)
    with _captures_lock:
        _captures[twin] = weakref.ref(capture)


class Capture:
    """What is heard on one engine.

    Attributes:
        places: the engine's real tables.
        opened: the engine's connections that are in use.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.dialect = dialect_for(engine)
        self.opened = OpenConnections(engine, self.dialect)
        self.places = Places(engine, self.dialect, self.opened.checkout)
        self._transactions = Transactions(self.dialect)
        self._ownership = Ownership()
        self._recorder = Recorder() if self.dialect.reuses_keys else None
        self._plain_tables: weakref.WeakSet[Any] = weakref.WeakSet()
        event.listen(engine, "before_execute", self._before_execute, retval=True)
        event.listen(engine, "after_execute", self._after_execute)
        self._cursor_events = CursorEvents(
            self._transactions, self._ownership, self.places, self.dialect
        )
        for name in CURSOR_EVENTS:
            event.listen(engine, name, getattr(self._cursor_events, name))
        for name in EVENTS:
            event.listen(engine, name, getattr(self._transactions, name))
        self.dialect.guard_pool(engine)

    @property
    def database(self) -> str:
        """How row keys name the engine's database."""
        return self.places.database

    @property
    def schema_version(self) -> int:
        """Counts the DDL that was seen; what is known of the schema may be stale."""
        return self.places.version

    @property
    def sinks(self) -> list[Sink]:
        """The sinks that may hold rows of the engine."""
        return self._transactions.sinks

    # -- who listens ---------------------------------------------------------------------------

    def listen(self, sink: Sink) -> Callable[[], None]:
        """Let a sink own all that is inserted through the engine; returns what undoes it."""
        self.add_sink(sink)
        return self._ownership.listen(sink)

    def set_fallback(
        self, fallback: Callable[[], Sink | None] | None
    ) -> Callable[[], Sink | None] | None:
        """Set what returns the owner of rows that no sink listens for; None for no owner.

        Returns:
            The fallback before.
        """
        before, self._ownership.fallback = self._ownership.fallback, fallback
        self._transactions.set_fallback(exists=fallback is not None)
        return before

    def add_sink(self, sink: Sink) -> None:
        """From now on this sink may hold rows of this engine."""
        self._transactions.add_sink(sink)

    def forget_parent(self) -> None:
        """In a forked child: all sinks, and what is pending, are the parent's."""
        self._transactions.forget_parent()
        self._ownership.forget_parent()

    def attribute(self, connection: sa.Connection, sink: Sink) -> None:
        """What this connection writes belongs to a session of ``sink``."""
        self.add_sink(sink)
        self._ownership.attribute(connection, sink)

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
        ):
            owner = self._ownership.owner(connection)
            if owner is not None:
                rows = multiparams or ([params] if params else [])
                statement = self._prepared_insert(connection, owner, statement, rows, options)
        elif isinstance(statement, Delete) and not (self._transactions.idle or INTERNAL in options):
            rows = multiparams or ([params] if params else [])
            statement = self._prepared_delete(connection, statement, rows, options)
        return statement, multiparams, params

    def _is_plain(self, insert: Insert, multiparams: Any) -> bool:
        """Whether SQLAlchemy will tell the key of its one row by itself; most inserts are such."""
        if len(multiparams) > 1 or not returning.is_plain(insert):
            return False
        table = returning.table_of(insert)
        if table not in self._plain_tables:
            if not tuple(getattr(table, "primary_key", ())) or self.dialect.upsert(insert):
                return False
            self._plain_tables.add(table)
        return True

    def _prepared_insert(
        self,
        connection: sa.Connection,
        owner: Sink,
        insert: Insert,
        parameters: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Insert:
        self._transactions.resolve_on(connection)  # before the question below begins a transaction
        log = self._transactions.log(connection)
        try:
            found = self.places.find(connection, log.targets, returning.table_of(insert), options)
        except NowhereError as reason:
            self._raise_if_lost(connection, insert, reason.__cause__)
            return insert  # said afterwards, if the statement succeeds
        if found is None:
            return insert
        target, real = found
        rewrite = returning.rewrite_insert(insert, parameters, target, real, self.dialect)
        if rewrite is None:
            return insert
        log.rewritten[id(rewrite.statement)] = rewrite, owner
        changed: Insert = rewrite.statement
        return changed

    def _prepared_delete(
        self,
        connection: sa.Connection,
        delete: Delete,
        parameters: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Delete:
        """A DELETE that does not name its rows must tell which it took: their keys are free.

        Where they are tracked, and where somebody watches: what was not his may be put back.
        """
        self._transactions.resolve_on(connection)
        log = self._transactions.log(connection)
        try:
            found = self.places.find(connection, log.targets, delete.table, options)
        except NowhereError as reason:
            self._raise_if_lost(connection, delete, reason.__cause__)
            return delete
        if found is None:
            return delete
        target, real = found
        named = target.key_columns and where_clause.names_its_rows(delete, target)
        if named or not (self._is_held(target, log) or self._ownership.watcher is not None):
            return delete
        rewrite = returning.rewrite_delete(delete, parameters, target, real, self.dialect)
        if rewrite is None:
            return delete
        log.rewritten[id(rewrite.statement)] = rewrite, None
        changed: Delete = rewrite.statement
        return changed

    def _raise_if_lost(
        self,
        connection: sa.Connection,
        statement: Insert | Update | Delete,
        error: BaseException | None,
    ) -> None:
        """Let a dead connection or a lost transaction be the caller's error, as SQLAlchemy would.

        The statement itself would now get another error, that the connection is closed; or be
        committed without what came before it.
        """
        if error is None:
            return
        lost = self.dialect.fault(error) is Fault.LOST
        driver = connection.connection.dbapi_connection
        if lost or self.dialect.loss(error, driver) is Loss.EVERYTHING:
            connection._handle_dbapi_exception(error, str(statement), None, None, None)  # noqa: SLF001 -- what it does to its own cursor's errors

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
            self._cursor_events.ddl(connection)

    def _inserted(
        self,
        connection: sa.Connection,
        insert: Insert,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        log = self._transactions.log(connection)
        # its sink may have stopped meanwhile: the caller must not see what was added for it
        rewrite, owner = (
            log.rewritten.pop(id(insert), (None, None)) if log.rewritten else (None, None)
        )
        owner = owner or self._ownership.owner(connection)
        if owner is None:
            return
        try:
            found = self.places.find(connection, log.targets, returning.table_of(insert), options)
        except NowhereError as reason:
            self._raise_if_lost(connection, insert, reason.__cause__)
            self._warn_untracked(owner, returning.table_of(insert), str(reason))
            return
        if found is None:
            return
        target = found[0]
        if not target.key_columns:
            rows = _whole_rows(insert, rewrite, result, target)
            if rows:
                self._transactions.add(connection, log, InsertedWhole(target, rows), owner)
            return
        found_keys = self._keys_of(insert, rewrite, result, found)
        if isinstance(found_keys, str):
            self._warn_untracked(owner, target.table, found_keys)
            return
        keys, generated = found_keys
        whole = inserts.nameable(keys)
        if whole:
            single = len(target.key_columns) == 1
            stored: list[Any] = list(map(_first, whole)) if single else whole
            hashes = None
            if self._recorder is not None:
                hashes = self._recorder.inserted(
                    insert, result.context, target, whole, owner.context
                )
            change = Inserted(target, stored, generated=generated, hashes=hashes)
            self._transactions.add(connection, log, change, owner)
        if len(whole) != len(keys):  # said last: where warnings are errors, no row is lost over one
            owner.warn_once(
                ("unnamed", target.name),
                f"A row of {target.name} has NULL in its primary key, or a value that is no key: "
                f"no DELETE can name it, so it is not tracked. Delete it yourself, or give the key "
                f"a value.",
            )

    def _keys_of(
        self, insert: Insert, rewrite: Rewrite | None, result: sa.CursorResult[Any], found: Target
    ) -> tuple[list[tuple[Any, ...]], bool] | str:
        """The keys of an INSERT and whether the database made them; or why they are not known."""
        target, real = found
        if rewrite is not None:
            if rewrite.refusal is not None:
                return rewrite.refusal
            return returning.keys_from_rewritten(result, rewrite), rewrite.generated
        if not returning.is_plain(insert) and self.dialect.upsert(insert):
            # compiled by the caller, or changed by another listener
            return "an upsert that does not run as it was seen proves nothing"
        told = inserts.keys_from_result(insert, result, target, real, self.dialect)
        return told or "its result does not tell which rows it made"

    def _warn_untracked(self, owner: Sink, table: Any, reason: str) -> None:
        name = getattr(table, "fullname", None) or getattr(table, "name", None) or str(table)
        owner.warn_once(
            ("untold", name),
            f"An INSERT into {name} is not tracked: {reason}. Take its rows with "
            f"tracker.track_query(select({name})...) or tracker.track_rows({name}, keys).",
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
        rewrite = log.rewritten.pop(id(statement), (None,))[0] if log.rewritten else None
        try:
            found = self.places.find(connection, log.targets, statement.table, options)
        except NowhereError as reason:
            self._raise_if_lost(connection, statement, reason.__cause__)
            return
        if found is None:
            return
        target = found[0]
        changes: list[Change] = []
        if rewrite is not None or self._is_held(target, log):
            changes = self._followed(target, rewrite, statement, result)
        watcher = self._ownership.watcher
        if watcher is not None:  # first, while rows that go with this are known as whose they were
            touched = where_clause.touched(statement, result, target, changes)
            if touched is not None:
                self._transactions.add(connection, log, touched, watcher)
        for change in changes:
            self._transactions.add(connection, log, change)

    def _followed(
        self,
        target: KeyedTable,
        rewrite: Rewrite | None,
        statement: Update | Delete,
        result: sa.CursorResult[Any],
    ) -> list[Change]:
        """What a statement did to rows that are tracked, or are pending."""
        if not target.key_columns:
            rows = _taken_rows(statement, rewrite, result, target)
            return [DeletedWhole(target, rows)] if rows else []
        changes: list[Change | None] = []
        if self._recorder is not None and isinstance(statement, Update):
            changes.append(self._recorder.updated(statement, result.context, target))
        changes.append(where_clause.change_of(statement, result, target, rewrite))
        return [change for change in changes if change is not None]

    def _is_held(self, target: KeyedTable, log: TransactionLog) -> bool:
        """Whether rows of a table are tracked, or are pending here."""
        self._transactions.resolve()
        return any(sink.holds(target.name) for sink in self._transactions.sinks) or any(
            change.table is target for change, _sink in log.all()
        )

    # -- for sinks -----------------------------------------------------------------------------

    def resolve(self) -> None:
        """Apply the changes of every COMMIT that is over."""
        self._transactions.resolve()

    @property
    def unanswered(self) -> set[int]:
        """Server ids of connections that were lost with a COMMIT, which may be under way yet."""
        return self._transactions.unanswered

    def pending(self, sink: Sink) -> Iterator[Change]:
        """What has been inserted for a sink and is not committed."""
        return self._transactions.pending(sink)


_first = itemgetter(0)


def _forget_parents() -> None:
    for reference in list(_captures.values()):
        capture = reference()
        if capture is not None:
            capture.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)


def _taken_rows(
    statement: Update | Delete,
    rewrite: Rewrite | None,
    result: sa.CursorResult[Any],
    target: KeyedTable,
) -> list[Any]:
    """The rows that a DELETE took from a table without a primary key; None where not known."""
    if rewrite is not None:
        return returning.keys_from_rewritten(result, rewrite)
    context: Any = result.context
    if not (isinstance(statement, Delete) and context.rowcount):
        return []
    rows: list[Any] | None = where_clause.matched_rows(statement, context, target)
    return rows or [None]


def _whole_rows(
    insert: Insert, rewrite: Rewrite | None, result: sa.CursorResult[Any], target: KeyedTable
) -> list[Any]:
    """The rows of an INSERT into a table without a primary key; None for one that is not known."""
    if rewrite is not None and rewrite.refusal is None:
        return returning.keys_from_rewritten(result, rewrite)
    return inserts.whole_rows(insert, result.context, target)
