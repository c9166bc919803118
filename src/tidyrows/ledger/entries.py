"""What a transaction did, as a ledger's bodies say it, and back.

A ledger is a log: whoever plays an owner's entries in their order into a tracker holds what that
owner held. Keys are written as the database's driver takes them, so that a process without the
project's models can read them; integers that follow each other as a first and a last.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from tidyrows.capture.changes import (
    Change,
    Deleted,
    DeletedWhole,
    Inserted,
    InsertedWhole,
    KeysChanged,
    KeysLost,
    Updated,
)
from tidyrows.capture.digests import CELL, Prints
from tidyrows.dialects.keys import chunks, runs_of
from tidyrows.errors import TidyRowsError
from tidyrows.key_json import values_in, values_of_rows_out, values_out
from tidyrows.keys import KeyedTable, TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


EXTERNAL = "external"
MAKING = ("rows", "whole", EXTERNAL)
"""The kinds of entries that say that there is something."""
_KINDS: dict[type[Change], str] = {
    Inserted: "rows",
    InsertedWhole: "whole",
    Deleted: "gone",
    DeletedWhole: "taken",
    KeysChanged: "renamed",
    KeysLost: "moved",
    Updated: "updated",
}
_NAMED = {name: kind for kind, name in _KINDS.items()}
ROWS = tuple(_NAMED)
"""The kinds of entries that say what rows there are."""
_KEYS_IN_ONE, _ROWS_IN_ONE = 5_000, 500
_NUMBERS = (sa.Integer, sa.types.NullType)
_AS_IT_IS = sa.types.NullType  # what the driver takes goes to the driver as it is


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry.

    Attributes:
        kind: what happened.
        table: to rows of this table.
        body: JSON.
        changes: what it was made of.
    """

    kind: str
    table: KeyedTable
    body: str
    changes: tuple[Change, ...]


def written(
    changes: Iterable[Change], dialect: sa.Dialect, refused: Callable[[TableName, str], None]
) -> list[Entry]:
    """What a transaction did, in few entries: the rows of a table together.

    Args:
        changes: in their order.
        dialect: whose driver takes the keys.
        refused: told of a table whose keys have no form in JSON, and why.
    """
    entries = []
    for group in _grouped(changes):
        first = group[0]
        try:
            bodies = [json.dumps(body) for body in _bodies(group, dialect)]
        except TidyRowsError as error:
            refused(first.table.name, str(error))
        else:
            kind = _KINDS[type(first)]
            entries += [Entry(kind, first.table, body, tuple(group)) for body in bodies]
    return entries


def _grouped(changes: Iterable[Change]) -> list[list[Change]]:
    """Inserts of a table together, as long as nothing else happened to it in between."""
    groups: list[list[Change]] = []
    open_now: dict[TableName, dict[Any, list[Change]]] = {}
    for change in changes:
        name = change.table.name
        if not isinstance(change, Inserted):
            open_now.pop(name, None)
            groups.append([change])
            continue
        names = None if change.prints is None else change.prints.layout.names
        key = (change.table, change.generated, change.certain, change.named, names)
        kin = open_now.setdefault(name, {})
        group = kin.get(key)
        if group is None:
            group = kin[key] = []
            groups.append(group)
        group.append(change)
    return groups


def _bodies(group: Sequence[Change], dialect: sa.Dialect) -> Iterator[dict[str, Any]]:
    """As many as keep each one small: a server takes no packet of any size."""
    first = group[0]
    table = first.table
    common: dict[str, Any] = {} if first.certain else {"certain": False}
    if not table.key_columns:
        common["columns"] = [column.name for column in table.table.columns]
        for part in chunks(first.keys, _ROWS_IN_ONE):
            rows = [row and values_of_rows_out(table, [row])[0] for row in part]
            yield {**common, "rows": rows}
        return
    common["columns"] = [column.name for column in table.key_columns]
    if isinstance(first, KeysChanged):
        for part in chunks(first.keys, _ROWS_IN_ONE):
            old = values_out(table, dialect, [old for old, _new in part])
            new = [None if new is None else values_out(table, dialect, [new])[0] for _, new in part]
            yield {**common, "old": old, "new": new}
        return
    if isinstance(first, Inserted):
        common |= {"generated": True} if first.generated else {}
        common |= {"told": True} if first.named else {}
    elif isinstance(first, Updated):
        common["patches"] = list(first.patches)
    keys = [key for change in group for key in change.keys]
    looks = _looks(group)
    size = max(len(keys), 1) if isinstance(first, Updated) else _KEYS_IN_ONE
    for start in range(0, max(len(keys), 1), size):
        part = keys[start : start + size]
        body = {**common, **_named(table, dialect, part)}
        if looks is not None:
            width = len(looks.names) + 1
            cells = looks.cells[start * width : (start + len(part)) * width]
            body["looks"] = {
                "columns": looks.names,
                "cells": base64.b64encode(cells.tobytes()).decode(),
            }
        yield body


def _named(table: KeyedTable, dialect: sa.Dialect, keys: Sequence[Any]) -> dict[str, Any]:
    """Keys as the driver takes them; in the same order."""
    (column, *others) = table.key_columns
    plain = not others and isinstance(column.type, _NUMBERS)
    if plain and column.type.dialect_impl(dialect).bind_processor(dialect) is None:
        runs = runs_of(keys)
        if runs is not None:
            return {"ranges": list(chain.from_iterable(runs))}
    return {"keys": values_out(table, dialect, keys)}


@dataclass(frozen=True, slots=True)
class _Looks:
    """Digests row after row, in the byte order of the ledger."""

    names: list[str]
    cells: array[int]


def _looks(group: Sequence[Change]) -> _Looks | None:
    prints = [
        each.prints for each in group if isinstance(each, Inserted) and each.prints is not None
    ]
    if not prints:
        return None
    cells = array(CELL)
    for each in prints:
        cells += each.cells()
    if sys.byteorder == "big":
        cells.byteswap()
    return _Looks(list(prints[0].layout.names), cells)


class EntryReader:
    """Reads entries of a ledger as the changes that they were made of.

    Args:
        database: the ledger's database.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._metadata = sa.MetaData()
        self._tables: dict[tuple[str, str], KeyedTable | None] = {}

    def change(
        self,
        connection: sa.Connection,
        kind: str,
        place: tuple[str, str],
        body: str,
    ) -> Change | None:
        """The change of one entry; None where its table does not exist any more.

        Raises:
            TidyRowsError: nobody wrote such an entry.
        """
        schema, table = place
        try:
            read = json.loads(body)
            key = () if "rows" in read else read["columns"]
            keyed = self.table(connection, schema, table, key)
            return None if keyed is None else _change(_NAMED[kind], keyed, read)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise TidyRowsError(
                f"An entry of the ledger about {schema}.{table} cannot be read (kind {kind!r}); "
                f"nothing was deleted. Was it written by another version of tidyrows?"
            ) from error

    def table(
        self, connection: sa.Connection, schema: str, name: str, key: Sequence[str]
    ) -> KeyedTable | None:
        """A table, with these columns as its primary key; None where it is no more."""
        if (schema, name) in self._tables:
            return self._tables[schema, name]
        known = [sa.Column(column, _AS_IT_IS, primary_key=True) for column in key]
        try:
            table = sa.Table(
                name,
                self._metadata,
                *known,
                schema=schema,
                autoload_with=connection,
                extend_existing=True,
                autoload_replace=False,
                resolve_fks=False,
            )
            found = KeyedTable(TableName(self._database, schema, name), table)
        except NoSuchTableError:
            found = None
        self._tables[schema, name] = found
        return found


def _change(kind: type[Change], table: KeyedTable, body: dict[str, Any]) -> Change:
    certain = body.get("certain", True)
    if "rows" in body:
        rows = [
            None if row is None else tuple(values_in([[v] for v in row])) for row in body["rows"]
        ]
        places = {name: at for at, name in enumerate(body["columns"])}
        names = [column.name for column in table.table.columns]
        if set(names) != set(places):  # not the whole table: its rows could not be told apart
            rows = [None] * len(rows)
        rows = [row and tuple(row[places[name]] for name in names) for row in rows]
        return kind(table, rows, certain=certain)
    if kind is KeysChanged:
        new = [None if each is None else values_in([each])[0] for each in body["new"]]
        return KeysChanged(table, list(zip(values_in(body["old"]), new, strict=True)))
    keys = keys_in(body)
    if kind is Updated:
        return Updated(table, keys, body.get("patches", ()), certain=certain)
    if kind is Inserted:
        return Inserted(
            table,
            keys,
            generated=body.get("generated", False),
            named=body.get("told", False),
            prints=_prints(body.get("looks")),
            certain=certain,
        )
    return kind(table, keys, certain=certain)


def keys_in(body: dict[str, Any]) -> list[Any]:
    """The keys of a body."""
    if "ranges" not in body:
        return values_in(body["keys"])
    ends = iter(body["ranges"])
    return [key for first, last in zip(ends, ends, strict=True) for key in range(first, last + 1)]


def _prints(looks: dict[str, Any] | None) -> Prints | None:
    if looks is None:
        return None
    cells = array(CELL, base64.b64decode(looks["cells"]))
    if sys.byteorder == "big":
        cells.byteswap()
    return Prints.of_digests(tuple(looks["columns"]), cells)
