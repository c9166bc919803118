"""The cleanups of a whole suite: after each test, or later where something is in the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.connections import open_sessions
from tidyrows.capture.engine import capture_for
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.reasons import in_full
from tidyrows.cleanup.report import HERE
from tidyrows.dialects import database_name, dialect_for
from tidyrows.dialects.keys import own_keys
from tidyrows.errors import CleanupError, SessionStateError, TidyRowsError, UnknownTableError
from tidyrows.retry import RetryPolicy
from tidyrows.suite.residue import Notes
from tidyrows.suite.spare_engine import has_vanished, run_for, spare_engine_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from sqlalchemy import orm

    from tidyrows.cleanup.report import CleanupReport, Held
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.suite.tracker import SuiteEngines, SuiteTracker
    from tidyrows.tracking.tracker import ResourceTracker

    Record = dict[str, Any]

_AT_THE_END = {"retry": RetryPolicy(deadline=5.0), "lock_timeout": 1.0}
_BUSY = {"retry": RetryPolicy(deadline=1.0), "lock_timeout": 0.2}
"""Cleanup options where a transaction of this process is open: it may hold the locks itself.

At the end nobody will end that transaction, and the first cleanup that waits for it is enough.
"""
_LEFT_OPEN = "left a transaction open"


@dataclass(eq=False)
class PendingCleanup:
    """A cleanup that is to be done."""

    tracker: SuiteTracker
    options: Mapping[str, Any]
    reason: str = ""  # what it waits for
    reported: Counter[str] = field(default_factory=Counter)  # rows that are recorded already
    held: tuple[Held, ...] = ()


class SuiteCleanups:
    """Deletes the rows of trackers that have ended."""

    def __init__(self, engines: SuiteEngines, add: Callable[[Record], None]) -> None:
        self._engines = engines
        self._add = add
        self._waiting: list[PendingCleanup] = []
        self._uncommitted: list[PendingCleanup] = []

    def clean(self, pending: PendingCleanup) -> None:
        """Delete now, or later if this process itself is in the way."""
        busy = bool(pending.tracker.store) and self._is_busy(pending.tracker)
        try:
            self._delete(pending, _BUSY if busy else {})
        except (CleanupError, SessionStateError):
            if not busy:
                raise
            self._wait(pending, _LEFT_OPEN)
        except KeyboardInterrupt:
            self._wait(pending, "was interrupted")
            raise
        else:
            if pending.held:
                self._wait(pending, "waited for rows of others")

    def _wait(self, pending: PendingCleanup, reason: str) -> None:
        pending.reason = reason
        self._waiting.append(pending)

    def expect_commit(self, pending: PendingCleanup) -> None:
        """The test has left a transaction open: clean up again when that is committed."""
        if any(pending.tracker.engines.pending_changes()):
            pending.reason = _LEFT_OPEN
            self._uncommitted.append(pending)

    def retry(self) -> None:
        """Clean up what had to wait, where nothing is in its way any more."""
        late = [each for each in self._uncommitted if each.tracker.committed_late]
        waiting, self._waiting = dict.fromkeys([*self._waiting, *late]), []
        for pending in waiting:
            pending.tracker.committed_late = False
            pending.tracker.engines.resolve()
            if self._is_busy(pending.tracker) or pending.held:
                self._waiting.append(pending)
                continue
            try:
                self._delete(pending, _BUSY)
            except (TidyRowsError, sa.exc.SQLAlchemyError):
                self._waiting.append(pending)  # finish() reports it

    def finish(self, more: Iterable[PendingCleanup]) -> tuple[list[PendingCleanup], list[str]]:
        """Clean up all that is left."""
        left = list(dict.fromkeys([*self._waiting, *self._uncommitted, *more]))
        self._waiting, self._uncommitted = [], []
        undeleted: list[str] = []
        while left:
            held: list[PendingCleanup] = []
            for pending in left:
                try:
                    busy = self._is_busy(pending.tracker)
                    options = (_BUSY if undeleted else _AT_THE_END) if busy else {}
                    self._delete(pending, options)
                except (TidyRowsError, sa.exc.SQLAlchemyError) as error:
                    pending.tracker.dismiss_leak_warning()
                    undeleted.append(_text_of(pending, error))
                else:
                    held += [pending] if pending.held else []
            if len(held) == len(left):
                break
            left = held
        return left, undeleted

    def leave_with_references(self, held: Iterable[PendingCleanup]) -> Counter[str]:
        """Leave rows that rows of this process reference; no sweep takes them.

        Where a row of another worker references them, a sweep deletes them in the end.
        """
        stays: Counter[str] = Counter()
        for pending in held:
            tracker = pending.tracker
            if all(each.by.startswith(HERE) for each in pending.held):
                stays.update(settled_counts(tracker))
                for rows in tracker.store.snapshot():
                    tracker.store.forget(rows.table, rows.keys)
                self._delete(pending, {})
        return stays

    # -- one cleanup -----------------------------------------------------------------------------

    def _delete(self, pending: PendingCleanup, options: Mapping[str, Any]) -> None:
        tracker = pending.tracker
        tracker.engines.resolve()
        if not (tracker.store or tracker.journals.has_entries):
            pending.held = ()
            self._record(tracker, {}, None)
            return
        for name in _databases(tracker):
            if has_vanished(tracker.own_engine_of(name)):
                tracker.journals.release(name)
        before = {held.table: held.keys for held in tracker.store.snapshot()}
        known = created_by(tracker)
        created = dict(Counter(known) - pending.reported)
        pending.held = ()
        if not (before or tracker.journals.has_entries):
            self._record(tracker, created, None)
            return
        try:
            manager = _manager_of(tracker, {**pending.options, **options})
        except TidyRowsError:  # a mark names a table that there is not: the rows stay
            pending.reported = Counter(created_by(tracker))
            self._record(tracker, created, None)
            raise
        try:
            pending.held = run_for(_engines(tracker), manager.cleanup).held
        except CleanupError:
            still = Counter(created_by(tracker))
            if self._are_gone_with_databases(tracker):
                created = dict(Counter(created) - (still - Counter(created_by(tracker))))
            elif not self._delete_as_other_roles(tracker, manager):
                raise
        finally:
            left = {held.table: held.keys for held in tracker.store.snapshot()}
            gone = {
                table: {key for key in keys if table not in left or key not in left[table]}
                for table, keys in before.items()
                if table.key_columns
            }
            _expunge_rows(gone)
            pending.reported = Counter(created_by(tracker))
            self._record(tracker, created, manager.last_report, known)

    def _record(
        self,
        tracker: SuiteTracker,
        created: dict[str, int],
        report: CleanupReport | None,
        known: Mapping[str, int] | None = None,
    ) -> None:
        record = record_of(tracker.test, created, report, known) | tracker.pop_observed()
        record |= residue_record(Notes(tracker, report)) | {"is_shared": tracker.is_shared}
        told = ("created", "deleted", "touched", "untracked", "residue")
        if any(record.get(name) for name in told):
            self._add(record)

    def keep(self, pending: PendingCleanup) -> str:
        """Leave the rows for study; which they are, and what deletes them."""
        tracker = pending.tracker
        record = record_of(tracker.test, settled_counts(tracker), None) | tracker.pop_observed()
        record["kept"] = sum(record["created"].values())
        manager = CleanupManager(tracker, **pending.options)
        told = manager.keep()
        self._add(record | residue_record(Notes(tracker, None, kept=manager.kept)))
        return told

    def _is_busy(self, tracker: SuiteTracker) -> bool:
        """Whether a transaction of this process is open where the rows are."""
        urls = {engine.url for engine in _engines(tracker)}
        return any(
            capture_for(engine).opened.is_busy
            for engine in self._engines.known
            if engine.url in urls
        )

    def _are_gone_with_databases(self, tracker: SuiteTracker) -> bool:
        """Whether the suite itself has dropped the databases of all rows that are left."""
        for name in _databases(tracker):
            engine = tracker.own_engine_of(name)
            try:
                run_for([engine], partial(_connect, spare_engine_of(engine)))
            except sa.exc.DBAPIError as error:
                if dialect_for(engine).is_database_missing(error):
                    tracker.journals.release(name)
        return not tracker.store.snapshot()

    def _delete_as_other_roles(self, tracker: SuiteTracker, manager: CleanupManager) -> bool:
        """Whether all rows go with the rights of other roles that the suite connects as."""
        for engine in self._engines.known:
            name = database_name(engine)
            if name not in _databases(tracker):
                continue
            if engine.url.username == tracker.own_engine_of(name).url.username:
                continue
            tracker.engines.by_database[name] = engine
            record = record_of(tracker.test, {}, manager.last_report)
            self._add(record | {"whole_suite": True, "created": {}})
            try:
                run_for([engine], manager.cleanup)
            except CleanupError:
                continue
            return True
        return False


def settled_counts(tracker: SuiteTracker) -> dict[str, int]:
    """How many rows a tracker holds, by table, once every COMMIT under way is known."""
    tracker.engines.resolve()
    in_doubt = _summed((held.table.name, len(held.in_doubt)) for held in tracker.store.snapshot())
    return dict(Counter(created_by(tracker)) + Counter(in_doubt))


def _text_of(pending: PendingCleanup, error: Exception) -> str:
    waited = f" (it {pending.reason})" if pending.reason else ""
    return f"{pending.tracker.test}{waited}: {in_full(error)}"


def _connect(engine: sa.Engine) -> None:
    with engine.connect():
        pass


def _manager_of(tracker: SuiteTracker, options: dict[str, Any]) -> CleanupManager:
    """What cleans up; a name of a table that was dropped with those of all rows says nothing."""
    try:
        return CleanupManager(tracker, **options)
    except UnknownTableError:
        if run_for(_engines(tracker), partial(_has_tables, tracker)):
            raise
        return CleanupManager(tracker, **(options | {"own": (), "protect": ()}))


def _has_tables(tracker: SuiteTracker) -> bool:
    """Whether a table of its rows is still there."""
    tables = [held.table.name for held in tracker.store.snapshot()]
    return any(
        sa.inspect(tracker.engine_of(each.database)).has_table(each.name, schema=each.schema)
        for each in tables
    )


def _databases(tracker: SuiteTracker) -> list[str]:
    return sorted({held.table.name.database for held in tracker.store.snapshot()})


def _engines(tracker: SuiteTracker) -> Iterator[sa.Engine]:
    return (tracker.own_engine_of(name) for name in _databases(tracker))


def created_by(tracker: ResourceTracker) -> dict[str, int]:
    """How many rows a tracker holds, by table."""
    return _summed(
        (held.table.name, len(held.keys) + held.keyless_count) for held in tracker.store.snapshot()
    )


def _summed(counts: Iterable[tuple[TableName, int]]) -> dict[str, int]:
    """By table; tables of one name in several databases count together."""
    total: Counter[str] = Counter()
    for table, count in counts:
        total[str(table)] += count
    return dict(+total)


def residue_record(notes: Notes) -> Record:
    """What stays after a cleanup; the engines are for this process only."""
    return {"residue": notes.found, "engines": notes.engines} if notes.found else {}


def record_of(
    test: str,
    created: dict[str, int],
    report: CleanupReport | None,
    known: Mapping[str, int] | None = None,
) -> Record:
    """The counts of one cleanup, in JSON's types.

    Args:
        test: its name.
        created: the rows to count, as they were before the cleanup.
        report: of the cleanup; what it deleted besides was committed while it ran.
        known: the rows that were there before the cleanup, where some have been counted already.
    """
    record: Record = {"test": test, "created": created}
    if report is not None:
        deleted = Counter(_summed(report.deleted.items()))
        late = deleted - Counter(known if known is not None else created)
        record["created"] = dict(Counter(created) + late)
        others = Counter(_summed((table, len(rows)) for table, rows in report.dependents.items()))
        record |= {
            "deleted": dict(deleted + others),
            "gone": _summed(report.already_gone.items()),
            "dependents": others.total(),
            "leaked": sum(leftover.count for leftover in report.leftovers),
            "held": len(report.held),
            "retries": report.retries,
            "seconds": report.seconds,
        }
    return record


def _expunge_rows(gone: Mapping[KeyedTable, Collection[Any]]) -> None:
    """Take the objects of rows that were deleted out of every session of this process.

    A session that outlives its test (a scoped one, or a fixture's) would go on to give them out, or
    would not take a new row under a key that the database gives again.
    """
    by_place: dict[tuple[str, sa.Table], set[Any]] = {}
    keyed_tables = {keyed.table: keyed for keyed in gone}
    for keyed, keys in gone.items():
        by_place.setdefault((keyed.name.database, keyed.table), set()).update(keys)
    tables = {table for _database, table in by_place}
    for session in open_sessions():
        for identity in list(session.identity_map.keys()):
            kind, key = identity[0], identity[1]
            mapper = sa.inspect(kind)
            table: Any = mapper.primary_key[0].table
            if table not in tables:
                continue
            keys = by_place.get((_database(session, mapper), table), ())
            if keys:  # an object that was made with the key "10" has it in its identity
                (key,), _ = own_keys(keyed_tables[table], session.get_bind(mapper).dialect, [key])
            if (key[0] if len(key) == 1 else key) in keys:
                known = session.identity_map.get(identity)
                if known is not None:
                    session.expunge(known)


def _database(session: orm.Session, mapper: orm.Mapper[Any]) -> str:
    """Where a session's objects of a class are; a row of the same key elsewhere is another."""
    try:
        return database_name(session.get_bind(mapper).engine)
    except sa.exc.UnboundExecutionError:
        return ""
