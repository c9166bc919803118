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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from tidyrows.cleanup.cycles import RowLoopError, delete_by_levels, row_order
from tidyrows.cleanup.dependents import Discovery, Found, Kept, Reason, Rules, referenced_values
from tidyrows.cleanup.graphs import SILENT_ACTIONS, forget_graph, schema_of
from tidyrows.cleanup.plan import Batch, Step, place_of, steps_of
from tidyrows.cleanup.report import TableRows
from tidyrows.cleanup.verify import SILENT, in_short
from tidyrows.dialects import CycleForm, Fault
from tidyrows.errors import SessionStateError, TidyRowsError
from tidyrows.rows import TableName
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.graphs import SchemaView
    from tidyrows.retry import RetryPolicy
    from tidyrows.rows import KeyedTable
    from tidyrows.schema import Place

T = TypeVar("T")
Rows = dict["Place", tuple["KeyedTable", "Sequence[Any]"]]
"""Rows by place: their table, and their keys in the one global order."""
_FAILURES_IN_A_ROW = 50
_ROUNDS = 8
"""How often dependents are looked for again, because others came or one would not go."""


class _SeenError(Exception):
    """Rows that nobody tracked reference ours, and would go or change in silence."""


class _StayError(Exception):
    """A DELETE did nothing and said nothing, and what these rows reference was to go too."""

    def __init__(self, rows: Mapping[Place, Sequence[Any]]) -> None:
        super().__init__(SILENT)
        self.rows = rows


@dataclass(slots=True)
class Done:
    """What one transaction did.

    Attributes:
        deleted: tracked rows deleted, by table.
        dependents: untracked rows deleted.
        detached: untracked rows detached.
        kept: rows left alone, and why.
        seconds: how long each table's DELETE took.
    """

    deleted: Counter[TableName] = field(default_factory=Counter)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    seconds: dict[TableName, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.deleted.total() or self.dependents or self.detached)


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
        rules: what becomes of rows that reference ours.
        claimed: of rows of a place, who else in this process tracks them.
        identity: of rows with these keys, which may not be ours any more, and why; asked in the
            transaction that deletes.
        foreign_keys_off: see ``CleanupManager(allow_foreign_keys_off=True)``.
    """

    def __init__(
        self,
        database: Database,
        *,
        retry: RetryPolicy,
        until: float,
        rules: Callable[[Sequence[KeyedTable]], Rules] | None = None,
        claimed: Callable[[Place, Sequence[Any]], Mapping[Any, str]] | None = None,
        identity: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]]
        | None = None,
        foreign_keys_off: bool = False,
    ) -> None:
        self._database = database
        self._dialect = database.dialect
        self._retry = retry
        self._until = until
        self._make_rules = rules
        self._rules = Rules()
        self._claimed = claimed or (lambda _place, _keys: {})
        self._identity = identity
        self._foreign_keys_off = foreign_keys_off
        self._unanswered: Done | None = None
        self._tracked: dict[Place, KeySet] = {}
        self._stay: Kept = {}
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
        tables = [each.table for each in batches]
        if self._make_rules is not None:
            self._rules = self._make_rules(tables)
        self._view = self.patiently(lambda: schema_of(self._database, tables))
        failure = self._failure_of(rows, discover=False)
        constraints = 0
        for _round in range(_ROUNDS):
            if failure is None:
                break
            constraints += self._dialect.fault(failure) is Fault.CONSTRAINT
            if not self._may_help(failure, tables, surprised=constraints > 1):
                break
            failure = self._failure_of(rows, discover=True)
        if failure is not None:
            self._carefully(rows)
        return [batch for step in steps_of(self._view.graph, rows) for batch in step.batches]

    def _may_help(
        self, failure: Exception, tables: Sequence[KeyedTable], *, surprised: bool
    ) -> bool:
        """Whether looking for dependents, once more, is a way around this failure."""
        if isinstance(failure, (_SeenError, _StayError)):
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
            if isinstance(error, _StayError):
                self._let_stay(error)
            if not self._database.passes(error):
                return error
            for table, keys in rows.values():
                self._refuse_all(table, keys, f"gave up: {in_short(error)}")
        return None

    def _let_stay(self, error: _StayError) -> None:
        for place, keys in error.rows.items():
            self._stay.setdefault(place, {}).update(dict.fromkeys(keys, Reason(SILENT)))

    # -- one transaction -----------------------------------------------------------------------

    def _whole(self, rows: Rows, *, discover: bool) -> Done:
        done = Done()
        sent = False
        try:
            with self._database.writing(seconds=self._remaining()) as connection:
                self._delete_all(connection, self._ours(connection, rows, done), done, discover)
                sent = True
        except Exception as error:
            if sent and self._dialect.fault(error) is Fault.LOST:
                self._unanswered = done
            raise
        # Run again after a COMMIT without an answer it finds nothing: that COMMIT had succeeded.
        unanswered, self._unanswered = self._unanswered, None
        return done if done or unanswered is None else unanswered

    def _ours(self, connection: sa.Connection, rows: Rows, done: Done) -> Rows:
        """Leave out rows that may be somebody else's by now."""
        if self._identity is None:
            return rows
        certain: Rows = {}
        for place, (table, keys) in rows.items():
            unsure = self._identity(connection, table, keys)
            done.kept[place] = {key: Reason(cause) for key, cause in unsure.items()}
            certain[place] = table, [key for key in keys if key not in unsure] if unsure else keys
        return certain

    def _delete_all(
        self,
        connection: sa.Connection,
        rows: Rows,
        done: Done,
        discover: bool,
    ) -> None:
        found = Found()
        if discover:
            rows, found = self._with_dependents(connection, rows, done)
        going = {place for place, (_table, keys) in rows.items() if len(keys)}
        for step in steps_of(self._view.graph, {place: rows[place] for place in going}):
            if not discover:
                self._refuse_silence(connection, step)
            started = self._retry.clock()
            counts = self._delete(connection, step)
            if not step.cycle:
                name = step.batches[0].table.name
                done.seconds[name] = self._retry.clock() - started
            _refuse_strangers(step, counts)
            self._refuse_stayers(connection, step, counts, going, done)
            for batch in step.batches:
                name = batch.table.name
                others = found.dependents.get(place_of(name), {})
                done.deleted[name] += max(counts[name] - len(others), 0)
                if others:
                    done.dependents[name] = TableRows(batch.table, list(others))

    def _with_dependents(
        self, connection: sa.Connection, rows: Rows, done: Done
    ) -> tuple[Rows, Found]:
        """Look who references these rows, detach whom the schema lets be, and say what goes."""
        unsure = {place: set(kept) for place, kept in done.kept.items()}

        def is_tracked(place: Place, key: Any) -> bool:
            return key in self._tracked.get(place, ()) and key not in unsure.get(place, ())

        discovery = Discovery(
            connection,
            self._dialect,
            self._view,
            self._rules,
            is_tracked=is_tracked,
            claimed=self._claimed,
            kept={place: dict(kept) for place, kept in self._stay.items()},
        )
        found = discovery.look({place: keys for place, (_table, keys) in rows.items()})
        for place, kept in discovery.kept.items():
            mine = self._tracked.get(place, ())
            done.kept.setdefault(place, {}).update(
                (key, reason) for key, reason in kept.items() if key in mine
            )
        for place, others in found.dependents.items():
            for key in others:
                done.kept.get(place, {}).pop(key, None)  # it went as a dependent
        self._detach(connection, discovery, found, done)
        for key, (values, count) in found.unnamed.items():
            reference = self._view.reference(connection, key)
            self._dialect.delete_by_keys(connection, reference, values)
            _add(done.dependents, TableRows(reference, (), count), reference.name)
        going: Rows = {}
        for place, doomed in found.doomed.items():
            table = rows[place][0] if place in rows else self._view.table(connection, place)
            going[place] = table, KeySet(doomed).in_order()
        return going, found

    def _detach(
        self, connection: sa.Connection, discovery: Discovery, found: Found, done: Done
    ) -> None:
        for key, detached in found.detached.items():
            doomed = found.doomed.get(key.child, {})
            keys = [each for each in KeySet(detached).in_order() if each not in doomed]
            if not keys:
                continue
            child = self._view.table(connection, key.child)
            if discovery.fate(key).name == "DETACHED":
                wide = self._view.with_columns(connection, key)
                self._dialect.set_null(connection, wide, keys, discovery.nulled(key))
            _add(done.detached, TableRows(child, keys), child.name)
        for key, (values, count) in found.detached_unnamed.items():
            reference = self._view.reference(connection, key)
            if discovery.fate(key).name == "DETACHED":
                self._dialect.set_null(connection, reference, values, discovery.nulled(key))
            _add(done.detached, TableRows(reference, (), count), reference.name)

    def _refuse_silence(self, connection: sa.Connection, step: Step) -> None:
        """Stop where the DELETE of these rows would take or change others without a word."""
        places = {place_of(batch.table.name) for batch in step.batches}
        for batch in step.batches:
            place = place_of(batch.table.name)
            incoming = self._view.incoming(place)
            if incoming and self._dialect.enforces_foreign_keys(connection):
                incoming = tuple(key for key in incoming if key.on_delete in SILENT_ACTIONS)
            if not incoming:
                continue
            if step.cycle and any(key.child in places for key in incoming):
                raise _SeenError
            values = referenced_values(
                connection,
                self._dialect,
                self._view,
                place,
                batch.keys,
                incoming=incoming,
            )
            asked = [
                (self._view.reference(connection, key), values[key.parent_columns])
                for key in incoming
            ]
            if self._dialect.first_found(connection, asked):
                raise _SeenError

    def _refuse_stayers(
        self,
        connection: sa.Connection,
        step: Step,
        counts: Mapping[TableName, int],
        going: set[Place],
        done: Done,
    ) -> None:
        """Stop where a row would not go and one that it references is to go after it."""
        stay: dict[Place, Sequence[Any]] = {}
        for batch in step.batches:
            place = place_of(batch.table.name)
            if counts[batch.table.name] >= len(batch.keys):
                continue
            if not any(key.parent in going for key in self._view.graph.outgoing(place)):
                continue
            keys: Sequence[Any] = []
            # It may have to switch off what hides rows, or fail: neither must outlast the look.
            with suppress(sa.exc.DBAPIError), connection.begin_nested() as look:
                keys = self._dialect.existing_keys(connection, batch.table, batch.keys)
                look.rollback()
            if keys:
                stay[place] = keys
        if stay:
            raise _StayError(stay)

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
            except _StayError as error:
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
            _add(outcome.dependents, rows, name)
        for name, rows in done.detached.items():
            _add(outcome.detached, rows, name)
        outcome.seconds.update(done.seconds)
        database = self._database.capture.database
        for (schema, table), kept in done.kept.items():
            if kept:
                outcome.kept.setdefault(TableName(database, schema, table), {}).update(kept)


def _add(into: dict[TableName, TableRows], rows: TableRows, name: TableName) -> None:
    into[name] = into[name].merged(rows) if name in into else rows


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
