"""The foreign-key graph of a database, built once and kept."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

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

_Part: TypeAlias = tuple["sa.MetaData", "str | None", str]
"""The models of one MetaData, what they call a schema, and which schema that really is."""

_KEPT = 8
_Graphs: TypeAlias = "OrderedDict[frozenset[_Part], tuple[int, ForeignKeyGraph]]"
_graphs: weakref.WeakKeyDictionary[sa.Engine, _Graphs] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def graph_of(database: Database, tables: Iterable[KeyedTable]) -> ForeignKeyGraph:
    """The graph of everything that the schemas of these tables hold.

    What the models say is joined with what the database has: keys that the models do not know are
    honoured, and keys that only the models know still order the deletes. It is read again after
    DDL through the engine, after :func:`forget_graph`, and for a schema or model not seen before.
    """
    parts = frozenset(
        (table.table.metadata, table.table.schema, table.name.schema) for table in tables
    )
    version = database.capture.schema_version
    with _lock:
        for known, (known_version, graph) in _graphs.get(database.engine, {}).items():
            if known_version == version and parts <= known:
                return graph
    graph = ForeignKeyGraph(merge(_found(database, parts), _declared(parts)))
    with _lock:
        kept = _graphs.setdefault(database.engine, OrderedDict())
        kept[parts] = (version, graph)
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return graph


def forget_graph(engine: sa.Engine) -> None:
    """Read the schema anew next time: a delete has failed in a way that the graph did not know."""
    with _lock:
        _graphs.pop(engine, None)


def _found(database: Database, parts: frozenset[_Part]) -> list[ForeignKey]:
    """The database's own keys, in the schemas asked for and those that these lead up to."""
    read = pragma_foreign_keys if database.dialect.foreign_key_pragmas else None
    found: list[ForeignKey] = []
    wanted = {real for _metadata, _schema, real in parts}
    done: set[str] = set()
    with database.reading() as connection:
        while wanted:
            keys = reflect_foreign_keys(connection, sorted(wanted), read=read)
            found.extend(keys)
            done |= wanted
            wanted = {key.parent[0] for key in keys} - done
    return found


def _declared(parts: frozenset[_Part]) -> list[ForeignKey]:
    reals: dict[str | None, set[str]] = {}
    for _metadata, schema, real in parts:
        reals.setdefault(schema, set()).add(real)
    declared: list[ForeignKey] = []
    for metadata in {metadata for metadata, _schema, _real in parts}:
        for default in sorted(reals.get(None, {""})):

            def real_schema(schema: str | None, default: str = default) -> str:
                return default if schema is None else min(reals.get(schema, {schema}))

            declared.extend(model_foreign_keys(metadata.tables.values(), real_schema))
    return declared
