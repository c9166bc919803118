"""Trackers that take turns: one at a time is given all rows, in whatever thread they are made."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.tracking.tracker import ResourceTracker


class Turns:
    """What several trackers are bound to; the one whose turn began last is given the rows."""

    def __init__(self) -> None:
        self._turns: tuple[ResourceTracker, ...] = ()  # replaced, never changed: threads read it

    @property
    def whose(self) -> ResourceTracker | None:
        """Whose turn it is; None where nobody listens."""
        turns = self._turns
        return turns[-1] if turns and turns[-1].active else None

    def hand_over(self, tracker: ResourceTracker) -> Callable[[], None]:
        """Begin a tracker's turn; returns what ends it."""
        self._turns = (*self._turns, tracker)

        def end() -> None:
            turns = list(self._turns)
            for place in range(len(turns) - 1, -1, -1):
                if turns[place] is tracker:
                    del turns[place]
                    break
            self._turns = tuple(turns)

        return end

    @contextmanager
    def turn(self, tracker: ResourceTracker) -> Iterator[None]:
        """In the block all rows are this tracker's, which has been started."""
        end = self.hand_over(tracker)
        try:
            yield
        finally:
            end()
