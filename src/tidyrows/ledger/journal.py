"""The entries of one tracker in one ledger.

An entry counts once its transaction has committed, as its rows do: both in memory and in the
database. Where a COMMIT was not answered, the ledger shows what became of it.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Change, Inserted, InsertedWhole
from tidyrows.dialects.keys import chunks
from tidyrows.dialects.sessions import LOCK_SECONDS
from tidyrows.errors import LedgerError, TakenOverError, add_note
from tidyrows.ledger.entries import EXTERNAL, Entry, Number, entries_of, resource_body

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from tidyrows.dialects import Blocker
    from tidyrows.external import ExternalResource, Tie
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.process import LedgerProcess
    from tidyrows.ledger.table import Ledger
    from tidyrows.worker import WorkerContext


@dataclass(frozen=True, slots=True)
class JournalUpdate:
    """What a transaction changes in a journal, if it commits."""

    removed: frozenset[Number] = frozenset()
    added: frozenset[Number] = frozenset()
    rows: int = 0  # that the transaction deletes


class Journal:
    """A tracker's entries in one ledger.

    ``refused`` is called with a table whose keys cannot be recorded, and the reason.
    """

    def __init__(
        self, ledger: Ledger, process: LedgerProcess, refused: Callable[[TableName, str], None]
    ) -> None:
        self.ledger = ledger
        self.process = process
        self.scope = process.next_scope()  # the tracker's number in the process
        self._refused = refused
        self.committed: set[Number] = set()  # the entries that are in the ledger
        self.uncertain: dict[Number, list[Change]] = {}  # entries that may be in the ledger
        self.unanswered: list[JournalUpdate] = []  # whose COMMIT was not answered
        self.externals: dict[ExternalResource, Number] = {}
        self.is_log = False  # some entries are about deletes: fewer entries could say the same
        self.keeps_log = False  # and are not replaced after a cleanup: each keeps its test
        self._waiting: list[Change] = []
        # as long as the transaction of the change is open
        self._numbers: weakref.WeakKeyDictionary[Change, list[Number]]
        self._numbers = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # connections on which `record` writes now, with their waiters and since when
        self._recording: dict[sa.Connection, tuple[Any, float]] = {}
        self._blockers: dict[sa.Connection, list[Blocker]] = {}
        process.journals.add(self)

    @property
    def is_empty(self) -> bool:
        """Whether no entry of it is, or may come to be, in the ledger."""
        with self._lock:
            written = (self.committed, self.uncertain, self.unanswered, self.externals)
            coming = (self._waiting, self._recording, len(self._numbers))
            return not any((*written, *coming))

    def reopen(self, process: LedgerProcess) -> None:
        """Give the entries to another process: the one before was closed, so it counts as dead."""
        scope = process.next_scope()
        with self.ledger.transaction(lock_timeout=5.0) as connection:
            self._move(connection, owner=process.id, scope=scope)
        self._belong_to(process, scope)

    def _belong_to(self, process: LedgerProcess, scope: int) -> None:
        self.process, self.scope = process, scope
        process.journals.add(self)

    def _come_back(self) -> None:
        """Before an entry is written: the process may have stepped aside while it had none."""
        if self.process.is_aside:
            process = self.ledger.open()
            self._belong_to(process, process.next_scope())

    # -- in the transaction that makes the changes ---------------------------------------------

    def record(
        self, connection: sa.Connection, changes: Sequence[Change], context: WorkerContext
    ) -> None:
        """Write changes in the transaction that made them; those written before are skipped."""
        dialect, info = self.ledger.dialect, connection.info
        if dialect.has_server and _WAITER not in info:
            info[_WAITER] = dialect.waiter(connection)
        with self._lock:  # before the look at the process: it looks at this afterwards
            self._recording[connection] = info.get(_WAITER), time.monotonic()
        try:
            self._come_back()
            self._record(connection, changes, context)
        finally:
            with self._lock:
                self._recording.pop(connection, None)
                self._blockers.pop(connection, None)

    def _record(
        self, connection: sa.Connection, changes: Sequence[Change], context: WorkerContext
    ) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            fresh = [change for change in changes if change not in self._numbers]
        numbers: dict[Change, list[Number]] = {change: [] for change in (*waiting, *fresh)}
        try:
            # Rows that the user named are the tracker's from now on, others are from before.
            again = waiting and [each for each in waiting if not getattr(each, "named", False)]
            for number, entry in self.write(connection, numbers, context, again).items():
                for change in entry.changes:
                    numbers[change].append(number)
        except BaseException as error:
            with self._lock:
                self._waiting[:0] = waiting
            with self._lock:
                blockers = self._blockers.get(connection)
            if isinstance(error, sa.exc.DBAPIError):
                why = (
                    "The role that writes them needs INSERT on that table; without ledger= the "
                    "tracker writes nothing."
                )
                if blockers is not None:
                    named = " and ".join(map(str, blockers)) or "somebody whom it does not name"
                    why = f"The database made it wait for {LOCK_SECONDS:g} s, blocked by {named}."
                add_note(
                    error,
                    f"tidyrows: the rows of this transaction could not be entered into "
                    f"{self.ledger!r}, so it was not committed. {why}",
                )
            raise
        with self._lock:
            self._waiting += waiting  # until their transaction has committed
            self._numbers.update(numbers)
            for each in waiting if changes else ():
                self._numbers[changes[0]] += numbers[each][-1:]

    def is_stuck(self) -> bool:
        """Whether an entry waits for longer than a lock is waited for; called in any thread."""
        return bool(self._stuck())

    def cancel_stuck(self, connection: sa.Connection) -> None:
        """End such a wait, by another connection: the transaction then fails, and says why."""
        dialect = self.ledger.dialect
        with self._lock:  # no entry is finished meanwhile, so no other statement is ended
            for stuck, waiter in self._stuck():
                with closing(connection.connection.cursor()) as cursor:
                    self._blockers[stuck] = dialect.blockers(cursor, waiter)
                dialect.cancel(connection, waiter)

    def _stuck(self) -> list[tuple[sa.Connection, Any]]:
        latest, recording = time.monotonic() - LOCK_SECONDS, list(self._recording.items())
        return [
            (each, waiter)
            for each, (waiter, since) in recording
            if waiter is not None and since < latest
        ]

    def confirm(self, changes: Iterable[Change]) -> None:
        """The transaction has committed; rows that it did not record are recorded next time."""
        here = self.ledger.database
        with self._lock:
            for change in changes:
                numbers = self._numbers.get(change)
                is_own = isinstance(change, _MAKING) and change.table.name.database == here
                if numbers is None and is_own:
                    self._waiting.append(change)
                elif numbers:
                    self.committed.update(numbers)
                    self.is_log = self.is_log or not isinstance(change, _MAKING)
            if self._waiting:
                self._waiting = [
                    change
                    for change in self._waiting
                    if self.committed.isdisjoint(self._numbers.get(change, ()))
                ]
            for change in changes:
                self._numbers.pop(change, None)

    def mark_uncertain(self, changes: Iterable[Change]) -> None:
        """It is not known whether the transaction has committed."""
        with self._lock:
            for change in changes:
                for number in self._numbers.pop(change, ()):
                    self.uncertain.setdefault(number, []).append(change)

    # -- in transactions of its own ------------------------------------------------------------

    def add(self, change: Change, context: WorkerContext) -> None:
        """Record rows that are committed already; with the next COMMIT where that cannot be now."""
        self.postpone(change)
        self.catch_up(context)

    def postpone(self, change: Change) -> None:
        """Record rows with the next COMMIT."""
        with self._lock:
            self._waiting.append(change)

    def catch_up(self, context: WorkerContext) -> None:
        """Record what waits, unless another transaction holds the lock that this needs."""
        with self._lock:
            waiting = list(self._waiting)
        if not waiting:
            return
        dialect = self.ledger.dialect
        try:
            with self.ledger.transaction(lock_timeout=0.2) as connection:
                self.record(connection, (), context)
        except sa.exc.DBAPIError as error:
            if not dialect.is_timeout(error):
                raise
        else:
            self.confirm(waiting)

    def forget_waiting(self) -> None:
        """Rows that wait to be recorded are gone."""
        with self._lock:
            self._waiting = []

    def intend(
        self, tie: Tie, tables: Mapping[TableName, KeyedTable], context: WorkerContext
    ) -> None:
        """Record an external resource that is not made yet."""
        self._come_back()
        seq = self.process.next_entry()
        try:
            with self.ledger.transaction(lock_timeout=1.0) as connection:
                dialect = connection.dialect
                body = resource_body(tie, tables, self.externals, lambda _table: dialect)
                row = self.ledger.row(
                    self.process.id, self.scope, seq, EXTERNAL, json.dumps(body), context=context
                )
                self.ledger.insert(connection, [row])
        except sa.exc.DBAPIError as error:
            if not self.ledger.dialect.is_timeout(error):
                raise
            raise LedgerError(
                f"The intent to make {tie.resource} cannot be entered into {self.ledger!r} while "
                f"somebody holds its lock; where only one may write, as with SQLite, that may be "
                f"this test's own open transaction. Commit, then call track_external()."
            ) from error
        self.externals[tie.resource] = self.process.id, seq

    def forget_resource(self, resource: ExternalResource) -> None:
        """Delete the entry of an external resource that is gone."""
        number = self.externals.get(resource)
        if number is None:
            return
        with self.ledger.transaction(lock_timeout=5.0) as connection:
            table = self.ledger.table_on(connection)
            gone = sa.delete(table).where(table.c.maker == number[0], table.c.seq == number[1])
            self.ledger.execute(connection, gone)
        del self.externals[resource]

    def resolve(self, connection: sa.Connection) -> list[tuple[Change, bool]]:
        """The changes of uncertain entries, the committed ones last, and whether each is."""
        uncertain = dict(self.uncertain)
        if not uncertain:
            return []
        table = self.ledger.table_on(connection)
        there: set[Number] = set()
        for part in self._conditions(table, set(uncertain)):
            asked = sa.select(table.c.maker, table.c.seq).where(*part)
            there |= {(maker, seq) for maker, seq in self.ledger.execute(connection, asked)}
        resolved = [
            (change, is_there)
            for is_there in (False, True)
            for number, changes in uncertain.items()
            if (number in there) is is_there
            for change in changes
        ]
        with self._lock:
            for number in uncertain:
                self.uncertain.pop(number, None)
            self.committed |= there
            deletes = (done for each, done in resolved if not isinstance(each, _MAKING))
            self.is_log = self.is_log or any(deletes)
        return resolved

    def put_aside(self, name: str, context: WorkerContext) -> bool:
        """Give all entries, also those that wait, to an owner of this name; False if none."""
        with self._lock:
            waiting = list(self._waiting)
        with self.ledger.transaction(lock_timeout=5.0) as connection:
            self.record(connection, (), context)
            count = self._move(connection, owner=name)
        self.confirm(waiting)
        return bool(count)

    def _move(self, connection: sa.Connection, **values: Any) -> int:
        """Give all entries to another owner; returns their number."""
        table = self.ledger.table_on(connection)
        own = (table.c.owner == self.process.id, table.c.scope == self.scope, table.c.seq > 0)
        moved = self.ledger.execute(connection, sa.update(table).where(*own).values(values))
        return int(moved.rowcount)

    # -- from one process to another -----------------------------------------------------------

    def export(self, externals: Iterable[ExternalResource]) -> dict[str, Any] | None:
        """What :meth:`adopt` needs, as JSON values; None where nothing is recorded."""
        numbers = sorted(self.numbers())
        tied = [self.externals.get(resource) for resource in externals]
        if not numbers and not any(tied):
            return None
        return {"owner": self.process.id, "entries": numbers, "externals": tied}

    def adopt(
        self,
        connection: sa.Connection,
        given: Mapping[str, Any],
        changes: Iterable[Change],
        context: WorkerContext,
        externals: Iterable[ExternalResource],
    ) -> JournalUpdate:
        """Replace the entries that :meth:`export` of another process names by own ones."""
        table = self.ledger.table_on(connection)
        owner = given["owner"]
        numbers = {(maker, seq) for maker, seq in given["entries"]}
        tied = {
            resource: tuple(number)
            for resource, number in zip(externals, given["externals"], strict=True)
            if number is not None
        }
        before = self._written(connection, numbers, owner)
        found = self._delete(connection, numbers, owner)
        for part in self._conditions(table, set(tied.values()), owner):
            moved = sa.update(table).where(*part).values(owner=self.process.id, scope=self.scope)
            found += self.ledger.execute(connection, moved).rowcount
        if found < len(numbers) + len(tied):
            raise TakenOverError(
                f"These rows have been deleted since to_json() wrote them down, or a sweep has "
                f"taken them over: {self.ledger!r} names them no longer, so they may be "
                f"somebody else's by now. Nothing was deleted; there is nothing left to do."
            )
        self.externals |= tied
        again = list(changes)
        added = self.write(connection, again, context, again, **before)
        return JournalUpdate(added=frozenset(added))

    # -- in the transaction that deletes the rows -----------------------------------------------

    def numbers(self) -> set[Number]:
        """The entries that are in the ledger, and whose rows are held; a copy."""
        with self._lock:
            return set(self.committed)

    def replace(
        self,
        connection: sa.Connection,
        numbers: set[Number],
        changes: Sequence[Change],
        context: WorkerContext,
    ) -> Collection[Number]:
        """Replace these entries by entries of the changes that are left; returns the new ones."""
        before = self._written(connection, numbers) if changes else {}
        self._refuse_loss(self._delete(connection, numbers), numbers)
        return self.write(connection, changes, context, changes, **before) if changes else ()

    def append(
        self,
        connection: sa.Connection,
        numbers: set[Number],
        changes: Iterable[Change],
        context: WorkerContext,
    ) -> Collection[Number]:
        """Add entries of changes, while these entries stay; returns the new ones."""
        table = self.ledger.table_on(connection)
        # A sweep recovers all entries, and the oldest of each process have always been there.
        oldest: dict[str, int] = {}
        for maker, seq in numbers:
            oldest[maker] = min(seq, oldest.get(maker, seq))
        first = set(oldest.items())
        held = 0
        for part in self._conditions(table, first):
            locked = sa.select(table.c.seq).where(*part).with_for_update()
            held += len(self.ledger.execute(connection, locked).all())
        self._refuse_loss(held, first)
        return self.write(connection, changes, context)

    def apply(self, update: JournalUpdate) -> None:
        """The transaction of an update has committed."""
        with self._lock:
            self.committed = (self.committed - update.removed) | update.added
            self.is_log = bool(self.committed) and (self.is_log or bool(update.added))

    def has_committed(self, connection: sa.Connection, update: JournalUpdate) -> bool:
        """Whether the transaction of an update has committed, by what the ledger shows."""
        if not update.added and not update.removed:
            return False
        table = self.ledger.table_on(connection)
        asked = sa.select(table.c.maker, table.c.seq).where(table.c.owner == self.process.id)
        found = {(maker, seq) for maker, seq in self.ledger.execute(connection, asked)}
        return update.added <= found and not update.removed & found

    def _conditions(
        self, table: sa.Table, numbers: set[Number], owner: str | None = None
    ) -> Iterator[tuple[sa.ColumnElement[bool], ...]]:
        """Conditions for these entries, as long as this process, or that owner, has them."""
        makers: dict[str, list[int]] = {}
        for maker, seq in sorted(numbers):
            makers.setdefault(maker, []).append(seq)
        for maker, seqs in makers.items():
            for part in chunks(seqs, _IN_ONE):
                yield (
                    table.c.maker == maker,
                    table.c.seq.in_(part),
                    table.c.owner == (owner or self.process.id),
                )

    def write(
        self,
        connection: sa.Connection,
        changes: Iterable[Change],
        context: WorkerContext,
        again: Iterable[Change] = (),
        **columns: Any,
    ) -> dict[Number, Entry]:
        """Write changes as new entries, with other values in these columns; returns the entries.

        Those of ``again`` are from before: their rows may be older than the time of the entry.
        """
        process, ledger, before = self.process, self.ledger, set(again)
        entries = {
            (process.id, process.next_entry()): entry
            for entry in entries_of(changes, connection.dialect, self._refused)
        }
        part: list[dict[str, Any]] = []
        size = 0
        for (_, seq), entry in entries.items():
            marks = {} if before.isdisjoint(entry.changes) else {"again": True}
            name, body = entry.table.name, json.dumps({**entry.body, **marks})
            if part and (len(part) == _AT_ONCE or size + len(body) > _LONG):
                ledger.insert(connection, part)
                part, size = [], 0
            place = (name.schema, name.name)
            row = ledger.row(
                process.id, self.scope, seq, entry.kind, body, context=context, place=place
            )
            part.append({**row, **columns})
            size += len(body)
        if part:
            ledger.insert(connection, part)
        return entries

    def _written(
        self, connection: sa.Connection, numbers: set[Number], owner: str | None = None
    ) -> dict[str, float]:
        """When the last of these entries was written, as the value of its column."""
        table = self.ledger.table_on(connection)
        asked = sa.select(sa.func.max(table.c.written))
        parts = self._conditions(table, numbers, owner)
        times = [self.ledger.execute(connection, asked.where(*part)).scalar() for part in parts]
        return {"written": max(filter(None, times))} if any(times) else {}

    def _delete(
        self, connection: sa.Connection, numbers: set[Number], owner: str | None = None
    ) -> int:
        """Delete entries of this process, or of that owner; returns how many there were."""
        table = self.ledger.table_on(connection)
        found = 0
        for part in self._conditions(table, numbers, owner):
            found += self.ledger.execute(connection, sa.delete(table).where(*part)).rowcount
        return found

    def _refuse_loss(self, found: int, numbers: set[Number]) -> None:
        if found < len(numbers):
            raise TakenOverError(
                f"Entries of this worker are no longer its own in {self.ledger!r}: a sweep took "
                f"them over, since the worker's lock was free and its heartbeat had stopped, or a "
                f"process did with from_json(). They delete the rows. If the process was stopped "
                f"for that long, give sweep(patience=...) more seconds."
            )


_WAITER = "tidyrows.waiter"
"""In ``connection.info``: what its database knows it by; asked for before it waits."""
_AT_ONCE, _LONG = 50, 500_000
"""Entries in one INSERT, and characters of their bodies."""
_IN_ONE = 500
"""Numbers of entries in one statement."""
_MAKING = (Inserted, InsertedWhole)
