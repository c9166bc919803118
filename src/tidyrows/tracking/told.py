"""Rows that the user names, and questions that the user asks of a tracker."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import NoInspectionAvailable, UnboundExecutionError

from tidyrows.errors import (
    KeyShapeError,
    NoPrimaryKeyError,
    NotBoundError,
    UnknownTableError,
    UntrackableRowError,
)
from tidyrows.rows import KeyedTable, RowKey, TableName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.tracking.tracker import ResourceTracker


def table_of(model: Any) -> sa.Table:
    """The Table of a mapped class, or the Table itself."""
    if isinstance(model, sa.Table):
        return model
    mapper = sa.inspect(model, raiseerr=False) if isinstance(model, type) else None
    if isinstance(mapper, orm.Mapper) and isinstance(mapper.local_table, sa.Table):
        return mapper.local_table
    raise UnknownTableError(
        f"{model!r} is neither a mapped class nor a Table. Pass the model, as in "
        f"track_rows(User, [1, 2]).",
        table=model,
    )


@contextmanager
def _connection(tracker: ResourceTracker, near: orm.Session | None) -> Iterator[sa.Connection]:
    """A connection that sees names as ``near`` does: its own while in a transaction, else new."""
    session = near
    if session is None and not tracker.owns_session:
        session = tracker.session
    if session is not None and session.in_transaction():
        yield session.connection()
        return
    bind: Any = None
    if session is not None:
        try:
            bind = session.get_bind()
        except UnboundExecutionError:
            bind = None
    if bind is None:
        bind = tracker.bound_engine
    if bind is None:
        raise NotBoundError(
            "The tracker's session has no single engine to look the table up on. Use "
            "ResourceTracker(engine) for the engine that has it."
        )
    with bind.engine.connect() as connection:
        yield connection


def keyed_table(
    tracker: ResourceTracker, model: Any, near: orm.Session | None = None
) -> KeyedTable:
    """The real table of a model, as the database knows it now."""
    table = table_of(model)
    if not table.primary_key.columns:
        raise NoPrimaryKeyError(
            f"The table {table.fullname} has no primary key, so no row of it can be named. Delete "
            f"its rows yourself, or give it a primary key.",
            table=table.fullname,
        )
    with _connection(tracker, near) as connection:
        capture = tracker.capture(connection.engine)
        translate = connection.get_execution_options().get("schema_translate_map") or {}
        schema = translate.get(table.schema, table.schema)
        real = capture.dialect.resolve(connection, schema, table.name)
        if real is None:
            raise UnknownTableError(
                f"The database {capture.database} has no table {table.fullname}. Create it "
                f"(metadata.create_all(engine)), or bind the tracker to the database that has it.",
                table=table,
            )
        return capture.places.keyed(TableName(capture.database, real.schema, table.name), table)


def checked_keys(table: KeyedTable, keys: Iterable[Any]) -> list[Any]:
    """Keys in the stored form.

    Raises:
        KeyShapeError: a key does not fit the primary key.
    """
    columns = table.key_columns
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise KeyShapeError(
            f"track_rows takes a list of keys of {table.name}, and {keys!r} is one value. Write "
            f"track_rows(model, [key]).",
            table=str(table.name),
            key=keys,
        )
    checked: list[Any] = []
    for key in keys:
        values = tuple(key) if isinstance(key, (tuple, list, sa.Row)) else (key,)
        names = ", ".join(column.name for column in columns)
        if len(values) != len(columns):
            raise KeyShapeError(
                f"The primary key of {table.name} is ({names}), and {key!r} has {len(values)} "
                f"value(s). Give one tuple of {len(columns)} per row.",
                table=str(table.name),
                key=key,
            )
        for column, value in zip(columns, values, strict=True):
            if value is None:
                raise KeyShapeError(
                    f"{key!r} has NULL for {table.name}.{column.name}: such a row cannot be named.",
                    table=str(table.name),
                    key=key,
                )
            if not _fits(column, value):
                raise KeyShapeError(
                    f"{value!r} is no value of {table.name}.{column.name} ({column.type!r}). Give "
                    f"the Python value that the model's attribute would have.",
                    table=str(table.name),
                    key=key,
                )
        checked.append(values[0] if len(columns) == 1 else values)
    return checked


def _fits(column: sa.Column[Any], value: Any) -> bool:
    """Only plain types are checked: what a TypeDecorator takes, only it knows."""
    if isinstance(column.type, sa.Integer):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum):
        return isinstance(value, str)
    return True


def rows_of_instance(tracker: ResourceTracker, instance: Any) -> Iterator[tuple[KeyedTable, Any]]:
    """The rows of a mapped object, one for each table of its inheritance hierarchy."""
    try:
        state = sa.inspect(instance)
    except NoInspectionAvailable:
        state = None
    if not isinstance(state, orm.InstanceState):
        raise UntrackableRowError(
            f"{instance!r} is no mapped object. For rows without an object write "
            f"tracker.track_rows(table, keys)."
        )
    if state.identity is None:
        raise UntrackableRowError(
            f"{instance!r} has no row yet. Flush or commit its session first, then track it."
        )
    mapper: orm.Mapper[Any] = state.mapper
    values = {
        mapper.get_property_by_column(column).key: value
        for column, value in zip(mapper.primary_key, state.identity, strict=True)
    }
    for table in mapper.tables:
        if not isinstance(table, sa.Table):
            continue
        keyed = keyed_table(tracker, table, near=state.session)
        key = tuple(
            values[mapper.get_property_by_column(column).key] for column in keyed.key_columns
        )
        yield keyed, key[0] if len(key) == 1 else key


def rows_of_query(tracker: ResourceTracker, select: sa.Select[Any]) -> tuple[KeyedTable, list[Any]]:
    """The rows that a query finds, committed ones only."""
    if not isinstance(select, sa.Select):
        raise UnknownTableError(
            f"track_query takes a select(), and {select!r} is none. Write "
            f"tracker.track_query(select(User).where(...)).",
            table=select,
        )
    froms = [source for source in select.columns_clause_froms if isinstance(source, sa.Table)]
    if len(froms) != 1:
        raise UnknownTableError(
            f"The query selects columns of {len(froms)} tables; to own rows, select one model: "
            f"select(User).join(...).where(...).",
            table=select,
        )
    table = froms[0].metadata.tables.get(froms[0].key, froms[0])
    keyed = keyed_table(tracker, table)
    engine = tracker.engine_of(keyed.name.database)
    query = select.with_only_columns(*(table.c[c.key] for c in keyed.key_columns)).distinct()
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return keyed, checked_keys(keyed, rows)


def mine(tracker: ResourceTracker, model: Any) -> sa.ColumnElement[bool]:
    """A WHERE clause for the tracked rows of one model."""
    table = table_of(model)
    tracker.settle()
    keys: list[Any] = []
    for held in tracker.snapshot():
        if _is_of(held.table, table):
            keys.extend(held.keys.in_order())
    keys.extend(tracker.pending_keys(table))
    columns = tuple(table.primary_key)
    if len(columns) == 1 and isinstance(columns[0].type, sa.Integer):
        # written into the statement: there may be more keys than a statement takes parameters
        return columns[0].in_(sa.bindparam(None, keys, expanding=True, literal_execute=True))
    if len(columns) == 1:
        return columns[0].in_(keys)
    # one OR per row: a tuple IN scans the whole table on SQLite (DATABASE_FACTS 2)
    return sa.or_(
        sa.false(),
        *(
            sa.and_(*(column == value for column, value in zip(columns, key, strict=True)))
            for key in keys
        ),
    )


def _is_of(held: KeyedTable, table: sa.Table) -> bool:
    """Whether held rows are of this Table; ``from_json`` knows them by reflected ones."""
    if held.table.metadata is table.metadata:
        return held.table is table
    return held.table.name == table.name and table.schema in {None, held.name.schema}


def explain(tracker: ResourceTracker, row: Any) -> str:
    """Why a row is ours, or that it is not."""
    if isinstance(row, RowKey):
        key = row.key[0] if len(row.key) == 1 else row.key
        return _explain_key(tracker, row.table, key, str(row))
    lines = []
    for table, key in rows_of_instance(tracker, row):
        lines.append(_explain_key(tracker, table.name, key, str(table.row(key))))
    return "\n".join(lines)


def _explain_key(tracker: ResourceTracker, name: TableName, key: Any, label: str) -> str:
    tracker.settle()
    held = next((held for held in tracker.snapshot() if held.table.name == name), None)
    if held is not None and key in held.told:
        return f"{label} is ours: the tracker was told of it (track, track_rows or track_query)."
    if held is not None and key in held.keys:
        return (
            f"{label} is ours: its INSERT was committed while the tracker of "
            f"{tracker.context.tag} was listening."
        )
    if held is not None and key in held.doubtful:
        return (
            f"{label} is in doubt: its INSERT was seen, and the answer to its COMMIT was lost. It "
            f"is deleted only if nobody else can hold this key."
        )
    for change in tracker.pending_changes():
        if change.table.name == name and key in change.keys:
            return f"{label} is not ours yet: its INSERT is not committed."
    return f"{label} is not ours: no committed INSERT of it was seen, and nobody told the tracker."
