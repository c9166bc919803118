"""Rows that several tests share: made once, deleted at the end of the worker or of the run."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self.tracker.stop()
            self.tracker.release_session()  # tests must not wait for its locks

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The value that ``make`` returned when this name was first used.

        Args:
            name: of the value.
            make: creates rows, and returns what tests need to know of them. Where several workers
                share the rows, one worker calls it, and the value must have a form in JSON: keys,
                names.

        Raises:
            SessionStateError: the value has no such form.
        """
        if name in self._values:
            value: T = self._values[name]
        elif self._folder is None:
            with self:
                value = self._values[name] = make()
        else:
            value = self._values[name] = self._once_per_run(name, make, self._folder)
        return value

    def _once_per_run(self, name: str, make: Callable[[], T], folder: Path) -> T:
        try:
            from filelock import FileLock  # noqa: PLC0415 -- an extra; one process needs no lock
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Rows that several workers share need the filelock package, which is not "
                'installed: pip install "tidyrows[pytest]".',
                name=error.name,
            ) from error
        file = folder / f"{sha256(name.encode()).hexdigest()[:16]}.json"
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                value: T = json.loads(file.read_text(encoding="utf-8"))
                return value
            with self:
                value = make()
            try:
                text = json.dumps(value)
            except TypeError as error:
                raise SessionStateError(
                    f"tidy_run.once({name!r}, ...) returned a {type(value).__name__}, which has no "
                    f"form in JSON for another worker. Return keys or names instead, as in "
                    f"tidy_run.once({name!r}, lambda: UserFactory().id)."
                ) from error
            if json.loads(text) != value:
                raise SessionStateError(
                    f"tidy_run.once({name!r}, ...) returned {value!r}, which another worker would "
                    f"read as {json.loads(text)!r}. Return lists, not tuples, and texts as keys."
                )
            new = file.with_suffix(".new")
            new.write_text(text, encoding="utf-8")
            new.replace(file)
            return value
