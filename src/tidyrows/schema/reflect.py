"""Reading foreign keys: from the database itself, and from the project's tables."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine.reflection import ObjectKind, ObjectScope

from tidyrows.schema.graph import ForeignKey, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy.engine.interfaces import ReflectedForeignKeyConstraint

    ReflectedKeys: TypeAlias = Mapping[str, Sequence[ReflectedForeignKeyConstraint]]
    Reader: TypeAlias = Callable[[sa.Connection, str], ReflectedKeys]


_SILENT = "skip_user_error_events"
"""SQLAlchemy's execution option of statements whose errors no listener hears."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one table, as the database has them.

    Attributes:
        types: by name, in the table's order.
        key: the names of the primary key's columns, in its order; empty where there is none.
        nullable: those that may be set to NULL, without key and computed columns.
    """

    types: Mapping[str, sa.types.TypeEngine[Any]]
    key: tuple[str, ...]
    nullable: frozenset[str]


def reflect_foreign_keys(
    connection: sa.Connection, schemas: Iterable[str], *, read: Reader | None = None
) -> tuple[ForeignKey, ...]:
    """All foreign keys that tables of these schemas hold, wherever they point."""
    read = read or inspector_foreign_keys
    reflected = {schema: read(connection, schema) for schema in dict.fromkeys(schemas)}
    keys = [
        _foreign_key((schema, table), key)
        for schema, tables in reflected.items()
        for table, constraints in tables.items()
        for key in constraints
    ]
    return tuple(key for key in keys if _is_enforceable(key, reflected))


def inspector_foreign_keys(connection: sa.Connection, schema: str) -> ReflectedKeys:
    """One schema's foreign keys by table, as SQLAlchemy's Inspector reads them."""
    # PostgreSQL leaves out the schema of a parent that the connection's search_path reaches. A
    # second reading that ignores the path then names every schema but the default one, for which
    # it repeats the child's; where the child was in the parent's own schema, the first reading
    # named it. Other databases ignore the option.
    inspector = sa.inspect(connection)
    tables = _multi_foreign_keys(inspector, schema)
    if any(key["referred_schema"] is None for keys in tables.values() for key in keys):
        disregarding_path = _multi_foreign_keys(
            inspector, schema, postgresql_ignore_search_path=True
        )
        schemas = {
            (table, key["name"]): key["referred_schema"]
            for table, keys in disregarding_path.items()
            for key in keys
        }
        for table, keys in tables.items():
            for key in keys:
                if key["referred_schema"] is None:
                    named = schemas.get((table, key["name"]))
                    key["referred_schema"] = (
                        inspector.default_schema_name if named in {None, schema} else named
                    )
    return tables


def _multi_foreign_keys(
    inspector: sa.Inspector, schema: str, **options: Any
) -> dict[str, list[ReflectedForeignKeyConstraint]]:
    with without_reflection_warnings():
        found = inspector.get_multi_foreign_keys(
            schema=schema, scope=ObjectScope.ANY, kind=ObjectKind.TABLE, **options
        )
    return {table: list(keys) for (_, table), keys in found.items()}


def _foreign_key(child: Place, reflected: ReflectedForeignKeyConstraint) -> ForeignKey:
    options: Mapping[str, Any] = reflected.get("options", {})
    return ForeignKey(
        name=reflected["name"],
        child=child,
        child_columns=tuple(reflected["constrained_columns"]),
        parent=(reflected["referred_schema"] or child[0], reflected["referred_table"]),
        parent_columns=tuple(reflected["referred_columns"]),
        on_delete=_action(options.get("ondelete")),
        deferrable=bool(options.get("deferrable")),
        initially_deferred=_is_deferred(options.get("initially")),
    )


def _is_enforceable(key: ForeignKey, reflected: Mapping[str, ReflectedKeys]) -> bool:
    """Whether the parent exists: SQLite, and MySQL without checks, allow a key to no table."""
    # Such a key holds no row back; where SQLite knows the parent but no columns to compare, it
    # refuses every statement on the two tables itself.
    schema, table = key.parent
    exists = schema not in reflected or table in reflected[schema]
    return exists and len(key.child_columns) == len(key.parent_columns)


def model_foreign_keys(
    tables: Iterable[sa.Table], real_schema: Callable[[str | None], str]
) -> tuple[ForeignKey, ...]:
    """The foreign keys of the project's own tables, but those to tables that are no Table."""
    found = []
    for table in tables:
        for constraint in sorted(
            table.foreign_key_constraints, key=lambda key: tuple(key.column_keys)
        ):
            try:
                parents = [element.column for element in constraint.elements]
            except sa.exc.NoReferenceError:
                continue
            name, parent = constraint.name, constraint.referred_table
            found.append(
                ForeignKey(
                    name=str(name) if isinstance(name, str) else None,
                    child=(real_schema(table.schema), str(table.name)),
                    child_columns=tuple(str(e.parent.name) for e in constraint.elements),
                    parent=(real_schema(parent.schema), str(parent.name)),
                    parent_columns=tuple(str(column.name) for column in parents),
                    on_delete=_action(constraint.ondelete),
                    deferrable=bool(constraint.deferrable),
                    initially_deferred=_is_deferred(constraint.initially),
                    source="models",
                )
            )
    return tuple(found)


def reflect_columns(connection: sa.Connection, places: Iterable[Place]) -> dict[Place, Columns]:
    """The columns of these tables, as SQLAlchemy's Inspector reads them; no view is among them."""
    names: dict[str, list[str]] = {}
    for schema, name in places:
        names.setdefault(schema, []).append(name)
    inspector = sa.inspect(connection)
    found: dict[Place, Columns] = {}
    for schema in sorted(names.keys() & set(inspector.get_schema_names())):
        asked: Any = {"schema": schema, "filter_names": names[schema], "scope": ObjectScope.ANY}
        with without_reflection_warnings():
            keys = inspector.get_multi_pk_constraint(**asked, kind=ObjectKind.TABLE)
            tables = inspector.get_multi_columns(**asked, kind=ObjectKind.TABLE)
        for (_schema, name), columns in tables.items():
            key = keys[_schema, name]["constrained_columns"]
            found[schema, name] = Columns(
                {column["name"]: column["type"] for column in columns},
                tuple(key),
                frozenset(
                    column["name"]
                    for column in columns
                    if column["nullable"] and "computed" not in column and column["name"] not in key
                ),
            )
    return found


def with_real_columns(connection: sa.Connection, table: sa.Table, schema: str) -> sa.Table:
    """The columns and the primary key that the database has for a Table without a primary key.

    Columns that the Table has keep its types. It is the same Table where the database has no more.
    """
    inspector = sa.inspect(connection)
    with without_reflection_warnings(), _hearing_errors(connection):
        key = inspector.get_pk_constraint(table.name, schema=schema)["constrained_columns"]
        real = inspector.get_columns(table.name, schema=schema)
    own = {column.name: column for column in table.columns}
    if not key and own.keys() >= {column["name"] for column in real}:
        return table
    columns = {}
    for found in real:
        known, name = own.get(found["name"]), found["name"]
        if known is None:
            columns[name] = sa.Column(name, found["type"])
        else:
            columns[name] = known._copy()  # noqa: SLF001 -- as Table.to_metadata() does
            # what a statement says of one column holds for the other
            columns[name]._proxies = [known]  # noqa: SLF001 -- no public name
        generated = found.get("autoincrement") or found.get("identity")
        columns[name].autoincrement = "auto" if generated else False
    primary_key = sa.PrimaryKeyConstraint(*(columns[name].key for name in key))
    return sa.Table(table.name, sa.MetaData(), *columns.values(), primary_key, schema=table.schema)


@contextmanager
def without_reflection_warnings() -> Iterator[None]:
    """SQLAlchemy warns of types and DDL that it does not know, and nobody has to know them here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        yield


@contextmanager
def _hearing_errors(connection: sa.Connection) -> Iterator[None]:
    """SQLAlchemy's Inspector of MySQL switches a connection's error events off, and never on again.

    Without the events capture does not hear that the COMMIT of the caller's connection has failed.
    """
    before = connection.get_execution_options().get(_SILENT, False)
    try:
        yield
    finally:
        if connection.get_execution_options().get(_SILENT, False) != before:
            connection.execution_options(**{_SILENT: before})


def _action(on_delete: str | None) -> str:
    """The action without the columns of PostgreSQL's ``SET NULL (column)``."""
    return " ".join((on_delete or "NO ACTION").upper().split("(")[0].split())


def _is_deferred(initially: str | None) -> bool:
    return (initially or "").upper() == "DEFERRED"
