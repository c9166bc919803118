"""A stack of trackers: the last one pushed owns the rows of every thread."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.capture.sink import Sink

S = TypeVar("S", bound="Sink")


class TrackerStack(Generic[S]):
    """What several trackers are bound to; the last one that was pushed owns the rows."""

    def __init__(self) -> None:
        self._stack: tuple[S, ...] = ()  # replaced, never changed: threads read it

    @property
    def top(self) -> S | None:
        """The tracker that owns the rows now; None where the last one is not active."""
        stack = self._stack
        return stack[-1] if stack and stack[-1].active else None

    def push(self, tracker: S) -> Callable[[], None]:
        """Let a tracker own the rows; returns what ends it."""
        self._stack = (*self._stack, tracker)

        def remove() -> None:
            stack = list(self._stack)
            for place in range(len(stack) - 1, -1, -1):
                if stack[place] is tracker:
                    del stack[place]
                    break
            self._stack = tuple(stack)

        return remove

    @contextmanager
    def pushed(self, tracker: S) -> Iterator[None]:
        """In the block all rows are this tracker's, which has been started."""
        remove = self.push(tracker)
        try:
            yield
        finally:
            remove()
