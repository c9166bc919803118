"""The foreign-key graph of a database, built once and kept."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from tidyrows.schema import (
    ForeignKey,
    ForeignKeyGraph,
    merge,
    model_foreign_keys,
    pragma_foreign_keys,
    reflect_foreign_keys,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from tidyrows.cleanup.connection import Database
    from tidyrows.rows import KeyedTable

_Known = tuple[int, frozenset[str], frozenset[int], ForeignKeyGraph]
_graphs: weakref.WeakKeyDictionary[sa.Engine, _Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def graph_of(database: Database, tables: Iterable[KeyedTable]) -> ForeignKeyGraph:
    """The graph of everything that the schemas of these tables hold.

    What the models say is joined with what the database has: keys that the models do not know are
    honoured, and keys that only the models know still order the deletes. It is read again after
    DDL through the engine, after :func:`forget_graph`, and for a schema or model not seen before.
    """
    tables = list(tables)
    schemas = frozenset(table.name.schema for table in tables)
    metadatas = {id(table.table.metadata): table.table.metadata for table in tables}
    version = database.capture.schema_version
    with _lock:
        known = _graphs.get(database.engine)
    if (
        known is not None
        and known[0] == version
        and schemas <= known[1]
        and metadatas.keys() <= known[2]
    ):
        return known[3]
    if known is not None and known[0] == version:
        schemas |= known[1]
    with database.reading() as connection:
        found = reflect_foreign_keys(
            connection,
            sorted(schemas),
            read=pragma_foreign_keys if database.dialect.foreign_key_pragmas else None,
        )
    reals: dict[str | None, set[str]] = {}
    for table in tables:
        reals.setdefault(table.table.schema, set()).add(table.name.schema)
    declared: list[ForeignKey] = []
    for metadata in metadatas.values():
        for real in sorted(reals.get(None, {""})):

            def real_schema(schema: str | None, default: str = real) -> str:
                if schema is None:
                    return default
                return next(iter(sorted(reals.get(schema, {schema}))))

            declared.extend(model_foreign_keys(metadata.tables.values(), real_schema))
    graph = ForeignKeyGraph(merge(found, declared))
    with _lock:
        _graphs[database.engine] = (version, schemas, frozenset(metadatas), graph)
    return graph


def forget_graph(engine: sa.Engine) -> None:
    """Read the schema anew next time: a delete has failed in a way that the graph did not know."""
    with _lock:
        _graphs.pop(engine, None)
