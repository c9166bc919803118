"""Which tracker is active here: a context variable, so tasks and ``to_thread`` inherit it.

Plain threads do not inherit it; there ``scoped_to`` says whose rows they are.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.tracking.tracker import ResourceTracker

_stack: ContextVar[tuple[ResourceTracker, ...]] = ContextVar("tidyrows_trackers", default=())


def trackers() -> tuple[ResourceTracker, ...]:
    """The trackers entered in this context, innermost last, stopped ones included."""
    return _stack.get()


def current_tracker() -> ResourceTracker | None:
    """The innermost active tracker of this context, or None outside of any block.

    A forked child has none of its parent's.
    """
    for tracker in reversed(_stack.get()):
        if tracker.active:
            return tracker
    return None


def enter(tracker: ResourceTracker) -> None:
    """Make ``tracker`` the innermost of this context."""
    _stack.set((*_stack.get(), tracker))


def leave(tracker: ResourceTracker) -> None:
    """Take ``tracker`` out of this context, wherever it stands (blocks may end out of order)."""
    _stack.set(tuple(other for other in _stack.get() if other is not tracker))


@contextmanager
def entered(tracker: ResourceTracker) -> Iterator[None]:
    """Make ``tracker`` the innermost for the length of a block."""
    token = _stack.set((*_stack.get(), tracker))
    try:
        yield
    finally:
        _stack.reset(token)
