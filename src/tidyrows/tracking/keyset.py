"""Keys of one table, kept small: eight bytes for an integer key."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from heapq import merge
from itertools import groupby, islice
from operator import lt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_FEW = 32
_LOW, _HIGH = -(2**63), 2**63 - 1
_RUN = 50_000
"""Keys sorted at once: as Python's integers they take five times the room."""


class KeySet:
    """A set of keys of one table: scalars where the key is one column, else tuples.

    Integers of up to 64 bits are kept in an ``array('q')``, everything else in a dict. The order
    of :meth:`in_order` is the order of all deletes, the same in every process.
    """

    __slots__ = ("_ascending", "_integers", "_others")

    def __init__(self, keys: Iterable[Any] = ()) -> None:
        self._integers = array("q")
        self._ascending = True
        self._others: dict[Any, None] = {}
        if keys:
            self.update(keys)

    def update(self, keys: Iterable[Any]) -> None:
        """Add keys; those already there change nothing."""
        integers = self._integers
        if isinstance(keys, list) and len(keys) > _FEW and _are_plain(keys):
            more = array("q", keys)
            ascending = all(map(lt, keys, islice(keys, 1, None)))
            after = not integers or keys[0] > integers[-1]
            self._ascending = self._ascending and ascending and after
            integers.extend(more)
            return
        for key in keys:
            if type(key) is int and _LOW <= key <= _HIGH:
                if integers and key <= integers[-1]:
                    if key == integers[-1]:
                        continue
                    self._ascending = False
                integers.append(key)
            else:
                self._others[key] = None

    def difference_update(self, keys: Iterable[Any]) -> None:
        """Take keys out; those not there change nothing."""
        keys = keys if isinstance(keys, list) else list(keys)
        if len(keys) == len(self) and keys == self.in_order():  # usually all are gone at the end
            self._integers = array("q")
            self._others = {}
            return
        gone = set(keys)
        for key in gone & self._others.keys():
            del self._others[key]
        if self._integers:
            kept = [key for key in self._integers if key not in gone]
            if len(kept) != len(self._integers):
                self._integers = array("q", kept)

    def discard(self, key: Any) -> None:
        """Take one key out, if it is there."""
        if type(key) is int and _LOW <= key <= _HIGH:
            place = self._find(key)
            if place is not None:
                del self._integers[place]
        else:
            self._others.pop(key, None)

    def in_order(self) -> list[Any]:
        """All keys in the one global order."""
        integers = self._integers if self._ascending else self._sorted_integers()
        keys = integers.tolist()
        if self._others:
            others = list(self._others)
            try:
                others.sort()
            except TypeError:  # enums, mixed types: any order will do that is the same everywhere
                others.sort(key=repr)
            keys.extend(others)
        return keys

    def copy(self) -> KeySet:
        """A copy that no longer changes with this one."""
        twin = KeySet()
        twin._integers = self._integers[:]
        twin._ascending = self._ascending
        twin._others = dict(self._others)
        return twin

    def _sorted_integers(self) -> array[int]:
        if not self._ascending:
            self._integers = _ascending(self._integers)
            self._ascending = True
        return self._integers

    def _find(self, key: int) -> int | None:
        integers = self._integers if self._ascending else self._sorted_integers()
        place = bisect_left(integers, key)
        return place if place < len(integers) and integers[place] == key else None

    def __contains__(self, key: object) -> bool:
        if type(key) is int and _LOW <= key <= _HIGH:
            return self._find(key) is not None
        return key in self._others

    def __iter__(self) -> Iterator[Any]:
        yield from self._integers if self._ascending else self._sorted_integers()
        yield from self._others

    def __len__(self) -> int:
        integers = self._integers if self._ascending else self._sorted_integers()
        return len(integers) + len(self._others)


def _are_plain(keys: list[Any]) -> bool:
    """Whether all are integers of 64 bits: then they can be added at once."""
    return set(map(type, keys)) == {int} and min(keys) >= _LOW and max(keys) <= _HIGH


def in_order(keys: Collection[Any]) -> list[Any]:
    """Different keys in the one global order."""
    if set(map(type, keys)) == {int}:
        ordered = sorted(keys)
        if ordered[0] >= _LOW and ordered[-1] <= _HIGH:
            return ordered
    return KeySet(keys).in_order()


def _ascending(keys: array[int]) -> array[int]:
    """The keys in order, each once, with little more room than the two arrays take.

    Runs are sorted where they stand, so that an interrupt finds all keys still there.
    """
    if len(keys) <= _RUN:
        return array("q", sorted(set(keys)))
    starts = range(0, len(keys), _RUN)
    for start in starts:
        keys[start : start + _RUN] = array("q", sorted(keys[start : start + _RUN]))
    runs = (map(keys.__getitem__, range(len(keys))[start : start + _RUN]) for start in starts)
    return array("q", (key for key, _same in groupby(merge(*runs))))
