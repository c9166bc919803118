"""A suite as it is: the rows that each of its tests commits are deleted after the test.

Every test, module, class and package has a tracker. One tracker at a time is given all rows,
whichever thread or session writes them. Rows that are made outside of tests (before the first
test, by fixtures of the session) have a tracker too, and stay.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.configuration import NAMING, configured
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.options import named_tables
from tidyrows.connections.leases import leases_returned
from tidyrows.dialects import database_name, dialect_for
from tidyrows.errors import LedgerError, ProductionDatabaseError
from tidyrows.ledger.table import NAME, Ledger
from tidyrows.production import refuse_places, refuse_production
from tidyrows.suite.cleanups import PendingCleanup, SuiteCleanups, settled_counts
from tidyrows.suite.residue import Notes
from tidyrows.suite.spare_engine import has_vanished, run_for, spare_engine_of
from tidyrows.suite.tracker import DeletedRows, SuiteEngines, SuiteTracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tidyrows.capture.changes import Sink
    from tidyrows.suite.cleanups import Record

OUTSIDE = "outside of any test"


class WholeSuite:
    """The rows of a suite that does not use tidyrows itself."""

    outside: SuiteTracker

    def __init__(
        self,
        add: Callable[[Record], None],
        *,
        with_ledger: bool,
        on_ledger: Callable[[Ledger, WorkerContext], None],
        everything: bool = False,
        observer: Sink | None = None,
    ) -> None:
        self._add = add
        self._everything = everything
        self._asked: object = None
        self._started: list[SuiteTracker] = []
        self._refused: list[str] = []
        self._ledgers = SuiteLedgers(
            self._with_entries, on_ledger, self._refused.append, are_wanted=with_ledger
        )
        self.engines = SuiteEngines(
            self._meet, self._ledgers.close, DeletedRows(self._started), observer
        )
        self._cleanups = SuiteCleanups(self.engines, add)

    def start(self) -> None:
        """Track the rows of every engine from now on."""
        self.engines.start()
        self.outside = self._start_tracker(OUTSIDE, is_shared=True, ledger=self._everything)

    def install_ledgers(self) -> None:
        """Install those that could not be when their database was first used."""
        self._ledgers.install_those_met()

    def end(self) -> None:
        """Stop; delete what had to wait, and report what could not be deleted."""
        self.outside.stop()
        more = list(self._interrupted())
        if self._everything:
            more.append(PendingCleanup(self.outside, {}))
        # What wider fixtures do (migrations, for example) stays by rule, and is no test's affair.
        record: Record = {"test": OUTSIDE, **self.outside.pop_observed()}
        record["untracked"] = [*self._refused, *(record["untracked"] if self._everything else ())]
        record["touched"] = []
        held, record["undeleted"] = self._cleanups.finish(more)
        if not self._everything:
            stays = Counter(settled_counts(self.outside))
            record["stays"] = dict(stays + self._cleanups.leave_with_references(held))
            self.outside.dismiss_leak_warning()
            notes = Notes(self.outside, None, untracked_only=True)
            record |= {"outside": notes.found, "engines": notes.engines}
        self._add(record)
        self.engines.stop()

    def _interrupted(self) -> Iterator[PendingCleanup]:
        """The cleanups of trackers whose end Ctrl-C has prevented."""
        for tracker in self._started[:]:
            if tracker is not self.outside:
                tracker.stop()
                self._started.remove(tracker)
                yield PendingCleanup(tracker, {}, "was interrupted")

    # -- tests, modules, classes -----------------------------------------------------------------

    @contextmanager
    def test(
        self,
        test: str,
        options: Mapping[str, Any],
        keeps: Callable[[], bool],
        show: Callable[[str], None],
    ) -> Iterator[None]:
        """In the block all rows are this test's; they are deleted after it."""
        self.install_ledgers()
        began = perf_counter()
        tracker = self._start_tracker(test, is_shared=False)
        try:
            yield
        finally:
            with leases_returned(began, tracker.sessions.release):
                self.finish(tracker, options, show if keeps() else None)

    def refuse_unknown_tables(self, options: Mapping[str, Any]) -> None:
        """Raise for a table name in a test's options that no database has which is in use so far.

        Raises:
            UnknownTableError: there is one.
        """
        options = configured() | dict(options)
        texts = [name for each in NAMING for name in named_tables(each, options.get(each, ()))]
        asked = frozenset(texts), tuple(map(id, self.engines.known))
        tracker = self._started[-1]
        if not texts or asked == self._asked:
            return
        for engine in self.engines.known:
            tracker.engines.capture(engine)

        def check() -> bool:
            engines = map(tracker.engine_of, tracker.engines.by_database)
            has_tables = any({*sa.inspect(each).get_table_names()} - {NAME} for each in engines)
            if has_tables:  # else each test makes its own
                CleanupManager(tracker, **options)
            return has_tables

        if run_for(self.engines.known, check):
            self._asked = asked

    def shared(self, name: str) -> SuiteTracker:
        """A tracker for rows of several tests, until :meth:`finish`; it is given no rows yet."""
        tracker = self._start_tracker(name, is_shared=True)
        tracker.sessions.stop_listening()
        return tracker

    def _start_tracker(self, test: str, *, is_shared: bool, ledger: bool = True) -> SuiteTracker:
        ledgers = self._ledgers.all if ledger else []
        tracker = SuiteTracker(self.engines, test, is_shared=is_shared, ledgers=ledgers)
        tracker.start()
        self._started.append(tracker)
        return tracker

    def finish(
        self,
        tracker: SuiteTracker,
        options: Mapping[str, Any],
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Delete a tracker's rows, or keep them and show which they are."""
        tracker.stop()
        self._started.remove(tracker)
        pending = PendingCleanup(tracker, options)
        self._cleanups.expect_commit(pending)
        try:
            if show is not None and tracker.store.snapshot():
                show(self._cleanups.keep(pending))
            else:
                self._cleanups.clean(pending)
        finally:
            self._cleanups.retry()

    # -- engines ---------------------------------------------------------------------------------

    def _with_entries(self) -> list[SuiteTracker]:
        """The trackers whose rows are entered into ledgers."""
        return [each for each in self._started if self._everything or each is not self.outside]

    def _meet(self, engine: sa.Engine) -> bool:
        """An engine connects for the first time: whether its rows are tracked."""
        try:
            refuse_production(engine.url)
            refuse_places(dialect_for(engine).places_by_url(engine))
        except ProductionDatabaseError as error:
            self._refused.append(str(error))
            return False
        self._ledgers.meet(engine)
        return True


class SuiteLedgers:
    """One ledger in each database, installed when the database is first used."""

    def __init__(
        self,
        trackers: Callable[[], Iterable[SuiteTracker]],
        on_ledger: Callable[[Ledger, WorkerContext], None],
        refuse: Callable[[str], None],
        *,
        are_wanted: bool,
    ) -> None:
        self._trackers = trackers
        self._on_ledger = on_ledger
        self._refuse = refuse
        self._are_wanted = are_wanted
        self._known: dict[str, Ledger | None] = {}
        self._later: dict[str, sa.Engine] = {}

    @property
    def all(self) -> list[Ledger]:
        """The installed ledgers."""
        return [each for each in self._known.values() if each is not None]

    def meet(self, engine: sa.Engine) -> None:
        """An engine connects for the first time."""
        name, dialect = database_name(engine), dialect_for(engine)
        if not self._are_wanted or name in self._known or dialect.is_private(engine):
            return
        if dialect.has_row_locks or _is_installed(engine):
            self._install(name, engine)
        else:  # the installation would wait for a transaction of the suite that may be open
            self._later[name] = engine

    def install_those_met(self) -> None:
        """Install the ledgers that could not be installed when their database was first used."""
        later, self._later = self._later, {}
        for name, engine in later.items():
            if name not in self._known and not has_vanished(engine):
                run_for([engine], partial(self._install, name, engine))

    def close(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped, through an engine to its server: end its ledger."""
        wanted = (database, engine.url.host, engine.url.port)
        for name, ledger in list(self._known.items()):
            url = None if ledger is None else ledger.engine.url
            if ledger is not None and url and (url.database, url.host, url.port) == wanted:
                del self._known[name]
                for tracker in self._trackers():
                    tracker.journals.drop_ledger(ledger)
                ledger.close()

    def _install(self, name: str, engine: sa.Engine) -> None:
        ledger = Ledger(spare_engine_of(engine), allow_production=True)
        try:
            ledger.install()
        except (LedgerError, sa.exc.DBAPIError) as error:
            self._known[name] = None
            self._refuse(f"rows of {name} in a ledger: {error}")
            return
        self._known[name] = ledger
        for tracker in self._trackers():
            tracker.journals.add_ledger(ledger)
        self._on_ledger(ledger, WorkerContext.current())


def _is_installed(engine: sa.Engine) -> bool:
    """Whether a run before has installed the ledger: then nothing needs to be written."""
    if engine.dialect.is_async or has_vanished(engine):
        return False
    with suppress(sa.exc.DBAPIError), spare_engine_of(engine).connect() as connection:
        return sa.inspect(connection).has_table(NAME)
    return False
