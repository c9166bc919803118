"""What the rows that we inserted looked like.

Where a database gives a key again, a key alone does not say whose row it names. So each value of an
INSERT leaves a digest: a stranger's row that has the key now shows other values.
"""

from __future__ import annotations

import operator
import threading
from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from tidyrows.capture.digests import CELL, LATE, UNCOMPARED, Prints

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_LOW, _HIGH = -(2**63), 2**63 - 1


class Fingerprints:
    """The digests of one table's rows, by key. Threads may share it.

    Attributes:
        names: the columns, one cell each per row.
        width: how many cells a row has: the last says which values are our own, as bits.
        generated: the database made the keys of all rows.
    """

    __slots__ = (
        "_cells",
        "_keys",
        "_late",
        "_lock",
        "_other_cells",
        "_others",
        "_waiting",
        "generated",
        "names",
        "width",
    )

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.width = len(names) + 1
        self.generated = True
        self._keys = array("q")  # ascending; the usual keys of a table
        self._cells = array(CELL)
        self._others: dict[Any, int] = {}
        self._other_cells = array(CELL)
        self._late: list[tuple[Sequence[Any], Prints]] = []
        self._waiting = 0
        self._lock = threading.Lock()

    def record(self, keys: Sequence[Any], prints: Prints, *, generated: bool = False) -> None:
        """Note rows that were inserted; what was known under these keys is over."""
        with self._lock:
            self.generated = self.generated and generated
            self._late.append((keys, prints))
            self._waiting += len(keys)
            if self._waiting > LATE:
                self._settle()

    def of(self, key: Any) -> array[int] | None:
        """The cells of a row; None where nothing was noted."""
        with self._lock:
            return self._copied(key)

    def change(self, key: Any, patch: Mapping[str, int]) -> None:
        """Note what an UPDATE set in one row."""
        with self._lock:
            place = self._find(key)
            if place is not None:
                cells, start = place
                for at, name in enumerate(self.names):
                    if name in patch:
                        cells[start + at] = patch[name]
                        cells[start + self.width - 1] &= ~(1 << at)

    def loosen(self, names: Iterable[str]) -> None:
        """Compare these columns no longer, in any row."""
        with self._lock:
            self._settle()
            for name in names:
                if name in self.names:
                    for cells in (self._cells, self._other_cells):
                        nothing = array(CELL, [UNCOMPARED]) * (len(cells) // self.width)
                        cells[self.names.index(name) :: self.width] = nothing

    def drop(self, key: Any) -> None:
        """Compare nothing of this row any longer."""
        with self._lock:
            self._clear(key)

    def rename(self, old: Any, new: Any) -> None:
        """A row's key was changed: what it looks like goes with it."""
        with self._lock:
            cells = self._copied(old)
            self._clear(old)
            self._clear(new)
            if cells is not None:
                self._put(new, cells)

    def compared(self) -> list[int]:
        """The columns of which any row has a digest, as places in :attr:`names`."""
        with self._lock:
            self._settle()
            both = (self._cells, self._other_cells)
            return [
                at
                for at in range(len(self.names))
                if any(any(cells[at :: self.width]) for cells in both)
            ]

    def columns(self, keys: Sequence[Any]) -> list[array[int]]:
        """The cells of many rows, column by column, then what is our own."""
        with self._lock:
            self._settle()
            cells = self._cells
            if not self._are_all(keys):
                nothing = array(CELL, [UNCOMPARED]) * self.width
                cells = array(CELL)
                for key in keys:
                    cells.extend(self._copied(key) or nothing)
            return [cells[at :: self.width] for at in range(self.width)]

    def all_of(self, keys: Sequence[Any]) -> Prints | None:
        """The digests of these rows, as an INSERT would have left them; None without any."""
        if not self.compared():
            return None
        cells = array(CELL, [UNCOMPARED]) * (self.width * len(keys))
        for at, column in enumerate(self.columns(keys)):
            cells[at :: self.width] = column
        return Prints.of_digests(self.names, cells)

    def known(self, keys: Sequence[Any]) -> Sequence[Any]:
        """Of these keys, those of which anything was noted."""
        with self._lock:
            self._settle()
            return keys if self._are_all(keys) else [k for k in keys if self._place(k) is not None]

    def _are_all(self, keys: Sequence[Any]) -> bool:
        """Whether these are all the ascending keys, in order."""
        return len(keys) == len(self._keys) and list(keys) == self._keys.tolist()

    def _copied(self, key: Any) -> array[int] | None:
        place = self._find(key)
        if place is None:
            return None
        cells, start = place
        return cells[start : start + self.width]

    def _clear(self, key: Any) -> None:
        place = self._find(key)
        if place is not None:
            cells, start = place
            for at in range(start, start + self.width):
                cells[at] = UNCOMPARED

    def _find(self, key: Any) -> tuple[array[int], int] | None:
        if self._late:
            self._settle()
        return self._place(key)

    def _place(self, key: Any) -> tuple[array[int], int] | None:
        if type(key) is int and self._keys and _LOW <= key <= self._keys[-1]:
            at = bisect_left(self._keys, key)
            if self._keys[at] == key:
                return self._cells, at * self.width
        start = self._others.get(key)
        return None if start is None else (self._other_cells, start)

    def _settle(self) -> None:
        """Take the digests that are still to be taken."""
        late, self._late, self._waiting = self._late, [], 0
        width = self.width
        for keys, prints in late:
            cells = prints.cells() if prints.layout.names == self.names else self._arranged(prints)
            if self._goes_behind(keys):
                self._keys.extend(keys)
                self._cells.extend(cells)
                continue
            for number, key in enumerate(keys):
                self._put(key, cells[number * width : (number + 1) * width])

    def _goes_behind(self, keys: Sequence[Any]) -> bool:
        """Whether these keys are ascending integers above all that are known."""
        return (
            not self._others
            and set(map(type, keys)) == {int}
            and (not self._keys or keys[0] > self._keys[-1])
            and all(map(operator.lt, keys, keys[1:]))
            and keys[0] >= _LOW
            and keys[-1] <= _HIGH
        )

    def _put(self, key: Any, cells: array[int]) -> None:
        place = self._place(key)
        if place is not None:
            into, start = place
            into[start : start + len(cells)] = cells
        elif (
            type(key) is int and _LOW <= key <= _HIGH and not (self._keys and key < self._keys[-1])
        ):
            self._keys.append(key)
            self._cells.extend(cells)
        else:
            self._others[key] = len(self._other_cells)
            self._other_cells.extend(cells)

    def _arranged(self, prints: Prints) -> array[int]:
        """Cells of a Table that has the columns in another order, or has other columns."""
        theirs, cells = prints.layout.names, prints.cells()
        places = [theirs.index(name) if name in theirs else None for name in self.names]
        arranged = array(CELL)
        for start in range(0, len(cells), len(theirs) + 1):
            owned = cells[start + len(theirs)]
            arranged.extend(UNCOMPARED if at is None else cells[start + at] for at in places)
            arranged.append(
                sum((owned >> at & 1) << to for to, at in enumerate(places[:32]) if at is not None)
            )
        return arranged
