"""RETURNING behind the caller's back: add it, read the keys, hide what was added.

An executemany gives its keys only where RETURNING is asked for, and an
upsert proves what it inserted only there. The caller's result must be the same with and without.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import cursor as sa_cursor
from sqlalchemy.engine.result import result_tuple
from sqlalchemy.sql.util import find_tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.dialects import Dialect, RealTable
    from tidyrows.keys import KeyedTable

_PROOF = "tidyrows_inserted"
_WHOLE = "tidyrows_column_"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a statement runs so that its keys can be read.

    Attributes:
        statement: the statement that runs, the caller's own if nothing had to be added.
        columns: where the keys stand in its rows: positions, from the end if negative; columns
            where the ORM decides on the positions.
        added: how many columns stand behind those that the caller asked for.
        proof: the last column tells whether the row was inserted.
        asked: the caller has a RETURNING of its own.
        defaults: the keys stand behind the defaults that SQLAlchemy fetches for its own use.
        generated: the database makes the keys of inserted rows.
        tells: its result tells the key of its one row, as ``inserted_primary_key``.
        refusal: why no row of this statement can be tracked, or None.
    """

    statement: Any
    columns: tuple[Any, ...] = ()
    added: int = 0
    proof: bool = False
    asked: bool = False
    defaults: bool = False
    generated: bool = False
    tells: bool = False
    refusal: str | None = None


def is_plain(insert: sa.Insert) -> bool:
    """Whether an INSERT of one row has nothing that could hide the row's key."""
    return (
        insert._post_values_clause is None
        and not insert._returning
        and not insert._prefixes
        and not insert._multi_values
        and not insert._inline
        and insert.select is None
    )


def rewrite_insert(
    insert: sa.Insert,
    parameters: Sequence[Mapping[str, Any]],
    target: KeyedTable,
    real: RealTable,
    dialect: Dialect,
) -> Rewrite | None:
    """Add RETURNING of the key; None where the result of the statement as it is tells it."""
    keyed = bool(target.key_columns)
    upsert = dialect.upsert(insert)
    if keyed:
        simple = not upsert and len(parameters) <= 1 and is_plain(insert)
        needless = simple and not real.alters_keys
    else:
        # Its rows will be counted.
        simple = False
        needless = real.kind == "other" or not dialect.deletes_keyless_rows
    if needless:
        return None
    proof = None
    if upsert:
        provable, proof = dialect.inserted_proof(insert, real)
        if not provable:
            return Rewrite(
                insert,
                refusal="an upsert on this database does not tell a new row from one it found",
            )
    told = keyed and not upsert and _is_told(insert, parameters, target, dialect)
    if told and not real.alters_keys:
        return None
    generated = makes_key(insert, parameters, target)
    refusal = _why_not(insert, parameters, real, dialect)
    if refusal is None:
        tells = len(parameters) <= 1 and not (
            insert._inline or insert._multi_values or insert.select is not None
        )
        return _with_returning(insert, target, dialect, proof, generated=generated, tells=tells)
    if told or simple:  # by the keys as they were sent, unless SQLAlchemy asks for its own use
        fetches = insert._return_defaults and not insert._returning and real.returns
        return _with_defaults(insert, target, dialect, generated=generated) if fetches else None
    return Rewrite(insert, refusal=refusal)


def _why_not(
    insert: sa.Insert, parameters: Sequence[Mapping[str, Any]], real: RealTable, dialect: Dialect
) -> str | None:
    """Why RETURNING cannot be added; None where it can."""
    able = dialect.executemany_returning if len(parameters) > 1 else dialect.returning
    if not able:
        return "this database has no RETURNING, and the parameters do not hold the whole key"
    if not (real.returns or insert._returning):
        return "its user may not read its rows, as RETURNING would"
    if insert._return_defaults and not insert._returning:
        return "it uses return_defaults(), which excludes RETURNING"
    return None


def rewrite_delete(
    delete: sa.Delete,
    parameters: Sequence[Mapping[str, Any]],
    target: KeyedTable,
    real: RealTable,
    dialect: Dialect,
) -> Rewrite | None:
    """Add RETURNING of the key to a DELETE that chooses its rows by something else; None if not."""
    tables = {
        table
        for clause in delete._where_criteria
        for table in find_tables(clause, check_columns=True, include_aliases=True)
    }
    others = {getattr(table, "key", table) for table in tables} - {target.table.key}
    able = real.returns and dialect.delete_returning(several_tables=bool(others))
    fetched = delete._annotations.get("synchronize_session") == "fetch"  # then the ORM asks itself
    if not able or fetched or delete._return_defaults or len(parameters) > 1:
        return None
    if not (target.key_columns or dialect.deletes_keyless_rows):
        return None
    return _with_returning(delete, target, dialect)


def _with_returning(
    statement: sa.Insert | sa.Delete,
    target: KeyedTable,
    dialect: Dialect,
    proof: sa.ColumnElement[bool] | None = None,
    *,
    generated: bool = False,
    tells: bool = False,
) -> Rewrite:
    """Add the key to RETURNING; without one every column, read so that it finds the row again."""
    wanted = _exact_keys(target, dialect)
    names: list[Any] = [key if isinstance(key, sa.Column) else key.name for key in wanted]
    places: list[int | None]
    if wanted:
        own = [each for element in statement._returning for each in element._select_iterable]
        places = [_place(column, own) for column in wanted]
    else:
        names = [f"{_WHOLE}{number}" for number in range(len(target.table.columns))]
        wanted = [
            dialect.read_exactly(column).label(name)
            for column, name in zip(target.table.columns, names, strict=True)
        ]
        places = [None] * len(wanted)
    added = [column for column, place in zip(wanted, places, strict=True) if place is None]
    if proof is not None:
        added.append(proof.label(_PROOF))
    # the ORM decides itself which columns RETURNING has, and where
    if statement._annotations.get("dml_strategy") not in {"orm", "bulk"}:
        behind = iter(range(-len(added), 0))
        names = [next(behind) if place is None else place for place in places]
    changed: Any = statement
    if added:
        changed = statement._generate()  # as returning() does, which forbids it in the ORM's bulk
        changed._returning = (*statement._returning, *added)
    return Rewrite(
        changed,
        columns=tuple(names),
        added=len(added),
        proof=proof is not None,
        asked=bool(statement._returning),
        generated=generated,
        tells=tells,
    )


def _with_defaults(
    insert: sa.Insert, target: KeyedTable, dialect: Dialect, *, generated: bool
) -> Rewrite:
    """Add the stored key to the defaults that SQLAlchemy fetches, as in a flush."""
    keys = _exact_keys(target, dialect, labelled=True)
    changed: Any = insert._generate()
    changed._supplemental_returning = (*(insert._supplemental_returning or ()), *keys)
    names = tuple(key.name for key in keys)
    return Rewrite(changed, columns=names, defaults=True, generated=generated)


def _exact_keys(target: KeyedTable, dialect: Dialect, *, labelled: bool = False) -> list[Any]:
    """What to read of the key columns so that the row is found by it: labels, or the columns."""
    keys: list[Any] = []
    for number, column in enumerate(target.key_columns):
        key = dialect.read_key(target.table.c[column.key])
        keys.append(key.label(f"{_WHOLE}{number}") if labelled or key is not column else key)
    return keys


def _is_told(
    insert: sa.Insert,
    parameters: Sequence[Mapping[str, Any]],
    target: KeyedTable,
    dialect: Dialect,
) -> bool:
    """Whether the result of an INSERT as it is, or its parameters, have the keys."""
    return _reports_keys(insert) or (
        not insert._returning and _parameters_hold_key(insert, parameters, target, dialect)
    )


def _reports_keys(insert: sa.Insert) -> bool:
    """Whether SQLAlchemy itself will fetch the keys of every row, as in a flush."""
    if insert.select is not None or insert._multi_values:
        return False
    # an ORM bulk insert with RETURNING asks for the primary key as well, for its own use
    return bool(insert._return_defaults) or (
        bool(insert._returning) and insert._annotations.get("dml_strategy") == "bulk"
    )


def _place(column: sa.Column[Any], own: Sequence[Any]) -> int | None:
    """Where the caller's RETURNING has this column; None where it has not, or may have more."""
    for place, other in enumerate(own):
        if not isinstance(other, sa.ColumnElement) or getattr(other, "is_literal", False):
            return None  # "*" or another text, as wide as it likes
        if isinstance(other, sa.Column) and other.shares_lineage(column):
            return place
    return None


def _parameters_hold_key(
    insert: sa.Insert,
    parameters: Sequence[Mapping[str, Any]],
    target: KeyedTable,
    dialect: Dialect,
) -> bool:
    if not parameters or insert._multi_values or insert.select is not None:
        return False
    given = parameters[0]
    computed = computed_names(insert)
    for column in target.key_columns:
        name = column.key
        if name in given:
            values = [row.get(name) for row in parameters]
            if any(value is None or isinstance(value, sa.ClauseElement) for value in values):
                return False
            if dialect.explicit_zero_is_generated and 0 in values:
                return False
        elif name in computed:
            return False
        else:
            default = column.default
            if default is None or not (default.is_scalar or default.is_callable):
                return False
    return True


def computed_names(statement: Any) -> set[str]:
    """The columns that ``values()`` of a statement sets, by their names."""
    given = list(statement._values or ())
    # SQLAlchemy 2.0 keeps those of ordered_values() apart
    given += [pair[0] for pair in getattr(statement, "_ordered_values", None) or ()]
    return {getattr(column, "key", column) for column in given}


def makes_key(
    insert: sa.Insert, parameters: Sequence[Mapping[str, Any]], target: KeyedTable
) -> bool:
    """Whether a number from a sequence or an auto-increment is part of every row's key.

    Another value that the database computes, by a default or in the statement, may be one that
    somebody else has too.
    """
    name = target.generated_name
    if name is None or insert._multi_values or insert.select is not None:
        return False
    for other in insert._values or ():
        if getattr(other, "key", other) == name:
            return False
    for row in parameters:  # noqa: SIM110 -- a generator is a call
        if row.get(name) is not None:
            return False
    return True


def keys_from_rewritten(result: sa.CursorResult[Any], rewrite: Rewrite) -> list[tuple[Any, ...]]:
    """Read the keys that were asked for behind the caller's back, and hide them from the caller."""
    if rewrite.defaults:
        fetched = result.context.returned_default_rows or ()
        return [tuple(row._mapping[name] for name in rewrite.columns) for row in fetched]
    rows = result.all()
    context: Any = result.context
    metadata: Any = result._metadata
    width = len(metadata._keys)
    places = [
        place % width if isinstance(place, int) else metadata._index_for_key(place)
        for place in rewrite.columns
    ]
    proof = metadata._index_for_key(_PROOF) if rewrite.proof else None
    keys = [tuple(row[at] for at in places) for row in rows if proof is None or row[proof]]
    orm = _trim_orm_entities(context, rewrite)
    if rewrite.asked:
        # _rewind is what SQLAlchemy uses itself to hand on rows that it has read for the keys
        result._rewind(rows)
        if rewrite.added and not orm:
            result._metadata = _first_columns(result._metadata, width - rewrite.added)
            result._reset_memoizations()
    else:
        result._soft_close()
        result._metadata = sa_cursor._NO_RESULT_METADATA
        result.cursor_strategy = sa_cursor._NO_CURSOR_DML
        context._is_explicit_returning = False
        if len(rows) == 1:
            _tell_key(context, [rows[0][at] for at in places], rewrite)
    context._rowcount = len(rows)  # psycopg reads -1 after several RETURNING batches
    return keys


def _tell_key(context: Any, stored: list[Any], rewrite: Rewrite) -> None:
    """Tell the caller what the database made of the key, as implicit RETURNING or the cursor do."""
    if rewrite.generated and len(stored) == 1 and context.dialect.postfetch_lastrowid:
        context.get_lastrowid = lambda: stored[0]  # the cursor may not know it after RETURNING
    if not rewrite.tells:
        return
    sent = context.inserted_primary_key_rows[0]
    if len(sent) == len(stored):
        told = [new if old is None else old for old, new in zip(sent, stored, strict=True)]
        context.inserted_primary_key_rows = [result_tuple(sent._fields)(told)]


def _first_columns(metadata: Any, count: int) -> Any:
    """What the result would have told of itself without the columns behind these."""
    reduced = metadata._reduce(range(count))
    reduced._keys = metadata._keys[:count]  # _reduce takes the labels of double columns for names
    by_place = {record[0]: record for record in reduced._keymap.values()}
    for name, record in metadata._keymap.items():
        if record[0] in by_place:
            reduced._keymap.setdefault(name, by_place[record[0]])
    return reduced


def _trim_orm_entities(context: Any, rewrite: Rewrite) -> bool:
    """Let the ORM forget the columns that were added; whether the ORM reads the result at all.

    The compiled statement is shared by all executions, so this one gets copies of it.
    """
    compiled = context.compiled
    state = compiled.compile_state
    loading = getattr(state, "from_statement_ctx", None)
    if loading is None:
        return False
    if rewrite.added:
        state = copy.copy(state)
        state.from_statement_ctx = None
        if rewrite.asked:
            state.from_statement_ctx = copy.copy(loading)
            state.from_statement_ctx._entities = loading._entities[: -rewrite.added]
        context.compiled = copy.copy(compiled)
        context.compiled.compile_state = state
    return True
