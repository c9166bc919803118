"""Row by row around a failure: what keeps some rows must not keep the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.plan import place_of
from tidyrows.cleanup.verify import in_short
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.cleanup.deletion import Rows
    from tidyrows.cleanup.plan import Step
    from tidyrows.keys import KeyedTable

_FAILURES_IN_A_ROW = 50


class Careful:
    """Deletes all rows that can go, in transactions of their own.

    Args:
        tried: deletes rows in one transaction; the cause where that failed.
        apart: takes the rows of a cycle apart into rows that go one after the other, and circles.
        refuse: notes why rows could not be deleted.
        is_late: whether no time is left.
    """

    def __init__(
        self,
        *,
        tried: Callable[[Rows], str | None],
        apart: Callable[[Step], Iterator[Step]],
        refuse: Callable[[KeyedTable, Sequence[Any], str], None],
        is_late: Callable[[], bool],
    ) -> None:
        self._tried = tried
        self._apart = apart
        self._refuse = refuse
        self._is_late = is_late

    def delete(self, steps: Iterable[Step]) -> None:
        """Delete what can be deleted of these steps, in their order."""
        for step in steps:
            if step.cycle:
                self._cycle(step)
            else:
                (batch,) = step.batches
                self._halving(batch.table, batch.keys)

    def _cycle(self, step: Step) -> None:
        cause = self._tried(_rows_of(step))
        if cause is None:
            return
        try:
            parts = list(self._apart(step))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything; it becomes the rows' cause
            self._refuse_step(step, f"{cause}; {in_short(error)}")
            return
        for part in parts:
            if part.cycle:
                cause = self._tried(_rows_of(part))
                if cause is not None:
                    self._refuse_step(part, cause)
            else:
                for batch in part.batches:
                    self._halving(batch.table, batch.keys)

    def _halving(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Find the rows that cannot go, one by one as long as others go in between.

        Where fifty in a row cannot, the parts left are tried whole: all rows may be blocked, and
        there may be ten thousand.
        """
        failures = 0
        parts = [keys]
        while parts:
            part = parts.pop()
            cause = self._tried({place_of(table.name): (table, part)})
            if cause is None:
                failures = 0
            elif len(part) == 1 or failures >= _FAILURES_IN_A_ROW or self._is_late():
                failures += 1
                self._refuse(table, part, cause)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    def _refuse_step(self, step: Step, cause: str) -> None:
        for batch in step.batches:
            self._refuse(batch.table, batch.keys, cause)


def _rows_of(step: Step) -> Rows:
    return {place_of(batch.table.name): (batch.table, batch.keys) for batch in step.batches}
