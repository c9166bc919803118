"""External resources as entries of a ledger, which are written before the resource is made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tidyrows.errors import TidyRowsError
from tidyrows.key_json import values_in, values_out
from tidyrows.keys import RowKey, TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import sqlalchemy as sa

    from tidyrows.external import Externals, Item, Tie
    from tidyrows.keys import KeyedTable

Number = tuple[str, int]
"""An entry's maker and its number."""


def resource_body(
    tie: Tie,
    tables: Mapping[TableName, KeyedTable],
    numbers: Mapping[Any, Number],
    dialect_of: Callable[[TableName], sa.Dialect],
) -> dict[str, Any]:
    """The body of a resource's entry; rows and resources that are not tracked are left out.

    Args:
        tie: the resource, and what is removed before and after it.
        tables: the tables of the tracked rows.
        numbers: the entries of other resources.
        dialect_of: SQLAlchemy's dialect, whose driver takes the keys of a table.
    """

    def links(items: Iterable[Item]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for item in items:
            if isinstance(item, RowKey):
                table = tables.get(item.table)
                if table is not None:
                    key = item.key[0] if len(item.key) == 1 else item.key
                    columns = [column.name for column in table.key_columns]
                    sent = values_out(table, dialect_of(item.table), [key])[0]
                    found.append({"row": [*_place(item.table), columns, sent]})
            elif isinstance(item, TableName):
                found.append({"table": _place(item)})
            elif item in numbers:
                found.append({"external": list(numbers[item])})
        return found

    resource = tie.resource
    return {
        "kind": resource.kind,
        "payload": resource.payload,
        "after": links(tie.after),
        "before": links(tie.before),
    }


def _place(name: TableName) -> list[str]:
    return [name.schema, name.name]


def read_resource_body(text: str) -> dict[str, Any]:
    """The body of a resource's entry, from the ledger."""
    try:
        body: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise _unreadable() from error
    return body


def hold_resources(
    into: Externals,
    bodies: Mapping[Number, Mapping[str, Any]],
    database: str,
    table_of: Callable[[str, str, list[str]], KeyedTable | None],
) -> dict[Any, Number]:
    """Hold the resources of entries; returns the entry of each resource.

    Args:
        into: the resources of a tracker.
        bodies: the entries, by number, in their order.
        database: the name of the entries' database in row keys.
        table_of: a table by schema, name and key columns; None where it does not exist any more.
    """

    def items(links: list[dict[str, Any]]) -> list[Item]:
        found: list[Item] = []
        for link in links:
            ((what, value),) = link.items()
            if what == "table":
                found.append(TableName(database, *value))
            elif what == "external":
                other = made.get((value[0], value[1]))
                found += [] if other is None else [other]
            else:
                table = table_of(value[0], value[1], value[2])
                found += [] if table is None else [table.row(values_in([value[3]])[0])]
        return found

    try:
        made = {
            number: into.new(body["kind"], body["payload"], body.get("number"))
            for number, body in bodies.items()
        }
        for number, body in bodies.items():
            into.tie(made[number], items(body["after"]), items(body["before"]))
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable() from error
    return {resource: number for number, resource in made.items()}


def _unreadable() -> TidyRowsError:
    return TidyRowsError(
        "An entry of the ledger about an external resource cannot be read; nothing was removed. "
        "Was it written by another version of tidyrows?"
    )
