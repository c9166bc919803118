"""The rows that a tracker holds; the one place that carries out a change."""

from __future__ import annotations

import os
import threading
from array import array
from contextlib import contextmanager
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
        in_doubt: rows that may be ours; True where only ours can have this key.
        named: those among ``keys`` that the user named.
        sent: keys that nobody has seen in the database, which may have stored others.
        hashes: hashes of the rows, where the database may give their keys to other rows.
        incarnation: the table's, when the latest rows were inserted; None where it is not known.
        former: of rows with a key that were inserted in another incarnation, which one.
        generated: the database has made the keys of all rows but ``named`` ones.
        given: whether there may be any :attr:`given_keys`.
        keyless_rows: rows of a table without a primary key, as they were inserted.
        keyless_unknown: how many such rows there are whose values are not known.
        keyless_in_doubt: how many such rows may be there or not, and nobody can find out.
    """

    table: KeyedTable
    keys: KeySet = field(default_factory=KeySet)
    in_doubt: dict[Any, bool] = field(default_factory=dict)
    named: KeySet = field(default_factory=KeySet)
    sent: set[Any] = field(default_factory=set)
    hashes: RowHashes | None = None
    incarnation: str | None = None
    former: dict[Any, str | None] = field(default_factory=dict)
    generated: bool = True
    given: bool = False
    keyless_rows: list[tuple[Any, ...]] = field(default_factory=list)
    keyless_unknown: int = 0
    keyless_in_doubt: int = 0

    def __bool__(self) -> bool:
        return bool(len(self.keys) or self.in_doubt or self.keyless_count)

    def __len__(self) -> int:
        return len(self.keys) + len(self.keyless_rows)

    @property
    def keyless_count(self) -> int:
        """How many rows of a table without a primary key there are."""
        return len(self.keyless_rows) + self.keyless_unknown + self.keyless_in_doubt

    @property
    def given_keys(self) -> KeySet:
        """Those among ``keys`` that may be given to another row, once theirs is gone."""
        is_association = len(self.table.key_columns) == len(self.table.table.columns)
        if self.hashes is not None or (is_association and not self.generated):
            return self.keys
        return self.named

    def copy(self) -> TableHoldings:
        """A copy that no longer changes."""
        return replace(
            self,
            keys=self.keys.copy(),
            in_doubt=dict(self.in_doubt),
            named=self.named.copy(),
            sent=set(self.sent),
            hashes=self.hashes and self.hashes.copy(),
            former=dict(self.former),
            keyless_rows=list(self.keyless_rows),
        )

    def changes(self) -> Iterator[Change]:
        """The changes that make these holdings."""
        table, keys = self.table, self.keys.in_order()
        inserted = [key for key in keys if key not in self.named]
        named = [key for key in keys if key in self.named]
        for told, some in self._alike(inserted):
            for change in self._inserted(some):
                yield replace(change, **told)
        for told, some in self._alike(named):
            for change in self._inserted(some):
                yield replace(change, named=True, generated=False, **told)
        for made in (True, False):
            keys = [key for key, generated in self.in_doubt.items() if generated is made]
            for told, some in self._alike(keys):
                yield Inserted(table, some, generated=made, certain=False, **told)
        rows: list[Any] = [*self.keyless_rows, *[None] * self.keyless_unknown]
        if rows:
            yield InsertedWhole(table, rows, self.incarnation)
        if self.keyless_in_doubt:
            rows = [()] * self.keyless_in_doubt
            yield InsertedWhole(table, rows, self.incarnation, certain=False)

    def _by_sent(self, keys: Sequence[Any]) -> list[tuple[bool, Sequence[Any]]]:
        """Keys that were seen in the database, and those that were only sent to it."""
        if not self.sent:
            return [(False, keys)] if keys else []
        seen = [key for key in keys if key not in self.sent]
        sent = [key for key in keys if key in self.sent]
        return [part for part in ((False, seen), (True, sent)) if part[1]]

    def _alike(self, keys: Sequence[Any]) -> Iterator[tuple[dict[str, Any], Sequence[Any]]]:
        """These keys, those together of which the same is known."""
        for incarnation, of_it in self._by_incarnation(keys):
            for sent, some in self._by_sent(of_it):
                yield {"incarnation": incarnation, "sent": sent}, some

    def _by_incarnation(self, keys: Sequence[Any]) -> Iterator[tuple[str | None, Sequence[Any]]]:
        """These keys, those of each incarnation together."""
        groups: dict[str | None, Any] = {} if self.former or not keys else {self.incarnation: keys}
        for key in keys if self.former else ():
            groups.setdefault(self.former.get(key, self.incarnation), []).append(key)
        yield from groups.items()

    def of_another(self, incarnation: str) -> dict[Any, str]:
        """The rows with a key that were certainly inserted in another incarnation, and which."""
        if not self.former and self.incarnation in {None, incarnation}:
            return {}
        return {
            key: inserted
            for inserted, keys in self._by_incarnation([*self.keys, *self.in_doubt])
            if inserted not in {None, incarnation}
            for key in keys
        }

    def _enter(self, incarnation: str | None, keys: Sequence[Any] = ()) -> None:
        """Rows, with these keys if any, are inserted in this incarnation."""
        if incarnation != self.incarnation:
            if incarnation is None:
                self.former.update(dict.fromkeys(keys))
                return
            self.former.update(dict.fromkeys((*self.keys, *self.in_doubt), self.incarnation))
            self.incarnation = incarnation
        for key in keys if self.former else ():
            self.former.pop(key, None)

    def _inserted(self, keys: Sequence[Any]) -> Iterator[Inserted]:
        """These keys as inserted rows, with their hashes."""
        made, rest = self.generated, set(keys)
        for shape, hashes in () if self.hashes is None else self.hashes.by_shape():
            known = [key for key in keys if key in hashes]
            rest.difference_update(known)
            read = Hashes(shape, array(HASH, map(hashes.__getitem__, known))).read
            yield Inserted(self.table, known, generated=made, read_hashes=read)
        if rest:
            without = [key for key in keys if key in rest]
            yield Inserted(self.table, without, generated=made)

    def insert(self, change: Inserted, *, certain: bool) -> None:
        """Add rows, as ours or as in doubt."""
        keys = change.keys
        if change.sent:
            self.sent.update([key for key in keys if key not in self.keys])
        elif self.sent:
            self.sent.difference_update(keys)
        self._enter(change.incarnation, keys)
        self.generated = self.generated and (change.generated or change.named)
        if change.named or not change.generated or change.read_hashes is not None:
            self.given = True
        if certain:
            self.keys.update(keys)
        else:
            self.in_doubt.update(dict.fromkeys(keys, change.generated))
        if change.named and certain:
            self.named.update(keys)
        hashes = None if change.read_hashes is None else change.read_hashes()
        if hashes is not None:
            self.hashes = self.hashes or RowHashes()
            self.hashes.record(keys, hashes)
        elif self.hashes is not None:  # these rows are ours whatever their values are
            self.hashes.drop(keys)

    def apply(self, change: Change, *, certain: bool) -> Change | None:
        """As :meth:`Store.apply`; None where a row can no longer be followed."""
        keys = change.keys
        match change:
            case InsertedWhole():
                self._insert_keyless(change, certain=certain)
            case Deleted() if certain:
                self._delete(keys)
            case Deleted():
                self._doubt(keys)
            case DeletedWhole():
                return self._delete_equal(change, certain=certain)
            case KeysChanged() if certain:
                self.generated = False
                return change if self._change_keys(keys, sent=change.sent) else None
            case KeysChanged():
                self._doubt([key for pair in keys for key in pair])
            case KeysLost():
                held = self.keys.in_order()
                self._doubt(held)
                return None if held and certain else change
            case Updated() if self.hashes is not None:
                self.hashes.update(keys, change.columns, change.hashes if certain else None)
        return change

    def resolve(self, change: Change) -> None:
        """End the doubt of a change."""
        if isinstance(change, InsertedWhole):
            self.keyless_in_doubt = max(self.keyless_in_doubt - len(change.keys), 0)
        elif isinstance(change, Inserted):
            for key in change.keys:
                self.in_doubt.pop(key, None)
        elif isinstance(change, (Deleted, KeysChanged)):
            old = (
                [key[0] for key in change.keys] if isinstance(change, KeysChanged) else change.keys
            )
            self.keys.update([key for key in old if self.in_doubt.pop(key, None) is not None])

    def _insert_keyless(self, change: InsertedWhole, *, certain: bool) -> None:
        if self.keyless_rows and change.incarnation != self.incarnation:
            self.delete_keyless(self.keyless_rows, certain=False)
        self._enter(change.incarnation)
        rows = [row for row in change.keys if row is not None]
        self.keyless_unknown += len(change.keys) - len(rows)
        if certain:
            self.keyless_rows += rows
        else:
            self.keyless_in_doubt += len(rows)

    def delete_keyless(self, rows: Iterable[tuple[Any, ...]], *, certain: bool) -> None:
        """Remove rows without a primary key: these very objects, not equal ones."""
        gone = set(map(id, rows))
        left = [row for row in self.keyless_rows if id(row) not in gone]
        if not certain:
            self.keyless_in_doubt += len(self.keyless_rows) - len(left)
        self.keyless_rows = left

    def _delete_equal(self, change: DeletedWhole, *, certain: bool) -> Change:
        """Remove a row for each equal one, and doubt all where None; returns the rest."""
        if not self.keyless_rows:
            return change
        if None in change.keys:
            self.delete_keyless(self.keyless_rows, certain=False)
            return change
        ours: dict[str, list[tuple[Any, ...]]] = {}
        for row in self.keyless_rows:
            ours.setdefault(repr(row), []).append(row)
        gone, others = [], []
        for given in change.keys:
            equal = ours.get(repr(given))
            if equal:
                gone.append(equal.pop())
            else:
                others.append(given)
        self.delete_keyless(gone, certain=certain)
        return replace(change, keys=others)

    def _delete(self, keys: Sequence[Any]) -> None:
        if self.sent:
            self.sent.difference_update(keys)
        for kept in (self.keys, self.named) if self.named else (self.keys,):
            if len(keys) == 1:
                kept.discard(keys[0])
            else:
                kept.difference_update(keys)
        if self.in_doubt or self.former:
            for key in keys:
                self.in_doubt.pop(key, None)
                self.former.pop(key, None)

    def _doubt(self, keys: Sequence[Any]) -> None:
        """Rows that are ours, from now on in doubt."""
        ours = [key for key in keys if key in self.keys]
        self.keys.difference_update(ours)
        self.in_doubt.update(dict.fromkeys(ours, False))

    def _change_keys(self, pairs: Sequence[tuple[Any, Any]], *, sent: bool) -> bool:
        """Follow changed keys; whether the new key of each row that is ours is known."""
        known = True
        first: dict[Any, Any] = {}  # by a new key the row's key before all of these changes
        for old, new in pairs:
            if old not in self.keys:
                continue
            self.keys.discard(old)
            origin = first.pop(old, old)
            if new is None:
                known = False
                continue
            first[new] = origin
            self.keys.update([new])
            self.sent.discard(old)
            if sent:
                self.sent.add(new)
            if old in self.former:
                self.former[new] = self.former.pop(old)
        if self.hashes is not None:
            self.hashes.rename(first)
        return known


class Store:
    """The rows of all tables. Threads may share it; a forked child holds none of its parent's.

    Attributes:
        lost: tables of which rows can no longer be followed, since their keys were changed, with
            the number of these rows at most.
    """

    def __init__(self) -> None:
        self.forget_parent()

    def forget_parent(self) -> None:
        """Begin without rows, as a forked child does."""
        self._tables: dict[TableName, TableHoldings] = {}
        self._lock = threading.RLock()  # another thread of the parent may have held the old one
        self._pid = os.getpid()
        self.lost: list[tuple[KeyedTable, int]] = []

    # -- changes -------------------------------------------------------------------------------

    def apply(self, change: Change, *, certain: bool = True) -> Change:
        """Carry out a change that has been committed: certainly, or perhaps.

        Returns:
            What is left of it for other stores: of equal rows without a key each one counts once.
        """
        certain = certain and change.certain
        with self._lock:
            held = self._tables.get(change.table.name)
            if held is None:
                if not isinstance(change, (Inserted, InsertedWhole)):
                    return change
                held = self._tables[change.table.name] = TableHoldings(change.table)
            if isinstance(change, Inserted):
                held.insert(change, certain=certain)
                return change
            before = len(held.keys)
            rest = held.apply(change, certain=certain)
            if rest is None:
                self.lost.append((change.table, before - len(held.keys)))
            if not held:
                del self._tables[change.table.name]
        return change if rest is None else rest

    def mark_uncertain(self, change: Change) -> Change:
        """Carry out a change that may have been committed, as far as that can be; as `apply`."""
        return self.apply(change, certain=False)

    def resolve(self, change: Change, *, committed: bool) -> None:
        """It is known by now whether an uncertain change was committed."""
        with self._changed(change.table) as held:
            held.resolve(change)
        if committed:
            self.apply(change)

    def resolve_keys(self, table: KeyedTable, keys: Iterable[Any], *, committed: bool) -> None:
        """It is known by now whether rows with these keys are ours."""
        with self._changed(table) as held:
            for key in list(keys):
                held.in_doubt.pop(key, None)
                if committed:
                    held.keys.update([key])

    def forget(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Remove rows; those not held change nothing."""
        self.apply(Deleted(table, list(keys)))

    def see(self, table: KeyedTable, keys: Iterable[Any]) -> None:
        """Rows with these keys have been seen in the database."""
        with self._changed(table) as held:
            held.sent.difference_update(keys)

    def forget_keyless(
        self, table: KeyedTable, rows: Iterable[tuple[Any, ...]], *, certain: bool = True
    ) -> None:
        """Remove rows of a table without a primary key: these very objects, not equal ones."""
        with self._changed(table) as held:
            held.delete_keyless(rows, certain=certain)

    def forget_counted(self, table: KeyedTable) -> None:
        """Remove the rows of a table of which only the number is known."""
        with self._changed(table) as held:
            held.keyless_unknown = held.keyless_in_doubt = 0

    def forget_database(self, database: str) -> None:
        """Remove everything of a database."""
        with self._lock:
            for name in [name for name in self._tables if name.database == database]:
                del self._tables[name]

    @contextmanager
    def _changed(self, table: KeyedTable) -> Iterator[TableHoldings]:
        """The rows of a table, to be changed in the block."""
        with self._lock:
            held = self._tables.setdefault(table.name, TableHoldings(table))
            yield held
            if not held:
                self._tables.pop(table.name)

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
        """How many rows of a table are held at most: without a primary key and in doubt too."""
        with self._lock:
            held = self._tables.get(name)
            if held is None:
                return 0
            return len(held.keys) + len(held.in_doubt) + held.keyless_count

    def changes(self, database: str) -> Iterator[Change]:
        """The changes that make what is held in a database now."""
        for held in self.snapshot():
            if held.table.name.database == database:
                yield from held.changes()

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """All keys that are held."""
        return [(held.table, held.keys.in_order()) for held in self.snapshot()]

    def uncertain_keys(self) -> set[tuple[TableName, Any]]:
        """The rows of which it is not known whether they were committed."""
        with self._lock:
            uncertain = set()
            for name, held in self._tables.items():
                for key in held.in_doubt:
                    uncertain.add((name, key))
            return uncertain

    def snapshot(self) -> list[TableHoldings]:
        """A copy that no longer changes, ordered by table. Empty in a forked child."""
        if self._pid != os.getpid():
            return []
        with self._lock:
            return [held.copy() for _name, held in sorted(self._tables.items())]

    def __bool__(self) -> bool:
        return bool(self._tables) and self._pid == os.getpid()

    def __len__(self) -> int:
        if self._pid != os.getpid():
            return 0
        with self._lock:  # counting sorts the keys
            return sum(len(held.keys) for held in self._tables.values())
