"""Why rows stay, and which index would make their DELETE fast.

The database looks for rows that reference a deleted one, foreign key by foreign key. Without an
index it reads the whole child table, for every row deleted.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex

from tidyrows.cleanup.reasons import LeftoverKind, Reason, in_short
from tidyrows.cleanup.schema_view import SILENT_ACTIONS, referenced, schema_of
from tidyrows.errors import TidyRowsError, add_note
from tidyrows.schema.reflect import without_reflection_warnings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.plan import Batch
    from tidyrows.cleanup.schema_view import SchemaView
    from tidyrows.cleanup.verify import Seen
    from tidyrows.dialects import Dialect
    from tidyrows.schema.graph import ForeignKey, Place


_SILENCED = (sa.exc.SQLAlchemyError, TidyRowsError, ConnectionError)
"""What a look may raise that only adds to a report."""
_LOOKED_AT = 500
"""Rows per table: enough to see what is wrong."""
_BY_OTHERS = frozenset({LeftoverKind.LOCKED, LeftoverKind.DISCONNECTED, LeftoverKind.REFUSED})


def add_details(database: Database, batch: Batch, seen: Seen, reasons: dict[Any, Reason]) -> None:
    """Name the triggers, rules and policies of the table, or the tables that reference the rows.

    Raises nothing where the database does not answer: the reason is complete without.
    """
    ignored = [
        key
        for key, reason in reasons.items()
        if reason.kind is LeftoverKind.IGNORED or key in seen.unconfirmed
    ]
    if ignored:
        names: tuple[str, ...] = ()
        with suppress(*_SILENCED), database.reading() as connection:
            names = tuple(database.dialect.delete_suppressors(connection, batch.table))
        for key in ignored if names else ():
            reason, also = reasons[key], reasons[key].also
            named = {"names": names} if also is None else {"also": replace(also, names=names)}
            reasons[key] = replace(reason, **named)
    refused = [key for key in seen.there if key in reasons and reasons[key].kind in _BY_OTHERS]
    with suppress(*_SILENCED):
        tables = _referencing_tables(database, batch, refused) if refused else {}
        for key, names in tables.items():
            reasons[key] = replace(reasons[key], names=names)
    for error in {id(reasons[k].error): reasons[k].error for k in reasons}.values():
        if error is not None and database.dialect.is_permission_denied(error):
            _add_grant(database, batch, error)


def _add_grant(database: Database, batch: Batch, error: BaseException) -> None:
    """Add to an error of a missing right the statement that gives it."""
    with suppress(*_SILENCED):
        graph = schema_of(database, [batch.table]).graph
        places = [key.child for key in graph.incoming(batch.table.place)]
        text = in_short(error)
        named = (p for p in places if re.search(rf"\b{re.escape(p[1])}\b", text))
        schema, name = next(named, batch.table.place)
        with database.reading() as connection:
            grant = database.dialect.grant(connection, sa.table(name, schema=schema))
        note = f"have somebody who may run {grant}"
        if note not in getattr(error, "__notes__", ()):
            add_note(error, note)


def _referencing_tables(
    database: Database, batch: Batch, keys: Sequence[Any]
) -> dict[Any, tuple[str, ...]]:
    """The tables and columns that reference each of these rows and forbid its delete."""
    # The database's own error names one table at best, on SQLite none.
    keys = keys[:_LOOKED_AT]
    graph = schema_of(database, [batch.table]).graph
    found: dict[Any, tuple[str, ...]] = {}
    with database.reading() as connection:
        for key in graph.incoming(batch.table.place):
            if key.source == "database" and key.on_delete not in SILENT_ACTIONS:
                name = f"{'.'.join(key.child)} ({', '.join(key.child_columns)})"
                for row in referenced(connection, key, batch.table, keys).intersection(keys):
                    found[row] = (*found.get(row, ()), name)
    return found


SLOW = 0.5
"""Seconds that deleting a table's rows may take before missing indexes are looked for."""
SLOW_PER_ROW = 0.0005
"""Seconds that deleting one row may take: with indexes it is a tenth of this."""
_SEARCHED = frozenset({"btree", "hash"})
"""Kinds of index that find equal values."""


def is_slow(seconds: float, rows: int) -> bool:
    """Whether deleting so many rows should not have taken that long."""
    return seconds > SLOW and seconds > SLOW_PER_ROW * rows


def advice(
    database: Database, view: SchemaView, place: Place, *, rows: int, seconds: float
) -> list[str]:
    """Where deleting these rows was slow, one line for each missing index."""
    if not is_slow(seconds, rows):
        return []
    # It is only advice: no error of it may surface.
    with suppress(*_SILENCED), database.reading() as connection:
        return [
            f"{key.child[1]} ({', '.join(key.child_columns)}) has no index, so deleting {rows} "
            f"row(s) of {place[1]} took {seconds:.1f} s: {statement}"
            for key, statement in missing_indexes(connection, database.dialect, view, place)
        ]
    return []


def missing_indexes(
    connection: sa.Connection, dialect: Dialect, view: SchemaView, place: Place
) -> list[tuple[ForeignKey, str]]:
    """The foreign keys to a table that no index serves, and the statement that creates one."""
    missing: dict[tuple[Place, frozenset[str]], tuple[ForeignKey, str]] = {}
    for key in view.incoming(place):
        found, names = _indexes(connection, dialect, key.child)
        wanted = set(key.child_columns)
        if not any(set(each[: len(wanted)]) == wanted for each in found):
            missing[key.child, frozenset(wanted)] = key, _create(connection, key, names)
    return list(missing.values())


def _indexes(
    connection: sa.Connection, dialect: Dialect, place: Place
) -> tuple[list[Sequence[str]], set[str]]:
    """The columns of each index that finds every row by equal values; the names of all."""
    schema, table = place
    inspector = sa.inspect(connection)
    with without_reflection_warnings():  # of expressions, which do not count
        indexes = inspector.get_indexes(table, schema=schema)
        unique = inspector.get_unique_constraints(table, schema=schema)
    invalid = dialect.invalid_indexes(connection, schema, table)
    found = [inspector.get_pk_constraint(table, schema=schema)["constrained_columns"]]
    found += [each["column_names"] for each in unique]
    found += [list(_columns(each)) for each in indexes if each["name"] not in invalid]
    return [each for each in found if each], {str(each["name"]) for each in indexes}


def _columns(index: Any) -> Iterator[str]:
    """The leading columns by which an index finds rows; none if it does not have every row."""
    for option, value in index.get("dialect_options", {}).items():
        if option.endswith("_where") or (option.endswith("_using") and value not in _SEARCHED):
            return
    for name in index["column_names"]:
        if name is None:  # an expression
            return
        yield name


def _create(connection: sa.Connection, key: ForeignKey, names: Iterable[str]) -> str:
    schema, table = key.child
    longest = connection.dialect.max_identifier_length
    wanted = "_".join(("ix", table, *key.child_columns))[: longest - 3]
    name, number = wanted, 1
    while name in names:
        number += 1
        name = f"{wanted}_{number}"
    columns = [sa.Column(column, sa.types.NullType()) for column in key.child_columns]
    sa.Table(table, sa.MetaData(), *columns, sa.Index(name, *columns), schema=schema)
    (index,) = columns[0].table.indexes
    return str(CreateIndex(index).compile(connection)).strip()
