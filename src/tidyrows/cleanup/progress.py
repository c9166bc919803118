"""How far a cleanup is, for those that take seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a cleanup is.

    Attributes:
        done: rows that are deleted, or given up as leftovers.
        total: all rows that the cleanup is about; dependents are not among them, since nobody
            knows them before.
        finished: whether this is the last that is heard of it.
    """

    done: int
    total: int
    finished: bool = False


class Steps:
    """Tells a listener of every step.

    Args:
        listener: what is told; None for nobody.
        total: how many rows there are.
    """

    def __init__(self, listener: Callable[[Progress], None] | None, total: int) -> None:
        self._listener = listener
        self._total = total
        self._done = 0
        self._failures: list[Exception] = []
        self._tell(finished=False)

    def add(self, rows: int) -> None:
        """So many rows are done."""
        self._done += rows
        self._total = max(self._total, self._done)  # rows in doubt may have turned out to be ours
        self._tell(finished=False)

    def finish(self) -> list[Exception]:
        """All is done; what the listener has raised, after which it was told nothing more."""
        self._total = self._done = max(self._total, self._done)
        self._tell(finished=True)
        return self._failures

    def _tell(self, *, finished: bool) -> None:
        if self._listener is None or self._failures:
            return
        try:
            self._listener(Progress(self._done, self._total, finished))
        except Exception as error:  # noqa: BLE001 -- rows are still to be deleted; it is raised when they are
            self._failures.append(error)


def progress_bar(**options: Any) -> Callable[[Progress], None]:
    """A bar of tqdm's, for ``CleanupManager(tracker, on_progress=progress_bar())``.

    It appears only in cleanups of more than one transaction, and goes when they end.

    Args:
        options: what ``tqdm`` takes, as ``desc="cleanup"`` or ``leave=True``.

    Raises:
        ModuleNotFoundError: tqdm is not installed; the message says how to.
    """
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 -- an extra, which not everybody has
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'progress_bar() draws with tqdm, which is not installed: pip install "tidyrows'
            '[progress]".',
            name=error.name,
        ) from error
    chosen = {"desc": "cleanup", "unit": " rows", "leave": False, **options}
    bar: Any = None

    def show(progress: Progress) -> None:
        nonlocal bar
        if bar is None and 0 < progress.done < progress.total:
            bar = tqdm(total=progress.total, **chosen)
        if bar is None:
            return
        bar.total = progress.total
        bar.update(progress.done - bar.n)
        if progress.finished:
            bar.close()
            bar = None

    return show
