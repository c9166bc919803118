"""Look again, by key, whether the rows are gone.

It shares no code with the executor: a DELETE can do nothing and say nothing (a trigger, a rule,
row-level security on PostgreSQL), and a fault of ours would be repeated by our own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.rows import TableName

Found = dict["TableName", "list[Any] | str"]
"""By table, the keys that are still there; a text where the database would not tell."""


def still_there(database: Database, batches: Sequence[Batch]) -> Found:
    """Which rows of these batches exist, in a transaction begun after the cleanup's."""
    found: Found = {}
    try:
        with database.reading() as connection:
            for batch in batches:
                found[batch.table.name] = database.dialect.existing_keys(
                    connection, batch.table, batch.keys
                )
    except sa.exc.ProgrammingError as error:
        # row-level security that would hide rows, or a table that is no more: the others can tell
        if len(batches) == 1:
            return {batches[0].table.name: str(error.orig).splitlines()[0]}
        for batch in batches:
            found.update(still_there(database, [batch]))
    return found


def judge(
    batch: Batch, there: Sequence[Any], deleted: int, refused: Mapping[Any, str]
) -> dict[Any, str]:
    """Why each row that is still there is still there; {} where they are somebody else's now.

    If every row of the batch was counted as deleted, what is there now came afterwards.
    """
    if deleted >= len(batch.keys):
        return {}
    silent = (
        "DELETE removed nothing and raised nothing: a trigger, a rule or row-level security "
        "keeps it"
    )
    return {key: refused.get(key, silent) for key in there}
