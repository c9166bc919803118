"""See every insert of an engine, and tell its sink when its transaction has committed.

One :class:`Capture` per engine listens to SQLAlchemy's connection events. It
stays for the engine's life and is idle while no tracker is active: a COMMIT may arrive after its
block has ended, and must then still be heard.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Compiled
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import Delete, Insert, Update
from sqlalchemy.sql.elements import ReleaseSavepointClause

from tidyrows.capture import affected_rows, returning
from tidyrows.capture.changes import (
    INTERNAL,
    Change,
    Inserted,
    InsertedWhole,
    KeysChanged,
    Untracked,
    cascaded,
)
from tidyrows.capture.connections import OpenConnections
from tidyrows.capture.destination import Destination
from tidyrows.capture.fingerprints import Recorder
from tidyrows.capture.ownership import EngineSinks
from tidyrows.capture.raw_sql import EVENTS as CURSOR_EVENTS
from tidyrows.capture.raw_sql import CursorEvents
from tidyrows.capture.table_resolution import RealTables, table_of
from tidyrows.capture.transactions import EVENTS, LOG, Transactions
from tidyrows.dialects import dialect_for
from tidyrows.keys import unresolved_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.capture.changes import Sink
    from tidyrows.capture.returning import Rewrite
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
        sinks: who may hold the engine's rows.
        tables: the engine's real tables.
        database: how row keys name the engine's database.
        resolve: applies the changes of every COMMIT that is over.
        prepared: the changes of transactions that are prepared, by the transaction's id.
        settle: a transaction is prepared no more, and nobody knows how it ended.
        uncommitted: yields what has been done for a sink and is not committed.
        unanswered: server ids of connections that were lost with a COMMIT, which may go on yet.
        destination: where the engine's connections lead.
        opened: the engine's connections that are in use.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.dialect = dialect_for(engine)
        self.destination = Destination(self.dialect)
        self.sinks = EngineSinks()
        self._transactions = Transactions(self.dialect, self.sinks)
        unseen = self._transactions.unseen
        self.opened = OpenConnections(engine, self.dialect, self.destination, unseen)
        self.tables = RealTables(
            engine,
            self.dialect,
            self.sinks,
            self.opened.checkout,
            self.destination.refuse_schema,
        )
        self.database = unseen.database = self.tables.database
        self.resolve = self._transactions.resolve
        self.prepared = self._transactions.prepared
        self.settle = self._transactions.settle
        self.uncommitted = self._transactions.uncommitted
        self.unanswered = self._transactions.unanswered
        self._recorder = Recorder(self.dialect)
        self._plain_tables: weakref.WeakSet[Any] = weakref.WeakSet()
        self._plain_version = 0
        # the latest key that the database has generated for each table
        self._highest: weakref.WeakKeyDictionary[KeyedTable, int] = weakref.WeakKeyDictionary()
        event.listen(engine, "before_execute", self._before_execute, retval=True)
        event.listen(engine, "after_execute", self._after_execute)
        self._cursor_events = CursorEvents(
            self._transactions, self.sinks, self.tables, self.dialect
        )
        for name in CURSOR_EVENTS:
            event.listen(engine, name, getattr(self._cursor_events, name))
        for name in EVENTS:
            event.listen(engine, name, getattr(self._transactions, name))
        self.dialect.guard_pool(engine)

    def forget_parent(self) -> None:
        """In a forked child: all sinks, and what is pending, are the parent's."""
        self.sinks.forget_parent()
        self._transactions.forget_parent()

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
            and not self.sinks.idle
            and not self._is_plain(statement, multiparams)
        ):
            owner = self.sinks.owner(connection)
            if owner is not None:
                rows = multiparams or ([params] if params else [])
                statement = self._rewritten(connection, statement, owner, rows, options)
        elif isinstance(statement, Delete) and not (self.sinks.idle or INTERNAL in options):
            rows = multiparams or ([params] if params else [])
            statement = self._rewritten(connection, statement, None, rows, options)
        return statement, multiparams, params

    def _is_plain(self, insert: Insert, multiparams: Any) -> bool:
        """Whether SQLAlchemy will tell the key of its one row by itself; most inserts are such."""
        if len(multiparams) > 1 or not returning.is_plain(insert):
            return False
        if self._plain_version != self.tables.schema_version:  # a trigger may have come
            self._plain_version = self.tables.schema_version
            self._plain_tables.clear()
        table = table_of(insert)
        if table not in self._plain_tables:
            if self.dialect.may_alter_keys or not tuple(getattr(table, "primary_key", ())):
                return False  # until the table is known
            if self.dialect.upsert(insert):
                return False
            self._plain_tables.add(table)
        return True

    def _rewritten(
        self,
        connection: sa.Connection,
        statement: Insert | Delete,
        owner: Sink | None,
        parameters: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Any:
        """The statement, with RETURNING where nothing else would tell its rows."""
        self._transactions.resolve(connection)  # before the question below begins a transaction
        targets = self._transactions.log(connection).targets
        found = self.tables.find(connection, targets, statement, options)
        if found is None or isinstance(found, str):  # said afterwards, if the statement succeeds
            return statement
        log = self._transactions.log(connection)  # the question may have begun the transaction
        if isinstance(statement, Insert):
            counted = "" in found[1].fills
            if counted:
                self._transactions.unseen.begin(
                    connection.connection, by_driver=False, moves_names=False
                )
            rewrite = returning.rewrite_insert(statement, parameters, *found, self.dialect)
            plain = found[0].key_columns and not (found[1].alters_keys or counted)
            if plain and not self.dialect.upsert(statement):
                self._plain_tables.add(table_of(statement))
        elif self._must_tell(statement, found[0], log):
            rewrite = returning.rewrite_delete(statement, parameters, *found, self.dialect)
        else:
            return statement
        if rewrite is None:
            return statement
        log.rewritten[id(rewrite.statement)] = rewrite, owner
        return rewrite.statement

    def _must_tell(self, delete: Delete, target: KeyedTable, log: TransactionLog) -> bool:
        """Whether a DELETE does not name its rows, and somebody must know: their keys are free.

        Where they are tracked, and where somebody watches: what was not his may be put back.
        """
        if target.key_columns and affected_rows.names_its_rows(delete, target):
            return False
        return self._is_held(target, log) or self.sinks.watcher is not None

    def _after_execute(  # noqa: PLR0917 -- SQLAlchemy's signature
        self,
        connection: sa.Connection,
        statement: Any,
        multiparams: Any,
        params: Any,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> None:
        if self.sinks.idle or INTERNAL in options:
            return
        if isinstance(statement, Compiled):
            statement = statement.statement
        if isinstance(statement, Insert):
            made = self._inserted(connection, statement, options, result)
            if made is not None and made[1][1].fills:
                self._warn_of_triggers(*made)
        elif getattr(statement, "is_select", False):
            return
        elif isinstance(statement, (Update, Delete)):
            self._written(connection, statement, options, result)
        elif isinstance(statement, ExecutableDDLElement):
            self._cursor_events.ddl(connection)
            self._transactions.look(connection)
        elif isinstance(statement, ReleaseSavepointClause):
            self._transactions.released(connection)

    def _inserted(
        self,
        connection: sa.Connection,
        insert: Insert,
        options: Mapping[str, Any],
        result: sa.CursorResult[Any],
    ) -> tuple[Sink, Target] | None:
        """The rows of an INSERT are pending; returns whose they are, and of which table."""
        log = getattr(connection, LOG, None) or self._transactions.log(connection)
        # its sink may have stopped meanwhile: the caller must not see what was added for it
        rewrite, owner = (
            log.rewritten.pop(id(insert), (None, None)) if log.rewritten else (None, None)
        )
        owner = owner or self.sinks.owner(connection)
        if owner is None:
            return None
        found = self.tables.find(connection, log.targets, insert, options)
        told = getattr(result.context, "tidyrows_table", "")
        if told and type(found) is tuple and not (found[1].incarnation or told).startswith(told):
            found = self.tables.find_moved(connection, log, insert, options, told)
        if not isinstance(found, tuple):
            self._untracked(connection, owner, table_of(insert), found, result)
            return None
        target = found[0]
        if not target.key_columns:
            rows = affected_rows.inserted_rows(insert, rewrite, result, target)
            unkeyed = InsertedWhole(target, rows, incarnation=found[1].incarnation)
            self._inserted_whole(connection, log, owner, unkeyed)
            return owner, found
        found_keys = affected_rows.inserted_keys(insert, rewrite, result, found, self.dialect)
        if isinstance(found_keys, str):
            self._untracked(connection, owner, target.table, found_keys, result)
            return None
        keys, generated, sent = found_keys
        whole = affected_rows.nameable(keys)
        if whole:
            single = len(whole[0]) == 1
            stored: list[Any] = list(map(_first, whole)) if single else whole
            if generated and found[1].incarnation and type(stored[0]) is int:
                came_back = stored[0] <= self._highest.get(target, stored[0] - 1)
                again = (connection, log.targets, insert, options, found)
                found = self.tables.find_again(*again) if came_back else found
                self._highest[target] = stored[-1]
            hashes = None
            if self.dialect.reuses_keys or not generated:
                told = result.context, found, stored, owner.context
                hashes = self._recorder.inserted(connection, *told, generated=generated)
            change = Inserted(
                target,
                stored,
                generated=generated,
                sent=sent,
                read_hashes=hashes,
                incarnation=found[1].incarnation,
            )
            self._transactions.add(connection, log, change, owner)
        if whole is not keys:  # said last: where warnings are errors, no row is lost over one
            unnamed = Untracked(target, count=len(keys) - len(whole))
            self._transactions.add(connection, log, unnamed, owner)
            owner.warn_once(
                ("unnamed", target.name),
                f"A row of {target.name} has NULL in its primary key, or a value that is no key: "
                f"no DELETE can name it, so it is not tracked. Delete it yourself, or give the key "
                f"a value.",
            )
        return owner, found

    def _inserted_whole(
        self, connection: sa.Connection, log: TransactionLog, owner: Sink, change: InsertedWhole
    ) -> None:
        if change.keys:
            self._transactions.add(connection, log, change, owner)

    def _untracked(
        self,
        connection: sa.Connection,
        owner: Sink,
        table: Any,
        reason: str | None,
        result: sa.CursorResult[Any],
    ) -> None:
        count = affected_rows.untold_count(result.context)
        if reason is None:  # a temporary table
            return
        name = getattr(table, "fullname", None) or getattr(table, "name", None) or str(table)
        parts = name.split(".")
        if count == 0:
            if self.tables.counts_inserts(connection, *parts):
                return
            count = None
        stand_in = unresolved_table(self.database, *parts)
        log = self._transactions.log(connection)
        self._transactions.add(connection, log, Untracked(stand_in, count=count), owner)
        owner.warn_once(
            ("untold", name),
            f"An INSERT into {name} is not tracked: {reason}. Take its rows with "
            f"tracker.track_query(select({name})...) or tracker.track_rows({name}, keys).",
        )

    def _warn_of_triggers(self, owner: Sink, found: Target) -> None:
        """Where counters do not tell what triggers insert, their texts do."""
        for name in filter(None, found[1].fills):
            owner.warn_once(
                ("filled", found[0].name, name),
                f"A trigger of {found[0].name} inserts into {name}: those rows are not tracked. "
                f"Cleanup deletes or detaches those that reference tracked rows: with own=[{name}] "
                f"it deletes them all. Take others with tracker.track_query(select({name})...).",
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
        found = self.tables.find(connection, log.targets, statement, options)
        if found is None or isinstance(found, str):
            return
        target = found[0]
        changes: list[Change] = []
        if rewrite is not None or self._is_held(target, log):
            changes = self._followed(connection, target, rewrite, statement, result)
        watcher = self.sinks.watcher
        if watcher is not None:  # first, while rows that go with this are known as whose they were
            touched = affected_rows.touched(statement, result, target, changes)
            if touched is not None:
                self._transactions.add(connection, log, touched, watcher)
        for change in changes:
            self._transactions.add(connection, log, change)

    def _followed(
        self,
        connection: sa.Connection,
        target: KeyedTable,
        rewrite: Rewrite | None,
        statement: Update | Delete,
        result: sa.CursorResult[Any],
    ) -> list[Change]:
        """What a statement did to rows that are tracked, or are pending."""
        log = self._transactions.log(connection)
        change = affected_rows.change_of(statement, result, target, rewrite)
        if isinstance(change, KeysChanged) and self.dialect.rounds_keys(target):
            change = replace(change, sent=True)
        changes = [] if change is None else [change]
        if isinstance(change, KeysChanged):
            changes += self._cascades(change, log)
        if isinstance(statement, Update) and target.key_columns:
            for each, _sink in log.all():  # in what its rows are compared, they are from now on
                if isinstance(each, Inserted) and each.table is target and each.read_hashes:
                    each.read_hashes()
            held = partial(self._held_keys, target, log)
            moved = dict(change.keys) if isinstance(change, KeysChanged) else {}
            told = result.context, target, held, moved
            updated = self._recorder.updated(connection, statement, *told)
            changes += [] if updated is None else [updated]
        return changes

    def _cascades(self, change: KeysChanged, log: TransactionLog) -> list[KeysChanged]:
        """What ON UPDATE CASCADE does to the keys of rows that are tracked, or are pending here."""
        held: dict[KeyedTable, list[Any]] = {}
        for sink in self.sinks:
            for table, keys in sink.keys_by_table():
                held.setdefault(table, []).extend(keys)
        for each, _sink in log.all():
            if isinstance(each, Inserted):
                held.setdefault(each.table, []).extend(each.keys)
        found = [change]
        for parents in found:
            for table, keys in held.items():
                moved = cascaded(parents, table, keys)
                if moved is not None and all(table is not each.table for each in found):
                    found.append(moved)
        return found[1:]

    def _held_keys(self, target: KeyedTable, log: TransactionLog) -> set[Any]:
        """The rows of a table that are tracked, or are pending here."""
        held: set[Any] = set()
        for sink in self.sinks:
            held.update(*(keys for table, keys in sink.keys_by_table() if table is target))
        for change, _sink in log.all():
            if isinstance(change, Inserted) and change.table is target:
                held.update(change.keys)
        return held

    def _is_held(self, target: KeyedTable, log: TransactionLog) -> bool:
        """Whether rows of a table are tracked, or are pending here."""
        self._transactions.resolve()
        return any(sink.holds(target.name) for sink in self.sinks) or any(
            change.table is target for change, _sink in log.all()
        )


_first = itemgetter(0)


def _forget_parents() -> None:
    for reference in list(_captures.values()):
        capture = reference()
        if capture is not None:
            capture.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
