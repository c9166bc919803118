"""What the schema says about its foreign keys, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Place: TypeAlias = tuple[str, str]
"""A table's place: its real schema and its name."""


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """One foreign key. Two tables may hold several, and a table may reference itself.

    Attributes:
        name: the constraint's name; None where it has none.
        child: the table that holds the key.
        child_columns: its columns, in the key's order.
        parent: the table it references.
        parent_columns: the columns referenced, in the same order; not always the primary key.
        on_delete: ``NO ACTION``, ``RESTRICT``, ``CASCADE``, ``SET NULL`` or ``SET DEFAULT``.
            The MySQL family's RESTRICT reads ``NO ACTION``: it tells nobody the difference.
        deferrable: whether the check can be put off to the COMMIT.
        initially_deferred: whether it is put off unless somebody says otherwise.
        inherited: the child is a partition that has the key from its partitioned table, whose own
            key finds the same rows.
        source: ``database`` where the database holds it; ``models`` where only the project's
            tables do, so that it says which rows go first and nothing else.
    """

    name: str | None
    child: Place
    child_columns: tuple[str, ...]
    parent: Place
    parent_columns: tuple[str, ...]
    on_delete: str = "NO ACTION"
    deferrable: bool = False
    initially_deferred: bool = False
    inherited: bool = False
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
    """The database's keys, all of them, and those of the models that it does not have.

    Where both have a key, the database's word on ON DELETE and deferral is what will happen, so
    it is the one that is kept.
    """
    merged = list(database)
    known = {key.meaning for key in merged}
    for key in models:
        if key.meaning not in known:
            known.add(key.meaning)
            merged.append(key)
    return tuple(merged)
