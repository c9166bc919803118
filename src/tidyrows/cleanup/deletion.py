"""One transaction that deletes tracked rows, and what references them.

It asks as little as it can, or looks for everything that references the rows first. Nothing here
commits, runs again or remembers: what it did is in :class:`Done`, and counts once it is committed.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.cycles import delete_by_levels
from tidyrows.cleanup.dependents import (
    Discovery,
    Found,
    Kept,
    Reason,
    acts_unseen,
    referenced_values,
)
from tidyrows.cleanup.options import Fate, Rules
from tidyrows.cleanup.plan import Step, place_of, steps_of
from tidyrows.cleanup.report import TableRows
from tidyrows.cleanup.schema_view import SILENT_ACTIONS
from tidyrows.cleanup.verify import SILENT
from tidyrows.dialects import CycleForm
from tidyrows.errors import TidyRowsError
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.schema import Place
    from tidyrows.tracking.keyset import KeySet

Rows = dict["Place", tuple["KeyedTable", "Sequence[Any]"]]
"""Rows by place: their table, and their keys in the one global order."""


class SeenError(Exception):
    """Rows that nobody tracked reference ours, and would go or change in silence."""


class DeadlineError(TidyRowsError):
    """The cleanup's time was over in the middle of a transaction, which was rolled back."""


class StayError(Exception):
    """A DELETE did nothing and said nothing, and what these rows reference was to go too."""

    def __init__(self, rows: Mapping[Place, Sequence[Any]]) -> None:
        super().__init__(SILENT)
        self.rows = rows


@dataclass(slots=True)
class Done:
    """What one transaction did.

    Attributes:
        deleted: tracked rows deleted, by table.
        gone: their keys, where every row that was asked for went.
        dependents: untracked rows deleted.
        detached: untracked rows detached.
        kept: rows left alone, and why.
        seconds: how long each table's DELETE took.
    """

    deleted: Counter[TableName] = field(default_factory=Counter)
    gone: dict[TableName, Sequence[Any]] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    seconds: dict[TableName, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.deleted.total() or self.dependents or self.detached)


@dataclass(frozen=True, slots=True)
class Deletion:
    """How rows are deleted in one transaction.

    Attributes:
        database: where.
        view: its schema.
        rules: what becomes of rows that reference ours.
        tracked: all our rows, by place.
        stay: rows that are known not to go.
        before: rows that transactions before this one have kept, and why.
        claimed: of rows of a table, who else tracks them.
        identity: of rows with these keys, which may not be ours any more, and why.
        limit: how many untracked rows may go with more than one row of ours.
        remaining: the seconds that are left of the cleanup's time.
        clock: seconds.
        foreign_keys_off: see ``CleanupManager(allow_foreign_keys_off=True)``.
    """

    database: Database
    view: SchemaView
    rules: Rules
    tracked: Mapping[Place, KeySet]
    stay: Kept
    before: Kept
    claimed: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]]
    identity: Callable[[sa.Connection, KeyedTable, Sequence[Any]], Mapping[Any, str]] | None
    limit: int
    remaining: Callable[[], float]
    clock: Callable[[], float]
    foreign_keys_off: bool

    def run(self, connection: sa.Connection, rows: Rows, done: Done, *, discover: bool) -> None:
        """Delete the rows; what was done is added to ``done``.

        Args:
            connection: in the transaction.
            rows: what to delete, all of them tracked.
            done: empty.
            discover: look for everything that references the rows, instead of only for what the
                database would take or change without a word.

        Raises:
            SeenError: there is something to discover.
            StayError: a row does not go, and what it references was to go.
            TooManyError: more untracked rows would go along than ``limit``.
            DeadlineError: the cleanup's time is over.
        """
        rows = self._ours(connection, rows, done)
        found = Found()
        if discover:
            rows, found = self._with_dependents(connection, rows, done)
        going = {place: each for place, each in rows.items() if len(each[1])}
        for number, step in enumerate(steps_of(self.view.graph, going)):
            if number and self.remaining() <= 0:
                raise DeadlineError(
                    "the cleanup's deadline struck before its transaction had ended"
                )
            if not discover:
                self._refuse_silence(connection, step)
            started = self.clock()
            counts = self._delete(connection, step)
            if not step.cycle:
                name = step.batches[0].table.name
                done.seconds[name] = self.clock() - started
            _refuse_strangers(step, counts)
            self._refuse_stayers(connection, step, counts)
            for batch in step.batches:
                name = batch.table.name
                others = found.dependents.get(place_of(name), {})
                done.deleted[name] += max(counts[name] - len(others), 0)
                if counts[name] == len(batch.keys):
                    done.gone[name] = [key for key in batch.keys if key not in others]
                if others:
                    done.dependents[name] = TableRows(batch.table, list(others))

    def _ours(self, connection: sa.Connection, rows: Rows, done: Done) -> Rows:
        """Leave out rows that may be somebody else's by now."""
        if self.identity is None:
            return rows
        certain: Rows = {}
        for place, (table, keys) in rows.items():
            unsure = self.identity(connection, table, keys)
            done.kept[place] = {key: Reason(cause) for key, cause in unsure.items()}
            certain[place] = table, [key for key in keys if key not in unsure] if unsure else keys
        return certain

    def _with_dependents(
        self, connection: sa.Connection, rows: Rows, done: Done
    ) -> tuple[Rows, Found]:
        """Look who references these rows, detach whom the schema lets be, and say what goes."""
        unsure = {place: kept for place, kept in done.kept.items() if kept}
        tracked = {
            place: (set(keys) - unsure[place].keys()) if place in unsure else keys
            for place, keys in self.tracked.items()
        }
        discovery = Discovery(
            connection,
            self.database.dialect,
            self.view,
            self.rules,
            tracked=tracked,
            claimed=self.claimed,
            kept={place: dict(kept) for place, kept in self.stay.items()},
            before=self.before,
            limit=self.limit,
        )
        found = discovery.look({place: keys for place, (_table, keys) in rows.items()})
        for place, kept in discovery.kept.items():
            mine = self.tracked.get(place, ())
            done.kept.setdefault(place, {}).update(
                (key, reason) for key, reason in kept.items() if key in mine
            )
        for place, others in found.dependents.items():
            for key in others:
                done.kept.get(place, {}).pop(key, None)  # it went as a dependent
        self._detach(connection, discovery, found, done)
        for key, (values, count) in found.unnamed.items():
            reference = self.view.reference(connection, key)
            if self.database.dialect.delete_by_keys(connection, reference, values) < count:
                raise TidyRowsError(
                    f"rows of {reference.name} that reference it would not go: {SILENT}"
                )
            add_rows(done.dependents, TableRows(reference, (), count), reference.name)
        going: Rows = {}
        for place, doomed in found.doomed.items():
            table = rows[place][0] if place in rows else self.view.table(connection, place)
            going[place] = table, in_order(doomed)
        return going, found

    def _detach(
        self, connection: sa.Connection, discovery: Discovery, found: Found, done: Done
    ) -> None:
        for key, detached in found.detached.items():
            doomed = found.doomed.get(key.child, {})
            keys = [each for each in in_order(detached) if each not in doomed]
            if not keys:
                continue
            child = self.view.table(connection, key.child)
            if discovery.fate(key) is Fate.DETACHED:
                wide = self.view.with_columns(connection, key)
                self.database.dialect.set_null(connection, wide, keys, discovery.nulled(key))
            add_rows(done.detached, TableRows(child, keys), child.name)
        for key, (values, count) in found.detached_unnamed.items():
            reference = self.view.reference(connection, key)
            if discovery.fate(key) is Fate.DETACHED:
                self.database.dialect.set_null(connection, reference, values, discovery.nulled(key))
            add_rows(done.detached, TableRows(reference, (), count), reference.name)

    def _refuse_silence(self, connection: sa.Connection, step: Step) -> None:
        """Stop where the DELETE of these rows would take or change others without a word."""
        places = {place_of(batch.table.name) for batch in step.batches}
        for batch in step.batches:
            place = place_of(batch.table.name)
            incoming = self.view.incoming(place)
            if incoming and self.database.dialect.enforces_foreign_keys(connection):
                incoming = tuple(key for key in incoming if key.on_delete in SILENT_ACTIONS)
            if not incoming:
                continue
            if step.cycle and any(key.child in places for key in incoming):
                raise SeenError
            if any(acts_unseen(self.view, key) for key in incoming):
                raise SeenError
            self.database.dialect.lock(connection, batch.table, batch.keys)
            values = referenced_values(
                connection,
                self.database.dialect,
                self.view,
                place,
                batch.keys,
                incoming=incoming,
            )
            asked = [
                (self.view.reference(connection, key), values[key.parent_columns])
                for key in incoming
            ]
            if self.database.dialect.tables_with_rows(connection, asked):
                raise SeenError

    def _refuse_stayers(
        self,
        connection: sa.Connection,
        step: Step,
        counts: Mapping[TableName, int],
    ) -> None:
        """Stop where a row would not go and one that it references is to go after it."""
        stay: dict[Place, Sequence[Any]] = {}
        for batch in step.batches:
            place = place_of(batch.table.name)
            if counts[batch.table.name] >= len(batch.keys):
                continue
            if not any(key.parent in self.tracked for key in self.view.graph.outgoing(place)):
                continue
            keys: Sequence[Any] = []
            # It may have to switch off what hides rows, or fail: neither must outlast the look.
            with suppress(sa.exc.DBAPIError), connection.begin_nested() as look:
                keys = self.database.dialect.existing_keys(connection, batch.table, batch.keys)
                look.rollback()
            if keys:
                stay[place] = keys
        if stay:
            raise StayError(stay)

    def _delete(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        dialect = self.database.dialect
        if not step.cycle:
            (batch,) = step.batches
            return {batch.table.name: dialect.delete_by_keys(connection, batch.table, batch.keys)}
        one_statement = dialect.cycle_form is CycleForm.ONE_STATEMENT
        if one_statement or not any(key.on_delete == "CASCADE" for key in step.cycle):
            return self._delete_cycle(connection, step)
        # One row takes others along, uncounted, before their turn has come.
        before = self._present(connection, step)
        self._delete_cycle(connection, step)
        after = self._present(connection, step)
        return {name: count - after[name] for name, count in before.items()}

    def _delete_cycle(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        if self.database.dialect.cycle_form is CycleForm.LEVELS:
            return delete_by_levels(
                connection, self.database, step, foreign_keys_off=self.foreign_keys_off
            )
        rows = [(batch.table, batch.keys) for batch in step.batches]
        counts = self.database.dialect.delete_cycle(connection, rows)
        return {b.table.name: count for b, count in zip(step.batches, counts, strict=True)}

    def _present(self, connection: sa.Connection, step: Step) -> dict[TableName, int]:
        return {
            batch.table.name: len(
                self.database.dialect.existing_keys(connection, batch.table, batch.keys)
            )
            for batch in step.batches
        }


def add_rows(into: dict[TableName, TableRows], rows: TableRows, name: TableName) -> None:
    """Add rows to those of their table."""
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
