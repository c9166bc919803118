"""Rows that several tests share: made once, and gone at the end of the worker or of the run."""

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

    What is created in the block is not the test's, and stays when that ends.

    Args:
        tidy: what remembers the rows.
        folder: where processes tell each other what they have made; None where there is one only.

    Example:
        >>> @pytest.fixture(scope="session")
        ... def org_id(tidy_run):
        ...     return tidy_run.once("org", lambda: OrgFactory().id)
    """

    def __init__(self, tidy: Tidy, folder: Path | None = None) -> None:
        self._tidy = tidy
        self._folder = folder
        self._made: dict[str, Any] = {}
        self._depth = 0
        tidy.start().tracker.stop()

    @property
    def tracker(self) -> ResourceTracker:
        """What remembers the rows."""
        return self._tidy.tracker

    @property
    def session(self) -> orm.Session:
        """What factories use in the block."""
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
            self.tracker.release_session()  # tests shall not wait for what it has read

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returned, the first time that somebody asked for this name.

        Args:
            name: of what is made.
            make: creates rows, and returns what tests need to know of them. Where several workers
                share them it is called in one, and returns what has a form in JSON: keys, names.

        Raises:
            SessionStateError: what it returned has no such form.
        """
        if name in self._made:
            made: T = self._made[name]
        elif self._folder is None:
            with self:
                made = self._made[name] = make()
        else:
            made = self._made[name] = self._among_all(name, make, self._folder)
        return made

    def _among_all(self, name: str, make: Callable[[], T], folder: Path) -> T:
        try:
            from filelock import FileLock  # noqa: PLC0415 -- an extra; one process needs no lock
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Rows that several workers share need the filelock package, which is not "
                'installed: pip install "tidyrows[pytest]".',
                name=error.name,
            ) from error
        told = folder / f"{sha256(name.encode()).hexdigest()[:16]}.json"
        with FileLock(told.with_suffix(".lock")):
            if told.exists():
                made: T = json.loads(told.read_text(encoding="utf-8"))
                return made
            with self:
                made = make()
            try:
                text = json.dumps(made)
            except TypeError as error:
                raise SessionStateError(
                    f"tidy_run.once({name!r}, ...) returned a {type(made).__name__}, which another "
                    f"worker cannot be told. Return keys or names instead, as in "
                    f"tidy_run.once({name!r}, lambda: UserFactory().id)."
                ) from error
            if json.loads(text) != made:
                raise SessionStateError(
                    f"tidy_run.once({name!r}, ...) returned {made!r}, which another worker would "
                    f"read as {json.loads(text)!r}. Return lists, not tuples, and texts as keys."
                )
            new = told.with_suffix(".new")
            new.write_text(text, encoding="utf-8")
            new.replace(told)
            return made
