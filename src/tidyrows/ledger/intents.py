"""External resources as entries of a ledger: written before the thing is made."""

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


def body_of(
    tie: Tie,
    tables: Mapping[TableName, KeyedTable],
    numbers: Mapping[Any, Number],
    dialect: sa.Dialect,
) -> str:
    """What is written of a resource; what is not tracked is not waited for, so it is left out.

    Args:
        tie: the resource, and what goes before and after it.
        tables: those of the rows that are tracked.
        numbers: the entries of other resources.
        dialect: whose driver takes the keys.
    """

    def links(items: Iterable[Item]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for item in items:
            if isinstance(item, RowKey):
                table = tables.get(item.table)
                if table is not None:
                    key = item.key[0] if len(item.key) == 1 else item.key
                    columns = [column.name for column in table.key_columns]
                    sent = values_out(table, dialect, [key])[0]
                    found.append({"row": [*_place(item.table), columns, sent]})
            elif isinstance(item, TableName):
                found.append({"table": _place(item)})
            elif item in numbers:
                found.append({"external": list(numbers[item])})
        return found

    resource = tie.resource
    return json.dumps(
        {
            "kind": resource.kind,
            "payload": resource.payload,
            "after": links(tie.after),
            "before": links(tie.before),
        }
    )


def _place(name: TableName) -> list[str]:
    return [name.schema, name.name]


def hold_all(
    into: Externals,
    bodies: Mapping[Number, str],
    database: str,
    table_of: Callable[[str, str, list[str]], KeyedTable | None],
) -> dict[Any, Number]:
    """Hold what entries say.

    Args:
        into: the resources of the tracker that is to remove them.
        bodies: the entries, by number, in their order.
        database: how row keys name the ledger's database.
        table_of: a table by schema, name and key columns; None where it is no more.

    Returns:
        The entry of each resource.
    """
    try:
        read = {number: json.loads(body) for number, body in bodies.items()}
        made = {number: into.new(body["kind"], body["payload"]) for number, body in read.items()}

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

        for number, body in read.items():
            into.tie(made[number], items(body["after"]), items(body["before"]))
    except (ValueError, TypeError, KeyError) as error:
        raise TidyRowsError(
            "An entry of the ledger about an external resource cannot be read; nothing was "
            "removed. Was it written by another version of tidyrows?"
        ) from error
    return {resource: number for number, resource in made.items()}
