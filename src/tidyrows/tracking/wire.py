"""A tracker's rows as JSON, so that one process can create and another can clean."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from tidyrows.errors import NotBoundError, TidyRowsError, UnknownTableError
from tidyrows.rows import KeyedTable, TableName
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.tracker import ResourceTracker

_VERSION = 1
_READERS: dict[str, Any] = {
    "uuid": uuid.UUID,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "decimal": decimal.Decimal,
    "bytes": base64.b64decode,
}


def dumps(tracker: ResourceTracker) -> str:
    """The committed rows of a tracker; keys as the database's driver takes them."""
    tracker.settle()
    tables = []
    for held in tracker.snapshot():
        dialect = tracker.engine_of(held.table.name.database).dialect
        processors = [
            column.type.dialect_impl(dialect).bind_processor(dialect)
            for column in held.table.key_columns
        ]
        tables.append(
            {
                "schema": held.table.name.schema,
                "table": held.table.name.name,
                "keys": [
                    [
                        _plain(process(value) if process else value)
                        for process, value in zip(processors, row.key, strict=True)
                    ]
                    for row in map(held.table.row, held.keys.in_order())
                ],
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
            "tables": tables,
        }
    )


def loads(
    cls: type[ResourceTracker], text: str, bind: Bind, *, allow_production: bool
) -> ResourceTracker:
    """A tracker of what :func:`dumps` wrote."""
    try:
        data = json.loads(text)
        tables = data["tables"]
        version = data["tidyrows"]
    except (ValueError, TypeError, KeyError) as error:
        raise TidyRowsError(
            "This is not what ResourceTracker.to_json() writes; nothing was read."
        ) from error
    if version != _VERSION:
        raise TidyRowsError(
            f"This was written in format {version}, and this tidyrows reads format {_VERSION}. "
            f"Use the same version of tidyrows on both sides."
        )
    context = WorkerContext(data["run"], data["worker"], data["worker_index"], data["test"])
    tracker = cls(bind, context=context, allow_production=allow_production)
    engine = tracker.bound_engine
    if engine is None:
        raise NotBoundError(
            "from_json needs one engine to look the tables up on. Write "
            "ResourceTracker.from_json(text, engine)."
        )
    capture = tracker.capture(engine)
    metadata = sa.MetaData()
    for entry in tables:
        schema, name = entry["schema"], entry["table"]
        try:
            table = sa.Table(name, metadata, schema=schema, autoload_with=engine)
        except NoSuchTableError as error:
            raise UnknownTableError(
                f"The database {capture.database} has no table {schema}.{name}, so its rows cannot "
                f"be read. Bind to the database that they were made in.",
                table=f"{schema}.{name}",
            ) from error
        keyed = KeyedTable(TableName(capture.database, schema, name), table)
        keys = [tuple(map(_read, key)) for key in entry["keys"]]
        tracker.take_told(keyed, [key[0] if len(key) == 1 else key for key in keys])
    return tracker


def _plain(value: Any) -> Any:
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return value
    if isinstance(value, uuid.UUID):
        return {"uuid": str(value)}
    if isinstance(value, dt.datetime):
        return {"datetime": value.isoformat()}
    if isinstance(value, dt.date):
        return {"date": value.isoformat()}
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": base64.b64encode(bytes(value)).decode()}
    raise TidyRowsError(
        f"A key value of type {type(value).__name__} has no JSON form yet; clean up in the process "
        f"that made the rows."
    )


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        return _READERS[kind](text)
    return value
