"""Whose values a factory makes: the ambient tracker's worker and test, else this process's."""

from __future__ import annotations

from tidyrows.capture.ambient import current_tracker
from tidyrows.worker import WorkerContext


def next_integer(start: int) -> int:
    """A number that no other worker of the run has; of no other run where there is a ledger."""
    tracker = current_tracker()
    return WorkerContext.current().integer(start) if tracker is None else tracker.integer(start)


def active_context() -> WorkerContext:
    """The context that scoped values and sequences are made for, here and now."""
    tracker = current_tracker()
    return WorkerContext.current() if tracker is None else tracker.context
