"""Entries of dead owners made those of another, as what is left of them.

A log says what is there only when it is played in its own order, and only an owner's own numbers
tell that order. So what is taken over is played at once, owner by owner, and written anew: each
tracker's rows under numbers of the new owner, with the run, worker and test that they were.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import TidyRowsError
from tidyrows.ledger.entries import EXTERNAL, MAKING, ROWS, Player, each_of
from tidyrows.ledger.intents import hold_all
from tidyrows.ledger.journal import Book
from tidyrows.ledger.table import in_order
from tidyrows.tracking.believing import believe
from tidyrows.tracking.tracker import ResourceTracker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.ledger.table import Ledger


@dataclass(slots=True)
class Logged:
    """What one tracker of an owner has entered.

    Attributes:
        tracker: holds what is left of it.
        columns: run, worker and test, as they were entered.
        tests: all tests that are named.
        externals: entries of external resources, by number.
        numbers: entries about rows.
    """

    tracker: ResourceTracker
    columns: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, None] = field(default_factory=dict)
    externals: dict[tuple[str, int], str] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)


def played(ledger: Ledger, connection: sa.Connection, owner: str) -> dict[int, Logged]:
    """What an owner has left, tracker by tracker.

    Raises:
        TidyRowsError: an entry cannot be read.
    """
    table = ledger.table_on(connection)
    columns = [table.c[name] for name in ("scope", "maker", "seq", "kind", "schema_name")]
    columns += [table.c[name] for name in ("table_name", "body", "run", "worker", "test")]
    found = ledger.run(
        connection,
        sa.select(*columns)
        .where(table.c.owner == owner, table.c.seq > 0)
        .order_by(*in_order(table)),
    ).all()
    logs: dict[int, Logged] = {}
    player: Player | None = None
    for scope, maker, seq, kind, schema, name, body, run, worker, test in found:
        log = logs.get(scope)
        if log is None:
            log = logs[scope] = Logged(_scratch(ledger))
        player = player or Player(log.tracker.capture(ledger.engine))
        if kind in MAKING or not log.columns:
            log.columns = {"run": run, "worker": worker, "test": test}
        if test:
            log.tests[test] = None
        if kind == EXTERNAL:
            log.externals[maker, seq] = body
        elif kind in ROWS:
            log.numbers.add((maker, seq))
            change = player.change(connection, kind, (schema, name), body, log.tracker)
            if change is not None:
                believe([change], [each.tracker for each in logs.values()])
        else:
            raise TidyRowsError(
                f"The ledger has an entry of the unknown kind {kind!r}; nothing was deleted. Was "
                f"it written by another version of tidyrows?"
            )
    return logs


def take_over(book: Book, connection: sa.Connection, wanted: Iterable[tuple[str, int]]) -> set[str]:
    """Make entries those of a book's owner.

    Args:
        book: its owner is nobody else's.
        connection: in a transaction, in which nothing is deleted yet.
        wanted: owners, and the numbers of their trackers.

    Returns:
        The owners that have nothing left.
    """
    ledger = book.ledger
    table = ledger.table_on(connection)
    scopes: dict[str, list[int]] = defaultdict(list)
    for owner, scope in sorted(wanted):
        scopes[owner].append(scope)
    empty: set[str] = set()
    for owner, theirs in scopes.items():
        # First, so that nobody else takes them, and nothing is read that is not there to take.
        locked = sa.select(table.c.seq).where(table.c.owner == owner).with_for_update()
        ledger.run(connection, locked).all()
        logs = played(ledger, connection, owner)
        for scope in theirs:
            if scope in logs:
                _rewrite(book, connection, (owner, scope), logs[scope])
        rest = [log for scope, log in logs.items() if scope not in theirs]
        if not any(log.externals or log.tracker.snapshot() for log in rest):
            gone = sa.delete(table).where(table.c.owner == owner, table.c.seq > 0)
            ledger.run(connection, gone)
            empty.add(owner)
    return empty


def _rewrite(book: Book, connection: sa.Connection, place: tuple[str, int], log: Logged) -> None:
    ledger, me, (owner, scope) = book.ledger, book.owner, place
    table = ledger.table_on(connection)
    mine = me.scope()
    here = (table.c.owner == owner, table.c.scope == scope)
    rows = sa.delete(table).where(*here, table.c.kind.in_(ROWS))
    ledger.run(connection, rows)
    external = sa.update(table).where(*here, table.c.kind == EXTERNAL)
    ledger.run(connection, external.values(owner=me.id, scope=mine))
    writer = Book(ledger, me, _refused)
    writer.scope = mine
    database = log.tracker.capture(ledger.engine).database
    writer.write(connection, each_of(log.tracker, database), log.columns)


def _refused(table: Any, reason: str) -> None:
    raise TidyRowsError(f"What was read of {table} cannot be written again: {reason}")


def load(book: Book, connection: sa.Connection) -> ResourceTracker:
    """A tracker of all that a book's owner has."""
    logs = played(book.ledger, connection, book.owner.id)
    tracker = _scratch(book.ledger)
    capture = tracker.capture(book.ledger.engine)
    externals: dict[tuple[str, int], str] = {}
    for log in logs.values():
        externals |= log.externals
        book.committed |= log.numbers
        believe(each_of(log.tracker, capture.database, tracker), [tracker])
    player = Player(capture)
    book.externals = hold_all(
        tracker.external_resources,
        externals,
        capture.database,
        lambda schema, name, key: player.table(connection, schema, name, key),
    )
    tracker.add_book(book)
    return tracker


def put_aside(book: Book, name: str) -> None:
    """Make what is left that of an owner which nobody is, under the runs whose it was."""
    ledger = book.ledger
    with ledger.alone(lock_timeout=5.0) as connection:
        table = ledger.table_on(connection)
        for scope, log in played(ledger, connection, book.owner.id).items():
            _rewrite(book, connection, (book.owner.id, scope), log)
        mine = (table.c.owner == book.owner.id, table.c.seq > 0)
        ledger.run(connection, sa.update(table).where(*mine).values(owner=name))


def _scratch(ledger: Ledger) -> ResourceTracker:
    tracker = ResourceTracker(ledger.engine, allow_production=True)
    tracker.said()
    return tracker
