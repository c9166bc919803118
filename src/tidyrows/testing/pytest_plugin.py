"""The pytest plugin itself, loaded by :mod:`pytest_tidyrows` with the first need of it."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.verify import in_short
from tidyrows.errors import LedgerError, TidyRowsError
from tidyrows.ledger.process import handed_id
from tidyrows.ledger.table import Ledger
from tidyrows.suite.summary import created_by, said_of
from tidyrows.sweep.sweep import sweep, sweep_async
from tidyrows.testing.async_fixtures import TURN, fixture_for
from tidyrows.testing.shared import Shared
from tidyrows.testing.summary import Totals
from tidyrows.testing.tidy import Tidy
from tidyrows.testing.worker_notes import Board
from tidyrows.testing.xdist_controller import Crew, address_of, of_the_run, sealed, wishes_of
from tidyrows.tracking.binding import Binding
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from tidyrows.cleanup.report import CleanupReport

_FAILED = pytest.StashKey[bool]()
_SAID = "tidyrows"
_LEDGERS: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
_OPTIONS = frozenset(
    name
    for made in (Tidy, CleanupManager)
    for name, parameter in inspect.signature(made).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
) - {"test", "context"}


class Plugin:
    """One process of pytest: the only one, a worker of xdist's, or their controller.

    Args:
        config: pytest's.
        key: what a worker of xdist's and the controller alone know.
        board: the folder in which the one leaves what the other may not hear.
    """

    def __init__(self, config: pytest.Config, key: str, board: str) -> None:
        self._config = config
        self._totals = Totals()
        self._unsaid: list[dict[str, Any]] = []
        self.before_the_end: list[Callable[[], None]] = []
        self._met: set[sa.engine.URL] = set()
        self._ledgers: list[Ledger] = []
        self._late: list[tuple[str, Tidy]] = []
        self._crew = Crew(self._totals, key)
        self._key = key
        self._board = Board(board)
        self._is_worker = hasattr(config, "workerinput")

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
        engine = sa.create_engine(url)
        yield engine
        engine.dispose()

    def for_test(self, request: pytest.FixtureRequest) -> Iterator[Tidy]:
        """A test's own rows."""
        item = request.node
        item.stash[_FAILED] = False
        bind = request.getfixturevalue("tidy_engine")
        options = self._options(item)
        tidy = self._made(bind, test=item.nodeid, **options)
        if self._is_worker:  # if it crashes, its controller cleans up in its place
            worker = tidy.context.worker_id
            self._tell({"worker": worker, "wanted": wishes_of(options)})
        if tidy.is_async:
            yield from self._in_a_loop(request, tidy)
            return
        self.begin(tidy)
        yield tidy
        self._show(item, self._finish(tidy, item.nodeid, failed=item.stash[_FAILED]))

    def _in_a_loop(self, request: pytest.FixtureRequest, tidy: Tidy) -> Iterator[Tidy]:
        """The same where the cleanup must be awaited, in the test's own loop if it has one."""
        item = request.node
        turn = item.stash[TURN] = _Turn(self, tidy, request.getfixturevalue("tidy_engine"), item)
        name = fixture_for(item)
        if name is not None:
            request.getfixturevalue(name)  # it ends after this one, since this one asks for it
            if not turn.begun:
                self.begin(tidy)
            yield tidy
            tidy.tracker.stop()
        else:
            asyncio.run(turn.begin(start=False))
            self.begin(tidy)
            yield tidy
            asyncio.run(turn.end())

    def for_worker(self, request: pytest.FixtureRequest) -> Iterator[Shared]:
        """Rows of this process."""
        tidy = self._shared(request)
        shared = Shared(tidy)
        self._meet(tidy)
        yield shared
        self._finish(tidy, "tidy_worker")

    def for_run(self, request: pytest.FixtureRequest) -> Iterator[Shared]:
        """Rows of the run: where it has several workers, the controller deletes them."""
        if not self._is_worker:
            yield from self.for_worker(request)
            return
        tidy = self._shared(request)
        tidy.context = of_the_run(tidy.context)
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp().parent / "tidy_run"
        folder.mkdir(exist_ok=True)
        shared = Shared(tidy, folder)
        if not tidy.tracker.has_ledger:
            pytest.fail(
                "tidy_run needs a ledger where the run has several workers: its rows must outlive "
                "the worker that made them. Set tidy_ledger = on in the ini file, or use "
                "tidy_worker.",
                pytrace=False,
            )
        self._meet(tidy)
        yield shared
        said = said_of("tidy_run", created_by(tidy.tracker), None)
        name = handed_id()
        for database in tidy.tracker.books():
            tidy.tracker.put_aside(database, name)
        self._unsaid.append(said)

    def _made(self, bind: Any, **options: Any) -> Tidy:
        tidy = Tidy(bind, **options)
        # xdist replaces a worker that crashes, even if it has one only.
        tidy.has_kin = tidy.has_kin or self._is_worker
        return tidy

    def _shared(self, request: pytest.FixtureRequest) -> Tidy:
        tidy = self._made(request.getfixturevalue("tidy_engine"), ledger=self._ledger())
        if tidy.is_async:
            pytest.fail(
                f"{request.fixturename} cannot await, and tidy_engine is asynchronous. Make shared "
                f"rows with tidyrows.testing.Tidy(create_engine(...)) in a session fixture of your "
                f"own.",
                pytrace=False,
            )
        return tidy

    def hear(self, said: dict[str, Any]) -> None:
        """What is to be told at the end of the run."""
        self._unsaid.append(said)

    def options_of(self, item: pytest.Item) -> tuple[dict[str, Any], Callable[[], bool]]:
        """What a test's marks say of its cleanup, and how to ask whether to keep its rows."""
        options = self._options(item)
        keeps = options.pop("keep_on_failure")
        for name in ("ledger", "allow_production"):
            options.pop(name, None)
        if self._is_worker:
            worker = WorkerContext.current().worker_id
            self._tell({"worker": worker, "wanted": wishes_of(options)})
        item.stash[_FAILED] = False
        return options, lambda: keeps and item.stash[_FAILED]

    def ledger_wanted(self) -> bool | None:
        """What the ini file says of the ledger; None where that depends on the run."""
        return self._ledger()

    def enter(self, ledger: Ledger, context: WorkerContext) -> None:
        """Rows are entered into a ledger; the controller must know where."""
        self._ledgers.append(ledger)
        if self._is_worker:
            sent = sealed(address_of(ledger.engine), self._key)
            self._tell({"url": sent, "run": context.run_id})

    def _options(self, item: pytest.Item) -> dict[str, Any]:
        """What the marks say; those closest to the test have the last word."""
        options: dict[str, Any] = {
            "ledger": self._ledger(),
            "keep_on_failure": self._config.getoption("--tidy-keep"),
            "verify": self._config.getoption("--tidy-verify") == "on",
        }
        for mark in reversed(list(item.iter_markers("tidy"))):
            if mark.args or mark.kwargs.keys() - _OPTIONS:
                said = [*map(repr, mark.args), *sorted(mark.kwargs.keys() - _OPTIONS)]
                pytest.fail(
                    f"@pytest.mark.tidy does not know {', '.join(said)}. It takes "
                    f"{', '.join(sorted(_OPTIONS))}, by name.",
                    pytrace=False,
                )
            options |= mark.kwargs
        return options

    def _ledger(self) -> bool | None:
        said = self._config.getini("tidy_ledger")
        if said not in _LEDGERS:
            pytest.fail(f"tidy_ledger = {said} in the ini file is none of {', '.join(_LEDGERS)}.")
        return _LEDGERS[said]

    def begin(self, tidy: Tidy) -> None:
        """Listen; sweep, and say where, if need be."""
        tidy.start()
        try:
            self._meet(tidy)
        except BaseException:
            tidy.tracker.stop()
            raise

    def _meet(self, tidy: Tidy) -> None:
        """Sweep a database when it is first met, if asked; and let the controller know of it."""
        engine = tidy.tracker.bound_engine
        if engine is None or engine.url in self._met:
            return
        self._met.add(engine.url)
        self._ledgers.append(Ledger(engine, allow_production=True))
        if self._config.getoption("--tidy-sweep") and not tidy.is_async:
            with self._sweeping():
                self._swept(sweep(engine))
        if self._is_worker and tidy.tracker.has_ledger:
            sent = sealed(address_of(engine), self._key)
            self._tell({"url": sent, "run": tidy.context.run_id})

    def _tell(self, said: dict[str, Any]) -> None:
        """Say what the controller must know even if no report comes any more."""
        self._unsaid.append(said)
        self._board.pin(self._config.workerinput["workerid"], said)  # type: ignore[attr-defined]  # xdist's

    async def sweep_async(self, bind: Any) -> None:
        """Sweep the database of an asynchronous bind, if asked and where it is not met yet."""
        engine = Binding(bind).engine()
        if self._config.getoption("--tidy-sweep") and engine and engine.url not in self._met:
            with self._sweeping():
                self._swept(await sweep_async(engine))

    @contextmanager
    def _sweeping(self) -> Iterator[None]:
        """What a sweep cannot delete is no fault of the test that comes first."""
        try:
            yield
        except LedgerError:
            pass  # there is no ledger: nothing was ever entered
        except TidyRowsError as error:
            self._unsaid.append({"swept": f"not all that dead runs left: {error}"})

    def _swept(self, report: CleanupReport) -> None:
        if report.total_deleted:
            self._unsaid.append({"swept": str(report)})

    def _finish(self, tidy: Tidy, test: str, *, failed: bool = False) -> str | None:
        tidy.tracker.stop()
        created, note = created_by(tidy.tracker), None
        try:
            note = tidy.finish(failed=failed)
        except KeyboardInterrupt:
            self._late.append((test, tidy))
            raise
        finally:
            self._say(tidy, test, created, note)
        return note

    async def finish_async(self, tidy: Tidy, item: pytest.Item) -> None:
        """As for a test that is not asynchronous."""
        tidy.tracker.stop()
        created, note = created_by(tidy.tracker), None
        try:
            note = await tidy.finish_async(failed=item.stash[_FAILED])
        finally:
            self._say(tidy, item.nodeid, created, note)
        self._show(item, note)

    def _say(self, tidy: Tidy, test: str, created: dict[str, int], note: str | None) -> None:
        said = said_of(test, created, tidy.report)
        if note is not None:
            said["kept"] = sum(created.values())
        elif tidy.report is not None and tidy.report.held and not tidy.is_async:
            self._late.append((test, tidy))
        self._unsaid.append(said)

    def _show(self, item: pytest.Item, note: str | None) -> None:
        if note is not None:
            item.add_report_section("teardown", "tidyrows", note)

    # -- hooks -----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember a failure until the rows are cleaned; send along what there is to say."""
        report = yield
        if report.failed and _FAILED in item.stash:
            item.stash[_FAILED] = True
        if self._unsaid:
            setattr(report, _SAID, [said for said in self._unsaid if said])
            self._unsaid = []
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hear what a test, here or in a worker, has to say."""
        if not self._is_worker:
            for said in getattr(report, _SAID, ()):
                self._crew.hear(said)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """A worker has ended."""
        worker = node.gateway.id
        output = getattr(node, "workeroutput", {})
        crashed = bool(error) or not output
        for said in output.get(_SAID, ()):
            self._crew.hear(said)
        if crashed:
            self._look(worker)
        self._crew.ended(worker, crashed=crashed)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """What waited for others' rows, or was interrupted, and what a run's end leaves to do."""
        for test, tidy in self._late:
            waited = len(tidy.report.held) if tidy.report else 0
            try:
                report = tidy.cleanup.cleanup()
            except (TidyRowsError, sa.exc.SQLAlchemyError) as error:
                self._totals.notes.append(f"rows of {test} are still there: {in_short(error)}")
                self._totals.failed = True
            else:
                deleted = {str(table): count for table, count in report.deleted.items()}
                self._totals.add({"deleted": deleted, "held": len(report.held) - waited})
        for deed in self.before_the_end:
            deed()
        if self._is_worker:
            self._config.workeroutput[_SAID] = self._unsaid  # type: ignore[attr-defined]  # xdist's
        else:
            for said in self._unsaid:  # no report came any more
                self._crew.hear(said)
            self._look()
            self._crew.finish()
            self._board.clear()
        if self._totals.failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for ledger in self._ledgers:  # a worker of xdist's ends without a word
            ledger.close()

    def _look(self, worker: str = "*") -> None:
        """Read what workers have left, for what they said may not have been heard."""
        for said in self._board.read(worker):
            self._crew.hear(said)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """What there is to say, if anything."""
        lines = list(self._totals.lines(tables=self._config.getoption("--tidy-report")))
        if lines:
            terminalreporter.write_sep("=", "tidyrows")
            for line in lines:
                terminalreporter.write_line(line)


class _Turn:
    """What an asynchronous test awaits."""

    def __init__(self, plugin: Plugin, tidy: Tidy, bind: Any, item: pytest.Item) -> None:
        self._plugin, self._tidy, self._bind, self._item = plugin, tidy, bind, item
        self.begun = False

    async def begin(self, *, start: bool) -> None:
        await self._plugin.sweep_async(self._bind)
        await self._tidy.prepare_async()
        if start:
            self._plugin.begin(self._tidy)
            self.begun = True

    async def end(self) -> None:
        await self._plugin.finish_async(self._tidy, self._item)
