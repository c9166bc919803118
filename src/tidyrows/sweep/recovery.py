"""Entries of dead workers become a sweep's own, written anew.

The order of the entries of one process is known by its own numbers only. So entries are replayed
here, process by process, and what is left of each tracker's rows is written under new numbers, with
the run, worker and test that they had.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa

from tidyrows.capture.changes import Inserted, InsertedWhole
from tidyrows.errors import TidyRowsError
from tidyrows.ledger.entries import EXTERNAL, MAKING, ROWS, EntryReader
from tidyrows.ledger.entry_table import entry_order
from tidyrows.ledger.intents import hold_resources, read_resource_body
from tidyrows.ledger.journal import Journal
from tidyrows.tracking.store import Store
from tidyrows.tracking.tracker import ResourceTracker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.keys import TableName
    from tidyrows.ledger.table import Ledger


@dataclass(slots=True)
class TrackerEntries:
    """What one tracker of a dead worker has entered; ``store`` holds what is left of its rows."""

    store: Store = field(default_factory=Store)
    columns: dict[str, Any] = field(default_factory=dict)
    """Run, worker and test, as they were entered."""
    tests: dict[str, None] = field(default_factory=dict)
    externals: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)
    """The entries about rows."""


def read_entries(
    ledger: Ledger, connection: sa.Connection, owner: str
) -> dict[int, TrackerEntries]:
    """What is left of an owner's rows, by the number of its tracker."""
    table = ledger.table_on(connection)
    columns = [table.c[name] for name in ("scope", "maker", "seq", "kind", "schema_name")]
    columns += [table.c[name] for name in ("table_name", "body", "run", "worker", "test")]
    rows = ledger.run(
        connection,
        sa.select(*columns)
        .where(table.c.owner == owner, table.c.seq > 0)
        .order_by(*entry_order(table)),
    ).all()
    of_tracker: dict[int, TrackerEntries] = {}
    reader = EntryReader(ledger.database)
    for scope, maker, seq, kind, schema, name, body, run, worker, test in rows:
        entries = of_tracker.setdefault(scope, TrackerEntries())
        if kind in MAKING or not entries.columns:
            entries.columns = {"run": run, "worker": worker, "test": test}
        if test:
            entries.tests[test] = None
        if kind == EXTERNAL:
            entries.externals[maker, seq] = read_resource_body(body)
        elif kind in ROWS:
            entries.numbers.add((maker, seq))
            change = reader.change(connection, kind, (schema, name), body)
            if isinstance(change, (Inserted, InsertedWhole)):
                entries.store.apply(change)
            elif change is not None:
                for each in of_tracker.values():
                    change = each.store.apply(change)
        else:
            raise TidyRowsError(
                f"The ledger has an entry of the unknown kind {kind!r}; nothing was deleted. Was "
                f"it written by another version of tidyrows?"
            )
    return of_tracker


def recover(journal: Journal, connection: sa.Connection, wanted: Iterable[tuple[str, int]]) -> None:
    """Make the entries of these owners and trackers those of a journal's process."""
    ledger = journal.ledger
    table = ledger.table_on(connection)
    wanted_scopes: dict[str, list[int]] = defaultdict(list)
    for owner, scope in sorted(wanted):
        wanted_scopes[owner].append(scope)
    for owner, scopes in wanted_scopes.items():
        # Locked before they are read, so that no other process recovers them meanwhile.
        locked = sa.select(table.c.seq).where(table.c.owner == owner).with_for_update()
        ledger.run(connection, locked).all()
        of_tracker = read_entries(ledger, connection, owner)
        for scope in scopes:
            if scope in of_tracker:
                _rewrite(journal, connection, (owner, scope), of_tracker.pop(scope))
        if not any(each.externals or each.store.snapshot() for each in of_tracker.values()):
            left = sa.delete(table).where(table.c.owner == owner, table.c.seq > 0)
            ledger.run(connection, left)


def _rewrite(
    journal: Journal, connection: sa.Connection, place: tuple[str, int], entries: TrackerEntries
) -> None:
    """Write what is left of one tracker's rows as entries of the journal's process."""
    ledger, process, (owner, scope) = journal.ledger, journal.owner, place
    table = ledger.table_on(connection)
    writer = Journal(ledger, process, refuse_unwritable)
    here = (table.c.owner == owner, table.c.scope == scope)
    ledger.run(connection, sa.delete(table).where(*here, table.c.kind.in_(ROWS)))
    externals = sa.update(table).where(*here, table.c.kind == EXTERNAL)
    ledger.run(connection, externals.values(owner=process.id, scope=writer.scope))
    writer.write(connection, entries.store.changes(ledger.database), entries.columns)


def refuse_unwritable(table: TableName, reason: str) -> NoReturn:
    """Stop a sweep whose rows cannot be entered again."""
    raise TidyRowsError(f"Rows of {table} cannot be written to the ledger again: {reason}")


def load(journal: Journal, connection: sa.Connection) -> ResourceTracker:
    """A tracker of all rows of a journal's process."""
    tracker = ResourceTracker(journal.ledger.engine, allow_production=True)
    tracker.dismiss_leak_warning()
    database = journal.ledger.database
    externals: dict[tuple[str, int], dict[str, Any]] = {}
    for entries in read_entries(journal.ledger, connection, journal.owner.id).values():
        externals |= entries.externals
        journal.committed |= entries.numbers
        for change in entries.store.changes(database):
            tracker.store.apply(change)
    reader = EntryReader(database)
    journal.externals = hold_resources(
        tracker.external_resources,
        externals,
        database,
        lambda schema, name, key: reader.table(connection, schema, name, key),
    )
    tracker.journals.attach(journal)
    return tracker


def put_aside(journal: Journal, name: str) -> None:
    """Give what is left an owner that no process is, under the runs that it had."""
    ledger, process = journal.ledger, journal.owner
    with ledger.alone(lock_timeout=5.0) as connection:
        table = ledger.table_on(connection)
        for scope, entries in read_entries(ledger, connection, process.id).items():
            _rewrite(journal, connection, (process.id, scope), entries)
        mine = (table.c.owner == process.id, table.c.seq > 0)
        ledger.run(connection, sa.update(table).where(*mine).values(owner=name))
