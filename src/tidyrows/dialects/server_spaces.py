"""Emptying a space on a server: one question which tables have changed, DELETEs in these alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from tidyrows.dialects.spaces import Space
from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.schema.graph import Place

_ROUNDS = 3
_AT_ONCE = 50
"""How many tables share one column of the answer: drivers need longer to read many columns."""


class ServerSpace(Space):
    """A space whose rows are reached by SQL on one connection."""

    _signature: str
    _quick: str
    _probe: str
    _asked: tuple[Place, ...]
    """The tables without a digest, in the order of the answer."""
    _tables: tuple[Place, ...]
    _graph: ForeignKeyGraph
    _digests: Mapping[Place, str]
    """Of the tables that it was built with rows in."""
    _rows: Mapping[Place, Any]
    """The same rows, as ``_restore`` needs them."""

    def learn(self) -> Mapping[str, Any]:
        """Its signature, and a digest of each table that has rows."""
        self._signature = self._full_signature()
        self._look()
        self._keep(())
        self._keep(self._differences()[0])
        rows = [[*place, digest] for place, digest in self._digests.items()]
        return {"signature": self._signature, "rows": rows}

    def recall(self, learned: Mapping[str, Any]) -> bool:
        """By the signature and the digests."""
        if self._full_signature() != learned.get("signature"):
            return False
        self._signature = learned["signature"]
        self._look()
        before = {(schema, table): digest for schema, table, digest in learned["rows"]}
        self._keep(before)
        return self._digests == before

    def is_clean(self) -> bool:
        """By one statement."""
        dirty, changed = self._differences()
        return not dirty and not changed

    def reset(self, *, defined: bool = False) -> bool:
        """Only in the tables that have other rows."""
        if defined and self._full_signature() != self._signature:
            return False
        dirty, changed = self._differences()
        if dirty and not changed:
            self._empty(dirty)
        return not changed

    def restore(self) -> bool:
        """In several rounds: triggers of a DELETE may fill a table that was empty."""
        for _round in range(_ROUNDS):
            dirty, changed = self._differences()
            if changed or not dirty:
                return not changed
            self._empty(dirty)
        return self.is_clean()

    # ----- one question

    def _look(self) -> None:
        self._tables = tuple(self._find_tables())
        self._graph = ForeignKeyGraph(
            ForeignKey(None, child, (), parent, ()) for child, parent in self._references()
        )
        self._quick = str(self._query(f"SELECT {self._quick_signature()}")[0][0])

    def _differences(self) -> tuple[list[Place], bool]:
        """The tables with other rows than it was built with, and whether the tables changed."""
        quick, flags, digests = self._answer()
        dirty = [place for place, flag in zip(self._asked, flags, strict=True) if flag != "0"]
        dirty += [place for place, digest in self._digests.items() if digests[place] != digest]
        return dirty, quick != self._quick

    def _answer(self) -> tuple[str, str, dict[Place, str]]:
        quick, *answers = map(str, self._query(self._probe)[0])
        digests = answers[len(answers) - len(self._digests) :]
        flags = "".join(answers[: len(answers) - len(self._digests)])
        return quick, flags, dict(zip(self._digests, digests, strict=True))

    def _keep(self, filled: Iterable[Place]) -> None:
        """Keep the rows that these tables have now."""
        self._digests = dict.fromkeys((p for p in filled if p in self._tables), "")
        self._rows = {place: self._copy_of(place) for place in self._digests}
        self._asked = tuple(place for place in self._tables if place not in self._digests)
        flags = [
            f"CASE WHEN EXISTS (SELECT 1 FROM {self._quoted(place)}) THEN 1 ELSE 0 END"
            for place in self._asked
        ]
        parts = [
            f"CONCAT({', '.join(flags[first : first + _AT_ONCE])})"
            for first in range(0, len(flags), _AT_ONCE)
        ]
        parts += [self._digest(place) for place in self._digests]
        self._probe = f"SELECT {', '.join([self._quick_signature(), *parts])}"
        self._digests = self._answer()[2]

    def _empty(self, dirty: Sequence[Place]) -> None:
        filled = [*self._digests] if not self._digests.keys().isdisjoint(dirty) else []
        groups = self._graph.order({*dirty, *filled})
        parents_first = [place for group in reversed(self._graph.order(filled)) for place in group]
        self._replace(groups, parents_first)

    # ----- what differs

    @abstractmethod
    def _query(self, sql: str) -> list[Any]:
        """All rows."""

    @abstractmethod
    def _full_signature(self) -> str:
        """The same as long as nobody has changed a definition."""

    @abstractmethod
    def _quick_signature(self) -> str:
        """As SQL for one value, what shows most changes of definitions."""

    @abstractmethod
    def _find_tables(self) -> list[Place]:
        """All tables, each with its rows; no views, no partitions."""

    @abstractmethod
    def _references(self) -> list[tuple[Place, Place]]:
        """The foreign keys: child and parent."""

    @abstractmethod
    def _quoted(self, place: Place) -> str:
        """A table in SQL."""

    @abstractmethod
    def _digest(self, place: Place) -> str:
        """As SQL for one value, what two different contents of a table do not share."""

    @abstractmethod
    def _copy_of(self, place: Place) -> Any:
        """The rows of a table, for :meth:`_replace`."""

    @abstractmethod
    def _replace(self, groups: Sequence[Sequence[Place]], filled: Sequence[Place]) -> None:
        """Delete all rows of the groups, in their order, and insert what was kept of ``filled``.

        In one transaction; a group of several tables is a cycle of foreign keys.
        """
