"""Delete rows, in transactions of bounded size; where one fails, row by row around the failure.

The first attempt asks as little as it can: the database itself says, by an error, that untracked
rows reference ours, and only keys that would take or change such rows in silence are asked about.
If there are any, the second attempt looks for all of them in the transaction that deletes.

Whole transactions are run again on deadlocks, lock timeouts and lost connections. A constraint
that speaks means that new rows have come, so they are looked for again, a few times. After that
every step gets a transaction of its own, and one that fails is halved until the rows that cannot go
are found. The same is done where somebody holds a lock for long: all other rows go first.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tidyrows.cleanup.batches import shares
from tidyrows.cleanup.bisect import Careful
from tidyrows.cleanup.cycles import RowLoopError, row_order
from tidyrows.cleanup.deletion import (
    DeadlineError,
    Deletion,
    Done,
    SeenError,
    StayError,
)
from tidyrows.cleanup.dependents import Reason, TooManyError
from tidyrows.cleanup.index_advice import advice
from tidyrows.cleanup.outcome import Outcome
from tidyrows.cleanup.plan import Batch, Step, place_of, steps_of
from tidyrows.cleanup.schema_view import forget_graph, schema_of
from tidyrows.cleanup.verify import SILENT, in_short
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.deletion import Rows
    from tidyrows.cleanup.dependents import Kept
    from tidyrows.cleanup.ledger_updates import Bookkeeping
    from tidyrows.cleanup.options import Rules
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.keys import KeyedTable
    from tidyrows.retry import RetryPolicy
    from tidyrows.schema import Place, RowOrder

T = TypeVar("T")
_SURPRISES = 3
_WAITS = 3
"""After how many waits for a lock in vain the rows that nobody has locked go first."""
_TOO_LATE = "the cleanup's deadline had passed before this row was tried"
_ROUNDS = 8
"""How often dependents are looked for again, because others came or one would not go."""


class Executor:
    """Deletes tracked rows, and what references them, from one database.

    Args:
        database: where.
        retry: how often and how patiently.
        until: when the cleanup's deadline ends, by the policy's clock.
        limit: the most rows of one transaction, if they can be parted.
        progress: told of rows that are deleted, or given up.
        rules: what becomes of rows that reference ours, given our tables.
        claimed: of rows of a place, who else tracks them.
        books: lets the ledger say what a transaction deletes.
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
        limit: int,
        progress: Callable[[int], None],
        rules: Callable[[Sequence[KeyedTable]], Rules],
        claimed: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]],
        books: Bookkeeping,
        identity: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]]
        | None = None,
        others: Mapping[Place, KeySet] | None = None,
        stay: Kept | None = None,
        foreign_keys_off: bool = False,
    ) -> None:
        self._database = database
        self._dialect = database.dialect
        self._clock = retry.clock
        self._policy = retry
        self._until = until
        self._limit = limit
        self._progress = progress
        self._make_rules = rules
        self._claimed = claimed
        self._books = books
        self._identity = identity
        self._foreign_keys_off = foreign_keys_off
        self._unanswered: Done | None = None
        self._tracked: dict[Place, KeySet] = {}
        self._others = others or {}
        self._stay: Kept = stay or {}
        self._tables: Sequence[KeyedTable] = ()
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
        self._tables = [each.table for each in batches]
        self._rules = self._make_rules(self._tables)
        self._view = self.patiently(lambda: schema_of(self._database, self._tables))
        steps = steps_of(self._view.graph, rows)
        for number, share in enumerate(shares(steps, self._limit, apart=self._apart)):
            if number and self._remaining() <= 0:
                for table, keys in share.values():
                    self._refuse(table, keys, _TOO_LATE)
            else:
                self._clear(share)
            self._progress(sum(len(keys) for _table, keys in share.values()))
        return [batch for step in steps for batch in step.batches]

    def _clear(self, rows: Rows) -> None:
        """Delete what can be deleted of these rows, all together if nothing stands in the way."""
        failure = self._failure_of(rows, discover=False)
        constraints = 0
        for number in range(_ROUNDS):
            if failure is None:
                return
            constraints += self._dialect.fault(failure) is Fault.CONSTRAINT
            if constraints > _SURPRISES:
                break  # rows are locked while dependents are looked for: it is something else
            if isinstance(failure, RowLoopError) and self._foreign_keys_off and not number:
                pass  # somebody's row references the loop: dependents have not been looked for
            elif not self._may_help(failure, surprised=constraints > 1):
                break
            failure = self._failure_of(rows, discover=True)
        if isinstance(failure, TooManyError):
            self._clear_in_halves(rows)
        elif failure is not None:
            self._carefully(rows)

    def _clear_in_halves(self, rows: Rows) -> None:
        """So many untracked rows go along that fewer of ours make a transaction."""
        size = sum(len(keys) for _table, keys in rows.values())
        steps = steps_of(self._view.graph, rows)
        halves = list(shares(steps, (size + 1) // 2, apart=self._apart))
        if len(halves) == 1:  # a circle of rows, which only go together
            self._carefully(rows)
            return
        for half in halves:
            self._clear(half)

    def _apart(self, step: Step) -> Iterator[Step]:
        """A step of a cycle in smaller ones: rows that go one after the other, and circles."""

        def read() -> RowOrder[tuple[int, Any]]:
            with self._database.reading() as connection:
                return row_order(connection, step)

        for rows in self.patiently(read).steps:
            if rows.loops:
                yield from (_part(step, loop) for loop in rows.loops)
            else:
                yield Step(_part(step, rows.rows).batches)

    def _may_help(self, failure: Exception, *, surprised: bool) -> bool:
        """Whether looking for dependents, once more, is a way around this failure."""
        if isinstance(failure, (SeenError, StayError)):
            return True
        if isinstance(failure, (RowLoopError, TooManyError, DeadlineError)):
            return False
        if self._dialect.fault(failure) is Fault.CONSTRAINT:
            if surprised:  # the first time there were dependents that we had not looked for
                self._read_anew()
            return True
        if self._database.enforced and self._only_we_enforce():
            self._database.enforced = False
            return True
        return self._read_anew()

    def _read_anew(self) -> bool:
        """Read the schema again; whether it has changed."""
        forget_graph(self._database.engine)
        before = self._view.graph.foreign_keys
        self._view = self.patiently(lambda: schema_of(self._database, self._tables))
        return self._view.graph.foreign_keys != before

    def _only_we_enforce(self) -> bool:
        """Whether the database enforces foreign keys for nobody but us."""

        def ask() -> bool:
            with self._database.reading() as connection:
                return not self._dialect.enforces_foreign_keys(connection)

        return self.patiently(ask)

    def patiently(self, transaction: Callable[[], T], *, waits: int = sys.maxsize) -> T:
        """Run a whole transaction, again where that may help, until the cleanup's deadline.

        Args:
            transaction: begins and ends one.
            waits: after how many waits for a lock in vain to give up.
        """

        def passes(error: BaseException) -> bool:
            nonlocal waits
            waits -= self._dialect.is_timeout(error)
            return waits > 0 and self._database.passes(error)

        def on_retry(_attempt: int, error: BaseException) -> None:
            self.outcome.retries += 1
            if self._dialect.is_timeout(error):
                self._database.waiting.armed = True  # who blocks the next attempt shall be known

        return replace(self._policy, deadline=max(self._remaining(), 0.0)).run(
            transaction, is_transient=passes, on_retry=on_retry
        )

    def advice(self, place: Place, *, rows: int, seconds: float) -> list[str]:
        """Which indexes would have made deleting these rows fast."""
        with self._database.reading() as connection:
            return advice(connection, self._dialect, self._view, place, rows=rows, seconds=seconds)

    def _remaining(self) -> float:
        return self._until - self._clock()

    def _failure_of(self, rows: Rows, *, discover: bool, around: bool = True) -> Exception | None:
        """Run everything in one transaction; the failure that a closer look may find a way around.

        Where somebody holds a lock for long, the rows that are free of it go first. Where waiting
        did not help, rows are refused: looking closer would only wait again.
        """
        several = sum(len(keys) for _table, keys in rows.values()) > 1
        around = around and several and self._dialect.has_row_locks
        transaction = partial(self._whole, rows, discover=discover, limit=self._limit)
        self._unanswered = None
        self._books.begin()
        self._database.waiting.begin()
        try:
            self.patiently(transaction, waits=_WAITS if around else sys.maxsize)
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything
            if isinstance(error, StayError):
                self._let_stay(error)
            if not self._database.passes(error):
                return error
            if around and self._dialect.is_timeout(error) and self._remaining() > 0:
                self._around_locks(rows)
                return None
            cause = f"gave up: {in_short(error)}{self._database.waiting.told()}"
            for table, keys in rows.values():
                self._refuse(table, keys, cause)
        return None

    def _around_locks(self, rows: Rows) -> None:
        """Delete what nobody has locked, then wait for the rest alone."""
        outcome, policy = self.outcome, self._policy
        refused, kept = outcome.refused, outcome.kept
        outcome.refused, outcome.kept = {}, {}
        self._policy = replace(policy, attempts=1)
        try:
            with self._database.hurrying():
                self._carefully(rows)
        finally:
            self._policy = policy
            locked, outcome.refused = outcome.refused, refused
            needed, outcome.kept = outcome.kept, kept
        rest: Rows = {}
        for place, (table, keys) in rows.items():
            stay = locked.get(table.name, {}).keys() | needed.get(table.name, {}).keys()
            if stay:
                rest[place] = table, [key for key in keys if key in stay]
        if rest and self._failure_of(rest, discover=True, around=False) is not None:
            self._carefully(rest)

    def _let_stay(self, error: StayError) -> None:
        for place, keys in error.rows.items():
            self._stay.setdefault(place, {}).update(dict.fromkeys(keys, Reason(SILENT)))

    # -- one transaction -----------------------------------------------------------------------

    def _whole(self, rows: Rows, *, discover: bool, limit: int) -> None:
        done = Done()
        deletion = Deletion(
            self._database,
            self._view,
            self._rules,
            tracked=self._tracked,
            stay=self._stay,
            before={place_of(name): kept for name, kept in self.outcome.kept.items()},
            claimed=self._claimed,
            identity=self._identity,
            limit=limit,
            remaining=self._remaining,
            clock=self._clock,
            foreign_keys_off=self._foreign_keys_off,
        )
        sent = False

        def committed() -> None:
            nonlocal sent
            sent = False
            # Run again after a COMMIT without an answer it finds nothing: that had succeeded.
            self._books.committed()
            unanswered, self._unanswered = self._unanswered, None
            done_after_all = done if done or unanswered is None else unanswered
            self.outcome.add(done_after_all, self._database.capture.database)

        try:
            with self._database.writing(
                seconds=self._remaining(), committed=committed
            ) as connection:
                deletion.run(connection, rows, done, discover=discover)
                self._books.settle(connection, rows, done)
                sent = True
        except Exception as error:
            if sent and self._dialect.fault(error) is Fault.LOST:
                if done or self._unanswered is None:  # what found nothing undoes no count
                    self._unanswered = done
                self._books.unanswered()
            raise

    # -- around a failure ----------------------------------------------------------------------

    def _carefully(self, rows: Rows) -> None:
        careful = Careful(
            tried=self._tried,
            apart=self._apart,
            refuse=self._refuse,
            is_late=lambda: self._remaining() <= 0,
        )
        careful.delete(steps_of(self._view.graph, rows))

    def _tried(self, rows: Rows) -> str | None:
        """Delete rows in a transaction of their own; the cause where that failed."""
        if self._remaining() <= 0:
            return _TOO_LATE
        cause = SILENT
        for _round in range(_ROUNDS):
            self._unanswered = None
            self._books.begin()
            self._database.waiting.begin()
            try:
                self.patiently(partial(self._whole, rows, discover=True, limit=sys.maxsize))
            except SessionStateError:
                raise
            except StayError as error:
                self._let_stay(error)
            except Exception as error:  # noqa: BLE001 -- as above; it becomes the rows' cause
                told = self._database.waiting.told() if self._database.passes(error) else ""
                return f"{in_short(error)}{told}"
            else:
                return None
        return cause

    def _refuse(self, table: KeyedTable, keys: Sequence[Any], cause: str) -> None:
        self.outcome.refused.setdefault(table.name, {}).update(dict.fromkeys(keys, cause))


def _part(step: Step, rows: Iterable[tuple[int, Any]]) -> Step:
    keys: dict[int, list[Any]] = {}
    for number, key in rows:
        keys.setdefault(number, []).append(key)
    places = {place_of(step.batches[number].table.name) for number in keys}
    return Step(
        tuple(Batch(step.batches[number].table, keys[number]) for number in sorted(keys)),
        tuple(key for key in step.cycle if {key.child, key.parent} <= places),
    )
