"""Which rows a DELETE removed, and which keys an UPDATE changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import Delete, Update

from tidyrows.capture import returning
from tidyrows.capture.changes import Change, Deleted, KeysChanged, KeysLost, Touched

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidyrows.capture.returning import Rewrite
    from tidyrows.keys import KeyedTable


def change_of(
    statement: Update | Delete,
    result: sa.CursorResult[Any],
    target: KeyedTable,
    rewrite: Rewrite | None,
) -> Change | None:
    """What a statement did to the keys of its table; None where nothing, or nobody can tell."""
    context: Any = result.context
    single = len(target.key_columns) == 1
    if isinstance(statement, Update):
        pairs = renamed_keys(statement, context, target)
        if pairs is None or context.rowcount == 0:
            return None
        stored = [(old[0], new and new[0]) if single else (old, new) for old, new in pairs]
        if not pairs:
            return KeysLost(target)
        return KeysChanged(target, stored, certain=context.rowcount == len(pairs))
    if rewrite is not None:
        keys: list[tuple[Any, ...]] | None = returning.keys_from_rewritten(result, rewrite)
    else:
        keys = matched_keys(statement, context, target) or _fetched_keys(context, target)
    if not keys or context.rowcount == 0:
        return None
    removed = [key[0] for key in keys] if single else keys
    return Deleted(target, removed, certain=context.rowcount == len(keys))


def touched(
    statement: Update | Delete,
    result: sa.CursorResult[Any],
    target: KeyedTable,
    changes: list[Change],
) -> Touched | None:
    """Which rows of any owner a statement has updated or deleted; None where it did none."""
    context: Any = result.context
    stored = [key for change in changes if isinstance(change, Deleted) for key in change.keys]
    if target.key_columns and not stored:
        keys = matched_keys(statement, context, target) or _fetched_keys(context, target)
        stored = [key[0] if len(key) == 1 else key for key in keys or ()]
    count = len(stored) if context.rowcount < 0 else context.rowcount
    if not count:
        return None
    verb = "updated" if isinstance(statement, Update) else "deleted"
    return Touched(target, stored, verb=verb, count=count)


def _fetched_keys(context: Any, target: KeyedTable) -> list[tuple[Any, ...]] | None:
    """The keys that the ORM has asked for, to expire its own objects."""
    rows = context.returned_default_rows
    columns = [target.table.c[name] for name in target.key_names]
    if not rows or not all(column in rows[0]._mapping for column in columns):
        return None
    return [tuple(row._mapping[column] for column in columns) for row in rows]


def matched_keys(
    statement: sa.Update | sa.Delete, context: Any, target: KeyedTable
) -> list[tuple[Any, ...]] | None:
    """The keys that the WHERE clause of an UPDATE or DELETE names, one by one.

    Returns:
        None where the clause is no plain comparison of the whole primary key with values.
    """
    compiled = context.compiled
    conditions = _conditions(compiled.statement, target, compiled.bind_names, target.key_names)
    key = target.key_columns
    if conditions is None:
        return None
    keys: list[tuple[Any, ...]] = []
    for parameters in context.compiled_parameters:
        if all(conditions[column.key][0] is operators.eq for column in key):
            keys.append(tuple(parameters.get(conditions[column.key][1]) for column in key))
            continue
        expanded = (context._expanded_parameters or {}).get(conditions[key[0].key][1])
        if len(key) > 1 or expanded is None or not all(name in parameters for name in expanded):
            return None
        keys += [(parameters[name],) for name in expanded]
    return keys


def matched_rows(
    statement: sa.Delete, context: Any, target: KeyedTable
) -> list[tuple[Any, ...]] | None:
    """The rows of a table without a primary key that a DELETE took, by its WHERE clause.

    So the ORM deletes from an association table.

    Returns:
        None where the clause does not compare every column with a value, or equal rows went too.
    """
    names = [column.key for column in target.table.columns]
    compiled = context.compiled
    conditions = _conditions(compiled.statement, target, compiled.bind_names, names)
    if conditions is None or any(op is not operators.eq for op, _ in conditions.values()):
        return None
    rows = [
        tuple(parameters[conditions[name][1]] for name in names)
        for parameters in context.compiled_parameters
    ]
    return rows if context.rowcount == len(rows) else None


def names_its_rows(statement: sa.Update | sa.Delete, target: KeyedTable) -> bool:
    """Whether the WHERE clause compares the whole primary key with values."""
    conditions = _conditions(statement, target, None, target.key_names)
    if conditions is None:
        return False
    return len(conditions) == 1 or all(op is operators.eq for op, _ in conditions.values())


def _conditions(
    statement: Any,
    target: KeyedTable,
    names: Mapping[Any, str] | None,
    wanted: Iterable[str],
) -> dict[str, tuple[Any, str]] | None:
    """By column, the operator and the name of the bound value (any, without ``names``).

    None where not all wanted columns are compared.
    """
    conditions: dict[str, tuple[Any, str]] = {}
    for clause in _conjuncts(getattr(statement, "_where_criteria", ())):
        column = getattr(clause, "left", None)
        bind = getattr(clause, "right", None)
        if not (isinstance(column, sa.Column) and isinstance(bind, sa.BindParameter)):
            continue
        if bind.literal_execute:
            continue  # such values are written into the statement, and told to nobody
        own = target.table.c.get(column.key)
        if own is None or not own.shares_lineage(column):
            continue  # another table's column of the same name
        name = bind.key if names is None else names.get(bind)
        if name is not None and clause.operator in {operators.eq, operators.in_op}:
            conditions[column.key] = (clause.operator, name)
    return conditions if all(name in conditions for name in wanted) else None


def _conjuncts(clauses: Iterable[Any]) -> Iterable[Any]:
    for clause in clauses:
        if getattr(clause, "operator", None) is operators.and_:
            yield from _conjuncts(clause.clauses)
        else:
            yield clause


def renamed_keys(
    statement: sa.Update, context: Any, target: KeyedTable
) -> list[tuple[tuple[Any, ...], tuple[Any, ...] | None]] | None:
    """The (old, new) keys of an UPDATE that sets a key column; new is None where SQL computes it.

    Returns:
        None where no key column is set; empty where the rows cannot be told.
    """
    compiled = context.compiled
    set_names = {
        column.key
        for column in target.key_columns
        if any(column.key in parameters for parameters in context.compiled_parameters)
    }
    values = getattr(compiled.statement, "_values", None) or {}
    computed = {getattr(column, "key", column) for column in values}
    touched = {column.key for column in target.key_columns} & (set_names | computed)
    if not touched:
        return None
    old_keys = matched_keys(statement, context, target)
    if old_keys is None or len(old_keys) != len(context.compiled_parameters):
        return []
    pairs: list[tuple[tuple[Any, ...], tuple[Any, ...] | None]] = []
    for old, parameters in zip(old_keys, context.compiled_parameters, strict=True):
        new: list[Any] = []
        for column, value in zip(target.key_columns, old, strict=True):
            new.append(parameters.get(column.key, value) if column.key in touched else value)
        known = all(
            column.key in parameters for column in target.key_columns if column.key in touched
        )
        pairs.append((old, tuple(new) if known else None))
    return pairs
