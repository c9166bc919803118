"""The hashes of the rows that a tracker holds."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tidyrows.capture.fingerprints import HASH

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from tidyrows.capture.changes import Hashes, Shape


@dataclass(slots=True)
class _Log:
    """Rows of one shape, the latest last.

    ``dropped`` has, by key, the place before which a row with this key is compared no longer.
    """

    keys: array[int] | list[Any] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array(HASH))
    dropped: dict[Any, int] = field(default_factory=dict)

    def add(self, keys: Sequence[Any], hashes: array[int]) -> None:
        try:
            self.keys.extend(array("q", keys) if isinstance(self.keys, array) else keys)
        except (TypeError, OverflowError):
            self.keys = [*self.keys, *keys]
        self.hashes.extend(hashes)

    def drop(self, keys: Iterable[Any]) -> None:
        self.dropped.update(dict.fromkeys(keys, len(self.keys)))

    def by_key(self) -> dict[Any, int]:
        if not self.dropped:
            return dict(zip(self.keys, self.hashes, strict=True))
        last = {key: place for place, key in enumerate(self.keys)}
        start = self.dropped.get
        return {k: self.hashes[place] for k, place in last.items() if place >= start(k, 0)}

    def copy(self) -> _Log:
        return replace(self, keys=self.keys[:], hashes=self.hashes[:], dropped=dict(self.dropped))


class RowHashes:
    """The hashes of one table's rows; a row without one is ours whatever its values are.

    Attributes:
        generated: the database made the keys of all rows.
    """

    __slots__ = ("_logs", "generated")

    def __init__(self) -> None:
        self.generated = True
        self._logs: dict[Shape, _Log] = {}

    def record(self, keys: Sequence[Any], hashes: Hashes, *, generated: bool = False) -> None:
        """Add inserted rows; earlier hashes under these keys end."""
        self.generated = self.generated and generated
        for shape, log in self._logs.items():
            if shape != hashes.shape:
                log.drop(keys)
        self._logs.setdefault(hashes.shape, _Log()).add(keys, hashes.values)

    def drop(self, keys: Iterable[Any]) -> None:
        """Compare these rows no longer."""
        keys = list(keys)
        for log in self._logs.values():
            log.drop(keys)

    def drop_updated(self, keys: Collection[Any], columns: frozenset[str]) -> None:
        """Compare no longer the rows in which these columns were set: without keys, any row."""
        for shape in [each for each in self._logs if not columns.isdisjoint(each.columns)]:
            if keys:
                self._logs[shape].drop(keys)
            else:
                del self._logs[shape]

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
            hashes = log.by_key()
            if hashes:
                yield shape, hashes

    def copy(self) -> RowHashes:
        """A copy that no longer changes with this one."""
        twin = RowHashes()
        twin.generated = self.generated
        twin._logs = {shape: log.copy() for shape, log in self._logs.items()}
        return twin
