"""What several factories make together, as one call: one transaction, one commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from tidyrows.factories.call import running_call
from tidyrows.factories.call_retry import call_with_retries
from tidyrows.greenlets import spawn
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def as_one_call(make: Callable[[], T], asynchronous: str) -> T:
    """Run ``make``, commit once at its end, and run it again where its transaction was lost.

    Args:
        make: calls factories.
        asynchronous: what to write in an asynchronous suite, for the error.
    """
    tracker = current_tracker()
    if tracker is None or running_call(tracker) is not None:
        return make()
    if tracker.is_async:
        tracker.sessions.refuse_blocking(asynchronous)
    return call_with_retries(tracker, lambda _: make(), {})


async def awaited(make: Callable[[], T]) -> T:
    """Run ``make`` where it may wait; two tasks never use one session at the same time."""
    tracker = current_tracker()
    if tracker is None:
        return await spawn(make)
    async with tracker.sessions.exclusive():
        return await spawn(make)
