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
from tidyrows.key_json import in_python
from tidyrows.keys import KeyedTable, RowKey, TableName
from tidyrows.tracking.inheritance import mapper_of, parts_of, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.tracking.tracker import ResourceTracker


@contextmanager
def _connection(
    tracker: ResourceTracker, table: sa.Table, near: orm.Session | None = None
) -> Iterator[sa.Connection]:
    """A connection that sees names as ``near`` does: its own while in a transaction, else new."""
    session = near
    if session is None and not tracker.owns_session:
        session = tracker.session
    if session is not None and session.in_transaction():
        yield session.connection(bind_arguments={"clause": table})
        return
    with new_connection(tracker, table, session) as connection:
        yield connection


@contextmanager
def new_connection(
    tracker: ResourceTracker, table: sa.Table, session: orm.Session | None = None
) -> Iterator[sa.Connection]:
    """A connection of its own, which sees what is committed."""
    if session is None and not tracker.owns_session:
        session = tracker.session
    bind: Any = None
    if session is not None:
        try:
            bind = session.get_bind(clause=table)
        except UnboundExecutionError:
            bind = None
    if bind is None:
        bind = tracker.bound_to
    if bind is None:
        raise NotBoundError(
            f"The tracker's session has no engine to look {table.fullname} up on. Use "
            f"ResourceTracker(engine) for the engine that has it."
        )
    translate = bind.get_execution_options().get("schema_translate_map")
    with bind.engine.connect() as connection:
        if translate is not None:
            connection.execution_options(schema_translate_map=translate)
        yield connection


def keyed_table(
    tracker: ResourceTracker, table: sa.Table, near: orm.Session | None = None
) -> KeyedTable:
    """The real table, as the database knows it now."""
    _refuse_keyless(table)
    with _connection(tracker, table, near) as connection:
        return keyed_on(tracker, table, connection)


def _refuse_keyless(table: sa.Table) -> None:
    if not table.primary_key.columns:
        raise NoPrimaryKeyError(
            f"The table {table.fullname} has no primary key, so no row of it can be named. Delete "
            f"its rows yourself, or give it a primary key.",
            table=table.fullname,
        )


def keyed_on(tracker: ResourceTracker, table: sa.Table, connection: sa.Connection) -> KeyedTable:
    """The real table that a name means on this connection."""
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


def checked_keys(table: KeyedTable, keys: Iterable[Any], dialect: sa.Dialect) -> list[Any]:
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
            if not _fits(column, value, dialect):
                raise KeyShapeError(
                    f"{value!r} is no value of {table.name}.{column.name} "
                    f"({type(column.type).__name__}). Give the Python value that the model's "
                    f"attribute would have.",
                    table=str(table.name),
                    key=key,
                )
        checked.append(values[0] if len(columns) == 1 else values)
    return checked


def _fits(column: sa.Column[Any], value: Any, dialect: sa.Dialect) -> bool:
    """Whether the column's type takes the value; only a TypeDecorator knows what it takes."""
    plain = (sa.Integer, sa.Date, sa.DateTime, sa.Time, sa.Uuid)
    if isinstance(column.type, plain):
        if not isinstance(value, column.type.python_type) or isinstance(value, bool):
            return False
    elif isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum):
        return isinstance(value, str)
    try:
        hash(value)
        process = column.type.dialect_impl(dialect).bind_processor(dialect)
        if process is not None:
            process(value)
    except Exception:  # noqa: BLE001 -- whatever a type raises, it says no
        return False
    return True


def named_rows(
    tracker: ResourceTracker, model: Any, keys: Iterable[Any]
) -> list[tuple[KeyedTable, list[Any]]]:
    """Rows that the user names, in every table of the model's hierarchy."""
    parts = parts_of(model)
    tables = [keyed_table(tracker, part.table) for part in parts]
    base = tables[0]  # whose key is the key of the class
    checked = checked_keys(base, keys, tracker.engine_of(base.name.database).dialect)
    rows = [key if len(base.key_columns) > 1 else (key,) for key in checked]
    return [
        (table, [part.key(row) for row in rows]) for part, table in zip(parts, tables, strict=True)
    ]


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
    for part in parts_of(state.mapper.class_):
        yield keyed_table(tracker, part.table, near=state.session), part.key(state.identity)


def selected_model(select: sa.Select[Any]) -> Any:
    """The one mapped class or Table whose rows a query selects, all of them with a key.

    Raises:
        UnknownTableError: it is no select(), or not of one model or table.
        NoPrimaryKeyError: a table of the model has no primary key.
    """
    if not isinstance(select, sa.Select):
        raise UnknownTableError(
            f"track_query takes a select(), and {select!r} is none. Write "
            f"tracker.track_query(select(User).where(...)).",
            table=select,
        )
    model = _selected(select)
    for part in parts_of(model):
        _refuse_keyless(part.table)
    return model


def rows_of_query(
    tracker: ResourceTracker,
    select: sa.Select[Any],
    *,
    where: tuple[Any, Callable[[Any], bool]] | None = None,
) -> tuple[list[tuple[KeyedTable, list[Any]]], int]:
    """The rows that a query finds, committed ones only, and how many it found.

    Args:
        tracker: whose database.
        select: the query.
        where: a column, and what its value must be like.
    """
    model = selected_model(select)
    mapper = mapper_of(model)
    columns = list(model.primary_key) if mapper is None else _attributes(mapper)
    query = select.with_only_columns(*columns, *([] if where is None else [where[0]]))
    found: dict[KeyedTable, list[Any]] = {}
    with new_connection(tracker, table_of(model)) as connection:
        rows = list(dict.fromkeys(map(tuple, connection.execute(query))))
        if where is not None:
            rows = [row[:-1] for row in rows if where[1](row[-1])]
        for row in rows:
            of_row = model if mapper is None else _class_of(mapper, row)
            for part in parts_of(of_row):
                keyed = keyed_on(tracker, part.table, connection)
                found.setdefault(keyed, []).append(part.key(row))
    return list(found.items()), len(rows)


def _selected(select: sa.Select[Any]) -> Any:
    """The one mapped class or Table whose rows a query selects."""
    entities = {described.get("entity") for described in select.column_descriptions} - {None}
    if len(entities) == 1 and mapper_of(*entities) is not None:
        return entities.pop()
    froms = select.columns_clause_froms
    if not entities and len(froms) == 1 and isinstance(froms[0], sa.Table):
        return froms[0]
    raise UnknownTableError(
        f"The query does not select one model or table, but {len(entities or froms)} or an alias; "
        f"to own rows, write select(User).join(...).where(...).",
        table=select,
    )


def _attributes(mapper: orm.Mapper[Any]) -> list[Any]:
    """The primary key and, where it decides on a row's tables, what kind of row it is.

    Attributes of the class, not columns of its table: they bring the criteria of inheritance.
    """
    columns = list(mapper.primary_key)
    columns += [column for column in mapper.columns if column is mapper.polymorphic_on]
    return [getattr(mapper.class_, mapper.get_property_by_column(c).key) for c in columns]


def _class_of(mapper: orm.Mapper[Any], row: tuple[Any, ...]) -> Any:
    kind = row[len(mapper.primary_key) :]
    return mapper.polymorphic_map.get(kind[0], mapper).class_ if kind else mapper.class_


def mine(tracker: ResourceTracker, model: Any) -> sa.ColumnElement[bool]:
    """A WHERE clause for the tracked rows of one model."""
    table = table_of(model)
    tracker.settle()
    keys: list[Any] = []
    for held in tracker.snapshot():
        if _is_of(held.table, table):
            dialect = tracker.engine_of(held.table.name.database).dialect
            keys.extend(in_python(held.table, held.keys.in_order(), table, dialect))
    keys.extend(tracker.pending_keys(table))
    columns = tuple(table.primary_key)
    if len(columns) == 1 and isinstance(columns[0].type, sa.Integer):
        # written into the statement: there may be more keys than a statement takes parameters
        return columns[0].in_(sa.bindparam(None, keys, expanding=True, literal_execute=True))
    if len(columns) == 1:
        return columns[0].in_(keys)
    # one OR per row: a tuple IN scans the whole table on SQLite
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
