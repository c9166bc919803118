"""Rows that several tests share, in one process or in all of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

from tidyrows.locks.once import Asked, FilePlace, made_once
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import orm

    from tidyrows.testing.tidy import Tidy
    from tidyrows.tracking.tracker import ResourceTracker

T = TypeVar("T")


class Shared:
    """Rows that several tests share.

    Rows that are created in the block are not the test's, and stay when the test ends.

    Args:
        tidy: its tracker tracks the rows.
        folder: where workers share what they have made; None where there is one process only.

    Example:
        >>> @pytest.fixture(scope="session")
        ... def org_id(tidy_run):
        ...     return tidy_run.once("org", lambda: OrgFactory().id)
    """

    def __init__(self, tidy: Tidy, folder: Path | None = None) -> None:
        self._tidy = tidy
        self._folder = folder
        self._values: dict[str, Any] = {}
        self._depth = 0
        tidy.start().tracker.stop()

    @property
    def tracker(self) -> ResourceTracker:
        """The tracker of the rows."""
        return self._tidy.tracker

    @property
    def session(self) -> orm.Session:
        """The session that factories use in the block."""
        return self._tidy.session

    def __enter__(self) -> Self:
        if not self._depth:
            self.tracker.start()
        self._depth += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.tracker.stop()
            self.tracker.sessions.release()  # tests must not wait for its locks

    def once(self, name: str, make: Callable[[], T], *, timeout: float = 300.0) -> T:
        """The value that ``make`` returned when this name was first used.

        Args:
            name: of the value.
            make: creates rows, and returns what tests need to know of them. Where several workers
                share the rows, one worker calls it, and the value must have a form in JSON: keys,
                names.
            timeout: how long to wait for the worker that calls it, in seconds.

        Raises:
            OncePerRunError: the value has no such form, or ``make`` has failed in another worker.
            LockTimeoutError: the value was not there in time; the error names who makes it.
        """
        if name not in self._values:

            def tracked() -> T:
                with self:
                    return make()

            if self._folder is None:
                self._values[name] = tracked()
            else:
                asked = Asked("tidy_run.once", name, timeout, WorkerContext.current())
                self._values[name] = made_once(asked, tracked, FilePlace(self._folder, name))
        value: T = self._values[name]
        return value
