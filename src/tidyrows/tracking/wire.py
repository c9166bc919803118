"""A tracker's rows as JSON, so that one process can create and another can clean."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import sys
import uuid
from array import array
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from tidyrows.errors import NotBoundError, TidyRowsError, UnknownTableError
from tidyrows.rows import KeyedTable, TableName
from tidyrows.tracking.digests import CELL, UNCOMPARED, Prints
from tidyrows.tracking.wire_ties import parts_of_entry, read_ties, write_ties
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.holdings import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

_VERSION = 1
# What the driver takes goes to the driver as it is: a type would want the project's own value.
_AS_IT_IS = sa.types.NullType
_WRITERS: tuple[tuple[type | tuple[type, ...], str, Callable[[Any], str]], ...] = (
    (uuid.UUID, "uuid", str),
    (dt.datetime, "datetime", dt.datetime.isoformat),  # a datetime is a date, too
    (dt.date, "date", dt.date.isoformat),
    (dt.time, "time", dt.time.isoformat),
    (decimal.Decimal, "decimal", str),
    ((bytes, bytearray, memoryview), "bytes", lambda value: base64.b64encode(value).decode()),
)
_READERS: dict[str, Callable[[str], Any]] = {
    "uuid": uuid.UUID,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "decimal": decimal.Decimal,
    "bytes": base64.b64decode,
}


def dumps(tracker: ResourceTracker) -> str:
    """The committed rows of a tracker; keys as the database's driver takes them."""
    tracker.settle()
    tables = []
    ties, held_now = tracker.ties(), tracker.snapshot()
    for held in held_now:
        dialect = tracker.engine_of(held.table.name.database).dialect
        processors = [
            column.type.dialect_impl(dialect).bind_processor(dialect)
            for column in held.table.key_columns
        ]
        keys = held.keys.in_order()
        tables.append(
            {
                "schema": held.table.name.schema,
                "table": held.table.name.name,
                "columns": [column.name for column in held.table.key_columns],
                "keys": [
                    [
                        _plain(_for_driver(process, value))
                        for process, value in zip(processors, row.key, strict=True)
                    ]
                    for row in map(held.table.row, keys)
                ],
                "told": [place for place, key in enumerate(keys) if key in held.told],
                "looks": _looks(held, keys),
                "nameless": _nameless(held),
            }
        )
    context = tracker.context
    return json.dumps(
        {
            "tidyrows": _VERSION,
            "run": context.run_id,
            "worker": context.worker_id,
            "worker_index": context.worker_index,
            "test": context.test_id,
            "workers": context.worker_count,
            "tables": tables,
            "externals": write_ties(ties, held_now),
        }
    )


def loads(
    cls: type[ResourceTracker], text: str, bind: Bind, *, allow_production: bool
) -> ResourceTracker:
    """A tracker of what :func:`dumps` wrote."""
    try:
        data = json.loads(text)
        version = data["tidyrows"]
        if version == _VERSION:
            tables = [
                (
                    (entry["schema"], entry["table"], entry["columns"]),
                    (_keys(entry["keys"]), set(entry["told"]), _prints(entry["looks"])),
                    entry.get("nameless"),
                )
                for entry in data["tables"]
            ]
            externals = [parts_of_entry(entry) for entry in data.get("externals", ())]
            names = ("run", "worker", "worker_index", "test", "workers")
            who = tuple(data[name] for name in names)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise TidyRowsError(
            "This is not what ResourceTracker.to_json() writes; nothing was read."
        ) from error
    if version != _VERSION:
        raise TidyRowsError(
            f"This was written in format {version}, and this tidyrows reads format {_VERSION}. "
            f"Use the same version of tidyrows on both sides."
        )
    context = WorkerContext(*who)
    tracker = cls(bind, context=context, allow_production=allow_production)
    engine = tracker.bound_engine
    if engine is None:
        raise NotBoundError(
            "from_json needs one engine to look the tables up on. Write "
            "ResourceTracker.from_json(text, engine)."
        )
    capture = tracker.capture(engine)
    metadata = sa.MetaData()
    held: dict[tuple[str, str], tuple[KeyedTable, Sequence[Any]]] = {}
    for (schema, name, columns), _rows, _nameless_rows in tables:
        # all of them first: reading a table brings those that it references along
        known = [sa.Column(column, _AS_IT_IS, primary_key=True) for column in columns]
        sa.Table(name, metadata, *known, schema=schema)
    for (schema, name, _columns), (keys, named, (prints, generated)), nameless in tables:
        try:
            table = sa.Table(
                name,
                metadata,
                schema=schema,
                autoload_with=engine,
                extend_existing=True,
                autoload_replace=False,
            )
        except NoSuchTableError as error:
            raise UnknownTableError(
                f"The database {capture.database} has no table {schema}.{name}, so its rows cannot "
                f"be read. Bind to the database that they were made in.",
                table=f"{schema}.{name}",
            ) from error
        keyed = KeyedTable(TableName(capture.database, schema, name), table)
        held[schema, name] = keyed, keys
        tracker.hold(keyed, keys, prints=prints, generated=generated)
        if named:
            tracker.take_told(keyed, [keys[place] for place in sorted(named)])
        if nameless:
            _take_nameless(tracker, keyed, nameless)
    read_ties(tracker.external_resources, externals, held)
    return tracker


def _nameless(held: TableHoldings) -> dict[str, Any] | None:
    """Rows of a table without a primary key, whole where they are known."""
    if not held.nameless:
        return None
    return {
        "columns": [column.name for column in held.table.table.columns],
        "rows": [[None if value is None else _plain(value) for value in row] for row in held.whole],
        "unkeyed": held.unkeyed,
        "unsure": held.unsure,
    }


def _take_nameless(tracker: ResourceTracker, table: KeyedTable, entry: dict[str, Any]) -> None:
    columns = [column.name for column in table.table.columns]
    places = {name: place for place, name in enumerate(entry["columns"])}
    rows: list[tuple[Any, ...] | None] = [None] * entry["unkeyed"]
    if set(columns) == set(places):
        for row in entry["rows"]:
            values = [_read(value) for value in row]
            rows.append(tuple(values[places[name]] for name in columns))
    else:  # the Table was not the whole table, so its rows could not be told from others
        rows += [None] * len(entry["rows"])
    tracker.take_unkeyed(table, rows)
    tracker.take_unkeyed(table, [()] * entry["unsure"], certain=False)


def _looks(held: TableHoldings, keys: Sequence[Any]) -> dict[str, Any] | None:
    """What rows with these keys looked like: the columns, and four bytes for each, row by row."""
    known = held.prints
    if known is None or not known.compared():
        return None
    columns = known.columns(keys)
    return {
        "columns": list(known.names),
        "generated": known.generated,
        "digests": [_packed(column) if any(column) else "" for column in columns],
    }


def _packed(cells: array[int]) -> str:
    if sys.byteorder == "big":
        cells.byteswap()
    return base64.b64encode(cells.tobytes()).decode()


def _prints(entry: dict[str, Any] | None) -> tuple[Prints | None, bool]:
    if entry is None:
        return None, False
    names = tuple(entry["columns"])
    columns = [array(CELL, base64.b64decode(text)) for text in entry["digests"]]
    rows = max(map(len, columns))
    cells = array(CELL, [UNCOMPARED]) * (rows * (len(names) + 1))
    for at, column in enumerate(columns):
        if sys.byteorder == "big":
            column.byteswap()
        if column:
            cells[at :: len(names) + 1] = column
    return Prints.of_digests(names, cells), bool(entry["generated"])


def in_python(held: KeyedTable, keys: Iterable[Any], table: sa.Table, dialect: Any) -> list[Any]:
    """Keys that came as the driver takes them, as values of the project's own Table."""
    places = {column.name: place for place, column in enumerate(held.key_columns)}
    order = [(places[column.name], _reader(column, held, dialect)) for column in table.primary_key]
    rows = [held.row(key).key for key in keys]
    found = [tuple(read(row[place]) for place, read in order) for row in rows]
    return [row[0] if len(order) == 1 else row for row in found]


def _reader(column: sa.Column[Any], held: KeyedTable, dialect: Any) -> Callable[[Any], Any]:
    raw = isinstance(held.table.c[column.name].type, _AS_IT_IS)
    converts = (sa.types.TypeDecorator, sa.Date, sa.DateTime, sa.Time, sa.Enum, sa.Uuid)
    if not raw or not isinstance(column.type, converts):
        return lambda value: value
    process = column.type.dialect_impl(dialect).result_processor(dialect, None)
    if process is None:
        return lambda value: value
    # what JSON has a form of its own for is the project's value already
    done = (uuid.UUID, dt.date, dt.time)
    return lambda value: value if isinstance(value, done) else process(value)


def _keys(entries: Iterable[list[Any]]) -> list[Any]:
    rows = [tuple(map(_read, entry)) for entry in entries]
    return [row[0] if len(row) == 1 else row for row in rows]


def _for_driver(process: Callable[[Any], Any] | None, value: Any) -> Any:
    """What the driver takes, without the wrapper that some have for bytes."""
    if process is None or isinstance(value, (bytes, bytearray, memoryview)):
        return value
    taken = process(value)
    return getattr(taken, "obj", getattr(taken, "adapted", taken))


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    for kind, name, write in _WRITERS:
        if isinstance(value, kind):
            return {name: write(value)}
    raise TidyRowsError(
        f"A key value of type {type(value).__name__} has no JSON form yet; clean up in the process "
        f"that made the rows."
    )


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        return _READERS[kind](text)
    return value
