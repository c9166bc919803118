"""External resources as JSON: rows by their place among a table's keys, handles by number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.external import Externals, Item, Tie
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings

Link: TypeAlias = dict[str, Any]
Written: TypeAlias = "tuple[str, Any, int, Sequence[Link], Sequence[Link]]"


def write_ties(ties: Iterable[Tie], tables: Iterable[TableHoldings]) -> list[dict[str, Any]]:
    """What :func:`read_ties` reads; what is not tracked is not waited for, so it is left out."""
    ties = list(ties)
    named = {item for tie in ties for item in (*tie.after, *tie.before)}
    links: dict[Item, Link] = {tie.resource: {"external": tie.resource.number} for tie in ties}
    for held in tables if named else ():
        place = [held.table.name.schema, held.table.name.name]
        links[held.table.name] = {"table": place}
        for at, row in enumerate(map(held.table.row, held.keys.in_order())):
            if row in named:
                links[row] = {"row": [*place, at]}
    return [
        {
            "kind": tie.resource.kind,
            "payload": tie.resource.payload,
            "number": tie.resource.number,
            "after": [links[item] for item in tie.after if item in links],
            "before": [links[item] for item in tie.before if item in links],
        }
        for tie in ties
    ]


def parts_of_entry(entry: Mapping[str, Any]) -> Written:
    """One written resource, its parts in order; KeyError where one is missing."""
    return entry["kind"], entry["payload"], entry["number"], entry["after"], entry["before"]


def read_ties(
    into: Externals,
    written: Sequence[Written],
    tables: Mapping[tuple[str, str], tuple[KeyedTable, Sequence[Any]]],
) -> None:
    """Hold what :func:`write_ties` wrote, with the tables' keys as they were written."""
    made = {each[2]: into.new(*each[:3]) for each in written}

    def item(link: Link) -> Item:
        ((what, value),) = link.items()
        if what == "external":
            return made[value]
        table, keys = tables[value[0], value[1]]
        return table.name if what == "table" else table.row(keys[value[2]])

    for _kind, _payload, number, after, before in written:
        into.tie(made[number], map(item, after), map(item, before))
