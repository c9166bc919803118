"""Asks the database which rows exist: after a cleanup, and where the answer to a COMMIT was lost.

It shares no code with the executor: a DELETE can remove nothing and raise nothing (a trigger, a
rule, row-level security on PostgreSQL), and shared code would repeat a fault of ours.

A row in doubt that does not exist was not committed. One that exists is ours only if no other row
can have its key; otherwise it stays and is reported: in doubt is never a reason to delete.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.affected_rows import only_ours_can_hold
from tidyrows.capture.changes import Inserted
from tidyrows.cleanup.connection import Database, DeadlineError
from tidyrows.cleanup.plan import Batch
from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.capture.changes import Change
    from tidyrows.cleanup.run import Outcome
    from tidyrows.keys import TableName
    from tidyrows.ledger.journal import Journal
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker


@dataclass(slots=True)
class Seen:
    """What was seen of the rows of one table: those that exist, and those not confirmed."""

    there: list[Any] = field(default_factory=list)
    unconfirmed: dict[Any, Reason] = field(default_factory=dict)


NOTHING = Seen()


def existing_rows(database: Database, batches: Sequence[Batch]) -> dict[TableName, Seen]:
    """Which rows of these batches exist, in a transaction begun after the cleanup's."""
    if not batches:
        return {}
    try:
        with database.reading() as connection:
            asked = [(batch.table, batch.keys) for batch in batches]
            found = database.dialect.existing_keys_of_each(connection, asked)
        return {batch.table.name: Seen(keys) for batch, keys in zip(batches, found, strict=True)}
    except (SessionStateError, DeadlineError):
        raise
    except Exception as error:
        if database.is_transient(error):
            raise
        if len(batches) == 1:
            return {batches[0].table.name: _seen_partly(database, batches[0], error)}
    # The cause may be one table, dropped or with row-level security: look at each alone.
    return {b.table.name: existing_rows(database, [b])[b.table.name] for b in batches}


def altered_keys(database: Database, held: TableHoldings) -> tuple[list[Any], dict[Any, Reason]]:
    """Of keys that nobody has seen in the database, those that are seen now, and the others.

    A column stores a key that it can hold as it is, so a row that has the key is ours. A trigger
    may have stored another key of ours, and somebody else's row may have the one that was sent.
    """
    table = held.table
    sent = [key for key in held.sent if key in held.keys or key in held.in_doubt]
    if not sent or not database.has_table(table.name):
        return sent, {}
    seen = existing_rows(database, [Batch(table, sent)])[table.name]
    with database.reading() as connection:
        real = database.dialect.resolve(connection, *table.place)
    unsafe = real is None or real.moves_keys or (real.alters_keys and database.dialect.returning)
    strange = {key for key in seen.there if unsafe and key not in held.named}
    there = {*seen.there, *seen.unconfirmed} - strange
    why = {True: Reason(LeftoverKind.ALTERED, names=(str(table.name),)), False: _NO_ROW}
    altered = {key: why[key in strange] for key in sent if key not in there}
    return [key for key in seen.there if key in there], altered


_NO_ROW = Reason(LeftoverKind.ALTERED)


def unconfirmed(batches: Sequence[Batch], error: Exception) -> dict[TableName, Seen]:
    """Nothing was seen of these rows because of an error."""
    reason = Reason(LeftoverKind.UNCONFIRMED, error)
    return {
        batch.table.name: Seen(unconfirmed=dict.fromkeys(batch.keys, reason)) for batch in batches
    }


def assumed(
    batches: Sequence[Batch], outcome: Outcome, error: Exception | None = None
) -> dict[TableName, Seen]:
    """What is known without a look: what was counted is gone, what was not tried is there."""
    unseen = Reason(LeftoverKind.UNCONFIRMED, error)
    found = {}
    for batch in batches:
        place = batch.table.place
        if outcome.deleted[place] >= len(batch.keys):
            continue
        gone = {key for keys in outcome.gone.get(place, ()) for key in keys}
        stay = {**outcome.kept.get(place, {}), **outcome.refused.get(place, {})}
        seen = found[batch.table.name] = Seen()
        for key in batch.keys:
            if key in stay and stay[key].kind is not LeftoverKind.DISCONNECTED:
                seen.there.append(key)
            elif key not in gone:
                seen.unconfirmed[key] = unseen
    return found


def _seen_partly(database: Database, batch: Batch, error: Exception) -> Seen:
    """What can be seen of a table although a SELECT from it failed."""
    if not database.has_table(batch.table.name):
        return NOTHING  # its rows are gone with it
    if not isinstance(error, sa.exc.DBAPIError) and len(batch.keys) > 1:
        # The key's own type refused a value; the other keys can be looked for.
        middle = len(batch.keys) // 2
        parts = (batch.keys[:middle], batch.keys[middle:])
        halves = [
            existing_rows(database, [replace(batch, keys=part)])[batch.table.name] for part in parts
        ]
        return Seen(
            [key for half in halves for key in half.there],
            {key: reason for half in halves for key, reason in half.unconfirmed.items()},
        )
    return unconfirmed([batch], error)[batch.table.name]


def judge(
    batch: Batch, seen: Seen, deleted: int, refused: Mapping[Any, Reason]
) -> tuple[dict[Any, Reason], int]:
    """Which rows are left over; and how many came after every row was counted as deleted."""
    reasons = {
        key: replace(refused[key], also=reason) if key in refused else reason
        for key, reason in seen.unconfirmed.items()
    }
    if deleted >= len(batch.keys):
        return reasons, len(seen.there)
    ignored = Reason(LeftoverKind.IGNORED)
    reasons.update((key, refused.get(key, ignored)) for key in seen.there)
    return reasons, 0


# -- rows in doubt: the answer to their COMMIT was lost --------------------------------------------

_SECONDS = 5.0


def resolve_doubts(database: Database, held: TableHoldings) -> tuple[list[Any], dict[Any, Reason]]:
    """Of the rows in doubt of one table, those that are ours, and those that stay in doubt."""
    refuse_while_committing(database)
    seen = existing_rows(database, [Batch(held.table, list(held.in_doubt))])[held.table.name]
    ours, in_doubt = [], dict(seen.unconfirmed)
    for key in seen.there:
        # Inserted again after the doubt and committed, or named by the user: then it is ours.
        if key in held.keys or _is_proof(database, held, key):
            ours.append(key)
        else:
            in_doubt[key] = Reason(LeftoverKind.IN_DOUBT)
    return ours, in_doubt


def _is_proof(database: Database, held: TableHoldings, key: Any) -> bool:
    """Whether a row with this key can only be ours."""
    return only_ours_can_hold(
        held.table.row(key).key, generated=held.in_doubt[key], reused=database.dialect.reuses_keys
    )


def was_committed(tracker: ResourceTracker, before: set[tuple[TableName, Any]]) -> bool | None:
    """Whether a COMMIT that was not answered had succeeded; None where no key proves it."""
    answer = _answer_of_ledgers(tracker, before)
    if answer is not None:
        return answer
    committed: bool | None = None
    unconfirmed = False
    tables = []
    for held in tracker.store.snapshot():
        table = held.table
        doubtful = [key for key in held.in_doubt if (table.name, key) not in before]
        tables.append((table, doubtful))
        database = _database(tracker, table.name.database)
        proving = [key for key in doubtful if _is_proof(database, held, key)]
        if not committed and proving:  # the first table's rows may have been deleted already
            refuse_while_committing(database)
            seen = existing_rows(database, [Batch(table, proving)])[table.name]
            unconfirmed = unconfirmed or bool(seen.unconfirmed)
            committed = bool(seen.there)
    if unconfirmed and not committed:
        committed = None
    for table, doubtful in tables:
        if committed is not None:
            tracker.store.resolve_keys(table, doubtful, committed=committed)
    return committed


def _database(tracker: ResourceTracker, name: str) -> Database:
    return Database(tracker.engine_of(name), lock_timeout=_SECONDS, statement_timeout=_SECONDS)


def _answer_of_ledgers(tracker: ResourceTracker, before: set[tuple[TableName, Any]]) -> bool | None:
    """Whether the ledgers have the entries of an unanswered COMMIT; None where none was made."""
    answer: bool | None = None
    for place in tracker.journals.databases:
        journal = tracker.journals.of(place)
        if journal is None or not journal.uncertain:
            continue
        for change, is_true in resolve_by_ledger(tracker, _database(tracker, place), journal):
            if not isinstance(change, Inserted):
                continue
            if not before.issuperset((change.table.name, key) for key in change.keys):
                answer = answer or is_true
    return answer


def resolve_by_ledger(
    tracker: ResourceTracker, database: Database, journal: Journal
) -> list[tuple[Change, bool]]:
    """Resolve what was entered with an unanswered COMMIT: it is there if that succeeded."""
    refuse_while_committing(database)
    with database.reading() as connection:
        resolved = journal.resolve(connection)
    for change, has_committed in resolved:
        tracker.store.resolve(change, committed=has_committed)
    tracker.warn_of_lost_rows()
    return resolved


def refuse_while_committing(database: Database) -> None:
    """A COMMIT may go on after its client is gone: until it has ended, its rows are not visible."""
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
