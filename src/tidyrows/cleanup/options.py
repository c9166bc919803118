"""The options of a cleanup, and what they mean for rows that reference tracked ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm.mapper import _all_registries  # nothing public has every mapped class

from tidyrows.arguments import SWITCH, function, instance_of, number, optional, whole
from tidyrows.cleanup.reasons import LeftoverKind
from tidyrows.errors import ArgumentError, UnknownTableError
from tidyrows.retry import RETRY, RetryPolicy
from tidyrows.tracking.named_rows import mapper_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import orm

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.report import Progress
    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place


@dataclass(frozen=True, slots=True)
class NamedTable:
    """A table as a user names it.

    Attributes:
        schema: the schema; None for the default one.
        name: the table's name.
        is_text: it was given as a text, which may have a typo; not as a model or a Table.
    """

    schema: str | None
    name: str
    is_text: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


class Dependents(Enum):
    """What a cleanup does with untracked rows that reference tracked ones."""

    FOLLOW_SCHEMA = auto()
    """What each foreign key says. Where it has no action: a row that cannot be without ours (NOT
    NULL) is deleted, one that can is detached, its foreign key set to NULL."""
    DELETE = auto()
    """Delete them all, also where the schema would detach them."""
    ERROR = auto()
    """Touch none: our rows that they reference stay and are reported with them."""


KINDS = {
    "dependents": instance_of(
        Dependents,
        need="Dependents.FOLLOW_SCHEMA, Dependents.DELETE or Dependents.ERROR",
        example="Dependents.FOLLOW_SCHEMA",
    ),
    "retry": RETRY,
    "verify": SWITCH,
    "lock_timeout": number("5.0", above=0),
    "deadline": optional(number("60.0", least=0)),
    "rows_per_transaction": whole("25_000", least=1),
    "on_progress": optional(function("progress_bar()")),
    "trust_keys": SWITCH,
    "keep_on_failure": SWITCH,
    "allow_foreign_keys_off": SWITCH,
}
"""What the arguments of a CleanupManager take; those that name tables are checked with it."""


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
        refuse_both({"own": self.own, "protect": self.protect})

    @property
    def texts(self) -> frozenset[NamedTable]:
        """The tables that were named by a text, which may have a typo."""
        return frozenset(each for each in self.own | self.protect if each.is_text)

    def rules(self, tables: Sequence[KeyedTable], default_schema: str) -> DependentRules:
        """What they mean for one database, seen from the tracked tables there."""
        if not (self.own or self.protect) and self.dependents is Dependents.FOLLOW_SCHEMA:
            return SCHEMA_ALONE
        return DependentRules(
            self.dependents,
            own=places_of(self.own, tables, default_schema),
            protect=places_of(self.protect, tables, default_schema),
        )


def refuse_both(options: Mapping[str, Any]) -> None:
    """Raise for a table that is to be owned and protected.

    Raises:
        ArgumentError: it names the table.
    """
    none: frozenset[NamedTable] = frozenset()
    for table in sorted(options.get("own", none) & options.get("protect", none), key=str):
        raise ArgumentError(
            f"{table} is in own= and in protect=; take it out of one of them.", argument="own"
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

    def speak_of(self, key: ForeignKey) -> bool:
        """Whether they say more of this key than the schema does."""
        named = key.child in self.own or key.child in self.protect
        return named or self.policy is not Dependents.FOLLOW_SCHEMA

    def kind_of_block(self, key: ForeignKey) -> LeftoverKind:
        """Why a row whose fate is BLOCKS is not touched."""
        return LeftoverKind.PROTECTED if key.child in self.protect else LeftoverKind.UNTRACKED


SCHEMA_ALONE = DependentRules()
"""The rules of a cleanup without options: there is nothing but the schema."""


# -- tables that the user names --------------------------------------------------------------------


def named_tables(argument: str, tables: Iterable[Any]) -> frozenset[NamedTable]:
    """Mapped classes, Tables and names like ``"audit_log"`` or ``"audit.log"``."""
    if isinstance(tables, (str, type, sa.Table)) or not isinstance(tables, Iterable):
        raise UnknownTableError(
            f"{argument}= takes a list of tables, and {tables!r} is one. Write "
            f"CleanupManager(tracker, {argument}=[{getattr(tables, '__name__', tables)}]).",
            table=tables,
        )
    return frozenset(_named(argument, each) for each in tables)


def _named(argument: str, table: Any) -> NamedTable:
    if isinstance(table, NamedTable):
        return table
    if isinstance(table, str):
        schema, dot, name = table.rpartition(".")
        return NamedTable(schema if dot else None, name, is_text=True)
    mapper = mapper_of(table)
    own = table if mapper is None else mapper.local_table
    if not isinstance(own, sa.Table):
        raise UnknownTableError(
            f"{argument}= takes mapped classes, Tables or names of tables, and {table!r} is none "
            f'of them. Write {argument}=[AuditLog] or {argument}=["audit_log"].',
            table=table,
        )
    return NamedTable(own.schema, str(own.name))


def places_of(
    named: Iterable[NamedTable], tables: Sequence[KeyedTable], default_schema: str
) -> frozenset[Place]:
    """The places of these tables; their schemas are translated as those of the tracked ones."""
    places: set[Place] = set()
    for each in named:
        reals = {table.name.schema for table in tables if table.table.schema == each.schema}
        places.update((real, each.name) for real in reals or {each.schema or default_schema})
    return frozenset(places)


def written_names(named: Iterable[NamedTable]) -> list[str]:
    """The names by which :func:`named_tables` finds these again."""
    return sorted(map(str, named))


Unknown: TypeAlias = "dict[NamedTable, set[str]]"
"""Names that no table has, and the names that tables have in their stead."""
_known: weakref.WeakKeyDictionary[sa.Engine, tuple[int, set[Any]]] = weakref.WeakKeyDictionary()
"""The names that a database has, with the version of its schema."""


def unknown_tables(
    database: Database, named: Iterable[NamedTable], tables: Sequence[KeyedTable] | None
) -> Unknown:
    """Of these names, those that no table has.

    Args:
        database: is asked once for each name, and again after DDL through its engine.
        named: the names.
        tables: the tracked tables, by which a schema is translated; None before any is tracked,
            when a name without a schema may be in any.
    """
    version = database.capture.tables.schema_version
    known_version, known = _known.get(database.engine, (version, set()))
    if known_version != version:
        known = set()
    default = database.engine.dialect.default_schema_name or ""
    asked = {each: each if tables is None else places_of([each], tables, default) for each in named}
    unknown: Unknown = {}
    new = [each for each, what in asked.items() if what not in known]
    if new:
        with database.reading() as connection:
            inspector = sa.inspect(connection)
            schemas = set(inspector.get_schema_names())
            default = inspector.default_schema_name or ""
            for each in new:
                places = places_of([each], tables or (), default)
                found = any(_has_table(inspector, schemas, *place) for place in sorted(places))
                anywhere = {default, *(schema for schema, _name in places)}
                if each.schema is None and not found:
                    others = [s for s in schemas if each.name in _table_names(inspector, s)]
                    anywhere.update(others)
                    found = tables is None and bool(others)
                if found:
                    known.add(asked[each])
                    continue
                anywhere.update(get_close_matches(each.schema or default, schemas, n=1))
                unknown[each] = {
                    name
                    for schema in anywhere & schemas
                    for table in _table_names(inspector, schema)
                    for name in (f"{schema}.{table}", table)[: 1 + (schema == default)]
                }
    _known[database.engine] = version, known
    return unknown


def _table_names(inspector: sa.Inspector, schema: str) -> list[str]:
    """The tables of a schema; none where somebody dropped it since the schemas were listed.

    On MariaDB the schemas are all databases of the server, of other applications too.
    """
    try:
        return inspector.get_table_names(schema)
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated or schema == inspector.default_schema_name:
            raise
        if schema in sa.inspect(inspector.bind).get_schema_names():
            raise
        return []


def _has_table(inspector: sa.Inspector, schemas: set[str], schema: str, name: str) -> bool:
    """Whether there is a table of exactly this name: SQLite would find it in any case."""
    if schema not in schemas:
        return False
    listed = inspector.get_table_names(schema)
    if name in listed:
        return True
    # MariaDB lists no table with system versioning.
    alike = name.casefold() in {each.casefold() for each in listed}
    return not alike and inspector.has_table(name, schema)


def unknown_table_error(argument: str, unknown: NamedTable, names: set[str]) -> UnknownTableError:
    """The error for a name that no table has, with the names that may have been meant."""
    text = str(unknown)
    for mapper in sorted(known_mappers(), key=str):
        if mapper.class_.__name__ == text and isinstance(mapper.local_table, sa.Table):
            found = [mapper.local_table.fullname]
            break
    else:
        folded = {name.casefold(): name for name in sorted(names)}
        found = [name for name in sorted(names) if name.endswith(f".{text}")]
        found = found or [folded[each] for each in get_close_matches(text.casefold(), folded)]
    proposed = found[0] if found else "schema.table"
    meant = f"Did you mean {' or '.join(map(repr, found))}? " if found else ""
    return UnknownTableError(
        f"{argument}= names {text!r}, and the database has no such table; nothing was deleted. "
        f"{meant}Write {argument}=[{proposed!r}], or pass the model; a table that is to be made "
        f"must be there first.",
        table=text,
    )


def is_table_of_models(named: NamedTable) -> bool:
    """Whether a mapped class has the table."""
    tables = (table for mapper in known_mappers() for table in mapper.tables)
    return any((table.schema, table.name) == (named.schema, named.name) for table in tables)


def known_mappers(first: orm.registry | None = None) -> Iterable[orm.Mapper[Any]]:
    """The mappers of this process, those of a registry first."""
    # Not registry.mappers: a class whose mapping is deferred makes that fail.
    registries = [*filter(None, [first]), *_all_registries()]
    managers = [each for registry in registries for each in list(registry._managers)]  # noqa: SLF001 -- as above
    return dict.fromkeys(manager.mapper for manager in managers if manager.is_mapped)
