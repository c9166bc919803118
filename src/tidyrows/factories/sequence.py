"""factory.Sequence where several workers share a database."""

from __future__ import annotations

from factory.base import _Counter  # the class that factory_boy's options make their counter of

from tidyrows.factories.active_context import active_context
from tidyrows.factories.call import innermost_call


class InterleavedCounter(_Counter):
    """factory_boy's counter, of which each worker sees numbers of its own.

    With one worker it counts 0, 1, 2; with several, worker 3 counts 3, 1003, 2003. Which worker
    this is, is asked when a number is wanted: at import nobody knows.
    """

    seq: int

    def next(self) -> int:
        """The next number of this worker."""
        call = innermost_call()
        if call is None or call.draws is None:
            return self._next()
        return call.draws.draw(self, self._next)

    def _next(self) -> int:
        context = active_context()
        value = self.seq + context.worker_index
        self.seq += context.stride
        return value
