"""Rows in doubt: the answer to their COMMIT was lost, so the database is asked.

A row that is not there is no row. One that is there is ours only if nobody else can hold its key;
otherwise it stays and is reported: in doubt is never a reason to delete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Inserted
from tidyrows.capture.inserts import only_ours_can_hold
from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.plan import Batch
from tidyrows.cleanup.verify import still_there

if TYPE_CHECKING:
    from tidyrows.capture.changes import Change
    from tidyrows.keys import TableName
    from tidyrows.ledger.journal import Journal
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

CAUSE = (
    "the answer to its COMMIT was lost, and a row with this key may as well be somebody else's; "
    "look at it, and delete it yourself or call tracker.track_rows() to own it"
)


@dataclass(slots=True)
class Settled:
    """What became of the rows in doubt of one table; those not named are no rows.

    Attributes:
        ours: keys that are ours after all.
        unsure: keys that stay in doubt, and why.
    """

    ours: list[Any] = field(default_factory=list)
    unsure: dict[Any, str] = field(default_factory=dict)


def settle_doubt(database: Database, held: TableHoldings) -> Settled:
    """Ask the database about the rows in doubt of one table.

    Raises:
        ConnectionError: the server has not ended the transaction yet; ask again.
    """
    refuse_too_early(database)
    name = held.table.name
    seen = still_there(database, [Batch(held.table, list(held.doubtful))])[name]
    settled = Settled(unsure=dict(seen.unseen))
    for key in seen.there:
        # Inserted again after the doubt and committed, or told by the user: then it is ours.
        if key in held.keys or only_ours_can_hold(
            held.table.row(key).key,
            generated=held.doubtful[key],
            reused=database.dialect.reuses_keys,
        ):
            settled.ours.append(key)
        else:
            settled.unsure[key] = CAUSE
    return settled


_SECONDS = 5.0


def was_committed(tracker: ResourceTracker, before: set[tuple[TableName, Any]]) -> bool | None:
    """Whether a COMMIT that was not answered had succeeded.

    Its rows are the tracker's, or forgotten, once that is known.

    Args:
        tracker: it holds the rows in doubt.
        before: rows in doubt that are not of this COMMIT.

    Returns:
        None where no key proves whose row it names.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: an error that may pass by itself.
        ConnectionError: the server has not ended the transaction yet; ask again.
    """
    told = _told_by_ledgers(tracker, before)
    if told is not None:
        return told
    committed: bool | None = None
    unseen = False
    theirs = []
    for held in tracker.snapshot():
        table = held.table
        doubtful = [key for key in held.doubtful if (table.name, key) not in before]
        theirs.append((table, doubtful))
        engine = tracker.engine_of(table.name.database)
        database = Database(engine, lock_timeout=_SECONDS, statement_timeout=_SECONDS)
        proving = [
            key
            for key in doubtful
            if only_ours_can_hold(
                table.row(key).key,
                generated=held.doubtful[key],
                reused=database.dialect.reuses_keys,
            )
        ]
        if not committed and proving:  # somebody may have deleted the first table's rows already
            refuse_too_early(database)
            seen = still_there(database, [Batch(table, proving)])[table.name]
            unseen = unseen or bool(seen.unseen)
            committed = bool(seen.there)
    if unseen and not committed:
        committed = None
    for table, doubtful in theirs:
        if committed is not None:
            tracker.store.resolve_keys(table, doubtful, committed=committed)
    return committed


def _told_by_ledgers(tracker: ResourceTracker, before: set[tuple[TableName, Any]]) -> bool | None:
    """What the ledgers say of a COMMIT that was not answered; None where nothing was entered."""
    told: bool | None = None
    for place in tracker.journals.databases:
        book = tracker.journals.of(place)
        if book is None or not book.uncertain:
            continue
        engine = tracker.engine_of(place)
        database = Database(engine, lock_timeout=_SECONDS, statement_timeout=_SECONDS)
        for change, is_true in ask_ledger(tracker, database, book):
            if not isinstance(change, Inserted):
                continue
            if not before.issuperset((change.table.name, key) for key in change.keys):
                told = told or is_true
    return told


def ask_ledger(
    tracker: ResourceTracker, database: Database, book: Journal
) -> list[tuple[Change, bool]]:
    """Settle what was entered with a COMMIT that was not answered: it is there if that succeeded.

    Returns:
        What was in doubt, and whether it is true.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: an error that may pass by itself.
        ConnectionError: the server has not ended the transaction yet; ask again.
    """
    refuse_too_early(database)
    with database.reading() as connection:
        committed, lost = book.resolve(connection)
    for change in lost:
        tracker.store.resolve(change, committed=False)
    for change in committed:
        tracker.store.resolve(change, committed=True)
    tracker.warn_of_lost_rows()
    return [*((change, True) for change in committed), *((change, False) for change in lost)]


def refuse_too_early(database: Database) -> None:
    """A COMMIT may go on after its client is gone: until it has ended, nobody sees its rows."""
    unanswered = database.capture.unanswered
    if not unanswered:
        return
    with database.reading() as connection:
        over = {each for each in list(unanswered) if not database.dialect.is_busy(connection, each)}
    unanswered -= over
    if unanswered:
        raise ConnectionError(
            f"the server is still busy with a COMMIT of the lost connection {min(unanswered)}"
        )
