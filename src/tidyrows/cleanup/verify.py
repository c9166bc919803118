"""Look again, by key, whether the rows are gone.

It shares no code with the executor: a DELETE can do nothing and say nothing (a trigger, a rule,
row-level security on PostgreSQL), and a fault of ours would be repeated by our own code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import SessionStateError, TidyRowsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.keys import TableName

SILENT = (
    "DELETE removed nothing and raised nothing: a trigger, a rule or row-level security keeps it"
)


@dataclass(slots=True)
class Seen:
    """What was seen of the rows of one table.

    Attributes:
        there: the keys that name a row.
        unseen: the keys of which the database would not tell, and why.
    """

    there: list[Any] = field(default_factory=list)
    unseen: dict[Any, str] = field(default_factory=dict)


def still_there(database: Database, batches: Sequence[Batch]) -> dict[TableName, Seen]:
    """Which rows of these batches exist, in a transaction begun after the cleanup's.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: an error that may pass by itself.
    """
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
        if database.passes(error):
            raise
        if len(batches) == 1:
            return {batches[0].table.name: _seen_partly(database, batches[0], error)}
    # Row-level security that would hide rows, a table that is no more: the others can tell.
    return {batch.table.name: still_there(database, [batch])[batch.table.name] for batch in batches}


def _seen_partly(database: Database, batch: Batch, error: Exception) -> Seen:
    """What can be told of a table although looking at it failed."""
    if not database.has_table(batch.table.name):
        return Seen()  # its rows are gone with it
    if not isinstance(error, sa.exc.DBAPIError) and len(batch.keys) > 1:
        # The key's own type refused a value; the other keys can be looked for.
        middle = len(batch.keys) // 2
        parts = (batch.keys[:middle], batch.keys[middle:])
        halves = [
            still_there(database, [replace(batch, keys=part)])[batch.table.name] for part in parts
        ]
        return Seen(
            [key for half in halves for key in half.there],
            {key: text for half in halves for key, text in half.unseen.items()},
        )
    return Seen(unseen=dict.fromkeys(batch.keys, f"cannot be looked at: {in_short(error)}"))


def judge(
    batch: Batch, seen: Seen, deleted: int, refused: Mapping[Any, str]
) -> tuple[dict[Any, str], int]:
    """Which rows are left over.

    If every row of the batch was counted as deleted, what is there now came afterwards.

    Returns:
        The cause for each leftover, and how many keys name a row again that is not ours.
    """
    causes = {
        key: f"{refused[key]}; {text}" if key in refused else text
        for key, text in seen.unseen.items()
    }
    if deleted >= len(batch.keys):
        return causes, len(seen.there)
    causes.update((key, refused.get(key, SILENT)) for key in seen.there)
    return causes, 0


def in_short(error: BaseException) -> str:
    """An error in one line, without the statement and its parameters."""
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    text = "; ".join([*lines[:2], *notes])
    name = type(original).__name__
    known = isinstance(error, (sa.exc.DBAPIError, TidyRowsError))
    return (text or name) if known else f"{name}: {text}"
