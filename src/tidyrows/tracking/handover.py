"""A tracker's rows as JSON, so that one process can create and another can clean."""

from __future__ import annotations

import base64
import json
import sys
from array import array
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from tidyrows.capture.changes import Inserted, InsertedWhole
from tidyrows.capture.digests import CELL, UNCOMPARED, Prints
from tidyrows.errors import LedgerError, NotBoundError, TidyRowsError, UnknownTableError
from tidyrows.key_json import UNTYPED, column_in, values_in, values_of_rows_out, values_out
from tidyrows.keys import KeyedTable, TableName
from tidyrows.tracking.handover_ties import parts_of_entry, read_ties, write_ties
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

_VERSION = 1


def dumps(tracker: ResourceTracker) -> str:
    """The committed rows of a tracker; keys as the database's driver takes them.

    Raises:
        TidyRowsError: a value has no form in JSON. Nothing is written then, and all stay tracked.
    """
    tracker.settle()
    tracker.journals.catch_up()
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
        known = [sa.Column(column, UNTYPED, primary_key=True) for column in columns]
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
        tracker.store.apply(Inserted(keyed, keys, generated=generated, prints=prints))
        if named:
            told = [keys[place] for place in sorted(named)]
            tracker.store.apply(Inserted(keyed, told, named=True))
        if nameless:
            _take_nameless(tracker, keyed, nameless)
    read_ties(tracker.external_resources, externals, held)
    if entered is not None:
        try:
            tracker.take_over(entered)
        except BaseException:
            tracker.dismiss_leak_warning()  # its rows are another's
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
            values = column_in(row)
            rows.append(tuple(values[places[name]] for name in columns))
    else:  # the Table was not the whole table, so its rows could not be told from others
        rows += [None] * len(entry["rows"])
    tracker.store.apply(InsertedWhole(table, rows))
    tracker.store.apply(InsertedWhole(table, [()] * entry["unsure"], certain=False))


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
