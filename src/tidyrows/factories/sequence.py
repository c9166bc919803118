"""factory.Sequence where several workers share a database."""

from __future__ import annotations

from factory.base import _Counter  # the class that factory_boy's options make their counter of

from tidyrows.factories.active_context import active_context


class InterleavedCounter(_Counter):
    """factory_boy's counter, whose numbers differ between workers.

    One worker counts 0, 1, 2. Of several workers, worker 3 counts 3, 1003, 2003. The worker is
    looked up with each number: at import time it is not known yet.
    """

    seq: int

    def next(self) -> int:
        """The next number of this worker."""
        context = active_context()
        value = self.seq + context.worker_index
        self.seq += context.stride
        return value
