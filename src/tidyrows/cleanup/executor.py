"""Delete rows: first whole, in one transaction; where that fails, row by row around the failure.

The first attempt asks as little as it can: the database itself says, by an error, that untracked
rows reference ours, and only keys that would take or change such rows in silence are asked about.
If there are any, the second attempt looks for all of them in the transaction that deletes.

Whole transactions are run again on deadlocks, lock timeouts and lost connections. A constraint
that speaks means that new rows have come, so they are looked for again, a few times. After that
every step gets a transaction of its own, and one that fails is halved until the rows that cannot go
are found.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tidyrows.cleanup.cycles import RowLoopError, row_order
from tidyrows.cleanup.deletion import Deletion, Done, SeenError, StayError, add_rows
from tidyrows.cleanup.dependents import Reason
from tidyrows.cleanup.graphs import forget_graph, schema_of
from tidyrows.cleanup.plan import Batch, Step, place_of, steps_of
from tidyrows.cleanup.slow import advice
from tidyrows.cleanup.verify import SILENT, in_short
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError
from tidyrows.rows import TableName
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.deletion import Rows
    from tidyrows.cleanup.dependents import Kept
    from tidyrows.cleanup.graphs import SchemaView
    from tidyrows.cleanup.report import TableRows
    from tidyrows.cleanup.rules import Rules
    from tidyrows.retry import RetryPolicy
    from tidyrows.rows import KeyedTable
    from tidyrows.schema import Place

T = TypeVar("T")
_FAILURES_IN_A_ROW = 50
_SURPRISES = 3
_ROUNDS = 8
"""How often dependents are looked for again, because others came or one would not go."""


@dataclass(slots=True)
class Outcome:
    """What came of all transactions.

    Attributes:
        deleted: tracked rows deleted, by table.
        refused: why rows could not be deleted, by table and key.
        kept: why rows were not to be deleted, by table and key.
        dependents: untracked rows deleted, by table.
        detached: untracked rows detached, by table.
        seconds: how long each table's deletes took.
        retries: how often a transaction was run again.
    """

    deleted: Counter[TableName] = field(default_factory=Counter)
    refused: dict[TableName, dict[Any, str]] = field(default_factory=dict)
    kept: dict[TableName, dict[Any, Reason]] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    seconds: Counter[TableName] = field(default_factory=Counter)
    retries: int = 0


class Executor:
    """Deletes tracked rows, and what references them, from one database.

    Args:
        database: where.
        retry: how often and how patiently.
        until: when the cleanup's deadline ends, by the policy's clock.
        rules: what becomes of rows that reference ours, given our tables.
        claimed: of rows of a place, who else in this process tracks them.
        identity: of rows with these keys, which may not be ours any more, and why; asked in the
            transaction that deletes.
        others: tracked rows that are not to be deleted now, by place; what they reference stays.
        stay: those of them that stay for a reason of their own.
        foreign_keys_off: see ``CleanupManager(allow_foreign_keys_off=True)``.
    """

    def __init__(
        self,
        database: Database,
        *,
        retry: RetryPolicy,
        until: float,
        rules: Callable[[Sequence[KeyedTable]], Rules],
        claimed: Callable[[Place, Sequence[Any]], Mapping[Any, str]],
        identity: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]]
        | None = None,
        others: Mapping[Place, KeySet] | None = None,
        stay: Kept | None = None,
        foreign_keys_off: bool = False,
    ) -> None:
        self._database = database
        self._dialect = database.dialect
        self._retry = retry
        self._until = until
        self._make_rules = rules
        self._claimed = claimed
        self._identity = identity
        self._foreign_keys_off = foreign_keys_off
        self._unanswered: Done | None = None
        self._tracked: dict[Place, KeySet] = {}
        self._others = others or {}
        self._stay: Kept = stay or {}
        self._rules: Rules
        self._view: SchemaView
        self.outcome = Outcome()

    def run(self, batches: Sequence[Batch]) -> list[Batch]:
        """Delete everything that can be deleted; what came of it is in :attr:`outcome`.

        Args:
            batches: the tracked rows, a table each, in any order.

        Returns:
            The batches in the order in which they go.
        """
        rows: Rows = {place_of(each.table.name): (each.table, each.keys) for each in batches}
        self._tracked = {place: KeySet(keys) for place, (_table, keys) in rows.items()}
        for place, others in self._others.items():
            self._tracked.setdefault(place, KeySet()).update(others)
        tables = [each.table for each in batches]
        self._rules = self._make_rules(tables)
        self._view = self.patiently(lambda: schema_of(self._database, tables))
        failure = self._failure_of(rows, discover=False)
        constraints = 0
        for number in range(_ROUNDS):
            if failure is None:
                break
            constraints += self._dialect.fault(failure) is Fault.CONSTRAINT
            if constraints > _SURPRISES:
                break  # rows are locked while dependents are looked for: it is something else
            if isinstance(failure, RowLoopError) and self._foreign_keys_off and not number:
                pass  # somebody's row references the loop: dependents have not been looked for
            elif not self._may_help(failure, tables, surprised=constraints > 1):
                break
            failure = self._failure_of(rows, discover=True)
        if failure is not None:
            self._carefully(rows)
        return [batch for step in steps_of(self._view.graph, rows) for batch in step.batches]

    def _may_help(
        self, failure: Exception, tables: Sequence[KeyedTable], *, surprised: bool
    ) -> bool:
        """Whether looking for dependents, once more, is a way around this failure."""
        if isinstance(failure, (SeenError, StayError)):
            return True
        if isinstance(failure, RowLoopError):
            return False
        if self._dialect.fault(failure) is Fault.CONSTRAINT:
            if surprised:  # the first time there were dependents that we had not looked for
                self._read_anew(tables)
            return True
        if self._database.enforced and self._only_we_enforce():
            self._database.enforced = False
            return True
        return self._read_anew(tables)

    def _read_anew(self, tables: Sequence[KeyedTable]) -> bool:
        """Read the schema again; whether it has changed."""
        forget_graph(self._database.engine)
        before = self._view.graph.foreign_keys
        self._view = self.patiently(lambda: schema_of(self._database, tables))
        return self._view.graph.foreign_keys != before

    def _only_we_enforce(self) -> bool:
        """Whether the database enforces foreign keys for nobody but us."""

        def ask() -> bool:
            with self._database.reading() as connection:
                return not self._dialect.enforces_foreign_keys(connection)

        return self.patiently(ask)

    def patiently(self, transaction: Callable[[], T]) -> T:
        """Run a whole transaction, again where that may help, until the cleanup's deadline."""

        def on_retry(_attempt: int, _error: BaseException) -> None:
            self.outcome.retries += 1

        return replace(self._retry, deadline=max(self._remaining(), 0.0)).run(
            transaction, is_transient=self._database.passes, on_retry=on_retry
        )

    def advice(self, place: Place, *, rows: int, seconds: float) -> list[str]:
        """Which indexes would have made deleting these rows fast."""
        with self._database.reading() as connection:
            return advice(connection, self._dialect, self._view, place, rows=rows, seconds=seconds)

    def _remaining(self) -> float:
        return self._until - self._retry.clock()

    def _failure_of(self, rows: Rows, *, discover: bool) -> Exception | None:
        """Run everything in one transaction; the failure that a closer look may find a way around.

        Where waiting did not help, all rows are refused: looking closer would only wait again.
        """
        try:
            self._book(self.patiently(partial(self._whole, rows, discover=discover)))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything
            if isinstance(error, StayError):
                self._let_stay(error)
            if not self._database.passes(error):
                return error
            for table, keys in rows.values():
                self._refuse_all(table, keys, f"gave up: {in_short(error)}")
        return None

    def _let_stay(self, error: StayError) -> None:
        for place, keys in error.rows.items():
            self._stay.setdefault(place, {}).update(dict.fromkeys(keys, Reason(SILENT)))

    # -- one transaction -----------------------------------------------------------------------

    def _whole(self, rows: Rows, *, discover: bool) -> Done:
        done = Done()
        deletion = Deletion(
            self._database,
            self._view,
            self._rules,
            tracked=self._tracked,
            stay=self._stay,
            claimed=self._claimed,
            identity=self._identity,
            clock=self._retry.clock,
            foreign_keys_off=self._foreign_keys_off,
        )
        sent = False
        try:
            with self._database.writing(seconds=self._remaining()) as connection:
                deletion.run(connection, rows, done, discover=discover)
                sent = True
        except Exception as error:
            if sent and self._dialect.fault(error) is Fault.LOST:
                self._unanswered = done
            raise
        # Run again after a COMMIT without an answer it finds nothing: that COMMIT had succeeded.
        unanswered, self._unanswered = self._unanswered, None
        return done if done or unanswered is None else unanswered

    # -- around a failure ----------------------------------------------------------------------

    def _carefully(self, rows: Rows) -> None:
        for step in steps_of(self._view.graph, rows):
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
            self._refuse(step, f"{cause}; {in_short(error)}")
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
                    self._refuse(circle, cause)

    def _tried(self, step: Step) -> str | None:
        """Delete a step in a transaction of its own; the cause where that failed."""
        if self._remaining() <= 0:
            return "the cleanup's deadline had passed before this row was tried"
        rows: Rows = {
            place_of(batch.table.name): (batch.table, batch.keys) for batch in step.batches
        }
        cause = SILENT
        for _round in range(_ROUNDS):
            try:
                self._book(self.patiently(partial(self._whole, rows, discover=True)))
            except SessionStateError:
                raise
            except StayError as error:
                self._let_stay(error)
            except Exception as error:  # noqa: BLE001 -- as above; it becomes the rows' cause
                return in_short(error)
            else:
                return None
        return cause

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
                self._refuse_all(table, part, cause)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    def _refuse(self, step: Step, cause: str) -> None:
        for batch in step.batches:
            self._refuse_all(batch.table, batch.keys, cause)

    def _refuse_all(self, table: KeyedTable, keys: Sequence[Any], cause: str) -> None:
        self.outcome.refused.setdefault(table.name, {}).update(dict.fromkeys(keys, cause))

    def _book(self, done: Done) -> None:
        """Add what a transaction did, now that it is committed."""
        outcome = self.outcome
        outcome.deleted += done.deleted
        for name, rows in done.dependents.items():
            add_rows(outcome.dependents, rows, name)
        for name, rows in done.detached.items():
            add_rows(outcome.detached, rows, name)
        outcome.seconds.update(done.seconds)
        database = self._database.capture.database
        for (schema, table), kept in done.kept.items():
            if kept:
                outcome.kept.setdefault(TableName(database, schema, table), {}).update(kept)


def _part(step: Step, rows: Iterable[tuple[int, Any]]) -> Step:
    keys: dict[int, list[Any]] = {}
    for number, key in rows:
        keys.setdefault(number, []).append(key)
    places = {place_of(step.batches[number].table.name) for number in keys}
    return Step(
        tuple(Batch(step.batches[number].table, keys[number]) for number in sorted(keys)),
        tuple(key for key in step.cycle if {key.child, key.parent} <= places),
    )
