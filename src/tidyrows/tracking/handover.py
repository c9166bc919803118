"""A tracker's rows as JSON: one process creates the rows, and another one deletes them.

Rows and external resources are written as entries of a ledger are; see `tidyrows.ledger.entries`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tidyrows.dialects import database_name
from tidyrows.errors import LedgerError, NotBoundError, TidyRowsError, UnknownTableError
from tidyrows.external import ExternalResource, Tie
from tidyrows.keys import TableName
from tidyrows.ledger.entries import EntryReader, entries_of, resource_body
from tidyrows.ledger.entry_table import OPTIONS
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change
    from tidyrows.external import Item
    from tidyrows.ledger.table import Ledger
    from tidyrows.tracking.binding import Bind
    from tidyrows.tracking.selection import Selection
    from tidyrows.tracking.store import TableHoldings

_VERSION = 2
_CONTEXT = {
    "run": "run_id",
    "worker": "worker_id",
    "worker_index": "worker_index",
    "test": "test_id",
    "workers": "worker_count",
}


T = TypeVar("T", bound="Selection")


def dumps(tracker: Selection) -> str:
    """The rows and external resources of a tracker; keys as the database's driver takes them."""
    tracker.engines.resolve()
    tracker.journals.catch_up()
    engine = tracker.bound_engine
    journal = None if engine is None else tracker.journals.of(database_name(engine))
    held = {each.table.name: each for each in tracker.store.snapshot()}
    dialects = {name: tracker.engine_of(name.database).dialect for name in held}
    tables = {name: each.table for name, each in held.items()}
    ties = [_without_untracked(tie, held) for tie in tracker.ties()]
    numbers = {tie.resource: ("", tie.resource.number) for tie in ties}
    return json.dumps(
        {
            "tidyrows": _VERSION,
            **{name: getattr(tracker.context, attribute) for name, attribute in _CONTEXT.items()},
            "entries": [
                [entry.kind, name.schema, name.name, entry.body]
                for name, each in held.items()
                for entry in entries_of(each.changes(), dialects[name], _refuse)
            ],
            "externals": [
                {
                    "number": tie.resource.number,
                    **resource_body(tie, tables, numbers, dialects.__getitem__),
                }
                for tie in ties
            ],
            "ledger": None if journal is None else journal.export(tracker.externals()),
        }
    )


def _without_untracked(tie: Tie, held: Mapping[TableName, TableHoldings]) -> Tie:
    """A resource does not wait for rows that are not tracked."""

    def is_tracked(item: Item) -> bool:
        if isinstance(item, ExternalResource):
            return True
        if isinstance(item, TableName):
            return item in held
        key = item.key[0] if len(item.key) == 1 else item.key
        return item.table in held and key in held[item.table].keys

    after, before = filter(is_tracked, tie.after), filter(is_tracked, tie.before)
    return Tie(tie.resource, tuple(after), tuple(before))


def _refuse(_table: TableName, reason: str) -> NoReturn:
    raise TidyRowsError(reason)


def loads(
    cls: Callable[..., T],
    text: str,
    bind: Bind,
    *,
    allow_production: bool | Collection[str],
    ledger: Ledger | None,
) -> T:
    """A tracker of what :func:`dumps` wrote."""
    data, context = _parsed(text)
    recorded = data.get("ledger")
    if recorded is not None and ledger is None:
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
    database = tracker.engines.capture(engine).database
    dialect, seconds = tracker.engines.capture(engine).dialect, tracker.sessions.patience
    with dialect.looking(engine, seconds, **OPTIONS) as connection:
        try:
            changes = _read(tracker, data, connection, database)
        except UnknownTableError:
            raise
        except (TidyRowsError, *_MALFORMED) as error:
            tracker.dismiss_leak_warning()  # it may hold some of the resources
            raise TidyRowsError(_NOT_OURS) from error
    for change in changes:
        tracker.store.apply(change)
    if recorded is not None:
        try:
            tracker.journals.adopt(recorded, engine, tracker.externals())
        except BaseException:
            tracker.dismiss_leak_warning()  # the rows belong to another process
            raise
    return tracker


_MALFORMED = (ValueError, TypeError, KeyError, ArithmeticError)
_NOT_OURS = (
    "This is not what ResourceTracker.to_json() writes; nothing was read. Give the text that "
    "tracker.to_json() returned."
)


def _parsed(text: str) -> tuple[dict[str, Any], WorkerContext]:
    try:
        data = json.loads(text)
        version = data["tidyrows"]
        if version == _VERSION:
            return data, WorkerContext(*(data[name] for name in _CONTEXT))
    except _MALFORMED as error:
        raise TidyRowsError(_NOT_OURS) from error
    raise TidyRowsError(
        f"This was written in format {version}, and this tidyrows reads format {_VERSION}. "
        f"Use the same version of tidyrows on both sides."
    )


def _read(
    tracker: Selection, data: dict[str, Any], connection: sa.Connection, database: str
) -> list[Change]:
    """The changes of all entries; the resources are held at once."""
    reader = EntryReader(connection, database)
    changes = []
    for kind, schema, name, body in data["entries"]:
        change = reader.change(kind, schema, name, body)
        if change is None:
            raise UnknownTableError(
                f"The database {database} has no table {schema}.{name}, so its rows cannot be "
                f"read. Bind to the database that they were made in.",
                table=f"{schema}.{name}",
            )
        changes.append(change)
    bodies = {("", body["number"]): body for body in data.get("externals", ())}
    reader.hold_resources(tracker.external_resources, bodies)
    return changes
