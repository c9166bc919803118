"""The pytest plugin itself; :mod:`pytest_tidyrows` loads it when a test first needs it."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tidyrows.cleanup.configuration import Configuration, configured
from tidyrows.cleanup.reasons import in_short
from tidyrows.dialects import engine_for
from tidyrows.errors import ArgumentError, LedgerError, TidyRowsError
from tidyrows.greenlets import spawn
from tidyrows.ledger.process import OwnerKind
from tidyrows.ledger.table import Ledger
from tidyrows.suite.cleanups import created_by, record_of, residue_record
from tidyrows.sweep.sweep import sweep
from tidyrows.testing.async_fixtures import ASYNC_TEST, AsyncTest, fixture_for
from tidyrows.testing.pytest_options import (
    FIXTURE,
    MARK,
    checked_tidy_options,
    ini_options,
    isolation_option,
    ledger_option,
)
from tidyrows.testing.shared import Shared
from tidyrows.testing.summary import RunSummary, notes_of
from tidyrows.testing.tidy import Tidy
from tidyrows.testing.xdist_controller import NotesFile, XdistController, for_all_workers
from tidyrows.tracking.binding import Binding

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tidyrows.suite.cleanups import Record
    from tidyrows.worker import WorkerContext

_FAILED = pytest.StashKey[bool]()
RECORDS = "tidyrows"
"""The attribute of a report, and the key of xdist's ``workeroutput``, that carries the records."""
_NO_CLEANUP = ("ledger", "allow_production", "isolation", "metadata", "migrate", "seed", "pool")
"""Options of ``Tidy`` that a cleanup does not take."""


class Plugin:
    """One process of pytest: the only one, a worker of pytest-xdist, or its controller."""

    def __init__(self, config: pytest.Config, notes_folder: Callable[[], Path | None]) -> None:
        self._config = config
        try:
            config.add_cleanup(Configuration(ini_options(config), above=True).reset)  # type: ignore[arg-type]
        except ArgumentError as error:  # a table is to be owned and protected
            raise pytest.UsageError(f"in the ini file: {error}") from None
        self._summary = RunSummary()
        self._unsent: list[Record] = []
        self.before_the_end: list[Callable[[], None]] = []
        self._known_urls: set[sa.URL] = set()
        self._ledgers: list[Ledger] = []
        # with the rows, by table, that are in a record already
        self._unfinished: list[tuple[str, Tidy, Counter[str]]] = []
        self._engines: dict[str, sa.Engine] = {}  # of databases in which rows may stay
        worker: str | None = getattr(config, "workerinput", {}).get("workerid")
        self._is_worker = worker is not None
        folder = notes_folder()
        self._notes = NotesFile(folder, worker) if folder is not None and worker else None
        self._controller = XdistController(self._summary, notes_folder)
        self._residue = str(config.getini("tidy_residue")).strip().lower()
        self._isolation = isolation_option(config)

    # -- fixtures ------------------------------------------------------------------------------

    def engine(self) -> Iterator[sa.Engine]:
        """An engine for the URL that was given."""
        url = self._config.getoption("--tidy-url") or self._config.getini("tidy_url")
        if not url:
            pytest.fail(
                "tidyrows does not know the database: define a session fixture tidy_engine in "
                "conftest.py that returns the suite's Engine, or give --tidy-url (ini: tidy_url).",
                pytrace=False,
            )
        engine = engine_for(url)
        yield engine
        engine.dispose()

    def for_test(self, request: pytest.FixtureRequest) -> Iterator[Tidy]:
        """The rows of one test."""
        item = request.node
        item.stash[_FAILED] = False
        bind = request.getfixturevalue("tidy_engine")
        options = self._options(item, request.getfixturevalue("tidy_options"))
        tidy = self._new_tidy(bind, test=item.nodeid, **options)
        if tidy.is_async:
            yield from self._for_async_test(request, tidy)
            return
        self._start(tidy)
        yield tidy
        self._finish_test(tidy, item)

    def _for_async_test(self, request: pytest.FixtureRequest, tidy: Tidy) -> Iterator[Tidy]:
        """The same, with the cleanup in the test's own loop if the test has one."""
        item = request.node

        async def begin() -> None:
            await spawn(self._sweep_first, Binding(tidy.bind).engine())
            await tidy.prepare_async()

        async def end() -> None:
            await tidy.tracker.run_sync(lambda _tracker: self._finish_test(tidy, item))

        item.stash[ASYNC_TEST] = AsyncTest(begin, partial(self._start, tidy), end)
        name = fixture_for(item)
        if name is None and tidy.isolation == "transaction":
            pytest.fail(
                f"At level transaction of an asynchronous engine {item.name} needs an event loop, "
                f"whose connection has the transaction. Write async def {item.name} with "
                f"pytest-asyncio or anyio, or @pytest.mark.tidy(isolation='worker').",
                pytrace=False,
            )
        if name is not None:
            request.getfixturevalue(name)  # it ends after this one, since this one asks for it
        else:
            asyncio.run(begin())
        if not hasattr(tidy, "tracker"):
            self._start(tidy)
        yield tidy
        tidy.tracker.stop()
        if name is None:
            asyncio.run(end())

    def for_worker(self, request: pytest.FixtureRequest) -> Iterator[Shared]:
        """Rows that all tests of this process share."""
        tidy = self._new_shared(request)
        shared = Shared(tidy)
        self._meet(tidy)
        yield shared
        self._finish(tidy, "tidy_worker")

    def for_run(self, request: pytest.FixtureRequest) -> Iterator[Shared]:
        """Rows that all tests of the run share; the controller of several workers deletes them."""
        if not self._is_worker:
            yield from self.for_worker(request)
            return
        tidy = self._new_shared(request)
        tidy.context = for_all_workers(tidy.context)
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp().parent / "tidy_run"
        folder.mkdir(exist_ok=True)
        shared = Shared(tidy, folder)
        if not tidy.tracker.journals:
            pytest.fail(
                "tidy_run needs a ledger where the run has several workers: its rows must outlive "
                "the worker that made them. Set tidy_ledger = on in the ini file, or use "
                "tidy_worker.",
                pytrace=False,
            )
        self._meet(tidy)
        yield shared
        record = record_of("tidy_run", created_by(tidy.tracker), None)
        name = OwnerKind.HANDED.new_id()
        for database in tidy.tracker.journals.databases:
            tidy.tracker.journals.put_aside(database, name)
        self.add(record)

    def _new_tidy(self, bind: Any, **options: Any) -> Tidy:
        tidy = Tidy(bind, **options)
        # xdist replaces a worker that crashes, even if it has one only.
        tidy.has_kin = tidy.has_kin or self._is_worker
        return tidy

    def _new_shared(self, request: pytest.FixtureRequest) -> Tidy:
        tidy = self._new_tidy(
            request.getfixturevalue("tidy_engine"), ledger=ledger_option(self._config)
        )
        if tidy.is_async:
            pytest.fail(
                f"{request.fixturename} cannot await, and tidy_engine is asynchronous. Make shared "
                f"rows with tidyrows.testing.Tidy(create_engine(...)) in a session fixture of your "
                f"own.",
                pytrace=False,
            )
        return tidy

    # -- options ---------------------------------------------------------------------------------

    def whole_suite_options(
        self, item: pytest.Item | pytest.Collector, fixture: Any
    ) -> dict[str, Any]:
        """The cleanup options of a test, or of the tests of a scope."""
        options = self._options(item, fixture)
        for name in _NO_CLEANUP:
            options.pop(name, None)
        item.stash[_FAILED] = False
        return options

    def keeps(self, item: pytest.Item, options: Mapping[str, Any]) -> bool:
        """Whether a test with these options has failed and its rows are kept."""
        wanted = (configured() | dict(options)).get("keep_on_failure", False)
        return wanted and item.stash[_FAILED]

    def _options(self, item: pytest.Item | pytest.Collector, fixture: Any) -> dict[str, Any]:
        """The options of a test's marks, those closest to the test first, and of its fixture."""
        options: dict[str, Any] = {"ledger": ledger_option(self._config)}
        options["isolation"] = self._isolation
        if self._config.getoption("--tidy-keep"):
            options["keep_on_failure"] = True
        if self._config.getoption("--tidy-verify") is not None:
            options["verify"] = self._config.getoption("--tidy-verify") == "on"
        options |= checked_tidy_options(FIXTURE, fixture)
        for mark in reversed(list(item.iter_markers("tidy"))):
            options |= checked_tidy_options(MARK, mark.kwargs, map(repr, mark.args))
        if self._notes is not None:
            self._notes.note_options(options)
        return options

    # -- the life of one tracker -----------------------------------------------------------------

    def _start(self, tidy: Tidy) -> None:
        """Start the tracker; sweep its database first, if asked."""
        if not tidy.deletes_rows:  # a level may lock the database
            self._meet(tidy)
        tidy.start()
        try:
            self._meet(tidy)
        except BaseException:
            tidy.tracker.stop()
            raise

    def _meet(self, tidy: Tidy) -> None:
        """Sweep a database when it is first used, if asked; and note it for the controller."""
        engine = tidy.suite_engine
        if engine is None or engine.url in self._known_urls:
            return
        if not tidy.is_async:
            self._sweep_first(engine)
        self._known_urls.add(engine.url)
        self._ledgers.append(Ledger(engine, allow_production=True))
        if tidy.deletes_rows and tidy.tracker.journals:
            self._note_database(engine, tidy.context)

    @property
    def ledgers(self) -> Sequence[Ledger]:
        """Those in which rows of this process are entered."""
        return tuple(self._ledgers)

    def add_ledger(self, ledger: Ledger, context: WorkerContext) -> None:
        """Rows of the whole suite are entered into this ledger."""
        self._ledgers.append(ledger)
        self._note_database(ledger.engine, context)

    def _note_database(self, engine: sa.Engine, context: WorkerContext) -> None:
        """The controller must know it even if this worker sends no report any more."""
        if self._notes is None:
            return
        if not self._notes.is_reachable:
            text = (
                f"worker {context.worker_id} does not share a file system with the controller: if "
                f"it crashes, its rows stay until a sweep (--tidy-sweep)"
            )
            self.add({"note": text})
        self._notes.note_database(engine.url, context.run_id)

    def _sweep_first(self, engine: sa.Engine | None) -> None:
        """Sweep a database that is not known yet, if asked; a row that stays fails no test."""
        if (
            engine is None
            or engine.url in self._known_urls
            or not self._config.getoption("--tidy-sweep")
        ):
            return
        try:
            swept = sweep(engine)
        except LedgerError:
            return  # there is no ledger: nothing was ever entered
        except TidyRowsError as error:
            text = f"not all that dead runs left: {error}"
        else:
            text = str(swept) if swept.total_deleted else ""
        if text:
            self.add({"note": f"swept before the first test: {text}"})

    def _finish(self, tidy: Tidy, test: str, *, failed: bool = False) -> str | None:
        for late in [each for each in self._unfinished if each[1].has_late_rows]:
            self._finish_late(*late)
            self._unfinished.remove(late)
            if late[1].is_unfinished:
                counted = Counter(created_by(late[1].tracker))
                self._unfinished.append((*late[:2], counted))
        tidy.tracker.stop()
        created, kept, interrupted = created_by(tidy.tracker), None, False
        undone: dict[str, int] = {}
        try:
            kept = tidy.finish(failed=failed)
            undone = created if tidy.undoes_rows else {}
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            record = record_of(test, created, tidy.report) | {"undone": undone}
            if kept is not None:
                record["kept"] = sum(created.values())
            elif tidy.deletes_rows and not tidy.is_async and (interrupted or tidy.is_unfinished):
                # not an asynchronous one: no loop is left
                counted = Counter(created) - Counter(record.get("deleted", {}))
                counted &= Counter(created_by(tidy.tracker))
                self._unfinished.append((test, tidy, counted))
            self.add(record | residue_record(notes_of(tidy)))
        return kept

    def _finish_test(self, tidy: Tidy, item: pytest.Item) -> None:
        kept = self._finish(tidy, item.nodeid, failed=item.stash[_FAILED])
        if kept is not None:
            item.add_report_section("teardown", "tidyrows", kept)

    def add(self, record: Record) -> None:
        """Send a record with the next report, to be summed at the end of the run."""
        engines = record.pop("engines", {})
        self._engines |= engines
        if self._notes is not None:
            for engine in engines.values():
                self._notes.note_residue(engine.url)
        self._unsent.append(record)

    # -- hooks -----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember a failure until the cleanup; attach the records to the report."""
        report = yield
        if report.failed and _FAILED in item.stash:
            item.stash[_FAILED] = True
        if self._unsent:
            setattr(report, RECORDS, self._unsent)
            self._unsent = []
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sum the records of a test, of this process or of a worker."""
        if not self._is_worker:
            self._sum(getattr(report, RECORDS, ()))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """A worker has ended."""
        output = getattr(node, "workeroutput", {})
        self._sum(output.get(RECORDS, ()))
        self._controller.worker_ended(node.gateway.id, crashed=bool(error) or not output)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Finish what was held or interrupted; in a controller also what workers left."""
        for unfinished in self._unfinished:
            self._finish_late(*unfinished)
        for action in self.before_the_end:
            action()
        if self._is_worker:
            self._config.workeroutput[RECORDS] = self._unsent  # type: ignore[attr-defined]  # xdist's
        else:
            self._sum(self._unsent)  # no report came any more
            self._controller.finish()
            if self._residue != "ignore":
                self._summary.look(self._engines | self._controller.engines())
        failed = self._summary.failed or (self._residue == "fail" and self._summary.residue)
        if failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for ledger in self._ledgers:  # nobody else closes them in an xdist worker
            ledger.close()

    def _finish_late(self, test: str, tidy: Tidy, counted: Counter[str]) -> None:
        """Clean up again, now that others' rows are gone or the interrupt is over."""
        held = tidy.report.held if tidy.report else ()
        late = Counter(created_by(tidy.tracker)) - counted
        try:
            report = tidy.cleanup.cleanup()
        except (TidyRowsError, sa.exc.SQLAlchemyError) as error:
            self.add({"failed": f"rows of {test} are still there: {in_short(error)}"})
        else:
            record = record_of(test, {}, report)
            record |= {"created": dict(late), "held": len(report.held) - len(held)}
            self.add(record | residue_record(notes_of(tidy)))

    def _sum(self, records: Iterable[Record]) -> None:
        for record in records:
            self._summary.add(record)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the summary, if there is one."""
        tables = self._config.getoption("--tidy-report")
        lines = list(self._summary.lines(tables=tables, residue=self._residue != "ignore"))
        if self._residue == "fail" and self._summary.residue:
            lines.append("the run fails, since rows stay and the ini file has tidy_residue = fail")
        if lines:
            terminalreporter.write_sep("=", "tidyrows")
            for line in lines:
                terminalreporter.write_line(line)
