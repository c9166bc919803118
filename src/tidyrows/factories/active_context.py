"""The worker and test for which values are made: the ambient tracker's, or this process's."""

from __future__ import annotations

from tidyrows.tracking.current import current_tracker
from tidyrows.worker import WorkerContext


def next_integer(start: int) -> int:
    """An integer that no other worker of the run gets; with a ledger, no other run either."""
    tracker = current_tracker()
    return WorkerContext.current().integer(start) if tracker is None else tracker.integer(start)


def active_context() -> WorkerContext:
    """The context for which scoped values and sequences are made now."""
    tracker = current_tracker()
    return WorkerContext.current() if tracker is None else tracker.context
