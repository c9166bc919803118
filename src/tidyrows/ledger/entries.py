"""Changes of rows as entries, and back: the form in which a ledger and ``to_json`` write them.

The entries of a process are a log: a store that applies them in their order holds its rows. Keys
are written as the database's driver takes them: the reader may not have the project's models.
"""

from __future__ import annotations

import base64
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
    Hashes,
    Inserted,
    InsertedWhole,
    KeysChanged,
    KeysLost,
    Shape,
    Updated,
)
from tidyrows.capture.fingerprints import HASH, NEVER
from tidyrows.dialects import dialect_for
from tidyrows.dialects.keys import runs_of
from tidyrows.errors import TidyRowsError
from tidyrows.key_json import UNTYPED, keys_from_json, keys_to_json, row_to_json
from tidyrows.keys import KeyedTable, RowKey, TableName
from tidyrows.ledger.entry_checks import (
    HIGH,
    INCARNATION,
    LOW,
    MALFORMED,
    MOST_ROWS,
    check_keys,
    check_primary_key,
    check_table,
    parsed,
)
from tidyrows.schema.reflect import without_reflection_warnings
from tidyrows.worker import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tidyrows.external import Externals, Item, Tie


EXTERNAL = "external"
MAKING = ("rows", "whole", EXTERNAL)
"""The kinds of entries about new rows or resources."""
_KINDS: dict[type[Change], str] = {
    Inserted: "rows",
    InsertedWhole: "whole",
    Deleted: "gone",
    DeletedWhole: "taken",
    KeysChanged: "renamed",
    KeysLost: "moved",
    Updated: "updated",
}
_TYPES = {name: kind for kind, name in _KINDS.items()}
ROWS = tuple(_TYPES)
"""The kinds of entries about rows."""
_SHOWN = 200  # characters of a reason, which may repeat a value of the entry
_KEYS_IN_ONE, _ROWS_IN_ONE = 5_000, 500
"""The most keys and whole rows in one entry: servers limit the size of a packet."""

Number = tuple[str, int]
"""An entry's maker and its number."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its kind, the table of its rows, its JSON body, and the changes it is made of."""

    kind: str
    table: KeyedTable
    body: dict[str, Any]
    changes: tuple[Change, ...]


def entries_of(
    changes: Iterable[Change], dialect: sa.Dialect, refused: Callable[[TableName, str], None]
) -> list[Entry]:
    """Changes as few entries; ``refused`` gets a table whose keys have no JSON form, and why."""
    entries = []
    for group in _grouped(changes):
        first = group[0]
        try:
            bodies = list(_bodies(group, dialect))
        except TidyRowsError as error:
            refused(first.table.name, str(error))
        else:
            kind = _KINDS[type(first)]
            entries += [Entry(kind, first.table, body, tuple(group)) for body in bodies]
    return entries


def _grouped(changes: Iterable[Change]) -> list[list[Change]]:
    """Inserts of a table together, as long as nothing else happened to it in between."""
    groups: list[list[Change]] = []
    open_groups: dict[TableName, dict[Any, list[Change]]] = {}
    for change in changes:
        name = change.table.name
        if not isinstance(change, Inserted):
            open_groups.pop(name, None)
            groups.append([change])
            continue
        hashes = None if change.read_hashes is None else change.read_hashes()
        shape = hashes and hashes.shape
        of_rows = (change.generated, change.certain, change.named, change.sent)
        key = (change.table, *of_rows, change.incarnation, shape)
        of_table = open_groups.setdefault(name, {})
        if key not in of_table:
            of_table[key] = []
            groups.append(of_table[key])
        of_table[key].append(change)
    return groups


def _bodies(group: Sequence[Change], dialect: sa.Dialect) -> Iterator[dict[str, Any]]:
    first, table = group[0], group[0].table
    keys = list(first.keys)
    if len(group) > 1:
        keys = [key for change in group for key in change.keys]
    columns = table.key_columns or tuple(table.table.columns)
    common: dict[str, Any] = {} if first.certain else {"certain": False}
    common["columns"] = [column.name for column in columns]
    if isinstance(first, Inserted):
        common |= {"generated": True} if first.generated else {}
        common |= {"told": True} if first.named else {}
    if isinstance(first, (Inserted, KeysChanged)) and first.sent:
        common["sent"] = True
    if isinstance(first, (Inserted, InsertedWhole)) and first.incarnation:
        common["incarnation"] = first.incarnation
    if isinstance(first, Updated):
        common["set"] = sorted(first.columns)
    hashes = _hashes_of(group)
    is_long = not table.key_columns or isinstance(first, KeysChanged)
    size = _ROWS_IN_ONE if is_long else _KEYS_IN_ONE
    for start in range(0, max(len(keys), 1), size):
        here = slice(start, start + size)
        body = {**common, **_keys_body(first, keys[here], dialect)}
        if hashes is not None:
            some = _little_endian(hashes.values[here])
            body["looks"] = {
                "columns": hashes.shape.values,
                "references": hashes.shape.references,
                "either": hashes.shape.either,
                "hashes": base64.b64encode(some.tobytes()).decode(),
            }
        yield body


def _keys_body(first: Change, keys: Sequence[Any], dialect: sa.Dialect) -> dict[str, Any]:
    """Keys as the driver takes them, in their order; whole rows where there are no keys."""
    table = first.table
    if not table.key_columns:
        return {"rows": [row and row_to_json(table, row) for row in keys]}
    if isinstance(first, KeysChanged):
        new = [None if new is None else keys_to_json(table, dialect, [new])[0] for _, new in keys]
        return {"old": keys_to_json(table, dialect, [old for old, _new in keys]), "new": new}
    (column, *others) = table.key_columns
    is_number = not others and isinstance(column.type, (sa.Integer, UNTYPED))
    if is_number and column.type.dialect_impl(dialect).bind_processor(dialect) is None:
        runs = runs_of(keys)
        # a numeric column, whose type is not known in a sweep, holds longer numbers
        if runs is not None and runs[0][0] >= LOW and runs[-1][1] <= HIGH:
            return {"ranges": list(chain.from_iterable(runs))}
    return {"keys": keys_to_json(table, dialect, keys)}


def keys_of_body(body: dict[str, Any]) -> list[Any]:
    """The keys of a body."""
    if "ranges" not in body:
        return keys_from_json(body["keys"])
    ends = iter(body["ranges"])
    return [key for first, last in zip(ends, ends, strict=True) for key in range(first, last + 1)]


def _hashes_of(group: Sequence[Change]) -> Hashes | None:
    """The hashes of all rows of a group, which have one shape; None where they have none."""
    values, shape = array(HASH), None
    for change in group:
        hashes = None
        if isinstance(change, Updated):
            hashes = change.hashes
        elif isinstance(change, Inserted) and change.read_hashes is not None:
            hashes = change.read_hashes()
        if hashes is not None:
            shape = hashes.shape
            values += hashes.values
    return None if shape is None else Hashes(shape, values)


def _hashes_in(looks: dict[str, Any] | None, count: int) -> Hashes | None:
    if looks is None:
        return None
    if "cells" in looks:  # of an older tidyrows, which hashed otherwise: these rows are uncertain
        return Hashes(Shape(tuple(looks["columns"])), array(HASH, [NEVER]) * count)
    values = _little_endian(array(HASH, base64.b64decode(looks["hashes"])))
    if len(values) != count:
        raise ValueError
    shape = Shape(tuple(looks["columns"]), tuple(looks["references"]), looks.get("either", False))
    return Hashes(shape, values)


def _little_endian(hashes: array[int]) -> array[int]:
    """The byte order of entries, from or to that of this machine."""
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes


class EntryReader:
    """Reads entries as the changes and resources that they were made of."""

    def __init__(self, connection: sa.Connection, database: str) -> None:
        self._connection = connection
        self._database = database
        self._dialect = dialect_for(connection)
        self._rows = 0
        self._tables: dict[tuple[str, str], KeyedTable | None] = {}
        # of each table: the key that entries name it by, and the types that its columns have now
        self._keys: dict[tuple[str, str], tuple[str, ...]] = {}
        self._types: dict[tuple[str, str], dict[str, sa.types.TypeEngine[Any]]] = {}

    def change(
        self, kind: str, schema: str, table: str, body: str | dict[str, Any] | None
    ) -> Change | None:
        """The change of one entry; None where its table does not exist any more.

        Raises:
            TidyRowsError: it cannot be read, or names rows of a table that is never a target.
        """
        place = str(schema), str(table)
        try:
            if kind not in _TYPES:
                raise ValueError("its kind is unknown")
            read = parsed(body)
            keyed = self._table(*place, () if "rows" in read else read["columns"])
            if keyed is None:
                return None
            if "rows" not in read:
                check_keys(read, self._types[place])
                read = _in_order_of(keyed, read)
            change = _change(_TYPES[kind], keyed, read)
            self._rows += len(change.keys)
            if self._rows > MOST_ROWS:
                raise ValueError(f"it and those before it name more than {MOST_ROWS} rows")
        except MALFORMED as error:
            raise unreadable(f"about {'.'.join(place)}", kind, error) from error
        return change

    def _table(self, schema: str, name: str, key: Sequence[str]) -> KeyedTable | None:
        """A table, with these columns as its primary key; None where it does not exist any more."""
        place = schema, name
        if not all(isinstance(each, str) for each in key):
            raise ValueError("its columns have no names")
        if self._keys.setdefault(place, tuple(key)) != tuple(key):
            raise ValueError("the entries name its rows by different keys")
        if place in self._tables:
            return self._tables[place]
        check_table(self._dialect, place)
        types = self._types[place] = {}

        def note(_inspector: Any, _table: sa.Table, column: Any) -> None:
            types[column["name"]] = column["type"]

        known = [sa.Column(column, UNTYPED, primary_key=True) for column in key]
        try:
            with without_reflection_warnings():
                table = sa.Table(
                    name,
                    sa.MetaData(),
                    *known,
                    schema=schema,
                    autoload_with=self._connection,
                    extend_existing=True,
                    autoload_replace=False,
                    resolve_fks=False,
                    listeners=[("column_reflect", note)],
                )
        except NoSuchTableError:
            found = None
        else:
            check_table(self._dialect, place, types)
            found = KeyedTable(TableName(self._database, schema, name), table)
            if key:
                now = [column.name for column in found.key_columns]
                check_primary_key(key, now, types)
        self._tables[place] = found
        return found

    def resource(self, body: str | None) -> dict[str, Any]:
        """The body of an entry about an external resource."""
        try:
            return parsed(body)
        except ValueError as error:
            raise unreadable("about an external resource", EXTERNAL, error) from error

    def hold_resources(
        self, into: Externals, bodies: Mapping[Number, Mapping[str, Any]]
    ) -> dict[Any, Number]:
        """Hold the resources of entries, given in their order; returns the entry of each one."""

        def items(links: list[dict[str, Any]]) -> list[Item]:
            found: list[Item | None] = []
            for link in links:
                ((what, value),) = link.items()
                if what == "table":
                    found.append(TableName(self._database, *value))
                elif what == "external":
                    found.append(made.get(tuple(value)))
                else:
                    schema, name, columns, key = value
                    table = self._table(schema, name, columns)
                    if table is not None:
                        body = _in_order_of(table, {"columns": columns, "keys": [key]})
                        found.append(table.row(keys_from_json(body["keys"])[0]))
            return [item for item in found if item is not None]

        try:
            made = {
                number: into.new(body["kind"], body["payload"], body.get("number"))
                for number, body in bodies.items()
            }
            for number, body in bodies.items():
                into.tie(made[number], items(body["after"]), items(body["before"]))
        except MALFORMED as error:
            raise unreadable("about an external resource", EXTERNAL, error) from error
        return {resource: number for number, resource in made.items()}


def _in_order_of(table: KeyedTable, body: dict[str, Any]) -> dict[str, Any]:
    """A body with the values of its keys in the order that the primary key has now."""
    places = [body["columns"].index(name) for name in table.key_names]
    if places == sorted(places):
        return body
    return body | {
        name: [None if key is None else [key[at] for at in places] for key in body[name]]
        for name in ("keys", "old", "new")
        if name in body
    }


def _change(kind: type[Change], table: KeyedTable, body: dict[str, Any]) -> Change:
    certain = body.get("certain", True)
    if not INCARNATION.fullmatch(body.get("incarnation", "/0")):
        raise ValueError("its incarnation of the table is none")
    if "rows" in body:
        rows = [
            None if row is None else tuple(keys_from_json([[v] for v in row]))
            for row in body["rows"]
        ]
        places = {name: at for at, name in enumerate(body["columns"])}
        names = [column.name for column in table.table.columns]
        if set(names) != set(places):  # not the whole table: its rows cannot be distinguished
            rows = [None] * len(rows)
        rows = [row and tuple(row[places[name]] for name in names) for row in rows]
        if kind is InsertedWhole:
            return InsertedWhole(table, rows, body.get("incarnation"), certain=certain)
        return kind(table, rows, certain=certain)
    if kind is KeysChanged:
        new = [None if each is None else keys_from_json([each])[0] for each in body["new"]]
        pairs = list(zip(keys_from_json(body["old"]), new, strict=True))
        return KeysChanged(table, pairs, sent=body.get("sent", False))
    keys = keys_of_body(body)
    if kind is Updated:
        columns = frozenset(body["set"])
        hashes = _hashes_in(body.get("looks"), len(keys))
        return Updated(table, keys, columns, hashes, certain=certain)
    if kind is Inserted:
        hashes = _hashes_in(body.get("looks"), len(keys))
        return Inserted(
            table,
            keys,
            generated=body.get("generated", False),
            named=body.get("told", False),
            sent=body.get("sent", False),
            read_hashes=None if hashes is None else hashes.read,
            incarnation=body.get("incarnation"),
            certain=certain,
        )
    return kind(table, keys, certain=certain)


# -- external resources, which are entered before they are made ------------------------------------


def resource_body(
    tie: Tie,
    tables: Mapping[TableName, KeyedTable],
    numbers: Mapping[Any, Number],
    dialect_of: Callable[[TableName], sa.Dialect],
) -> dict[str, Any]:
    """The body of a resource's entry; rows and resources that are not tracked are left out."""

    def links(items: Iterable[Item]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for item in items:
            if isinstance(item, RowKey):
                table = tables.get(item.table)
                if table is not None:
                    key = item.key[0] if len(item.key) == 1 else item.key
                    columns = [column.name for column in table.key_columns]
                    sent = keys_to_json(table, dialect_of(item.table), [key])[0]
                    found.append({"row": [item.table.schema, item.table.name, columns, sent]})
            elif isinstance(item, TableName):
                found.append({"table": [item.schema, item.name]})
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


def unreadable(about: str, kind: str, error: BaseException) -> TidyRowsError:
    """The error for an entry that cannot be read, with the reason."""
    why = str(error)[:_SHOWN] if type(error) is ValueError else type(error).__name__
    return TidyRowsError(
        f"An entry of the ledger {printable(about)} cannot be read (kind {kind!r}): "
        f"{printable(why)}. Another version of tidyrows may have written it, or somebody else."
    )
