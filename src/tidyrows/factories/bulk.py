"""create_bulk: chunks of objects, their rows, and the commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factory.errors import FactoryError

from tidyrows.arguments import SWITCH, check, function, optional, whole
from tidyrows.cleanup.report import Progress
from tidyrows.factories.bulk_plan import BulkBuilder
from tidyrows.factories.bulk_rows import Rows
from tidyrows.factories.call import running_call
from tidyrows.factories.call_retry import call_with_retries
from tidyrows.factories.used_session import used_session
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK_SIZE = 10_000
_KINDS = {
    "n": whole("1000", least=0),
    "returning": SWITCH,
    "chunk_size": whole(str(CHUNK_SIZE), least=1),
    "on_progress": optional(function("progress_bar()")),
    "hooks": SWITCH,
}


def create_bulk(
    factory: Any,
    n: int,
    overrides: dict[str, Any],
    *,
    returning: bool,
    chunk_size: int,
    on_progress: Callable[[Progress], None] | None,
    hooks: bool,
) -> list[Any]:
    """See ``TrackedFactory.create_bulk``."""
    given = {
        "n": n,
        "returning": returning,
        "chunk_size": chunk_size,
        "on_progress": on_progress,
        "hooks": hooks,
    }
    check(f"{factory.__name__}.create_bulk", _KINDS, given.items())
    if not n:
        return []
    tracker = current_tracker()
    if used_session() is not None:
        tracker = None  # the session's user commits
    if tracker is not None and tracker.is_async:
        tracker.sessions.refuse_blocking(f"await {factory.__name__}.create_bulk_async({n})")
    chunks = [min(chunk_size, n - done) for done in range(0, n, chunk_size)]
    one_commit = returning or tracker is None or running_call(tracker) is not None
    made: list[Any] = []
    done = 0

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(Progress(done, n, finished=done == n))

    for part in [chunks] if one_commit else [[size] for size in chunks]:
        make = _Part(factory, part, done, report, returning=returning, hooks=hooks)
        if tracker is None or running_call(tracker) is not None:
            made += make(overrides.copy())
        else:
            made += call_with_retries(tracker, make, overrides)
        done += sum(part)
        report(done)
    return made


class _Part:
    """Chunks that have one commit; called once more where their transaction was lost.

    It reports all but the last, which is reported after the commit.
    """

    def __init__(
        self,
        factory: Any,
        sizes: list[int],
        before: int,
        report: Callable[[int], None],
        *,
        returning: bool,
        hooks: bool,
    ) -> None:
        self._factory = factory
        self._sizes = sizes
        self._before = before
        self._report = report
        self._returning = returning
        self._hooks = hooks

    def __call__(self, overrides: dict[str, Any]) -> list[Any]:
        """Make the objects and write their rows."""
        create = self._one_by_one if self._hooks else self._bulk
        made: list[Any] = []
        done = self._before
        for size, objects in zip(self._sizes, create(overrides), strict=True):
            made += objects if self._returning else ()
            done += size
            if done < self._before + sum(self._sizes):
                self._report(done)
        return made

    def _one_by_one(self, overrides: dict[str, Any]) -> Iterator[list[Any]]:
        for size in self._sizes:
            yield self._factory.create_batch(size, **overrides)

    def _bulk(self, overrides: dict[str, Any]) -> Iterator[list[Any]]:
        options = self._factory._meta  # noqa: SLF001 -- an extension point of factory_boy
        if options.abstract:
            raise FactoryError(f"{self._factory.__name__} is abstract: its Meta names no model.")
        tracker = current_tracker()
        call = None if tracker is None or used_session() is not None else running_call(tracker)
        rows = Rows(self._factory, call, returning=self._returning)
        builder = BulkBuilder(options, overrides, rows, is_called=True)
        for size in self._sizes:
            objects = [builder.build() for _ in range(size)]
            rows.write()
            yield objects
        if rows.commits:
            rows.session.commit()
