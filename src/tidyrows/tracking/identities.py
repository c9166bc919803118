"""Objects in open sessions whose rows are gone: a session that knows them would be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.tracking.opened import open_sessions

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def expunge_rows(gone: Mapping[sa.Table, Collection[Any]]) -> None:
    """Take the objects of rows that were deleted out of every session of this process.

    A session that outlives its test (a scoped one, or a fixture's) would go on to give them out, or
    would not take a new row under a key that the database gives again.

    Args:
        gone: keys by table, scalars where the key has one column.
    """
    for session in open_sessions():
        for identity in list(session.identity_map.keys()):
            kind, key = identity[0], identity[1]
            table: Any = sa.inspect(kind).primary_key[0].table
            keys = gone.get(table)
            if keys and (key[0] if len(key) == 1 else key) in keys:
                known = session.identity_map.get(identity)
                if known is not None:
                    session.expunge(known)
