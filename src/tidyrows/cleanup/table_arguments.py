"""The tables that a user names with ``own=`` and ``protect=``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import UnknownTableError
from tidyrows.tracking.inheritance import mapper_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.schema import Place

Named = tuple[str | None, str]
"""A table as a user names it: the schema, None for the usual one, and the name."""


def named_tables(argument: str, tables: Iterable[Any]) -> frozenset[Named]:
    """Mapped classes, Tables and names like ``"audit_log"`` or ``"audit.log"``.

    Raises:
        UnknownTableError: one of them is none of these.
    """
    if isinstance(tables, (str, type, sa.Table)):
        raise UnknownTableError(
            f"{argument}= takes a list of tables, and {tables!r} is one. Write "
            f"CleanupManager(tracker, {argument}=[{getattr(tables, '__name__', tables)}]).",
            table=tables,
        )
    return frozenset(_named(argument, each) for each in tables)


def _named(argument: str, table: Any) -> Named:
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
    named: Iterable[Named], tables: Sequence[KeyedTable], default_schema: str
) -> frozenset[Place]:
    """Where these tables really are, seen from the tracked ones.

    A schema means for them what it means for the tracked rows' models: schemas may be translated.
    """
    places: set[Place] = set()
    for schema, name in named:
        reals = {table.name.schema for table in tables if table.table.schema == schema}
        places.update((real, name) for real in reals or {schema or default_schema})
    return frozenset(places)


def written_names(named: Iterable[Named]) -> list[str]:
    """The names by which :func:`named_tables` finds these again."""
    return [f"{schema}.{name}" if schema else name for schema, name in sorted(named, key=str)]
