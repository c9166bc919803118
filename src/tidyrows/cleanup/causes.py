"""What keeps a row that no DELETE removes, by name: the DELETE itself did not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.verify import Seen
    from tidyrows.keys import KeyedTable


def name_what_keeps(
    database: Database, table: KeyedTable, seen: Seen, causes: dict[Any, str], silent: str
) -> None:
    """Add to the causes of these rows which triggers, rules and policies their table has.

    Args:
        database: where the rows are.
        table: their table.
        seen: what was seen of them.
        causes: by key; those that are ``silent``, or of rows that nobody was shown, are changed.
        silent: the cause of a row that is there though its DELETE raised nothing.
    """
    unexplained = [key for key, cause in causes.items() if cause == silent or key in seen.unseen]
    if not unexplained:
        return
    try:
        with database.reading() as connection:
            keeps = database.dialect.delete_suppressors(connection, table)
    except (sa.exc.SQLAlchemyError, SessionStateError):
        return  # the cause is told all the same, without a name
    if keeps:
        for key in unexplained:
            causes[key] += f" ({', '.join(keeps)})"
