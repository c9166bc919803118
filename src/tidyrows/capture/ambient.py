"""The sinks that are entered in this context.

Tasks and ``to_thread`` inherit a context variable, plain threads do not.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.capture.sink import Sink

_stack: ContextVar[tuple[Sink, ...]] = ContextVar("tidyrows_sinks", default=())

sinks = _stack.get
"""The sinks entered in this context, innermost last, stopped ones included."""


def enter(sink: Sink) -> None:
    """Make a sink the innermost of this context."""
    _stack.set((*_stack.get(), sink))


def leave(sink: Sink) -> None:
    """Remove a sink from this context, wherever it stands (blocks may end out of order)."""
    _stack.set(tuple(other for other in _stack.get() if other is not sink))


@contextmanager
def entered(sink: Sink) -> Iterator[None]:
    """Make a sink the innermost for the length of a block."""
    token = _stack.set((*_stack.get(), sink))
    try:
        yield
    finally:
        _stack.reset(token)
