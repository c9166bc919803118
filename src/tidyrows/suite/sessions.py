"""Objects in open sessions whose rows are gone: a session that knows them would be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.connections import open_sessions
from tidyrows.dialects import database_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy import orm

    from tidyrows.keys import KeyedTable


def expunge_rows(gone: Mapping[KeyedTable, Collection[Any]]) -> None:
    """Take the objects of rows that were deleted out of every session of this process.

    A session that outlives its test (a scoped one, or a fixture's) would go on to give them out, or
    would not take a new row under a key that the database gives again.

    Args:
        gone: keys by table, scalars where the key has one column.
    """
    by_place: dict[tuple[str, sa.Table], set[Any]] = {}
    for keyed, keys in gone.items():
        by_place.setdefault((keyed.name.database, keyed.table), set()).update(keys)
    tables = {table for _database, table in by_place}
    for session in open_sessions():
        for identity in list(session.identity_map.keys()):
            kind, key = identity[0], identity[1]
            mapper = sa.inspect(kind)
            table: Any = mapper.primary_key[0].table
            if table not in tables:
                continue
            keys = by_place.get((_database(session, mapper), table), ())
            if (key[0] if len(key) == 1 else key) in keys:
                known = session.identity_map.get(identity)
                if known is not None:
                    session.expunge(known)


def _database(session: orm.Session, mapper: orm.Mapper[Any]) -> str:
    """Where a session's objects of a class are; a row of the same key elsewhere is another."""
    try:
        return database_name(session.get_bind(mapper).engine)
    except sa.exc.UnboundExecutionError:
        return ""
