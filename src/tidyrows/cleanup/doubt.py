"""Rows in doubt: the answer to their COMMIT was lost, so the database is asked.

A row that is not there is no row. One that is there is ours only if nobody else can hold its key;
otherwise it stays and is reported: in doubt is never a reason to delete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.plan import Batch
from tidyrows.cleanup.verify import still_there
from tidyrows.tracking.statements import only_ours_can_hold

if TYPE_CHECKING:
    from tidyrows.cleanup.connection import Database
    from tidyrows.tracking.holdings import TableHoldings

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
    """Ask the database about the rows in doubt of one table."""
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
