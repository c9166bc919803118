"""What becomes of untracked rows that reference tracked ones: the schema's word and the user's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.schema import ForeignKey, Place


class Dependents(Enum):
    """What a cleanup does with untracked rows that reference tracked ones."""

    FOLLOW_SCHEMA = auto()
    """What each foreign key says. Where it has no action: a row that cannot be without ours (NOT
    NULL) is deleted, one that can is detached, its foreign key set to NULL."""
    DELETE = auto()
    """Delete them all, also where the schema would detach them."""
    ERROR = auto()
    """Touch none: our rows that they reference stay and are reported with them."""


class Fate(Enum):
    """What becomes of a row that references one of ours by a certain foreign key."""

    DELETED = auto()
    DETACHED = auto()
    DETACHED_BY_SCHEMA = auto()
    KEEPS = auto()


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rows go, whatever the schema says.

    Attributes:
        policy: for all other tables.
        own: tables whose rows that reference ours are ours.
        protect: tables whose rows are never touched.
    """

    policy: Dependents = Dependents.FOLLOW_SCHEMA
    own: frozenset[Place] = frozenset()
    protect: frozenset[Place] = frozenset()

    def fate(self, key: ForeignKey, nullable: Iterable[str], *, enforced: bool) -> Fate:
        """What becomes of rows that reference ours by this key.

        Args:
            key: the foreign key.
            nullable: the columns of its table that may become NULL.
            enforced: whether the database does what ON DELETE says.
        """
        if key.child in self.protect:
            return Fate.KEEPS
        if key.child in self.own or self.policy is Dependents.DELETE:
            return Fate.DELETED
        if self.policy is Dependents.ERROR:
            return Fate.KEEPS
        if key.on_delete == "CASCADE":
            return Fate.DELETED
        if key.on_delete in {"SET NULL", "SET DEFAULT"} and enforced:
            return Fate.DETACHED_BY_SCHEMA
        return Fate.DETACHED if set(key.child_columns) & set(nullable) else Fate.DELETED

    def why_kept(self, key: ForeignKey) -> str:
        """Why a row that keeps ours is not touched."""
        if key.child in self.protect:
            return "is protected"
        return "is not tracked (Dependents.ERROR leaves it alone)"
