"""Run a plan: first whole, in one transaction; where that fails, row by row around the failure.

Whole transactions are run again on deadlocks, lock timeouts and lost connections. A constraint
that stands in the way is no reason to run the same thing again: then every step gets a
transaction of its own, and a step that fails is halved until the rows that cannot go are found.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.cleanup.cycles import RowLoopError, delete_by_levels, row_order
from tidyrows.cleanup.graphs import forget_graph
from tidyrows.cleanup.plan import Batch, Step
from tidyrows.dialects import CycleForm, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.retry import RetryPolicy
    from tidyrows.rows import KeyedTable, TableName

T = TypeVar("T")
_FAILURES_TRIED = 50


@dataclass(slots=True)
class Outcome:
    """What came of a plan.

    Attributes:
        deleted: rows deleted, by table.
        refused: why rows could not be deleted, by table and key.
        retries: how often a transaction was run again.
    """

    deleted: Counter[TableName] = field(default_factory=Counter)
    refused: dict[TableName, dict[Any, str]] = field(default_factory=dict)
    retries: int = 0


class Executor:
    """Deletes the rows of a plan's steps from one database.

    Args:
        database: where.
        retry: how often, how patiently, and for how long in all.
        foreign_keys_off: see ``CleanupManager(allow_foreign_keys_off=True)``.
    """

    def __init__(
        self, database: Database, *, retry: RetryPolicy, foreign_keys_off: bool = False
    ) -> None:
        self._database = database
        self._dialect = database.dialect
        self._retry = retry
        self._until = time.monotonic() + retry.deadline
        self._foreign_keys_off = foreign_keys_off
        self.outcome = Outcome()

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Delete everything that can be deleted."""
        try:
            self.outcome.deleted += self.patiently(lambda: self._whole(steps))
        except RowLoopError:
            self._carefully(steps)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            if self._is_transient(error):
                cause = f"gave up: {_cause(error)}"
                for step in steps:
                    self._refuse_all(step, cause)
            else:
                forget_graph(self._database.engine)
                self._carefully(steps)
        return self.outcome

    def patiently(self, transaction: Callable[[], T]) -> T:
        """Run a whole transaction, again where that may help, until the cleanup's deadline."""
        remaining = max(self._until - time.monotonic(), 0.001)

        def on_retry(_attempt: int, _error: BaseException) -> None:
            self.outcome.retries += 1

        return replace(self._retry, deadline=remaining).run(
            transaction, is_transient=self._is_transient, on_retry=on_retry
        )

    def _is_transient(self, error: BaseException) -> bool:
        return self._dialect.fault(error) in {Fault.TRANSIENT, Fault.LOST}

    def _whole(self, steps: Iterable[Step]) -> Counter[TableName]:
        deleted: Counter[TableName] = Counter()
        with self._database.writing() as connection:
            for step in steps:
                deleted.update(self._delete(connection, step))
        return deleted

    def _delete(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        if not step.cycle:
            (batch,) = step.batches
            count = self._dialect.delete_by_keys(connection, batch.table, batch.keys)
            return {batch.table.name: count}
        if self._dialect.cycle_form is CycleForm.LEVELS:
            return delete_by_levels(
                connection, self._database, step, foreign_keys_off=self._foreign_keys_off
            )
        counts = self._dialect.delete_cycle(connection, [(b.table, b.keys) for b in step.batches])
        return {b.table.name: count for b, count in zip(step.batches, counts, strict=True)}

    # -- around a failure ----------------------------------------------------------------------

    def _carefully(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if step.cycle:
                self._cycle_carefully(step)
            else:
                (batch,) = step.batches
                self._halving(batch.table, batch.keys)

    def _cycle_carefully(self, step: Step) -> None:
        if self._tried(step) is None:
            return

        def read() -> Any:
            with self._database.reading() as connection:
                return row_order(connection, step)

        try:
            order = self.patiently(read)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            self._refuse_all(step, _cause(error))
            return
        for rows in order.steps:
            part = _part(step, rows.rows)
            if not rows.loops:
                for batch in part.batches:
                    self._halving(batch.table, batch.keys)
                continue
            for loop in rows.loops:
                circle = _part(step, loop)
                cause = self._tried(circle)
                if cause is not None:
                    self._refuse_all(circle, cause)

    def _tried(self, step: Step) -> str | None:
        """Delete a step in a transaction of its own; the cause where that failed."""
        try:
            self.outcome.deleted += self.patiently(lambda: self._whole([step]))
        except (sa.exc.SQLAlchemyError, OSError, RowLoopError) as error:
            return _cause(error)
        return None

    def _halving(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Find the rows that cannot go: up to a bound one by one, then by failing part."""
        failures = 0
        parts = [keys]
        while parts:
            part = parts.pop()
            step = Step((Batch(table, part),))
            cause = self._tried(step)
            if cause is None:
                continue
            if len(part) == 1 or failures >= _FAILURES_TRIED or time.monotonic() > self._until:
                failures += 1
                self._refuse_all(step, cause)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    def _refuse_all(self, step: Step, cause: str) -> None:
        for batch in step.batches:
            refused = self.outcome.refused.setdefault(batch.table.name, {})
            refused.update(dict.fromkeys(batch.keys, cause))


def _part(step: Step, rows: Iterable[tuple[int, Any]]) -> Step:
    keys: dict[int, list[Any]] = {}
    for number, key in rows:
        keys.setdefault(number, []).append(key)
    return Step(
        tuple(Batch(step.batches[number].table, keys[number]) for number in sorted(keys)),
        step.cycle,
    )


def _cause(error: BaseException) -> str:
    """An error in one line, without the statement and its parameters."""
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    return "; ".join([*lines[:2], *notes]) or type(original).__name__
