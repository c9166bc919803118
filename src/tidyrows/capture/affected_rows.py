"""Which rows a statement has inserted, updated or deleted, as it was written and as it turned out.

A result of a flush or of a single insert has the keys, and an executemany may have them in its
parameters; where neither tells, see :mod:`~tidyrows.capture.returning`.
"""

from __future__ import annotations

import uuid
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import Delete, Update

from tidyrows.capture.changes import Change, Deleted, DeletedWhole, KeysChanged, KeysLost, Touched
from tidyrows.capture.returning import computed_names, is_plain, keys_from_rewritten, makes_key
from tidyrows.dialects.keyless_rows import is_as_given
from tidyrows.dialects.keys import own_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.capture.returning import Rewrite
    from tidyrows.capture.table_resolution import Target
    from tidyrows.dialects import Dialect, RealTable
    from tidyrows.keys import KeyedTable


def inserted_keys(
    insert: sa.Insert,
    rewrite: Rewrite | None,
    result: sa.CursorResult[Any],
    found: Target,
    dialect: Dialect,
) -> tuple[list[tuple[Any, ...]], bool, bool] | str:
    """The keys of an INSERT, whether the database made them, and whether they are only as sent.

    A text says why they are not known.
    """
    if rewrite is not None:
        if rewrite.refusal is not None:
            return rewrite.refusal
        return keys_from_rewritten(result, rewrite), rewrite.generated, found[1].moves_keys
    if not is_plain(insert) and dialect.upsert(insert):
        # compiled by the caller, or changed by another listener
        return "an upsert that does not run as it was seen proves nothing"
    reported = _reported_keys(insert, result.context, *found, dialect)
    if reported is None:
        return "its result does not tell which rows it made"
    keys, generated = reported
    sent = found[1].moves_keys or (found[1].alters_keys and not _has_key(result, found[0]))
    types = found[0].own_types
    if len(types) > 1 or not types[0].issuperset(map(type, map(_first, keys))):
        keys, are_own = own_keys(found[0], result.context.dialect, keys)
        sent = sent or not are_own
    return keys, generated, sent


_first = itemgetter(0)


def _reported_keys(
    insert: sa.Insert, context: Any, target: KeyedTable, real: RealTable, dialect: Dialect
) -> tuple[list[tuple[Any, ...]], bool] | None:
    """The keys of an INSERT that ran as it was written, and whether the database made them.

    Returns:
        None where they cannot be told.
    """
    parameters = context.compiled_parameters
    names = target.key_names
    returned = bool(context.compiled.effective_returning)
    if context.executemany and not returned:
        keys = [tuple(row.get(name) for name in names) for row in parameters]
        if kept_count(context) not in {-1, len(keys)}:
            return None
        return keys, False
    given = parameters[0] if parameters else {}
    missing = False
    for name in names:
        missing = missing or given.get(name) is None
    # A rule, a trigger or a conflict clause of the table may swallow the row, without an error.
    asked = not missing if returned else context.cursor is not None
    nothing = asked and kept_count(context) == 0
    rows = context.inserted_primary_key_rows
    # its Table may have no key where the real one has
    known = not rows or rows[0] is None or len(rows[0]) == len(names)
    untold = real.kind == "other" and not returned and (missing or nothing)
    if untold or (missing and not known):
        return None  # what the trigger of a view makes is not counted, and its row id not told
    if nothing:
        return [], False
    rows = rows if known else [tuple(map(given.get, names))]
    if dialect.explicit_zero_is_generated and not missing and _zero(rows, target):
        return None
    generated = missing and makes_key(insert, parameters[:1], target)
    keys = []
    for row in rows:  # a comprehension is a call
        if row is not None:
            keys.append(tuple(row))
    return keys, generated


def _has_key(result: sa.CursorResult[Any], target: KeyedTable) -> bool:
    """Whether SQLAlchemy has fetched the whole key for its own use."""
    context: Any = result.context
    fetched = context.returned_default_rows
    return bool(fetched) and all(column in fetched[0]._mapping for column in target.key_columns)


def inserted_rows(
    insert: sa.Insert, rewrite: Rewrite | None, result: sa.CursorResult[Any], target: KeyedTable
) -> list[Any]:
    """The rows of an INSERT into a table without a primary key; None for one that is not known."""
    if rewrite is not None and rewrite.refusal is None:
        return keys_from_rewritten(result, rewrite)
    context: Any = result.context
    # where the driver has closed its cursor, as many as were given
    count = sum(map(len, insert._multi_values)) or max(len(context.compiled_parameters), 1)
    if not context.executemany and not context.compiled.effective_returning:
        counted = kept_count(context)
        count = count if counted < 0 else counted
    columns = target.table.columns
    given = context.compiled_parameters
    computed = computed_names(insert)
    told = (
        len(given) == count
        and insert.select is None
        and not insert._multi_values
        and insert._post_values_clause is None
        and not insert._prefixes
        and all(column.key not in computed and is_as_given(column) for column in columns)
    )
    if not told or not all(column.key in row for row in given for column in columns):
        return [None] * count
    return [tuple(row[column.key] for column in columns) for row in given]


def nameable(keys: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The keys that can name a row: without NULL, and without what no set can hold.

    Returns:
        ``keys`` itself where that is all of them.
    """
    try:
        for key in keys:
            hash(key)
            if None in key:
                break
        else:
            return keys
    except TypeError:  # an array, a bytearray
        pass
    return [key for key in keys if _is_nameable(key)]


def _is_nameable(key: tuple[Any, ...]) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return None not in key


def _zero(rows: Iterable[Sequence[Any]], target: KeyedTable) -> bool:
    auto = target.table._autoincrement_column
    if auto is None:
        return False
    place = target.key_columns.index(auto)
    return any(row is not None and row[place] == 0 for row in rows)


def only_ours_can_hold(key: tuple[Any, ...], *, generated: bool, reused: bool) -> bool:
    """Whether a row that has this key must be the one that was inserted.

    A sequence or auto-increment never gives a number twice (SQLite does), and
    a random UUID is nobody else's.
    """
    if generated and not reused:
        return True
    return any(isinstance(value, uuid.UUID) and value.version == 4 for value in key)  # noqa: PLR2004 - random UUIDs


def change_of(
    statement: Update | Delete,
    result: sa.CursorResult[Any],
    target: KeyedTable,
    rewrite: Rewrite | None,
) -> Change | None:
    """What a statement did to the keys of its table; None where nothing, or nobody can tell."""
    context: Any = result.context
    if not target.key_columns:
        rows: list[Any] = []
        if rewrite is not None:
            rows = keys_from_rewritten(result, rewrite)
        elif isinstance(statement, Delete) and context.rowcount:
            rows = matched_rows(statement, context, target) or [None]
        return DeletedWhole(target, rows) if rows else None
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
        keys: list[tuple[Any, ...]] | None = keys_from_rewritten(result, rewrite)
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
    """The keys that a WHERE clause names; None where it does not compare each of them."""
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
    return own_keys(target, context.dialect, keys)[0]


def matched_rows(statement: sa.Delete, context: Any, target: KeyedTable) -> list[Any] | None:
    """The whole rows that a WHERE clause names, as the ORM's of an association table does.

    None where it does not compare every column with a value, or equal rows went too.
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

    None where no key column is set; empty where the rows cannot be told.
    """
    names, given = target.key_names, context.compiled_parameters
    computed = computed_names(context.compiled.statement)
    changed = [name for name in names if name in computed or any(name in row for row in given)]
    if not changed:
        return None
    old_keys = matched_keys(statement, context, target)
    if old_keys is None or len(old_keys) != len(given):
        return []
    pairs: list[tuple[tuple[Any, ...], tuple[Any, ...] | None]] = []
    for old, row in zip(old_keys, given, strict=True):
        new = None
        if all(name in row for name in changed):
            values = zip(names, old, strict=True)
            new = tuple(row[name] if name in changed else value for name, value in values)
            new = own_keys(target, context.dialect, [new])[0][0]
        pairs.append((old, new))
    return pairs


def after_statement(context: Any, action: Callable[[], None]) -> None:
    """Do something once a statement has succeeded, while its cursor is open."""
    go_on = context.post_exec

    def post_exec() -> None:
        action()
        go_on()

    context.post_exec = post_exec


def keep_count(context: Any) -> None:
    """Note how many rows a statement changed, while its cursor is open and tells it."""
    if not hasattr(context, "tidyrows_count"):  # else the next page of one INSERT
        context.tidyrows_count = None
        context.post_exec = partial(_keep_count, context, context.post_exec)


def _keep_count(context: Any, go_on: Callable[[], None]) -> None:
    context.tidyrows_count = context.cursor.rowcount
    go_on()


def add_page(context: Any, cursor: Any) -> None:
    """A page of an INSERT is about to be sent: note the rows of the page before it."""
    earlier: int | None = getattr(context, "tidyrows_earlier", None)
    context.tidyrows_earlier = 0 if earlier is None else earlier + max(cursor.rowcount, 0)


def keep_table(tell: Callable[[Any], Any], context: Any) -> None:
    """Note which table RETURNING reads, as ``oid/``, while the cursor is open."""
    if not hasattr(context, "tidyrows_table"):  # else the next page of one INSERT
        context.tidyrows_table = ""
        context.post_exec = partial(_keep_table, tell, context, context.post_exec)


def _keep_table(tell: Callable[[Any], Any], context: Any, go_on: Callable[[], None]) -> None:
    number = tell(context.cursor)(0)
    context.tidyrows_table = f"{number}/" if number else ""
    go_on()


def untold_count(context: Any) -> int | None:
    """How many rows an INSERT has made at most, of which no key is known; None: any number."""
    count = kept_count(context)
    is_sum = not context.executemany or context.dialect.supports_sane_multi_rowcount
    is_over = count > 0 or not context.compiled.effective_returning
    return count if count >= 0 and is_sum and is_over else None


def kept_count(context: Any) -> int:
    """How many rows a statement changed, as :func:`keep_count` noted, or as the result tells."""
    kept: int | None = getattr(context, "tidyrows_count", None)
    count = int(context.rowcount) if kept is None else kept
    return count if count < 0 else count + getattr(context, "tidyrows_earlier", 0)
