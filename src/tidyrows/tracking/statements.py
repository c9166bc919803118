"""Which rows an INSERT made, an UPDATE renamed and a DELETE removed.

Facts: DATABASE_FACTS 11. A result of a flush or of a single insert has the keys; an executemany
has them in its parameters, or gives them if RETURNING is added; an upsert's keys may be a
stranger's and count only where the insert is proved.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.sql import operators

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect, RealTable
    from tidyrows.rows import KeyedTable


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a statement was changed so that its keys can be read.

    Attributes:
        statement: the statement that runs instead.
        asked: how many columns the caller's own RETURNING asks for; 0 if it has none.
        keys: how many key columns stand behind them.
        proof: a last column tells whether the row was inserted.
        refusal: why no row of this statement can be tracked, or None.
    """

    statement: sa.Insert
    asked: int = 0
    keys: int = 0
    proof: bool = False
    refusal: str | None = None


def is_plain(insert: sa.Insert) -> bool:
    """Whether an INSERT of one row has nothing that could hide the row's key."""
    return (
        insert._post_values_clause is None
        and not insert._returning
        and not insert._prefixes
        and not insert._multi_values
        and insert.select is None
    )


def rewrite_insert(
    insert: sa.Insert,
    multiparams: Sequence[Mapping[str, Any]],
    target: KeyedTable,
    real: RealTable,
    dialect: Dialect,
) -> Rewrite | None:
    """Add RETURNING of the key where nothing else would tell it.

    Returns:
        None where the statement can run as it is.
    """
    key = target.key_columns
    upsert = dialect.upsert(insert)
    many = len(multiparams) > 1 or bool(insert._multi_values) or insert.select is not None
    if not key or not (upsert or many or insert._returning):
        return None
    proof = None
    if upsert:
        provable, proof = dialect.inserted_proof(insert, real)
        if not provable:
            return Rewrite(
                insert,
                refusal="an upsert on this database does not tell a new row from one it found",
            )
    elif _reports_keys(insert) or (
        not insert._returning and _parameters_hold_key(insert, multiparams, key)
    ):
        return None
    able = dialect.executemany_returning if multiparams else dialect.returning
    if not able:
        return Rewrite(
            insert,
            refusal="this database has no RETURNING, and the parameters do not hold the whole key",
        )
    if insert._return_defaults:  # the ORM's own upserts with RETURNING come as returning()
        return Rewrite(insert, refusal="it uses return_defaults(), which excludes RETURNING")
    columns = [target.table.c[column.key] for column in key]
    asked = len(_columns_of(insert._returning))
    extra = [proof] if proof is not None else []
    return Rewrite(
        insert.returning(*columns, *extra), asked=asked, keys=len(key), proof=proof is not None
    )


def _reports_keys(insert: sa.Insert) -> bool:
    """Whether SQLAlchemy itself will fetch the keys of every row (a flush does)."""
    return bool(insert._return_defaults) and insert.select is None and not insert._multi_values


def _columns_of(elements: Iterable[Any]) -> list[Any]:
    columns: list[Any] = []
    for element in elements:
        columns.extend(element._select_iterable)
    return columns


def _parameters_hold_key(
    insert: sa.Insert, multiparams: Sequence[Mapping[str, Any]], key: Iterable[sa.Column[Any]]
) -> bool:
    if not multiparams:
        return False
    given = multiparams[0]
    for column in key:
        if column.key in given:
            if given[column.key] is None or isinstance(given[column.key], sa.ClauseElement):
                return False
        elif column.key in {getattr(c, "key", c) for c in insert._values or ()}:
            return False
        else:
            default = column.default
            if default is None or not (default.is_scalar or default.is_callable):
                return False
    return True


def keys_from_rewritten(result: sa.CursorResult[Any], rewrite: Rewrite) -> list[tuple[Any, ...]]:
    """Read the keys that were asked for behind the caller's back, and hide them from the caller."""
    rows = result.all()
    start, end = rewrite.asked, rewrite.asked + rewrite.keys
    keys = [tuple(row[start:end]) for row in rows if not rewrite.proof or row[end]]
    if rewrite.asked:
        # _rewind is what SQLAlchemy uses itself to hand on rows that it has read for the keys
        result._rewind(rows)
        result._metadata = result._metadata._reduce(range(rewrite.asked))
        result._reset_memoizations()
    else:
        result._soft_close()
        result._metadata = _no_rows()
    context: Any = result.context
    context._rowcount = len(rows)  # psycopg reads -1 after several RETURNING batches
    return keys


def _no_rows() -> Any:
    from sqlalchemy.engine.cursor import _NO_RESULT_METADATA  # noqa: PLC0415 - private, here only

    return _NO_RESULT_METADATA


def keys_from_result(
    result: sa.CursorResult[Any], target: KeyedTable, dialect: Dialect
) -> tuple[list[tuple[Any, ...]], bool] | None:
    """The keys of an INSERT that ran as it was written, and whether the database made them.

    Returns:
        None where they cannot be told.
    """
    context: Any = result.context
    parameters = context.compiled_parameters
    names = target.key_names
    if context.executemany and not context.compiled.effective_returning:
        keys = [tuple(row.get(name) for name in names) for row in parameters]
        rowcount = context.rowcount
        if rowcount not in {-1, len(keys)}:
            return None
        return keys, False
    given = parameters[0] if parameters else {}
    generated = any(given.get(name) is None for name in names)
    rows = context.inserted_primary_key_rows
    if not generated and _nothing_inserted(result, context):
        return [], False
    if dialect.explicit_zero_is_generated and not generated and _zero(rows, target):
        return None
    return [tuple(row) for row in rows if row is not None], generated


def _nothing_inserted(result: sa.CursorResult[Any], context: Any) -> bool:
    """A rule, a trigger or a conflict clause of the table swallowed the row, without an error."""
    if context.compiled.effective_returning:
        return bool(context.rowcount == 0)
    return context.cursor is not None and context.cursor.rowcount == 0


def _zero(rows: Iterable[Sequence[Any]], target: KeyedTable) -> bool:
    auto = target.table._autoincrement_column
    if auto is None:
        return False
    place = target.key_columns.index(auto)
    return any(row is not None and row[place] == 0 for row in rows)


def matched_keys(
    statement: sa.Update | sa.Delete, context: Any, target: KeyedTable
) -> list[tuple[Any, ...]] | None:
    """The keys that the WHERE clause of an UPDATE or DELETE names, one by one.

    Returns:
        None where the clause is no plain comparison of the whole primary key with values.
    """
    compiled = context.compiled
    clauses = getattr(compiled.statement, "_where_criteria", ())
    conditions: dict[str, Any] = {}
    for clause in _conjuncts(clauses):
        column = getattr(clause, "left", None)
        bind = getattr(clause, "right", None)
        if isinstance(column, sa.Column) and isinstance(bind, sa.BindParameter):
            name = compiled.bind_names.get(bind)
            if name is not None and clause.operator in {operators.eq, operators.in_op}:
                conditions[column.key] = (clause.operator, name)
    key = target.key_columns
    if not all(column.key in conditions for column in key):
        return None
    keys: list[tuple[Any, ...]] = []
    for parameters in context.compiled_parameters:
        values = [parameters.get(conditions[column.key][1]) for column in key]
        if len(key) == 1 and conditions[key[0].key][0] is operators.in_op:
            keys.extend((value,) for value in values[0])
        elif any(conditions[column.key][0] is operators.in_op for column in key):
            return None
        else:
            keys.append(tuple(values))
    return keys


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
        None where no key column is set, or where the rows cannot be told.
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
        return None
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


def only_ours_can_hold(key: tuple[Any, ...], *, generated: bool, reused: bool) -> bool:
    """Whether a row that has this key must be the one that was inserted.

    A sequence or auto-increment never gives a number twice (SQLite does: DATABASE_FACTS 5), and
    a random UUID is nobody else's.
    """
    if generated and not reused:
        return True
    return any(isinstance(value, uuid.UUID) and value.version == 4 for value in key)  # noqa: PLR2004 - random UUIDs
