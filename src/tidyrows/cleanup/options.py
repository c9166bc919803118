"""The options of a cleanup, and what they mean for rows that reference tracked ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind
from tidyrows.errors import UnknownTableError
from tidyrows.retry import RetryPolicy
from tidyrows.tracking.named_rows import mapper_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.cleanup.report import Progress
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place

NamedTable = tuple[str | None, str]
"""A table as a user names it: the schema, None for the default one, and the name."""


class Dependents(Enum):
    """What a cleanup does with untracked rows that reference tracked ones."""

    FOLLOW_SCHEMA = auto()
    """What each foreign key says. Where it has no action: a row that cannot be without ours (NOT
    NULL) is deleted, one that can is detached, its foreign key set to NULL."""
    DELETE = auto()
    """Delete them all, also where the schema would detach them."""
    ERROR = auto()
    """Touch none: our rows that they reference stay and are reported with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupOptions:
    """The arguments of :class:`CleanupManager`, which describes them; all are valid."""

    dependents: Dependents = Dependents.FOLLOW_SCHEMA
    own: frozenset[NamedTable] = frozenset()
    protect: frozenset[NamedTable] = frozenset()
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    verify: bool = True
    lock_timeout: float = 5.0
    rows_per_transaction: int = 25_000
    on_progress: Callable[[Progress], None] | None = None
    trust_keys: bool = False
    keep_on_failure: bool = False
    allow_foreign_keys_off: bool = False

    def __post_init__(self) -> None:
        if self.lock_timeout <= 0:
            raise ValueError(
                f"lock_timeout={self.lock_timeout!r} is no time to wait; give seconds, as in "
                f"CleanupManager(tracker, lock_timeout=5.0)."
            )
        if self.rows_per_transaction < 1:
            raise ValueError(
                f"rows_per_transaction={self.rows_per_transaction!r} deletes nothing; give a "
                f"number of rows, as in CleanupManager(tracker, rows_per_transaction=25_000)."
            )
        if not isinstance(self.dependents, Dependents):
            raise TypeError(
                f"dependents={self.dependents!r} is no way to treat dependents; write "
                f"Dependents.FOLLOW_SCHEMA, Dependents.DELETE or Dependents.ERROR."
            )
        for schema, name in sorted(self.own & self.protect, key=str):
            raise ValueError(
                f"{f'{schema}.' if schema else ''}{name} is in own= and in protect=; take it out "
                f"of one of them."
            )

    def rules(self, tables: Sequence[KeyedTable], default_schema: str) -> DependentRules:
        """What they mean for one database, seen from the tracked tables there."""
        if not self.own and not self.protect:
            return DependentRules(self.dependents)
        return DependentRules(
            self.dependents,
            own=places_of(self.own, tables, default_schema),
            protect=places_of(self.protect, tables, default_schema),
        )


class Fate(Enum):
    """What becomes of a row that references one of ours by a certain foreign key."""

    DELETED = auto()
    DETACHED = auto()
    DETACHED_BY_SCHEMA = auto()
    BLOCKS = auto()


@dataclass(frozen=True, slots=True)
class DependentRules:
    """What becomes of untracked rows in one database."""

    policy: Dependents = Dependents.FOLLOW_SCHEMA
    own: frozenset[Place] = frozenset()
    protect: frozenset[Place] = frozenset()

    def fate(self, key: ForeignKey, nullable: Iterable[str], *, enforced: bool) -> Fate:
        """What becomes of rows that reference ours by this key."""
        if key.child in self.protect:
            return Fate.BLOCKS
        if key.child in self.own or self.policy is Dependents.DELETE:
            return Fate.DELETED
        if self.policy is Dependents.ERROR:
            return Fate.BLOCKS
        if key.on_delete == "CASCADE":
            return Fate.DELETED
        if key.on_delete in {"SET NULL", "SET DEFAULT"} and enforced:
            return Fate.DETACHED_BY_SCHEMA
        return Fate.DETACHED if set(key.child_columns) & set(nullable) else Fate.DELETED

    def kind_of_block(self, key: ForeignKey) -> LeftoverKind:
        """Why a row whose fate is BLOCKS is not touched."""
        return LeftoverKind.PROTECTED if key.child in self.protect else LeftoverKind.UNTRACKED


def named_tables(argument: str, tables: Iterable[Any]) -> frozenset[NamedTable]:
    """Mapped classes, Tables and names like ``"audit_log"`` or ``"audit.log"``."""
    if isinstance(tables, (str, type, sa.Table)):
        raise UnknownTableError(
            f"{argument}= takes a list of tables, and {tables!r} is one. Write "
            f"CleanupManager(tracker, {argument}=[{getattr(tables, '__name__', tables)}]).",
            table=tables,
        )
    return frozenset(_named(argument, each) for each in tables)


def _named(argument: str, table: Any) -> NamedTable:
    if isinstance(table, str):
        schema, dot, name = table.rpartition(".")
        return (schema if dot else None), name
    mapper = mapper_of(table)
    own = table if mapper is None else mapper.local_table
    if not isinstance(own, sa.Table):
        raise UnknownTableError(
            f"{argument}= takes mapped classes, Tables or names of tables, and {table!r} is none "
            f'of them. Write {argument}=[AuditLog] or {argument}=["audit_log"].',
            table=table,
        )
    return own.schema, str(own.name)


def places_of(
    named: Iterable[NamedTable], tables: Sequence[KeyedTable], default_schema: str
) -> frozenset[Place]:
    """The places of these tables; their schemas are translated as those of the tracked ones."""
    places: set[Place] = set()
    for schema, name in named:
        reals = {table.name.schema for table in tables if table.table.schema == schema}
        places.update((real, name) for real in reals or {schema or default_schema})
    return frozenset(places)


def written_names(named: Iterable[NamedTable]) -> list[str]:
    """The names by which :func:`named_tables` finds these again."""
    return sorted([f"{schema}.{name}" if schema else name for schema, name in named])
