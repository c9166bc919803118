"""Rows in doubt: the answer to their COMMIT was lost, so the database is asked.

A row that is not there is no row. One that is there is ours only if nobody else can hold its key;
otherwise it stays and is reported: in doubt is never a reason to delete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.tracking.statements import only_ours_can_hold

if TYPE_CHECKING:
    from tidyrows.cleanup.connection import Database
    from tidyrows.tracking.holdings import TableHoldings

CAUSE = (
    "the answer to its COMMIT was lost, and a row with this key may as well be somebody else's; "
    "look at it, and delete it yourself or call tracker.track_rows() to own it"
)


def settle_doubt(database: Database, held: TableHoldings) -> tuple[list[Any], list[Any]]:
    """Ask the database about the rows in doubt of one table.

    Returns:
        The keys that are ours after all, and the keys that stay in doubt.
    """
    keys = list(held.doubtful)
    with database.reading() as connection:
        there = database.dialect.existing_keys(connection, held.table, keys)
    ours: list[Any] = []
    unsure: list[Any] = []
    for key in there:
        # Inserted again after the doubt and committed, or told by the user: then it is ours.
        proved = key in held.keys or only_ours_can_hold(
            held.table.row(key).key,
            generated=held.doubtful[key],
            reused=database.dialect.reuses_keys,
        )
        (ours if proved else unsure).append(key)
    return ours, unsure
