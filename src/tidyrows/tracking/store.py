"""The rows that a tracker holds; the one place that carries out a change."""

from __future__ import annotations

import os
import threading
from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import (
    Change,
    Deleted,
    DeletedWhole,
    Hashes,
    Inserted,
    InsertedWhole,
    KeysChanged,
    KeysLost,
    Touched,
    Updated,
)
from tidyrows.capture.fingerprints import HASH
from tidyrows.tracking.fingerprints import RowHashes
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.keys import KeyedTable, TableName


@dataclass(slots=True)
class TableHoldings:
    """The rows of one table.

    Attributes:
        table: the real table.
        keys: the rows that are ours.
        doubtful: rows that may be ours; True where only ours can have this key.
        told: those among ``keys`` that the user named.
        unkeyed: how many rows were inserted that no DELETE can name.
        whole: rows of a table without a primary key, as they were inserted.
        unsure: how many such rows may be there or not, and nobody can find out.
        hashes: hashes of the rows, where the database may give their keys to other rows.
    """

    table: KeyedTable
    keys: KeySet = field(default_factory=KeySet)
    doubtful: dict[Any, bool] = field(default_factory=dict)
    told: KeySet = field(default_factory=KeySet)
    unkeyed: int = 0
    hashes: RowHashes | None = None
    whole: list[tuple[Any, ...]] = field(default_factory=list)
    unsure: int = 0

    def __bool__(self) -> bool:
        return bool(len(self.keys) or self.doubtful or self.nameless)

    def __len__(self) -> int:
        return len(self.keys) + len(self.whole)

    @property
    def nameless(self) -> int:
        """How many rows of a table without a primary key there are."""
        return self.unkeyed + len(self.whole) + self.unsure

    def copy(self) -> TableHoldings:
        """A copy that no longer changes."""
        return replace(
            self,
            keys=self.keys.copy(),
            doubtful=dict(self.doubtful),
            told=self.told.copy(),
            whole=list(self.whole),
            hashes=self.hashes and self.hashes.copy(),
        )

    def changes(self) -> Iterator[Change]:
        """The changes that make these holdings."""
        table = self.table
        told = [key for key in self.keys.in_order() if key in self.told]
        mine = [key for key in self.keys.in_order() if key not in self.told]
        if mine:
            yield from self._inserted(mine)
        if told:
            yield Inserted(table, told, named=True)
        for made in (True, False):
            keys = [key for key, generated in self.doubtful.items() if generated is made]
            if keys:
                yield Inserted(table, keys, generated=made, certain=False)
        nameless: list[Any] = [*self.whole, *[None] * self.unkeyed]
        if nameless:
            yield InsertedWhole(table, nameless)
        if self.unsure:
            yield InsertedWhole(table, [()] * self.unsure, certain=False)

    # -- what changes do to them ---------------------------------------------------------------

    def apply(self, change: Change) -> Change | None:
        """Carry out a change that has been committed, except an :class:`Inserted`.

        Returns:
            What is left of it for others; None where a row can no longer be followed.
        """
        match change:
            case InsertedWhole():
                self.insert_whole(change.keys, certain=True)
            case Deleted():
                self.delete(change.keys)
            case DeletedWhole():
                return self.delete_equal(change, certain=True)
            case KeysChanged():
                return None if self.change_keys(change.keys) else change
            case KeysLost():
                return None if self.doubt_all() else change
            case Updated():
                self.update(change)
        return change

    def mark_uncertain(self, change: Change) -> Change:
        """Carry out a change that may have been committed."""
        match change:
            case Inserted():
                self.insert(change, certain=False)
            case InsertedWhole():
                self.insert_whole(change.keys, certain=False)
            case Deleted():
                self.doubt(change.keys)
            case DeletedWhole():
                return self.delete_equal(change, certain=False)
            case KeysChanged():
                self.doubt([key for pair in change.keys for key in pair if key is not None])
            case KeysLost():
                self.doubt_all()
            case Updated():
                self.update(change)
        return change

    def insert(self, change: Inserted, *, certain: bool) -> None:
        """Add rows, as ours or as doubtful."""
        keys = change.keys
        if certain:
            self.keys.update(keys)
        else:
            self.doubtful.update(dict.fromkeys(keys, change.generated))
        if change.named and certain:
            self.told.update(keys)
            self._trust(keys)
        elif change.hashes is None:
            self._trust(keys)
        else:
            self.hashes = self.hashes or RowHashes()
            self.hashes.record(keys, change.hashes, generated=change.generated)

    def insert_whole(self, rows: Sequence[Any], *, certain: bool) -> None:
        """Add rows without a primary key; count those that are None."""
        whole = [row for row in rows if row is not None]
        self.unkeyed += len(rows) - len(whole)
        if certain:
            self.whole += whole
        else:
            self.unsure += len(whole)

    def delete(self, keys: Iterable[Any]) -> None:
        """Remove rows; those not held change nothing."""
        keys = keys if isinstance(keys, list) else list(keys)
        for kept in (self.keys, self.told) if self.told else (self.keys,):
            if len(keys) == 1:
                kept.discard(keys[0])
            else:
                kept.difference_update(keys)
        if self.doubtful:
            for key in keys:
                self.doubtful.pop(key, None)

    def delete_whole(self, rows: Iterable[tuple[Any, ...]], *, certain: bool = True) -> None:
        """Remove rows without a primary key: these very objects, not equal ones."""
        gone = {id(row) for row in rows}
        before = len(self.whole)
        self.whole = [row for row in self.whole if id(row) not in gone]
        if not certain:
            self.unsure += before - len(self.whole)

    def delete_equal(self, change: DeletedWhole, *, certain: bool) -> Change:
        """Remove a row for each equal one, and doubt all where None; returns the rest."""
        if not self.whole:
            return change
        if None in change.keys:
            self.delete_whole(self.whole, certain=False)
            return change
        ours: dict[str, list[tuple[Any, ...]]] = {}
        for row in self.whole:
            ours.setdefault(repr(row), []).append(row)
        gone, others = [], []
        for given in change.keys:
            equal = ours.get(repr(given))
            if equal:
                gone.append(equal.pop())
            else:
                others.append(given)
        self.delete_whole(gone, certain=certain)
        return replace(change, keys=others)

    def doubt(self, keys: Iterable[Any]) -> None:
        """Move rows, where held, from ours to doubtful."""
        for key in keys:
            if key in self.keys:
                self.keys.discard(key)
                self.doubtful[key] = False

    def doubt_all(self) -> bool:
        """Move all rows from ours to doubtful; whether there were any."""
        held = bool(len(self.keys))
        self.doubtful.update(dict.fromkeys(self.keys, False))
        self.keys = KeySet()
        return held

    def change_keys(self, pairs: Iterable[tuple[Any, Any]]) -> bool:
        """Follow changed keys; whether the new key of a held row is not known."""
        unknown = False
        first: dict[Any, Any] = {}  # by a new key the row's key before all of these changes
        for old, new in pairs:
            if old not in self.keys:
                continue
            self.keys.discard(old)
            origin = first.pop(old, old)
            if new is None:
                unknown = True
                continue
            first[new] = origin
            self.keys.update([new])
        if self.hashes is not None:
            self.hashes.rename(first)
        return unknown

    def update(self, change: Updated) -> None:
        """Columns were set in these rows, or without keys in any row."""
        if self.hashes is not None:
            self.hashes.drop_updated(change.keys, change.columns)

    def resolve(self, change: Change) -> None:
        """End the doubt of a change."""
        keys = change.keys
        if isinstance(change, InsertedWhole):
            self.unsure = max(self.unsure - len(keys), 0)
        elif isinstance(change, Inserted):
            for key in keys:
                self.doubtful.pop(key, None)
        elif isinstance(change, (Deleted, KeysChanged)):
            old = [pair[0] for pair in keys] if isinstance(change, KeysChanged) else keys
            self.keys.update([key for key in old if self.doubtful.pop(key, None) is not None])

    def _inserted(self, keys: Sequence[Any]) -> Iterator[Inserted]:
        """These keys as inserted rows, with their hashes."""
        made, rest = self.hashes is not None and self.hashes.generated, set(keys)
        for shape, hashes in () if self.hashes is None else self.hashes.by_shape():
            known = [key for key in keys if key in hashes]
            rest.difference_update(known)
            values = array(HASH, map(hashes.__getitem__, known))
            yield Inserted(self.table, known, generated=made, hashes=Hashes(shape, values))
        if rest:
            without = [key for key in keys if key in rest]
            yield Inserted(self.table, without, generated=made)

    def _trust(self, keys: Iterable[Any]) -> None:
        """Rows with these keys are ours whatever their values are."""
        if self.hashes is not None:
            self.hashes.drop(keys)


class Store:
    """The rows of all tables. Threads may share it; a forked child holds none of its parent's.

    Attributes:
        lost: tables of which rows can no longer be followed, since their keys were changed.
    """

    def __init__(self) -> None:
        self._tables: dict[TableName, TableHoldings] = {}
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self.lost: list[KeyedTable] = []

    def forget_parent(self) -> None:
        """In a forked child: begin anew."""
        self._tables, self._pid, self.lost = {}, os.getpid(), []
        self._lock = threading.RLock()  # another thread of the parent may have held it

    # -- changes -------------------------------------------------------------------------------

    def apply(self, change: Change) -> Change:
        """Carry out a change that has been committed.

        Returns:
            What is left of it for other stores: of equal rows without a key each one counts once.
        """
        if not change.certain:
            return self.mark_uncertain(change)
        with self._lock:
            held = self._tables.get(change.table.name)
            if isinstance(change, Inserted):
                if held is None:
                    held = self._tables[change.table.name] = TableHoldings(change.table)
                held.insert(change, certain=True)
                return change
            held = held or self._of(change)
            rest = change if held is None else held.apply(change)
            if rest is None:
                self.lost.append(change.table)
            self._drop_if_empty(held)
        return change if rest is None else rest

    def mark_uncertain(self, change: Change) -> Change:
        """Carry out a change that may have been committed, as far as that can be; as `apply`."""
        with self._lock:
            held = self._of(change)
            rest = change if held is None else held.mark_uncertain(change)
            self._drop_if_empty(held)
        return rest

    def resolve(self, change: Change, *, committed: bool) -> None:
        """It is known by now whether an uncertain change was committed."""
        with self._lock:
            held = self._tables.get(change.table.name)
            if held is not None:
                held.resolve(change)
                self._drop_if_empty(held)
            if committed:
                self.apply(change)

    def resolve_keys(self, table: KeyedTable, keys: Iterable[Any], *, committed: bool) -> None:
        """It is known by now whether rows with these keys are ours."""
        with self._lock:
            held = self._tables.setdefault(table.name, TableHoldings(table))
            for key in list(keys):
                held.doubtful.pop(key, None)
                if committed:
                    held.keys.update([key])
            self._drop_if_empty(held)

    def changes(self, database: str) -> Iterator[Change]:
        """The changes that make what is held in a database now."""
        for held in self.snapshot():
            if held.table.name.database == database:
                yield from held.changes()

    def _of(self, change: Change) -> TableHoldings | None:
        name = change.table.name
        held = self._tables.get(name)
        if held is None and isinstance(change, (Inserted, InsertedWhole)):
            held = self._tables[name] = TableHoldings(change.table)
        return None if isinstance(change, Touched) else held

    def _drop_if_empty(self, held: TableHoldings | None) -> None:
        if held is not None and not held:
            self._tables.pop(held.table.name, None)

    # -- rows that are gone --------------------------------------------------------------------

    def forget(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Remove rows; those not held change nothing."""
        self.apply(Deleted(table, list(keys)))

    def forget_whole(
        self, table: KeyedTable, rows: Iterable[tuple[Any, ...]], *, certain: bool = True
    ) -> None:
        """Remove rows of a table without a primary key: these very objects, not equal ones."""
        with self._lock:
            held = self._tables.get(table.name)
            if held is not None:
                held.delete_whole(rows, certain=certain)
                self._drop_if_empty(held)

    def forget_counted(self, table: KeyedTable) -> None:
        """Remove the rows of a table of which only the number is known."""
        with self._lock:
            held = self._tables.get(table.name)
            if held is not None:
                held.unkeyed = held.unsure = 0
                self._drop_if_empty(held)

    def forget_database(self, database: str) -> None:
        """Remove everything of a database."""
        with self._lock:
            for name in [name for name in self._tables if name.database == database]:
                del self._tables[name]

    # -- what is held --------------------------------------------------------------------------

    def holds(self, name: TableName) -> bool:
        """Whether rows of this table are held."""
        return name in self._tables

    def held_keys(self, name: TableName, keys: Iterable[Any]) -> list[Any]:
        """Of these keys of a table, those that are held."""
        with self._lock:
            held = self._tables.get(name)
            return [] if held is None else [key for key in keys if key in held.keys]

    def count_of(self, name: TableName) -> int:
        """How many rows of a table are held, those without a primary key too."""
        with self._lock:
            held = self._tables.get(name)
            return 0 if held is None else len(held.keys) + held.nameless

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """All keys that are held."""
        return [(held.table, held.keys.in_order()) for held in self.snapshot()]

    def uncertain_keys(self) -> set[tuple[TableName, Any]]:
        """The rows of which it is not known whether they were committed."""
        with self._lock:
            uncertain = set()
            for name, held in self._tables.items():
                for key in held.doubtful:
                    uncertain.add((name, key))
            return uncertain

    def snapshot(self) -> list[TableHoldings]:
        """A copy that no longer changes, ordered by table. Empty in a forked child."""
        if self._pid != os.getpid():
            return []
        with self._lock:
            return [held.copy() for _name, held in sorted(self._tables.items())]

    def __len__(self) -> int:
        if self._pid != os.getpid():
            return 0
        with self._lock:  # counting sorts the keys
            return sum(len(held.keys) for held in self._tables.values())
