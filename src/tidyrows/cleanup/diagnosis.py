"""Details of why rows stay, which the failed DELETE itself does not tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.references import referenced
from tidyrows.cleanup.schema_view import schema_of
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.cleanup.verify import Seen

_LOOKED_AT = 500
"""Rows per table: enough to see what is wrong."""
_NO_BLOCK = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})
_BY_OTHERS = frozenset({LeftoverKind.LOCKED, LeftoverKind.DISCONNECTED, LeftoverKind.REFUSED})


def add_details(database: Database, batch: Batch, seen: Seen, reasons: dict[Any, Reason]) -> None:
    """Name the triggers, rules and policies of the table, or the tables that reference the rows.

    Nothing is raised where the database cannot be asked: the reason is true without.
    """
    ignored = [
        key
        for key, reason in reasons.items()
        if reason.kind is LeftoverKind.IGNORED or key in seen.unconfirmed
    ]
    if ignored:
        try:
            with database.reading() as connection:
                names = tuple(database.dialect.delete_suppressors(connection, batch.table))
        except (sa.exc.SQLAlchemyError, SessionStateError):
            names = ()
        for key in ignored if names else ():
            reason = reasons[key]
            if reason.also is None:
                reasons[key] = replace(reason, names=names)
            else:
                reasons[key] = replace(reason, also=replace(reason.also, names=names))
    refused = [key for key in seen.there if key in reasons and reasons[key].kind in _BY_OTHERS]
    if refused:
        try:
            tables = _referencing_tables(database, batch, refused)
        except sa.exc.SQLAlchemyError:
            return
        for key, names in tables.items():
            reasons[key] = replace(reasons[key], names=names)


def _referencing_tables(
    database: Database, batch: Batch, keys: Sequence[Any]
) -> dict[Any, tuple[str, ...]]:
    """The tables and columns that reference each of these rows and forbid its delete.

    What a database says about a violated foreign key names one table at best, on SQLite none.
    """
    keys = keys[:_LOOKED_AT]
    graph = schema_of(database, [batch.table]).graph
    found: dict[Any, tuple[str, ...]] = {}
    with database.reading() as connection:
        for key in graph.incoming(batch.table.place):
            if key.source == "database" and key.on_delete not in _NO_BLOCK:
                name = f"{'.'.join(key.child)} ({', '.join(key.child_columns)})"
                for row in referenced(connection, key, batch.table, keys):
                    found[row] = (*found.get(row, ()), name)
    wanted = set(keys)
    return {row: names for row, names in found.items() if row in wanted}
