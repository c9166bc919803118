"""What one worker of a run makes while the others wait, and where its result is kept meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from tidyrows.dialects import Blocker
from tidyrows.errors import LockTimeoutError, OncePerRunError, TidyRowsError, add_note, text_of
from tidyrows.locked_files import LockedFile
from tidyrows.private_folder import private_folder
from tidyrows.worker import printable, session_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tidyrows.worker import WorkerContext

DAYS = 2
"""How long results are kept: nobody can tell when the last worker of a run has ended."""
_LONGEST = 2000
"""Characters of an error's text that are passed on."""


class Asked(NamedTuple):
    """A call, by one worker.

    Attributes:
        call: the function, as users write it.
        name: of the result.
        timeout: how long another worker is waited for, in seconds.
        context: who asks.
    """

    call: str
    name: str
    timeout: float
    context: WorkerContext

    def __str__(self) -> str:
        return f"{self.call}({self.name!r}, ...)"


class OncePlace(ABC):
    """Where all workers of a run find one result."""

    @abstractmethod
    def read(self) -> str | None:
        """What was written; None before."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Write it, under the lock."""

    @abstractmethod
    def lock(self, asked: Asked) -> AbstractContextManager[object]:
        """A block that only one worker is in; LockTimeoutError names the other one."""


def made_once(asked: Asked, make: Callable[[], Any], place: OncePlace) -> Any:
    """What ``make`` returned, in this worker or in another one.

    Raises:
        OncePerRunError: it has failed in another worker, or its result has no form in JSON.
        LockTimeoutError: another worker did not end in time.
        Exception: what ``make`` raised here; a KeyboardInterrupt and the like are not passed on.
    """
    found = place.read()
    if found is None:
        with place.lock(asked):
            found = place.read()
            if found is None:
                return _make(asked, make, place)
    outcome = json.loads(found)
    if "error" not in outcome:
        return outcome["value"]
    raise OncePerRunError(
        f"{asked} has failed in worker {printable(outcome['worker'])} of this run: "
        f"{outcome['error']}. No worker tries it again. Mend what failed there, and start a new "
        f"run.",
        name=asked.name,
        worker=outcome["worker"],
    )


def _make(asked: Asked, make: Callable[[], Any], place: OncePlace) -> Any:
    worker = {"worker": asked.context.worker_id}
    try:
        value = make()
        _refuse_other_than_json(asked, value)
    except Exception as error:
        text = f"{type(error).__name__}: {text_of(error)[:_LONGEST]}"
        try:
            place.write(json.dumps(worker | {"error": text}))
        except (sa.exc.SQLAlchemyError, TidyRowsError, OSError) as failure:
            add_note(error, f"tidyrows: other workers were not told: {text_of(failure)}")
        raise
    place.write(json.dumps(worker | {"value": value}))
    return value


def _refuse_other_than_json(asked: Asked, value: Any) -> None:
    worker = asked.context.worker_id
    try:
        read = json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise OncePerRunError(
            f"{asked} returned a {type(value).__name__}, which has no form in JSON for another "
            f"worker. Return keys or names instead, as in {asked.call}({asked.name!r}, lambda: "
            f"UserFactory().id).",
            name=asked.name,
            worker=worker,
        ) from error
    if read != value:
        raise OncePerRunError(
            f"{asked} returned {value!r}, which another worker would read as {read!r}. Return "
            f"lists, not tuples, and texts as keys.",
            name=asked.name,
            worker=worker,
        )


class FilePlace(OncePlace):
    """A file in a folder of this machine.

    Args:
        folder: of the run; nobody else may write into it.
        name: of the result.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{blake2b(name.encode(), digest_size=8).hexdigest()}.json"

    def read(self) -> str | None:
        """The file's text."""
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, text: str) -> None:
        """In one step: a killed worker leaves no half of it."""
        new = self._file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._file)

    @contextmanager
    def lock(self, asked: Asked) -> Iterator[None]:
        """A locked file beside it."""
        file = LockedFile(self._file.with_suffix(".lock"), session_label(asked.context))
        if not file.acquire(asked.timeout):
            found = file.holders()
            holders = tuple(Blocker(pid, application=label) for pid, label in found.items())
            by = f" It is made by {'; by '.join(map(str, holders))}." if holders else ""
            own = os.getpid() in found
            raise LockTimeoutError(
                f"{asked} had no result within {asked.timeout:g} s.{by} "
                + (
                    "That is this very process: make() must not ask for its own result."
                    if own
                    else "Wait longer with timeout=, or end what makes it."
                ),
                lock=asked.name,
                holders=holders,
            )
        try:
            yield
        finally:
            file.release()


def run_folder(run_id: str) -> Path:
    """The folder of a run among the temporary files, for this user alone.

    Raises:
        OncePerRunError: somebody else could have put results there.
    """
    above = private_folder(OncePerRunError)
    folder = above / blake2b(run_id.encode(), digest_size=8).hexdigest()
    if not folder.exists():
        _delete_old(above)
        folder.mkdir(exist_ok=True)
    return folder


def _delete_old(above: Path) -> None:
    oldest = time.time() - DAYS * 86400
    for folder in above.iterdir():
        with suppress(OSError):  # another worker deletes it too
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder)
