"""What several factories make together, as one call: one transaction, one commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from tidyrows.factories.call import innermost_call, running_call
from tidyrows.factories.call_retry import call_with_retries
from tidyrows.factories.loading import fill_relationships, load_attributes, recording
from tidyrows.factories.used_session import used_session
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
    if tracker is None or used_session() is not None or running_call(tracker) is not None:
        return make()
    if tracker.is_async:
        tracker.sessions.refuse_blocking(asynchronous)
    return call_with_retries(tracker, lambda _: make(), {})


async def awaited(make: Callable[[], T]) -> T:
    """Call factories inside a greenlet; two tasks never use one session at the same time."""
    tracker = current_tracker()
    if tracker is None or used_session() is not None:
        return await spawn(_loaded, make)
    async with tracker.sessions.exclusive():
        return await spawn(_loaded, make)


def _loaded(make: Callable[[], T]) -> T:
    """Call factories, and load what they made in other sessions than an outermost call's."""
    call = innermost_call()  # there is one where a hook awaits another factory
    before = 0 if call is None else len(call.made)
    with recording() as elsewhere:
        result = make()
    if call is not None:
        call.load(call.made[before:])
    load_attributes(elsewhere)
    fill_relationships(elsewhere, None)
    return result
