"""Which of the known tables a raw statement empties, by the names that it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.keys import KeyedTable, TableName


def emptied_of(
    tables: Iterable[KeyedTable], names: Iterable[Sequence[str]], *, with_kin: bool
) -> set[TableName]:
    """Of these tables, those that are empty afterwards.

    A name without a schema that fits tables of several schemas says nothing.

    Args:
        tables: those that rows are known of.
        names: the parts of each name in the statement, the table's last.
        with_kin: tables that reference them are emptied too (TRUNCATE ... CASCADE).
    """
    known = {table.name: table for table in tables}
    found: set[TableName] = set()
    for parts in names:
        fits = {name for name in known if _fits(name, [part.casefold() for part in parts])}
        found |= fits if len(fits) == 1 else set()
    while with_kin:
        kin = {name for name in known.keys() - found if _references(known[name], found)}
        if not kin:
            break
        found |= kin
    return found


def _fits(name: TableName, parts: Sequence[str]) -> bool:
    own = [name.name.casefold(), (name.schema or "").casefold()]
    return list(reversed(parts))[:2] == own[: min(len(parts), 2)]


def _references(table: KeyedTable, others: Iterable[TableName]) -> bool:
    targets = {key.target_fullname.split(".")[-2].casefold() for key in table.table.foreign_keys}
    return any(other.name.casefold() in targets for other in others)
