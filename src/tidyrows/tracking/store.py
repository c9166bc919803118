"""What a tracker holds, table by table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.tracking.fingerprints import Fingerprints
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.capture.digests import Patch, Prints
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
        prints: what rows looked like, where their keys may come back.
    """

    table: KeyedTable
    keys: KeySet = field(default_factory=KeySet)
    doubtful: dict[Any, bool] = field(default_factory=dict)
    told: KeySet = field(default_factory=KeySet)
    unkeyed: int = 0
    prints: Fingerprints | None = None
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

    def note(self, keys: Sequence[Any], prints: Prints | None, *, generated: bool) -> None:
        """Remember what inserted rows look like; nothing is known of them without ``prints``."""
        if prints is not None:
            if self.prints is None:
                self.prints = Fingerprints(prints.layout.names)
            self.prints.record(keys, prints, generated=generated)
        elif self.prints is not None:
            self.trust(keys)

    def trust(self, keys: Iterable[Any]) -> None:
        """Rows with these keys are ours whatever they look like."""
        if self.prints is not None:
            for key in keys:
                self.prints.drop(key)


class Holdings:
    """The rows of all tables."""

    def __init__(self) -> None:
        self._tables: dict[TableName, TableHoldings] = {}

    def of(self, table: KeyedTable) -> TableHoldings:
        """The holdings of one table, empty at first."""
        held = self._tables.get(table.name)
        if held is None:
            held = self._tables[table.name] = TableHoldings(table)
        return held

    def those_held(self, name: TableName, keys: Iterable[Any]) -> list[Any]:
        """Of these keys of a table, those that are ours."""
        held = self._tables.get(name)
        return [] if held is None else [key for key in keys if key in held.keys]

    def count_of(self, name: TableName) -> int:
        """How many rows of one table are held, those without a name too."""
        held = self._tables.get(name)
        return 0 if held is None else len(held.keys) + held.nameless

    def forget(self, name: TableName, keys: Iterable[Any]) -> None:
        """Take rows out; those not held change nothing."""
        held = self._tables.get(name)
        if held is None:
            return
        keys = keys if isinstance(keys, list) else list(keys)
        for kept in (held.keys, held.told):
            if len(keys) == 1:
                kept.discard(keys[0])
            elif len(kept):
                kept.difference_update(keys)
        if held.doubtful:
            for key in keys:
                held.doubtful.pop(key, None)
        if not held:
            del self._tables[name]

    def forget_whole(
        self, name: TableName, rows: Iterable[tuple[Any, ...]], *, unsure: bool
    ) -> None:
        """Rows that are gone, or of which nobody knows it; these very objects, not equal ones."""
        held = self._tables.get(name)
        if held is None:
            return
        gone = {id(row) for row in rows}
        before = len(held.whole)
        held.whole = [row for row in held.whole if id(row) not in gone]
        if unsure:
            held.unsure += before - len(held.whole)
        if not held:
            del self._tables[name]

    def forget_counted(self, name: TableName) -> None:
        """Rows of which only the number is known are gone."""
        held = self._tables.get(name)
        if held is not None:
            held.unkeyed = held.unsure = 0
            if not held:
                del self._tables[name]

    def drop_equal(
        self, name: TableName, rows: Sequence[tuple[Any, ...] | None], *, unsure: bool
    ) -> Sequence[tuple[Any, ...] | None]:
        """Forget a row for each equal one, or doubt all where None; those that were not held."""
        held = self._tables.get(name)
        if held is None or not held.whole:
            return rows
        if None in rows:
            self.forget_whole(name, held.whole, unsure=True)
            return rows
        ours: dict[str, list[tuple[Any, ...]]] = {}
        for row in held.whole:
            ours.setdefault(repr(row), []).append(row)
        gone, others = [], []
        for given in rows:
            equal = ours.get(repr(given))
            if equal:
                gone.append(equal.pop())
            else:
                others.append(given)
        self.forget_whole(name, gone, unsure=unsure)
        return others

    def doubt(self, name: TableName, keys: Iterable[Any]) -> None:
        """Move rows, where held, from ours to doubtful."""
        held = self._tables.get(name)
        if held is None:
            return
        for key in keys:
            if key in held.keys:
                held.keys.discard(key)
                held.doubtful[key] = False

    def doubts(self) -> set[tuple[TableName, Any]]:
        """All rows in doubt."""
        return {(name, key) for name, held in self._tables.items() for key in held.doubtful}

    def settle(self, name: TableName, keys: Iterable[Any]) -> None:
        """Doubt these rows no longer."""
        held = self._tables.get(name)
        if held is None:
            return
        for key in keys:
            held.doubtful.pop(key, None)
        if not held:
            del self._tables[name]

    def undoubt(self, name: TableName, keys: Iterable[Any]) -> None:
        """Rows that something may have happened to are as they were."""
        held = self._tables.get(name)
        if held is None:
            return
        for key in keys:
            if held.doubtful.pop(key, None) is not None:
                held.keys.update([key])

    def drop(self, database: str) -> None:
        """Forget everything of a database."""
        for name in [name for name in self._tables if name.database == database]:
            del self._tables[name]

    def settle_unsure(self, name: TableName, count: int) -> None:
        """Of so many rows without a primary key it is known by now whether they are there."""
        held = self._tables.get(name)
        if held is not None:
            held.unsure = max(held.unsure - count, 0)
            if not held:
                del self._tables[name]

    def doubt_all(self, name: TableName) -> bool:
        """Move all rows of a table from ours to doubtful; whether there were any."""
        held = self._tables.get(name)
        if held is None or not len(held.keys):
            return False
        held.doubtful.update(dict.fromkeys(held.keys, False))
        held.keys = KeySet()
        return True

    def rename(self, name: TableName, pairs: Iterable[tuple[Any, Any]]) -> bool:
        """Follow changed keys; True if a held row's new key is unknown."""
        held = self._tables.get(name)
        unknown = False
        if held is None:
            return unknown
        for old, new in pairs:
            if old not in held.keys:
                continue
            held.keys.discard(old)
            if held.prints is not None and new is not None:
                held.prints.rename(old, new)
            if new is None:
                unknown = True
            else:
                held.keys.update([new])
        return unknown

    def note_update(self, name: TableName, keys: Sequence[Any], patches: Sequence[Patch]) -> None:
        """An UPDATE set columns in rows of these keys, or without keys in any row."""
        held = self._tables.get(name)
        if held is None or held.prints is None:
            return
        for key, patch in zip(keys, patches, strict=False):
            held.prints.change(key, patch)
        if not keys:
            held.prints.loosen(name for patch in patches for name in patch)

    def copy(self) -> list[TableHoldings]:
        """A copy that no longer changes, ordered by table."""
        return [
            TableHoldings(
                held.table,
                held.keys.copy(),
                dict(held.doubtful),
                held.told.copy(),
                held.unkeyed,
                held.prints,
                list(held.whole),
                held.unsure,
            )
            for _name, held in sorted(self._tables.items())
        ]

    def __contains__(self, name: TableName) -> bool:
        return name in self._tables

    def __len__(self) -> int:
        return sum(len(held.keys) for held in self._tables.values())
