"""Who stands in the way: the tables whose rows reference a row that could not be deleted.

What a database says about a foreign key that was violated names one table at best, and on SQLite
none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.plan import place_of
from tidyrows.cleanup.references import referenced
from tidyrows.cleanup.schema_view import graph_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch

_LOOKED_AT = 500
"""Rows per table: enough to see what is wrong."""
_NO_BLOCK = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})


def blocking_tables(database: Database, batch: Batch, keys: Sequence[Any]) -> dict[Any, list[str]]:
    """The tables and columns that reference each of these rows and forbid its delete."""
    keys = keys[:_LOOKED_AT]
    graph = graph_of(database, [batch.table])
    found: dict[Any, list[str]] = {}
    with database.reading() as connection:
        for key in graph.incoming(place_of(batch.table.name)):
            if key.source == "database" and key.on_delete not in _NO_BLOCK:
                held = referenced(connection, key, batch.table, keys)
                name = f"{'.'.join(key.child)} ({', '.join(key.child_columns)})"
                for held_key in held:
                    found.setdefault(held_key, []).append(name)
    return found
