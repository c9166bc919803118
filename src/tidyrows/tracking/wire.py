"""A tracker's rows as JSON, so that one process can create and another can clean."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import ipaddress
import json
import math
import sys
import uuid
from array import array
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from tidyrows.errors import LedgerError, NotBoundError, TidyRowsError, UnknownTableError
from tidyrows.rows import KeyedTable, TableName
from tidyrows.tracking.digests import CELL, UNCOMPARED, Prints
from tidyrows.tracking.wire_ties import parts_of_entry, read_ties, write_ties
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.holdings import TableHoldings
    from tidyrows.tracking.ledger import Ledger
    from tidyrows.tracking.tracker import ResourceTracker

_VERSION = 1
# What the driver takes goes to the driver as it is: a type would want the project's own value.
_AS_IT_IS = sa.types.NullType
_BYTES = (bytes, bytearray, memoryview)
_LOW, _HIGH = -(2**63), 2**63 - 1  # what every reader of JSON, a database too, takes exactly
_MICROSECOND = dt.timedelta(microseconds=1)
_WRITERS: tuple[tuple[type | tuple[type, ...], str, Callable[[Any], str]], ...] = (
    (int, "int", lambda value: str(int(value))),
    (float, "float", float.__repr__),
    (uuid.UUID, "uuid", str),
    (dt.datetime, "datetime", dt.datetime.isoformat),  # a datetime is a date, too
    (dt.date, "date", dt.date.isoformat),
    (dt.time, "time", dt.time.isoformat),
    (dt.timedelta, "microseconds", lambda value: str(value // _MICROSECOND)),
    (decimal.Decimal, "decimal", str),
    (_BYTES, "bytes", lambda value: base64.b64encode(value).decode()),
    # an interface is an address, too
    ((ipaddress.IPv4Interface, ipaddress.IPv6Interface), "interface", str),
    ((ipaddress.IPv4Address, ipaddress.IPv6Address), "address", str),
    ((ipaddress.IPv4Network, ipaddress.IPv6Network), "network", str),
)
_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "uuid": uuid.UUID,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "microseconds": lambda text: int(text) * _MICROSECOND,
    "decimal": decimal.Decimal,
    "bytes": base64.b64decode,
    "interface": ipaddress.ip_interface,
    "address": ipaddress.ip_address,
    "network": ipaddress.ip_network,
}


def dumps(tracker: ResourceTracker) -> str:
    """The committed rows of a tracker; keys as the database's driver takes them.

    Raises:
        TidyRowsError: a value has no form in JSON. Nothing is written then, and all stay tracked.
    """
    tracker.settle()
    tracker.catch_up()
    tables = []
    ties, held_now = tracker.ties(), tracker.snapshot()
    for held in held_now:
        dialect = tracker.engine_of(held.table.name.database).dialect
        keys = held.keys.in_order()
        tables.append(
            {
                "schema": held.table.name.schema,
                "table": held.table.name.name,
                "columns": [column.name for column in held.table.key_columns],
                "keys": values_out(held.table, dialect, keys),
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
            "ledger": tracker.handed_on(),
        }
    )


def loads(
    cls: type[ResourceTracker],
    text: str,
    bind: Bind,
    *,
    allow_production: bool | Collection[str],
    ledger: Ledger | None,
) -> ResourceTracker:
    """A tracker of what :func:`dumps` wrote."""
    tables, externals, context, entered = _parsed(text)
    if entered is not None and ledger is None:
        raise LedgerError(
            "These rows are entered into a ledger, which must let go of them when they are "
            "deleted. Write ResourceTracker.from_json(text, engine, ledger=Ledger(engine))."
        )
    tracker = cls(bind, context=context, allow_production=allow_production, ledger=ledger)
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
    if entered is not None:
        try:
            tracker.take_over(entered)
        except BaseException:
            tracker.said()  # its rows are another's: that it is gone is nothing to warn of
            raise
    return tracker


def _parsed(text: str) -> tuple[list[Any], list[Any], WorkerContext, dict[str, Any] | None]:
    """The tables, the external resources, whose they are, and their entries in a ledger."""
    try:
        data = json.loads(text)
        version = data["tidyrows"]
        if version == _VERSION:
            tables = [
                (
                    (entry["schema"], entry["table"], entry["columns"]),
                    (values_in(entry["keys"]), set(entry["told"]), _prints(entry["looks"])),
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
    return tables, externals, WorkerContext(*who), data.get("ledger")


def _nameless(held: TableHoldings) -> dict[str, Any] | None:
    """Rows of a table without a primary key, whole where they are known."""
    if not held.nameless:
        return None
    return {
        "columns": [column.name for column in held.table.table.columns],
        "rows": values_of_rows_out(held.table, held.whole),
        "unkeyed": held.unkeyed,
        "unsure": held.unsure,
    }


def _take_nameless(tracker: ResourceTracker, table: KeyedTable, entry: dict[str, Any]) -> None:
    columns = [column.name for column in table.table.columns]
    places = {name: place for place, name in enumerate(entry["columns"])}
    rows: list[tuple[Any, ...] | None] = [None] * entry["unkeyed"]
    if set(columns) == set(places):
        for row in entry["rows"]:
            values = _column_in(row)
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
    own = isinstance(column.type, sa.types.TypeDecorator)  # only it knows what its values are
    converts = (sa.Date, sa.DateTime, sa.Time, sa.Enum, sa.Uuid)
    if not raw or not (own or isinstance(column.type, converts)):
        return lambda value: value
    process = column.type.dialect_impl(dialect).result_processor(dialect, None)
    if process is None:
        return lambda value: value
    if own:
        return process
    # what JSON has a form of its own for may be the project's value already
    done = column.type.python_type
    return lambda value: value if isinstance(value, done) else process(value)


def values_out(table: KeyedTable, dialect: sa.Dialect, keys: Iterable[Any]) -> list[list[Any]]:
    """Keys as JSON has them, each a list of the values that the database's driver takes.

    Args:
        table: whose keys; a column of ``NullType`` has the driver's values already.
        dialect: SQLAlchemy's, of the engine that made the rows.
        keys: scalars where the key is one column, else tuples.

    Raises:
        TidyRowsError: a value has no form in JSON; the error names its type, table and column.
    """
    keys = list(keys)
    columns = table.key_columns
    if len(columns) == 1:
        return [[value] for value in _column_out(table, columns[0], dialect, keys)]
    if not keys:
        return []
    written = [
        _column_out(table, column, dialect, values)
        for column, values in zip(columns, zip(*keys, strict=True), strict=True)
    ]
    return [list(key) for key in zip(*written, strict=True)]


def values_of_rows_out(table: KeyedTable, rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Whole rows of a table without a primary key, as they were read: no type converts them.

    Raises:
        TidyRowsError: as for :func:`values_out`.
    """
    columns = table.table.columns
    return [
        [_value_out(table, column, None, value) for column, value in zip(columns, row, strict=True)]
        for row in rows
    ]


def values_in(entries: Sequence[Sequence[Any]]) -> list[Any]:
    """Keys that :func:`values_out` wrote, as the driver takes them: scalars, or tuples of several.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: nobody wrote such a key.
    """
    if entries and len(entries[0]) == 1:
        return _column_in([value for (value,) in entries])
    columns = [_column_in(list(column)) for column in zip(*entries, strict=True)]
    return list(zip(*columns, strict=True))


def _column_out(
    table: KeyedTable, column: sa.Column[Any], dialect: sa.Dialect, values: Sequence[Any]
) -> Sequence[Any]:
    kind = column.type
    if _wraps_in_sql(kind):
        raise TidyRowsError(
            f"The type {type(kind).__name__} of {table.name}.{column.name} changes its values in "
            f"SQL, so nobody knows here what the database made of them, and they have no JSON "
            f"form. Clean up in the process that made the rows: CleanupManager(tracker).cleanup()."
        )
    process = kind.dialect_impl(dialect).bind_processor(dialect)
    if process is None and set(map(type, values)) == {int} and isinstance(kind, sa.Integer):
        return values
    return [_value_out(table, column, process, value) for value in values]


def _column_in(values: list[Any]) -> list[Any]:
    if set(map(type, values)) <= {int, str}:
        return values
    return [_read(value) for value in values]


def _wraps_in_sql(kind: sa.types.TypeEngine[Any]) -> bool:
    if type(kind).bind_expression is sa.types.TypeEngine.bind_expression:
        return False
    return kind.bind_expression(sa.bindparam("x", type_=kind)) is not None


def _value_out(
    table: KeyedTable,
    column: sa.Column[Any],
    process: Callable[[Any], Any] | None,
    value: Any,
) -> Any:
    try:
        return _plain(value if process is None or value is None else _unwrapped(process(value)))
    except Exception as error:
        # neither the value nor the type's arguments are shown: a project's own may have a secret
        raise TidyRowsError(
            f"A key value of type {type(value).__name__} has no JSON form yet: it stands in "
            f"{table.name}.{column.name}, of type {type(column.type).__name__}. Clean up in the "
            f"process that made the rows, CleanupManager(tracker).cleanup(), or make them with "
            f"a plain number, text, date or UUID there."
        ) from error


def _unwrapped(taken: Any) -> Any:
    """What the driver takes, without the wrapper that some have for bytes."""
    if isinstance(taken, _BYTES):
        return taken
    inside = getattr(taken, "obj", getattr(taken, "adapted", None))
    return inside if isinstance(inside, _BYTES) else taken


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # half of a surrogate pair is no text: no database has such a key
        return _as_all_drivers_do(value, str.__str__(value))
    if isinstance(value, int) and _LOW <= value <= _HIGH:
        return _as_all_drivers_do(value, int(value))
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    for kind, name, write in _WRITERS:
        if isinstance(value, kind):
            return {name: write(value)}
    raise TypeError(type(value).__name__)


def _as_all_drivers_do(value: Any, plain: Any) -> Any:
    """The plain value; of a class (str, Enum) some drivers send the name, others the value."""
    if type(value) is not type(plain) and str(value) != str(plain):
        raise TypeError(type(value).__name__)
    return plain


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        return _READERS[kind](text)
    if isinstance(value, list):
        raise TypeError(value)
    return value
