"""A suite as it is: what each of its tests commits is gone after it, whoever writes it, and how.

For every test, module, class and package there is a tracker, and they take turns. What is made
outside of them (before the first test, by fixtures of the session) has one too, and stays.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.engine import capture_for
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.report import HERE
from tidyrows.cleanup.verify import in_short
from tidyrows.dialects import database_name, dialect_for
from tidyrows.errors import (
    CleanupError,
    ProductionDatabaseError,
    SessionStateError,
    TidyRowsError,
)
from tidyrows.production import refuse_production
from tidyrows.retry import RetryPolicy
from tidyrows.suite.all_engines import Everywhere
from tidyrows.suite.ledgers import SuiteLedgers
from tidyrows.suite.sessions import expunge_rows
from tidyrows.suite.spare_engine import has_vanished, run_for, twin_of
from tidyrows.suite.summary import created_by, record_of
from tidyrows.suite.tracker import SuiteTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tidyrows.cleanup.report import CleanupReport, Held
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.tracker import ResourceTracker
    from tidyrows.worker import WorkerContext

_LAST = {"retry": RetryPolicy(deadline=5.0), "lock_timeout": 1.0}
_HURRIED = {"retry": RetryPolicy(deadline=1.0), "lock_timeout": 0.2}
"""Where a transaction of this process is open, it may be what we would wait for: less patiently.

In the end nobody will end it any more, and the first that waits there waits for all.
"""
OUTSIDE = "outside of any test"


@dataclass(eq=False)
class Owed:
    """What is to be deleted when it can be.

    Attributes:
        tracker: whose rows.
        options: for ``CleanupManager``.
        why: what it waits for.
        told: rows that are told of as left already, by table.
        held: those that rows of others need yet.
    """

    tracker: SuiteTracker
    options: Mapping[str, Any]
    why: str = ""
    told: Counter[str] = field(default_factory=Counter)
    held: tuple[Held, ...] = ()


class Suite:
    """The rows of a suite that knows nothing of tidyrows.

    Args:
        say: told, in JSON's types, what became of each test's rows.
        with_ledger: whether rows are entered into a ledger, which is installed in every database
            that other processes can see.
        entered: told of each database that has one, and of whose rows they are.
        everything: delete in the end what was made outside of tests, too.
    """

    def __init__(
        self,
        say: Callable[[dict[str, Any]], None],
        *,
        with_ledger: bool,
        entered: Callable[[Ledger, WorkerContext], None],
        everything: bool = False,
    ) -> None:
        self._say = say
        self._everything = everything
        self._ledgers = SuiteLedgers(self._entering, entered, self._refuse, are_wanted=with_ledger)
        self._started: list[SuiteTracker] = []
        self._due: list[Owed] = []
        self._asleep: dict[SuiteTracker, Owed] = {}
        self._refused: list[str] = []
        self._lost: dict[tuple[TableName, Any], SuiteTracker | None] = {}
        self.everywhere = Everywhere(self._met)

    # -- the suite's life ----------------------------------------------------------------------

    def start(self) -> None:
        """Listen to every engine from now on."""
        self.everywhere.start()
        self.outside = self._begun(OUTSIDE, is_shared=True, ledger=self._everything)

    def end(self) -> None:
        """Listen no more; delete what had to wait, and say what could not be deleted."""
        self.outside.stop()
        owed = list(dict.fromkeys([*self._due, *self._asleep.values(), *self._interrupted()]))
        self._due, self._asleep = [], {}
        said: dict[str, Any] = {"whole_suite": True, "test": OUTSIDE, "untracked": self._refused}
        if self._everything:
            owed.append(Owed(self.outside, {}))
        said |= _observed(self.outside, said["untracked"])
        unpaid: list[str] = []
        held = self._paid(owed, unpaid)
        if not self._everything:
            stays = Counter(_counted(self.outside))
            for each in held:
                stays += self._left_where_needed(each)
            said["stays"] = dict(stays)
            self.outside.said()
        self._say(said | {"undeleted": unpaid})
        self.everywhere.stop()

    def _interrupted(self) -> Iterator[Owed]:
        """Those whose end Ctrl-C has kept from coming."""
        for tracker in self._started[:]:
            if tracker is not self.outside:
                tracker.stop()
                self._started.remove(tracker)
                yield Owed(tracker, {}, "was interrupted")

    def _paid(self, owed: list[Owed], unpaid: list[str]) -> list[Owed]:
        """Delete what can be; returns what rows of others need yet.

        Args:
            owed: in the order in which to begin: what needs another's rows may come after it.
            unpaid: what could not be deleted is told here.
        """
        while owed:
            held: list[Owed] = []
            for each in owed:
                try:
                    busy = self._is_busy(each.tracker)
                    how = (_HURRIED if unpaid else _LAST) if busy else {}
                    self._delete(each, how)
                except (TidyRowsError, sa.exc.SQLAlchemyError) as error:
                    each.tracker.said()
                    unpaid.append(_why_not(each, error))
                else:
                    held += [each] if each.held else []
            if len(held) == len(owed):
                break
            owed = held
        return owed

    def _left_where_needed(self, owed: Owed) -> Counter[str]:
        """What rows of this process need that stay: it stays with them, and no sweep takes it.

        Where a row of another worker needs it, the ledger knows, and a sweep deletes it in the end.
        """
        tracker = owed.tracker
        if all(each.by.startswith(HERE) for each in owed.held):
            stays = Counter(_counted(tracker))
            for held in tracker.snapshot():
                tracker.forget(held.table, held.keys)
            self._delete(owed, {})
            return stays
        return Counter()

    # -- tests, modules, classes -----------------------------------------------------------------

    @contextmanager
    def test(
        self,
        test: str,
        options: Mapping[str, Any],
        kept: Callable[[], bool],
        show: Callable[[str], None],
    ) -> Iterator[None]:
        """In the block all rows are this test's; they are gone after it.

        Args:
            test: its id.
            options: for ``CleanupManager``.
            kept: asked in the end whether its rows are to be left for study.
            show: told then which they are and what deletes them.
        """
        self._ledgers.install_those_met()
        tracker = self._begun(test, is_shared=False)
        try:
            yield
        finally:
            self.finish(tracker, options, show if kept() else None)

    def shared(self, name: str) -> SuiteTracker:
        """A tracker for rows of several tests, until :meth:`finish`; it takes no turn yet."""
        tracker = self._begun(name, is_shared=True)
        tracker.rest()
        return tracker

    def _begun(self, test: str, *, is_shared: bool, ledger: bool = True) -> SuiteTracker:
        ledgers = self._ledgers.all if ledger else []
        tracker = SuiteTracker(self, test, is_shared=is_shared, ledgers=ledgers)
        tracker.start()
        self._started.append(tracker)
        return tracker

    def finish(
        self,
        tracker: SuiteTracker,
        options: Mapping[str, Any],
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Delete a tracker's rows, or keep them and show which they are.

        Raises:
            CleanupError: some are still there.
        """
        tracker.stop()
        self._started.remove(tracker)
        owed = Owed(tracker, options)
        if any(tracker.pending_changes()):
            owed.why = "left a transaction open"
            self._asleep[tracker] = owed
        try:
            if show is not None and tracker.snapshot():
                show(CleanupManager(tracker, **options).keep())
            else:
                self._settle(owed)
        finally:
            self._pay()

    def wake(self, tracker: SuiteTracker) -> None:
        """Rows of a tracker that had ended are being committed."""
        owed = self._asleep.get(tracker)
        if owed is not None and owed not in self._due:
            self._due.append(owed)

    # -- rows that were there before -------------------------------------------------------------

    def note_lost(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """A test has deleted rows that it had not made; it may put them back."""
        for key in keys:
            self._lost[table.name, key] = next(
                (each for each in self._started if each.those_held(table.name, [key])), None
            )

    def give_back(self, tracker: SuiteTracker, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Rows that were lost are inserted again, by key: they belong to whom they had."""
        for key in keys if self._lost else ():
            if (table.name, key) in self._lost:
                whose = self._lost.pop((table.name, key))
                tracker.forget(table, [key])
                if whose is not None and whose in self._started:
                    whose.take_told(table, [key])

    # -- deleting --------------------------------------------------------------------------------

    def _settle(self, owed: Owed) -> None:
        """Delete now, or later if something of this process itself is in the way."""
        busy = self._is_busy(owed.tracker)
        try:
            self._delete(owed, _HURRIED if busy else {})
        except (CleanupError, SessionStateError):
            if not busy:
                raise
            owed.why = "left a transaction open"
            self._due.append(owed)
        except KeyboardInterrupt:
            owed.why = "was interrupted"
            self._due.append(owed)
            raise
        else:
            if owed.held:
                owed.why = "waited for rows of others"
                self._due.append(owed)

    def _pay(self) -> None:
        """What had to wait, where nothing is in its way any more."""
        due, self._due = self._due, []
        for owed in due:
            owed.tracker.settle()
            if self._is_busy(owed.tracker) or owed.held:
                self._due.append(owed)
                continue
            try:
                self._delete(owed, _HURRIED)
            except (TidyRowsError, sa.exc.SQLAlchemyError):
                self._due.append(owed)  # the end is early enough to say so

    def _delete(self, owed: Owed, how: Mapping[str, Any]) -> None:
        tracker = owed.tracker
        tracker.settle()
        self._forget_vanished(tracker)
        before = {held.table: held.keys for held in tracker.snapshot()}
        created = dict(Counter(created_by(tracker)) - owed.told)
        owed.held = ()
        if not (before or tracker.has_entries):
            self._tell(tracker, created, None)
            return
        manager = CleanupManager(tracker, **{**owed.options, **how})
        engines = [tracker.own_engine_of(name) for name in _databases(tracker)]
        try:
            owed.held = run_for(engines, manager.cleanup).held
        except CleanupError:
            still = Counter(created_by(tracker))
            if self._are_no_more(tracker):  # with their databases, which is the suite's own doing
                created = dict(Counter(created) - (still - Counter(created_by(tracker))))
            elif not self._others_can(tracker, manager):
                raise
        finally:
            left = {held.table: held.keys for held in tracker.snapshot()}
            gone = {
                table: {key for key in keys if table not in left or key not in left[table]}
                for table, keys in before.items()
                if table.key_columns
            }
            expunge_rows(gone)
            owed.told = Counter(created_by(tracker))
            self._tell(tracker, created, manager.report)

    def _tell(
        self, tracker: SuiteTracker, created: dict[str, int], report: CleanupReport | None
    ) -> None:
        said = {
            **record_of(tracker.test, created, report),
            **_observed(tracker, []),
            "whole_suite": True,
        }
        if any(said.get(name) for name in ("created", "deleted", "touched", "untracked")):
            self._say(said)
        tracker.touched, tracker.unheard = {}, {}

    def _is_busy(self, tracker: SuiteTracker) -> bool:
        """Whether a transaction of this process is open where the rows are."""
        engines = [tracker.own_engine_of(name) for name in _databases(tracker)]
        urls = {engine.url for engine in engines}
        return any(
            capture_for(engine).opened.is_busy
            for engine in self.everywhere.engines
            if engine.url in urls
        )

    def _forget_vanished(self, tracker: SuiteTracker) -> None:
        for name in _databases(tracker):
            if has_vanished(tracker.own_engine_of(name)):
                tracker.let_go(name)

    def _are_no_more(self, tracker: SuiteTracker) -> bool:
        """Whether what could not be deleted is gone with its whole database."""
        for name in _databases(tracker):
            engine = tracker.own_engine_of(name)
            try:
                run_for([engine], partial(_connect, twin_of(engine)))
            except sa.exc.DBAPIError as error:
                if dialect_for(engine).lacks_database(error):
                    tracker.let_go(name)
        return not tracker.snapshot()

    def _others_can(self, tracker: SuiteTracker, manager: CleanupManager) -> bool:
        """Whether all goes with the rights of other roles that the suite connects as."""
        for engine in self.everywhere.engines:
            name = database_name(engine)
            if name not in _databases(tracker):
                continue
            if engine.url.username == tracker.own_engine_of(name).url.username:
                continue
            tracker.reach_by(name, engine)
            self._say({**record_of(tracker.test, {}, manager.report), "whole_suite": True})
            try:
                run_for([engine], manager.cleanup)
            except CleanupError:
                continue
            return True
        return False

    # -- engines ---------------------------------------------------------------------------------

    def _entering(self) -> list[SuiteTracker]:
        """The trackers whose rows are entered into ledgers."""
        return [each for each in self._started if self._everything or each is not self.outside]

    def _refuse(self, what: str) -> None:
        self._refused.append(what)

    def _met(self, engine: sa.Engine) -> bool:
        """An engine connects for the first time."""
        try:
            refuse_production(engine.url)
        except ProductionDatabaseError as error:
            self._refuse(str(error))
            return False
        self._ledgers.meet(engine)
        return True

    def leave(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped: end what a ledger keeps open there."""
        self._ledgers.leave(engine, database)


def _why_not(owed: Owed, error: Exception) -> str:
    waited = f" (it {owed.why})" if owed.why else ""
    told = str(error) if isinstance(error, TidyRowsError) else in_short(error)
    return f"{owed.tracker.test}{waited}: {told}"


def _connect(engine: sa.Engine) -> None:
    with engine.connect():
        pass


def _databases(tracker: ResourceTracker) -> list[str]:
    return sorted({held.table.name.database for held in tracker.snapshot()})


def _counted(tracker: ResourceTracker) -> dict[str, int]:
    tracker.settle()
    return created_by(tracker)


def _observed(tracker: SuiteTracker, unheard: list[str]) -> dict[str, Any]:
    return {
        "touched": [[table, verb, rows] for table, verb, rows in tracker.touched],
        "untracked": [*unheard, *tracker.unheard],
    }
