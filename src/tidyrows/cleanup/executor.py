"""Deletes rows, in transactions of bounded size; where one fails, row by row around the failure.

The first attempt asks as little as it can: an error of the database shows that untracked rows
reference ours, and only for rows whose DELETE would delete or change others silently it looks for
them. After such an error the next attempt looks for all of them in the transaction that deletes; so
does the next cleanup of the same tables, until it finds none.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.connection import DeadlineError
from tidyrows.cleanup.cycles import RowLoopError, row_order
from tidyrows.cleanup.deletion import Deletion, IgnoredDeleteError, NewIncarnationError
from tidyrows.cleanup.dependents import TooManyError
from tidyrows.cleanup.options import SCHEMA_ALONE
from tidyrows.cleanup.plan import Step, part_of, steps_of, transactions_of
from tidyrows.cleanup.reasons import LATE, LeftoverKind, Reason
from tidyrows.cleanup.run import Outcome
from tidyrows.cleanup.schema_view import forget_schema, known_schema, schema_of
from tidyrows.dialects import Fault
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.cleanup.plan import Batch, Rows
    from tidyrows.cleanup.run import Kept, Scope
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import Place, RowOrder
    from tidyrows.tracking.store import TableHoldings

_CONSTRAINT_ERRORS = 3
"""After how many, although dependents had been looked for, it is something else."""
_WAITS = 3
"""After how many lock timeouts the rows that are not locked go first."""
_ROUNDS = 8
"""How often dependents are looked for again, because others came or one would not go."""
_MOST_OF_IT = 0.75
"""The part of the time that must be left when rows are tried together another time."""
_FAILURES_IN_A_ROW = 50
"""After so many, larger parts are refused whole: ten thousand rows may all be blocked."""


class Executor:
    """Deletes tracked rows, and what references them, from one database."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._run = scope.run
        self._database = scope.database
        self._dialect = scope.database.dialect
        self._ledger = scope.ledger
        self._outcome = scope.outcome
        self._limit = scope.run.options.rows_per_transaction
        self._tables: Sequence[KeyedTable] = ()
        self._waits: Kept = {}  # rows of transactions that waited for a lock too long

    def delete(self, holdings: Iterable[TableHoldings]) -> list[Batch]:
        """Delete everything that can be deleted; what came of it is in the scope's outcome."""
        scope, size = self._scope, 0
        rows: Rows = {}
        for held in holdings:
            place, keys = held.table.place, held.keys.in_order()
            rows[place] = held.table, keys
            others = scope.tracked.get(place)
            scope.tracked[place] = held.keys
            if others is not None:
                held.keys.update(others)
            size += len(keys)
            if held.given and self._ledger is not None:
                scope.given[place] = held.given_keys
            if not (self._dialect.reuses_keys or self._run.options.trust_keys):
                scope.incarnations.add(held, keys)
        self._tables = [table for table, _keys in rows.values()]
        default = self._database.engine.dialect.default_schema_name or ""
        scope.rules = self._run.options.rules(self._tables, default)
        scope.view = known_schema(self._database, self._tables) or self._read_schema()
        if scope.rules is not SCHEMA_ALONE:
            scope.view = self._following(scope.view)
        scope.view.roots.update(rows)
        unknown = rows.keys() - scope.view.unique.keys()
        if unknown:
            read = partial(scope.view.read_unique, self._database, [rows[at][0] for at in unknown])
            self._run.retry(self._database, read)
        steps = steps_of(self._scope.view.graph, rows)
        if size <= self._limit:
            self._delete(rows, steps)
            self._run.done(size)
        else:
            parts = transactions_of(steps, self._limit, apart=self._apart)
            for number, part in enumerate(parts):
                if number and self._run.is_late:
                    self._refuse(part, LATE)
                else:
                    self._delete(part)
                self._run.done(_size(part))
        self._name_waits()
        return [batch for step in steps for batch in step.batches]

    def _name_waits(self) -> None:
        """Rows that waited for a lock before the deadline passed stay for that reason."""
        for place, waits in self._waits.items():
            for stay in (self._outcome.refused.get(place, {}), self._outcome.kept.get(place, {})):
                late = [key for key in stay if stay[key] is LATE and key in waits]
                stay.update({key: waits[key] for key in late})

    def _delete(self, rows: Rows, steps: Sequence[Step] | None = None) -> None:
        """Delete what can be deleted of these rows, all together if nothing stands in the way."""
        run = self._run
        enough = _MOST_OF_IT * run.remaining()
        failure = self._failure_of(rows, steps, discover=False)
        if failure is not None and run.remaining() < enough:
            self._delete_in_quarters(rows)  # to look for dependents of all would take longer yet
            return
        looked = False
        constraints = 0
        for _round in range(_ROUNDS):
            if failure is None:
                return
            constraints += looked and self._dialect.fault(failure) is Fault.CONSTRAINT
            if constraints >= _CONSTRAINT_ERRORS or not self._may_help(failure, looked=looked):
                break
            looked = True
            failure = self._failure_of(rows, discover=True)
        if isinstance(failure, TooManyError):
            self._delete_in_quarters(rows)
        elif failure is not None:
            self._delete_one_by_one(rows)

    def _delete_in_quarters(self, rows: Rows) -> None:
        """Delete a quarter of the rows at a time: too much references them all together.

        A quarter, since to look for it may have taken a quarter of the time: a smaller part would
        not be found in what is left otherwise.
        """
        steps, quarter = steps_of(self._scope.view.graph, rows), (_size(rows) + 3) // 4
        parts = list(transactions_of(steps, quarter, apart=self._apart))
        if len(parts) == 1:  # a circle of rows, which only go together
            self._delete_one_by_one(rows)
            return
        for part in parts:
            if self._run.is_late:
                self._refuse(part, LATE)
            else:
                self._delete(part)

    def _apart(self, step: Step) -> Iterator[Step]:
        """A step of a cycle in smaller ones: rows that go one after the other, and circles."""

        def read() -> RowOrder[tuple[Place, Any]]:
            with self._database.reading() as connection:
                return row_order(connection, step)

        for rows in self._run.retry(self._database, read).steps:
            if rows.loops:
                yield from (part_of(step, loop) for loop in rows.loops)
            else:
                yield Step(part_of(step, rows.rows).batches)

    def _may_help(self, failure: Exception, *, looked: bool) -> bool:
        """Whether looking for dependents is a way around this failure; once more, if ``looked``."""
        if isinstance(failure, (IgnoredDeleteError, NewIncarnationError)):
            return True
        if isinstance(failure, RowLoopError):  # an untracked row may reference the loop
            return self._run.options.allow_foreign_keys_off and not looked
        if isinstance(failure, (TooManyError, DeadlineError)) or self._run.is_late:
            return False
        if self._dialect.fault(failure) is Fault.CONSTRAINT:
            # A CHECK, a NOT NULL or a trigger refuses the same rows again. A foreign key may be
            # that of another row, unless the lock of the whole database keeps others out.
            others = self._dialect.has_row_locks and self._dialect.is_foreign_key(failure)
            return not looked or self._schema_has_changed() or others
        if self._database.enforced and self._only_we_enforce():
            self._database.enforced = False
            return True
        return self._schema_has_changed()

    def _read_schema(self) -> SchemaView:
        return self._run.retry(self._database, lambda: schema_of(self._database, self._tables))

    def _following(self, view: SchemaView) -> SchemaView:
        """The view with the foreign keys of the models that the rules speak of."""
        rules = self._scope.rules
        if rules not in view.following:
            read = partial(view.with_model_keys, self._database, rules)
            view.following[rules] = self._run.retry(self._database, read)
        return view.following[rules]

    def _schema_has_changed(self) -> bool:
        """Read the schema again; whether it has changed."""
        forget_schema(self._database.engine)
        before = self._scope.view
        view = self._scope.view = self._following(self._read_schema())
        view.roots |= before.roots
        return view.graph.foreign_keys != before.graph.foreign_keys

    def _only_we_enforce(self) -> bool:
        """Whether the database enforces foreign keys on our connection only."""

        def ask() -> bool:
            with self._database.reading() as connection:
                return not self._dialect.enforces_foreign_keys(connection)

        return self._run.retry(self._database, ask)

    # -- one transaction -----------------------------------------------------------------------

    def _failure_of(
        self,
        rows: Rows,
        steps: Sequence[Step] | None = None,
        *,
        discover: bool,
        around: bool = True,
    ) -> Exception | None:
        """Run everything in one transaction; the failure that a closer look may find a way around.

        Where a lock is held for long, all other rows go first; then the locked ones are refused.
        """
        around = around and _size(rows) > 1 and self._dialect.has_row_locks
        waits = _WAITS if around else sys.maxsize
        try:
            self._transact(rows, steps, discover=discover, limit=self._limit, waits=waits)
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything
            if isinstance(error, IgnoredDeleteError):
                self._note_ignored(error)
            if not self._database.is_transient(error):
                return error
            if around and self._dialect.is_timeout(error) and not self._run.is_late:
                self._delete_unlocked_first(rows)
            else:
                self._refuse(rows, self._database.reason(error))
        return None

    def _transact(
        self,
        rows: Rows,
        steps: Sequence[Step] | None = None,
        *,
        discover: bool = True,
        limit: int = sys.maxsize,
        waits: int = sys.maxsize,
    ) -> None:
        """Run one transaction, again where that may help."""
        ledger = self._ledger
        unanswered: Outcome | None = None
        if ledger is not None:
            ledger.begin()
        self._database.monitor.begin()

        def attempt() -> None:
            nonlocal unanswered
            done, sent = Outcome(), False
            deletion: Deletion | None = None

            def committed() -> None:
                nonlocal sent, unanswered
                sent = False
                # Run again after a COMMIT without an answer it finds nothing: that had succeeded.
                if ledger is not None:
                    ledger.committed()
                before, unanswered = unanswered, None
                self._outcome.add(done if before is None or done else before)
                known = self._scope.view.with_dependents
                for place, found in deletion.referenced.items() if deletion is not None else ():
                    (known.add if found else known.discard)(place)

            try:
                with self._database.writing(committed=committed) as connection:
                    deletion = Deletion(self._scope, connection, done)
                    deletion.run(rows, steps, discover=discover, limit=limit)
                    if ledger is not None:
                        ledger.record(connection, rows, done)
                    sent = True
            except BaseException as error:
                # A task that is cancelled during COMMIT has no answer either.
                is_error = isinstance(error, Exception)
                self._note_wait(rows, error)
                if sent and not (is_error and self._dialect.fault(error) is not Fault.LOST):
                    # what found nothing undoes no count
                    unanswered = done if done or unanswered is None else unanswered
                    if ledger is not None:
                        ledger.unanswered()
                raise

        self._run.retry(self._database, attempt, waits=waits)

    def _note_wait(self, rows: Rows, error: BaseException) -> None:
        if isinstance(error, Exception) and self._dialect.is_timeout(error):
            reason = self._database.reason(error)
            for place, (_table, keys) in rows.items():
                self._waits.setdefault(place, {}).update(dict.fromkeys(keys, reason))

    # -- around a failure ----------------------------------------------------------------------

    def _delete_unlocked_first(self, rows: Rows) -> None:
        """Delete the rows that are not locked, then wait for the others alone."""
        with self._database.without_waiting():
            self._delete_one_by_one(rows)
        rest: Rows = {}
        for place, (table, keys) in rows.items():
            staying = [each.get(place, {}) for each in (self._outcome.refused, self._outcome.kept)]
            locked = [key for key in keys if any(key in each for each in staying)]
            if locked:
                rest[place] = table, locked
            for each in staying:
                for key in locked:
                    each.pop(key, None)
        if rest and self._failure_of(rest, discover=True, around=False) is not None:
            self._delete_one_by_one(rest)

    def _delete_one_by_one(self, rows: Rows) -> None:
        """Delete all rows that can go, in transactions of their own."""
        for step in steps_of(self._scope.view.graph, rows):
            if step.cycle:
                self._delete_cycle(step)
            else:
                self._halve(step)

    def _delete_cycle(self, step: Step) -> None:
        reason = self._delete_or_reason(step.rows)
        if reason is None:
            return
        try:
            parts = list(self._apart(step))
        except SessionStateError:
            raise
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything; it becomes the rows' reason
            self._refuse(step.rows, replace(reason, also=self._database.reason(error)))
            return
        for part in parts:
            if not part.cycle:
                self._halve(part)
                continue
            reason = self._delete_or_reason(part.rows)
            if reason is not None:
                self._refuse(part.rows, reason)

    def _halve(self, step: Step) -> None:
        """Find the rows that cannot go, one by one as long as others go in between."""
        for batch in step.batches:
            failures = 0
            parts = [batch.keys]
            while parts:
                keys = parts.pop()
                rows: Rows = {batch.table.place: (batch.table, keys)}
                reason = self._delete_or_reason(rows)
                if reason is None:
                    failures = 0
                elif len(keys) == 1 or failures >= _FAILURES_IN_A_ROW or self._run.is_late:
                    failures += 1
                    self._refuse(rows, reason)
                else:
                    middle = len(keys) // 2
                    parts += [keys[middle:], keys[:middle]]

    def _delete_or_reason(self, rows: Rows) -> Reason | None:
        """Delete rows in a transaction of their own; returns the reason if that failed."""
        if self._run.is_late:
            return LATE
        for _round in range(_ROUNDS):
            try:
                self._transact(rows)
            except SessionStateError:
                raise
            except IgnoredDeleteError as error:
                self._note_ignored(error)
            except NewIncarnationError:
                continue
            except Exception as error:  # noqa: BLE001 -- as above; it becomes the rows' reason
                return self._database.reason(error)
            else:
                return None
        return Reason(LeftoverKind.IGNORED)

    def _note_ignored(self, error: IgnoredDeleteError) -> None:
        reason = Reason(LeftoverKind.IGNORED)
        for place, keys in error.rows.items():
            self._scope.stay.setdefault(place, {}).update(dict.fromkeys(keys, reason))

    def _refuse(self, rows: Rows, reason: Reason) -> None:
        for place, (_table, keys) in rows.items():
            self._outcome.refused.setdefault(place, {}).update(dict.fromkeys(keys, reason))


def _size(rows: Rows) -> int:
    return sum([len(keys) for _table, keys in rows.values()])
