"""Run a plan: first whole, in one transaction; where that fails, row by row around the failure.

Whole transactions are run again on deadlocks, lock timeouts and lost connections. Another error
is no reason to run the same thing again: the schema may have changed, so the plan is made anew
once; then every step gets a transaction of its own, and a step that fails is halved until the rows
that cannot go are found.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tidyrows.cleanup.cycles import RowLoopError, delete_by_levels, row_order
from tidyrows.cleanup.graphs import forget_graph
from tidyrows.cleanup.plan import Batch, Step, place_of
from tidyrows.cleanup.verify import in_short
from tidyrows.dialects import CycleForm, Fault
from tidyrows.errors import SessionStateError, TidyRowsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.retry import RetryPolicy
    from tidyrows.rows import KeyedTable, TableName

T = TypeVar("T")
_FAILURES_IN_A_ROW = 50


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
        retry: how often and how patiently.
        until: when the cleanup's deadline ends, by the policy's clock.
        foreign_keys_off: see ``CleanupManager(allow_foreign_keys_off=True)``.
    """

    def __init__(
        self,
        database: Database,
        *,
        retry: RetryPolicy,
        until: float,
        foreign_keys_off: bool = False,
    ) -> None:
        self._database = database
        self._dialect = database.dialect
        self._retry = retry
        self._until = until
        self._foreign_keys_off = foreign_keys_off
        self._unanswered: Counter[TableName] = Counter()
        self.outcome = Outcome()

    def run(self, plan: Callable[[], Sequence[Step]]) -> Sequence[Step]:
        """Delete everything that can be deleted.

        Args:
            plan: makes the steps, from the schema as far as it is known.

        Returns:
            The steps that were run; what came of them is in :attr:`outcome`.
        """
        steps = self.patiently(plan)
        failure = self._failure_of(steps)
        if failure is not None and not isinstance(failure, RowLoopError):
            forget_graph(self._database.engine)
            anew = self.patiently(plan)
            if anew != steps:
                steps = anew
                failure = self._failure_of(steps)
        if failure is not None:
            self._carefully(steps)
        return steps

    def patiently(self, transaction: Callable[[], T]) -> T:
        """Run a whole transaction, again where that may help, until the cleanup's deadline."""

        def on_retry(_attempt: int, _error: BaseException) -> None:
            self.outcome.retries += 1

        return replace(self._retry, deadline=max(self._remaining(), 0.0)).run(
            transaction, is_transient=self._database.passes, on_retry=on_retry
        )

    def _remaining(self) -> float:
        return self._until - self._retry.clock()

    def _failure_of(self, steps: Sequence[Step]) -> Exception | None:
        """Run everything in one transaction; the failure that a closer look may find a way around.

        Where waiting did not help, all rows are refused: looking closer would only wait again.
        """
        try:
            self.outcome.deleted += self.patiently(lambda: self._whole(steps))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything
            if not self._database.passes(error):
                return error
            for step in steps:
                self._refuse_all(step, f"gave up: {in_short(error)}")
        return None

    def _whole(self, steps: Iterable[Step]) -> Counter[TableName]:
        deleted: Counter[TableName] = Counter()
        sent = False
        try:
            with self._database.writing(seconds=self._remaining()) as connection:
                for step in steps:
                    counts = self._delete(connection, step)
                    _refuse_strangers(step, counts)
                    deleted.update(counts)
                sent = True
        except Exception as error:
            if sent and self._dialect.fault(error) is Fault.LOST:
                self._unanswered = deleted
            raise
        # Run again after a COMMIT without an answer it finds nothing: that COMMIT had succeeded.
        unanswered, self._unanswered = self._unanswered, Counter()
        return deleted if deleted.total() else unanswered

    def _delete(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        if not step.cycle:
            (batch,) = step.batches
            count = self._dialect.delete_by_keys(connection, batch.table, batch.keys)
            return {batch.table.name: count}
        if self._dialect.cycle_form is CycleForm.LEVELS:
            return delete_by_levels(
                connection, self._database, step, foreign_keys_off=self._foreign_keys_off
            )
        rows = [(batch.table, batch.keys) for batch in step.batches]
        cascades = any(key.on_delete == "CASCADE" for key in step.cycle)
        if self._dialect.cycle_form is CycleForm.DEFERRED and cascades:
            # One row takes others along, uncounted, before their turn has come.
            before = self._present(connection, step)
            self._dialect.delete_cycle(connection, rows)
            after = self._present(connection, step)
            return {name: count - after[name] for name, count in before.items()}
        counts = self._dialect.delete_cycle(connection, rows)
        return {b.table.name: count for b, count in zip(step.batches, counts, strict=True)}

    def _present(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        return {
            batch.table.name: len(self._dialect.existing_keys(connection, batch.table, batch.keys))
            for batch in step.batches
        }

    # -- around a failure ----------------------------------------------------------------------

    def _carefully(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if step.cycle:
                self._cycle_carefully(step)
            else:
                (batch,) = step.batches
                self._halving(batch.table, batch.keys)

    def _cycle_carefully(self, step: Step) -> None:
        cause = self._tried(step)
        if cause is None:
            return

        def read() -> Any:
            with self._database.reading() as connection:
                return row_order(connection, step)

        try:
            order = self.patiently(read)
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- as above; it becomes the rows' cause
            self._refuse_all(step, f"{cause}; {in_short(error)}")
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
        if self._remaining() <= 0:
            return "the cleanup's deadline had passed before this row was tried"
        try:
            self.outcome.deleted += self.patiently(lambda: self._whole([step]))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- as above; it becomes the rows' cause
            return in_short(error)
        return None

    def _halving(self, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Find the rows that cannot go, one by one as long as others go in between.

        Where fifty in a row cannot, the parts left are tried whole: all rows may be blocked, and
        there may be a hundred thousand.
        """
        failures = 0
        parts = [keys]
        while parts:
            part = parts.pop()
            step = Step((Batch(table, part),))
            cause = self._tried(step)
            if cause is None:
                failures = 0
            elif len(part) == 1 or failures >= _FAILURES_IN_A_ROW or self._remaining() <= 0:
                failures += 1
                self._refuse_all(step, cause)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    def _refuse_all(self, step: Step, cause: str) -> None:
        for batch in step.batches:
            refused = self.outcome.refused.setdefault(batch.table.name, {})
            refused.update(dict.fromkeys(batch.keys, cause))


def _refuse_strangers(step: Step, counts: dict[TableName, int]) -> None:
    """Roll back where a DELETE by key took more rows than it was given keys."""
    for batch in step.batches:
        count = counts[batch.table.name]
        if count > len(batch.keys):
            raise TidyRowsError(
                f"the DELETE of {len(batch.keys)} key(s) took {count} rows and was rolled back: "
                f"what the model calls the primary key is not unique in the database, or other "
                f"tables inherit from this one, so somebody else's rows were among them"
            )


def _part(step: Step, rows: Iterable[tuple[int, Any]]) -> Step:
    keys: dict[int, list[Any]] = {}
    for number, key in rows:
        keys.setdefault(number, []).append(key)
    places = {place_of(step.batches[number].table.name) for number in keys}
    return Step(
        tuple(Batch(step.batches[number].table, keys[number]) for number in sorted(keys)),
        tuple(key for key in step.cycle if {key.child, key.parent} <= places),
    )
