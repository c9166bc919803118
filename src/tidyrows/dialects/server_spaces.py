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
"""How often it is emptied: triggers of a DELETE may fill a table that was empty."""


class ServerSpace(Space):
    """A space whose rows are reached by SQL on one connection."""

    _signature: str
    _probe: str
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
        self._digests = {}
        filled, _changed = self._differences()
        self._keep(filled)
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

    def reset(self) -> bool:
        """Only in the tables that have other rows."""
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
        self._digests = {}
        self._ask_about()
        self._quick = str(self._query(f"SELECT {self._quick_signature()}")[0][0])

    def _ask_about(self) -> None:
        asked = [
            self._digest(place) if place in self._digests else f"EXISTS (SELECT 1 FROM {name})"
            for place, name in ((place, self._quoted(place)) for place in self._tables)
        ]
        self._probe = f"SELECT {', '.join([self._quick_signature(), *asked])}"

    def _differences(self) -> tuple[list[Place], bool]:
        """The tables with other rows than it was built with, and whether the tables changed."""
        quick, *found = self._query(self._probe)[0]
        dirty = [
            place
            for place, answer in zip(self._tables, found, strict=True)
            if (answer != self._digests[place] if place in self._digests else answer)
        ]
        return dirty, str(quick) != self._quick

    def _keep(self, filled: Iterable[Place]) -> None:
        filled = [place for place in filled if place in self._tables]
        self._digests = dict.fromkeys(filled, "")
        self._rows = {place: self._copy_of(place) for place in filled}
        self._ask_about()
        _quick, *found = self._query(self._probe)[0]
        self._digests = {
            place: str(answer)
            for place, answer in zip(self._tables, found, strict=True)
            if place in self._digests
        }

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
