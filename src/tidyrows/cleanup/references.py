"""Which rows reference which by a foreign key: the SELECTs, on tables known and unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.schema import ForeignKey

_CHUNK = 500


def referencing_pairs(
    connection: sa.Connection,
    key: ForeignKey,
    child: KeyedTable,
    child_keys: Sequence[Any],
    parent: KeyedTable,
) -> Iterator[tuple[Any, Any]]:
    """Of these child rows, each one that references a parent, with the parent's key."""
    # Both have an alias: that of one alone may be the other's own name.
    children = with_columns(child, key.child_columns).alias()
    parents = with_columns(parent, key.parent_columns).alias()
    width = len(child.key_columns)
    query = sa.select(
        *(children.c[column.name] for column in child.key_columns),
        *(parents.c[column.name] for column in parent.key_columns),
    ).select_from(children.join(parents, _join(children, parents, key)))
    for chunk in chunks(child_keys):
        for row in connection.execute(query.where(is_one_of(child, chunk, children))):
            yield stored(tuple(row[:width])), stored(tuple(row[width:]))


def referenced(
    connection: sa.Connection,
    key: ForeignKey,
    parent: KeyedTable,
    parent_keys: Sequence[Any],
    *,
    but_for: tuple[KeyedTable, Sequence[Any]] | None = None,
) -> set[Any]:
    """Of these parent rows, those that any row of the child table references."""
    if but_for is None:
        schema, name = key.child
        children = sa.table(name, *map(sa.column, key.child_columns), schema=schema).alias()
    else:
        children = with_columns(but_for[0], key.child_columns).alias()
    parents = with_columns(parent, key.parent_columns).alias()
    query = (
        sa.select(*(parents.c[column.name] for column in parent.key_columns))
        .distinct()
        .select_from(children.join(parents, _join(children, parents, key)))
    )
    if but_for is not None:
        query = query.where(sa.not_(is_one_of(*but_for, children)))
    found: set[Any] = set()
    for chunk in chunks(parent_keys):
        rows = connection.execute(query.where(is_one_of(parent, chunk, parents)))
        found.update(stored(tuple(row)) for row in rows)
    return found


def _join(child: Any, parent: Any, key: ForeignKey) -> sa.ColumnElement[bool]:
    pairs = zip(key.child_columns, key.parent_columns, strict=True)
    return sa.and_(*(child.c[c] == parent.c[p] for c, p in pairs))


def with_columns(table: KeyedTable, names: Iterable[str]) -> sa.TableClause:
    """The table with these columns too, which the project's own Table may not know."""
    known = {column.name: column.type for column in table.table.columns}
    columns = {**known, **{name: known.get(name) for name in names}}
    return sa.table(
        table.clause.name,
        *(sa.column(name, type_) for name, type_ in columns.items()),
        schema=table.clause.schema,
    )


def is_one_of(
    table: KeyedTable, keys: Sequence[Any], clause: sa.FromClause
) -> sa.ColumnElement[bool]:
    """A condition for a few keys, in SQL that every database runs by its index."""
    columns = [clause.c[column.name] for column in table.key_columns]
    if len(columns) == 1:
        return columns[0].in_(keys)
    return sa.or_(
        *(
            sa.and_(*(column == value for column, value in zip(columns, key, strict=True)))
            for key in keys
        )
    )


def stored(key: tuple[Any, ...]) -> Any:
    """A key as trackers keep it: a scalar where it is one column."""
    return key[0] if len(key) == 1 else key


def chunks(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Few enough keys for one statement, in order."""
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]
