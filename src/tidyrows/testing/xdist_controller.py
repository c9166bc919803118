"""The controller of pytest-xdist: it deletes what workers left, and what they shared.

A worker writes what its controller must know into a file of its own, and not into a report: a
worker that crashes sends no more reports, plugins write reports to files, and a URL contains a
password.
"""

from __future__ import annotations

import atexit
import json
import os
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tidyrows.cleanup.configuration import configured
from tidyrows.cleanup.options import Dependents, named_tables, written_names
from tidyrows.cleanup.reasons import in_full
from tidyrows.dialects import database_name
from tidyrows.errors import TidyRowsError
from tidyrows.ledger.table import Ledger
from tidyrows.suite.spare_engine import run_for
from tidyrows.sweep.dead_workers import SweepArguments
from tidyrows.sweep.recovery import Recovery
from tidyrows.sweep.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.testing.summary import RunSummary
    from tidyrows.worker import WorkerContext

_SHARED = ":run"
"""Appended to the id of a worker for the rows that all workers share."""


@dataclass(slots=True)
class WorkerNotes:
    """What one worker has written for its controller."""

    databases: dict[str, str] = field(default_factory=dict)  # URL with password: run id
    options: dict[str, Any] = field(default_factory=dict)  # of the newest test's cleanup
    residue: list[str] = field(default_factory=list)  # URLs of databases in which rows may stay


class NotesFile:
    """The notes of this worker, in a file that only this user can read."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._notes = WorkerNotes()
        self._path = folder / f"{worker}.json"
        self._process, self._controller = os.getpid(), os.getppid()
        atexit.register(self._remove_if_abandoned)

    @property
    def is_reachable(self) -> bool:
        """Whether the controller's folder is there; a worker on another machine has none."""
        return self._path.parent.is_dir()

    def note_database(self, url: sa.URL, run: str) -> None:
        """Rows of this worker are entered into the ledger of this database."""
        self._notes.databases[url.render_as_string(hide_password=False)] = run
        self._write()

    def note_residue(self, url: sa.URL) -> None:
        """Rows may stay in this database: the controller must see whether they do."""
        text = url.render_as_string(hide_password=False)
        if text not in self._notes.residue:
            self._notes.residue.append(text)
            self._write()

    def note_options(self, options: Mapping[str, Any]) -> None:
        """The newest test wants its rows cleaned up with these options."""
        options = configured() | dict(options)
        written: dict[str, Any] = {  # those that decide what is deleted
            name: written_names(named_tables(name, options.get(name, ())))
            for name in ("own", "protect")
        }
        if "dependents" in options:
            written["dependents"] = options["dependents"].name
        if self._notes.options != written:
            self._notes.options = written
            self._write()

    def _write(self) -> None:
        if not self.is_reachable:
            return
        new = self._path.with_suffix(".new")  # a worker may be killed while it writes
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self._notes), file)
        new.replace(self._path)

    def _remove_if_abandoned(self) -> None:
        """Where the controller was killed, nobody else removes the file."""
        if os.getpid() == self._process and os.getppid() != self._controller:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):  # notes of another worker are in it yet
                self._path.parent.rmdir()


class XdistController:
    """Deletes the rows of workers that crashed, and at the end those that all workers share."""

    def __init__(self, summary: RunSummary, notes_folder: Callable[[], Path | None]) -> None:
        self._summary = summary
        self._notes_folder = notes_folder
        self._databases: dict[str, WorkerDatabase] = {}

    def worker_ended(self, worker: str, *, crashed: bool) -> None:
        """A worker has ended."""
        options = dict(self._read(worker).get(worker, WorkerNotes()).options)
        if "dependents" in options:
            options["dependents"] = Dependents[options["dependents"]]
        for database in self._databases.values():
            self._run(database, f"worker {worker}", partial(database.recover_shared, worker))
            if crashed:
                sweeping = partial(database.sweep, worker, options)
                self._run(database, f"worker {worker} crashed", sweeping, show=True)

    def finish(self) -> None:
        """All workers have ended: delete what is left of the run."""
        self._read()
        for database in self._databases.values():
            self._run(database, f"run {database.run}", database.finish)

    def engines(self) -> dict[str, sa.Engine]:
        """The databases in which rows may stay, by name."""
        urls = dict.fromkeys(url for notes in self._read().values() for url in notes.residue)
        engines = (sa.create_engine(url, poolclass=NullPool) for url in urls)
        return {database_name(engine): engine for engine in engines}

    def _read(self, worker: str = "*") -> dict[str, WorkerNotes]:
        folder = self._notes_folder()
        files = [] if folder is None else sorted(folder.glob(f"{worker}.json"))
        notes = {file.stem: WorkerNotes(**json.loads(file.read_bytes())) for file in files}
        for each in notes.values():
            for url, run in each.databases.items():
                if url not in self._databases:
                    self._databases[url] = WorkerDatabase(url, run)
        return notes

    def _run(
        self,
        database: WorkerDatabase,
        what: str,
        work: Callable[[], CleanupReport | None],
        *,
        show: bool = False,
    ) -> None:
        try:
            report = None if database.is_gone() else run_for([database.engine], work)
        except (TidyRowsError, sa.exc.SQLAlchemyError, OSError) as error:
            if not database.is_gone(error):
                what_failed = f"{what}: not all of its rows could be deleted"
                self._summary.fail(f"{what_failed}: {in_full(error)}")
            return
        if report is not None:
            self._summary.add({"deleted": {str(t): n for t, n in report.deleted.items()}})
            if report.held or (show and report.total_deleted):
                self._summary.notes.append(f"{what}: {report}")


class WorkerDatabase:
    """A database that workers write to."""

    def __init__(self, url: str, run: str) -> None:
        self.run = run
        self.engine = sa.create_engine(url, poolclass=NullPool)
        # The suite's own tracker was allowed to write there.
        self._ledger = Ledger(self.engine, allow_production=True)

    def is_gone(self, error: BaseException | None = None) -> bool:
        """Whether the database no longer exists, as far as is known or an error tells."""
        dialect = self._ledger.dialect
        if error is not None and dialect.is_database_missing(error):
            return True
        return dialect.missing_file(self.engine) is not None

    def recover_shared(self, worker: str) -> None:
        """Take over the rows that a worker made for all workers, until all have ended."""
        self._recovery.recover(
            SweepArguments(run=self.run, worker=worker + _SHARED, handed=True, as_superuser=True)
        )

    def sweep(self, worker: str, options: Mapping[str, Any]) -> CleanupReport:
        """Delete what a worker left, with the cleanup options of its last test."""
        return sweep(self._ledger, run=self.run, worker=worker, as_superuser=True, **options)

    def finish(self) -> CleanupReport:
        """Delete what is left of the run."""
        with closing(self._recovery) as recovery:
            recovery.recover(SweepArguments(run=self.run, handed=True, as_superuser=True))
            return recovery.delete_rows()

    @cached_property
    def _recovery(self) -> Recovery:
        return Recovery(self._ledger)


def for_all_workers(context: WorkerContext) -> WorkerContext:
    """The context of rows that a worker makes for all workers."""
    return replace(context, worker_id=context.worker_id + _SHARED)
