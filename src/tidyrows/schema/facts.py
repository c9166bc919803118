"""The foreign keys of a schema, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Place: TypeAlias = tuple[str, str]
"""A table's place: its real schema and its name."""


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """One foreign key. Two tables may hold several, and a table may reference itself."""

    name: str | None
    child: Place  # the table that holds the key
    child_columns: tuple[str, ...]
    parent: Place
    parent_columns: tuple[str, ...]  # in the order of the child's; not always the primary key
    # NO ACTION, RESTRICT, CASCADE, SET NULL or SET DEFAULT. The MySQL family's RESTRICT reads
    # NO ACTION: its catalogue shows no difference.
    on_delete: str = "NO ACTION"
    deferrable: bool = False
    initially_deferred: bool = False
    inherited: bool = False  # a partition has it from its table, whose own key finds the same rows
    # A key of the models only, which the database lacks, gives the order of deletes, no more.
    source: Literal["database", "models"] = "database"

    @property
    def is_self_reference(self) -> bool:
        """Whether the key's table references itself."""
        return self.child == self.parent

    @property
    def meaning(self) -> tuple[Place, Place, frozenset[tuple[str, str]]]:
        """What makes two keys the same one, whatever their names and the order of columns."""
        pairs = zip(self.child_columns, self.parent_columns, strict=True)
        return self.child, self.parent, frozenset(pairs)


def merge(database: Iterable[ForeignKey], models: Iterable[ForeignKey]) -> tuple[ForeignKey, ...]:
    """All keys of the database, and those of the models that the database does not have."""
    merged = list(database)
    known = {key.meaning for key in merged}
    for key in models:
        if key.meaning not in known:
            known.add(key.meaning)
            merged.append(key)
    return tuple(merged)
