"""The hashes of the rows that a tracker holds."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Hashes
from tidyrows.capture.fingerprints import HASH, NEVER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidyrows.capture.changes import Shape

NOT_COMPARED = 2**64 - 2
"""A hash that stands for any values: a row with its key is not compared."""


@dataclass(slots=True)
class _Log:
    """Keys and hashes of one shape, in order of time: the last hash of a key counts."""

    keys: array[int] | list[Any] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array(HASH))

    def add(self, keys: Sequence[Any], hashes: array[int]) -> None:
        try:
            self.keys.extend(array("q", keys) if isinstance(self.keys, array) else keys)
        except (TypeError, OverflowError):
            self.keys = [*self.keys, *keys]
        self.hashes.extend(hashes)


class RowHashes:
    """The hashes of the rows of one table, by key; a row without one is not compared."""

    __slots__ = ("_logs",)

    def __init__(self) -> None:
        self._logs: dict[Shape, _Log] = {}

    def record(self, keys: Sequence[Any], hashes: Hashes) -> None:
        """Add inserted rows; earlier hashes under these keys end."""
        if self._logs.keys() - {hashes.shape}:
            self.drop(keys)
        self._logs.setdefault(hashes.shape, _Log()).add(keys, hashes.values)

    def drop(self, keys: Iterable[Any]) -> None:
        """Compare these rows no longer."""
        self._drop(list(keys), self._logs)

    def update(self, keys: Sequence[Any], columns: frozenset[str], hashes: Hashes | None) -> None:
        """Compare anew the rows in which these columns were set: without keys, any row.

        Without hashes nobody knows what is in them now.
        """
        new = {} if hashes is None else dict(zip(keys, hashes.values, strict=True))
        for shape, known in list(self.by_shape()):
            if not columns.isdisjoint(shape.columns):
                ours = [key for key in keys or known if key in known]
                values = array(HASH, [new.get(key, NEVER) for key in ours])
                self.record(ours, Hashes(shape if hashes is None else hashes.shape, values))

    def _drop(self, keys: list[Any], shapes: Iterable[Shape]) -> None:
        for shape in shapes:
            self._logs[shape].add(keys, array(HASH, [NOT_COMPARED]) * len(keys))

    def rename(self, old: Mapping[Any, Any]) -> None:
        """Keys of rows were changed; the hashes stay. ``old`` has the old keys by the new ones."""
        found = list(self.by_shape())
        self.drop([*old, *old.values()])
        for shape, hashes in found:
            moved = [new for new in old if old[new] in hashes]
            self._logs[shape].add(moved, array(HASH, [hashes[old[new]] for new in moved]))

    def by_shape(self) -> Iterator[tuple[Shape, dict[Any, int]]]:
        """For each shape the hashes by key."""
        for shape, log in self._logs.items():
            last = dict(zip(log.keys, log.hashes, strict=True))
            if NOT_COMPARED in log.hashes:
                last = {key: last[key] for key in last if last[key] != NOT_COMPARED}
            if last:
                yield shape, last

    def copy(self) -> RowHashes:
        """A copy that no longer changes with this one."""
        twin = RowHashes()
        for shape, log in self._logs.items():
            twin._logs[shape] = replace(log, keys=log.keys[:], hashes=log.hashes[:])
        return twin
