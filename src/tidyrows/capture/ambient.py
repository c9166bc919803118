"""The sinks that are entered in this context.

Tasks and ``to_thread`` inherit a context variable, plain threads do not.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


class entered:  # noqa: N801 -- used as a function is
    """A block in which a sink is the innermost.

    No generator: contextlib assigns to an error that passes, and one that is frozen would be
    replaced by the error of that.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __enter__(self) -> None:
        self._token = _stack.set((*_stack.get(), self._sink))

    def __exit__(self, *_error: object) -> None:
        _stack.reset(self._token)
