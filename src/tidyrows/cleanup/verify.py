"""Looks again, by key, whether the rows are gone.

It shares no code with the executor: a DELETE can remove nothing and raise nothing (a trigger, a
rule, row-level security on PostgreSQL), and shared code would repeat a fault of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.keys import TableName


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
    except SessionStateError:
        raise
    except Exception as error:
        if database.is_transient(error):
            raise
        if len(batches) == 1:
            return {batches[0].table.name: _seen_partly(database, batches[0], error)}
    # Row-level security that would hide rows, a table that is no more: the others can tell.
    return {b.table.name: existing_rows(database, [b])[b.table.name] for b in batches}


def unconfirmed(batches: Sequence[Batch], error: Exception) -> dict[TableName, Seen]:
    """Nothing was seen of these rows because of an error."""
    reason = Reason(LeftoverKind.UNCONFIRMED, error)
    return {
        batch.table.name: Seen(unconfirmed=dict.fromkeys(batch.keys, reason)) for batch in batches
    }


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
    """Which rows are left over.

    If every row of the batch was counted as deleted, what is there now came afterwards.
    """
    reasons = {
        key: replace(refused[key], also=reason) if key in refused else reason
        for key, reason in seen.unconfirmed.items()
    }
    if deleted >= len(batch.keys):
        return reasons, len(seen.there)
    ignored = Reason(LeftoverKind.IGNORED)
    reasons.update((key, refused.get(key, ignored)) for key in seen.there)
    return reasons, 0
