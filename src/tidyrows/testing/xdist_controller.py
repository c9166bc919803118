"""The workers of a run, as their controller sees them: who ended how, and what that left."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tidyrows.cleanup.options import Dependents
from tidyrows.cleanup.table_arguments import named_tables, written_names
from tidyrows.cleanup.verify import in_short
from tidyrows.errors import TidyRowsError
from tidyrows.greenlets import spawn
from tidyrows.ledger.table import Ledger
from tidyrows.sweep.database_sweep import DatabaseSweep
from tidyrows.sweep.sweep import sweep
from tidyrows.sweep.sweep_arguments import SweepArguments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.testing.summary import Totals
    from tidyrows.worker import WorkerContext

T = TypeVar("T")
_OF_THE_RUN = ":run"
"""Behind the id of a worker: its rows that all workers share."""


def address_of(engine: sa.Engine) -> str:
    """The URL, password included: for :func:`sealed`."""
    return engine.url.render_as_string(hide_password=False)


def sealed(text: str, key: str) -> str:
    """A text that only who has the key can read, since reports may be written to files.

    A keystream of SHAKE-256 over the key and a nonce, which is used once.
    """
    nonce = secrets.token_bytes(16)
    plain = text.encode()
    return (nonce + _with_stream(plain, key, nonce)).hex()


def opened(text: str, key: str) -> str:
    """What was sealed with the key."""
    given = bytes.fromhex(text)
    return _with_stream(given[16:], key, given[:16]).decode()


def _with_stream(data: bytes, key: str, nonce: bytes) -> bytes:
    stream = hashlib.shake_256(key.encode() + nonce).digest(len(data))
    return bytes(one ^ other for one, other in zip(data, stream, strict=True))


def wishes_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a test wants of its cleanup, in JSON's types, as far as the deletes depend on it."""
    said: dict[str, Any] = {}
    for name in ("own", "protect"):
        said[name] = written_names(named_tables(name, options.get(name, ())))
    if "dependents" in options:
        said["dependents"] = options["dependents"].name
    return said


class Crew:
    """What the controller of a run knows of its workers, and deletes when they cannot.

    Args:
        totals: what is said in the end.
        key: what workers seal addresses with.
    """

    def __init__(self, totals: Totals, key: str) -> None:
        self._totals = totals
        self._key = key
        self._posts: dict[str, Post] = {}
        self._wanted: dict[str, dict[str, Any]] = {}

    def hear(self, said: dict[str, Any]) -> None:
        """What a worker, or this process, has to say."""
        if "url" in said:
            url = opened(said["url"], self._key)
            if url not in self._posts:
                self._posts[url] = Post(url, said["run"])
        elif "wanted" in said:
            self._wanted[said["worker"]] = said["wanted"]
        elif "swept" in said:
            self._totals.notes.append(f"swept before the first test: {said['swept']}")
        else:
            self._totals.add(said)

    def ended(self, worker: str, *, crashed: bool) -> None:
        """A worker has ended.

        Args:
            worker: its id.
            crashed: it could not clean up.
        """
        for post in self._posts.values():
            self._try(post, f"worker {worker}", partial(post.take, worker))
            if crashed:
                self._try(
                    post,
                    f"worker {worker} crashed",
                    partial(post.sweep, worker, self._wanted.get(worker, {})),
                    say=True,
                )

    def finish(self) -> None:
        """All workers have ended: nothing of the run is to stay."""
        for post in self._posts.values():
            self._try(post, f"run {post.run}", post.finish)

    def _try(
        self, post: Post, what: str, deed: Callable[[], CleanupReport | None], *, say: bool = False
    ) -> None:
        try:
            report = None if post.is_deserted() else deed()
        except (TidyRowsError, sa.exc.SQLAlchemyError, OSError) as error:
            if post.is_deserted(error):
                return
            told = str(error) if isinstance(error, TidyRowsError) else in_short(error)
            self._totals.notes.append(f"{what}: not all of its rows could be deleted: {told}")
            self._totals.failed = True
            return
        if report is not None:
            self._totals.add({"deleted": {str(t): n for t, n in report.deleted.items()}})
            if report.held or (say and report.total_deleted):
                self._totals.notes.append(f"{what}: {report}")


class Post:
    """A database that workers write to.

    Args:
        url: where.
        run: the run's id.
    """

    def __init__(self, url: str, run: str) -> None:
        self.run = run
        made = sa.create_engine(url, poolclass=NullPool)
        self._is_async = made.dialect.is_async
        # The suite's own tracker was allowed to write there.
        self._ledger = Ledger(made, allow_production=True)
        self._custody: DatabaseSweep | None = None

    def is_deserted(self, error: BaseException | None = None) -> bool:
        """Whether there is no such database any more, as far as is known or an error tells."""
        dialect = self._ledger.dialect
        if error is not None and dialect.lacks_database(error):
            return True
        return dialect.missing_file(self._ledger.engine) is not None

    def take(self, worker: str) -> None:
        """Keep what a worker made for all of them, until all have ended."""
        wanted = SweepArguments(run=self.run, worker=worker + _OF_THE_RUN, handed=True)
        self._call(lambda: self._keeper().recover(wanted))

    def sweep(self, worker: str, wanted: Mapping[str, Any]) -> CleanupReport:
        """Delete what a worker left, as its last test wanted it."""
        options = dict(wanted)
        if "dependents" in options:
            options["dependents"] = Dependents[options["dependents"]]
        return self._call(lambda: sweep(self._ledger, run=self.run, worker=worker, **options))

    def finish(self) -> CleanupReport:
        """Delete what is left of the run."""

        def last() -> CleanupReport:
            keeper = self._keeper()
            try:
                keeper.recover(SweepArguments(run=self.run, handed=True))
                return keeper.delete_rows()
            finally:
                keeper.close()

        return self._call(last)

    def _keeper(self) -> DatabaseSweep:
        if self._custody is None:
            self._custody = DatabaseSweep(self._ledger)
        return self._custody

    def _call(self, deed: Callable[[], T]) -> T:
        return asyncio.run(spawn(deed)) if self._is_async else deed()


def of_the_run(context: WorkerContext) -> WorkerContext:
    """Whose rows are made here for all workers."""
    return replace(context, worker_id=context.worker_id + _OF_THE_RUN)
