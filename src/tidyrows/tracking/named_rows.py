"""Rows that the user names: by key, by object, by a query; in every table of a hierarchy."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import NoInspectionAvailable

from tidyrows.dialects.keys import chunks, own_keys
from tidyrows.errors import KeyShapeError, UnknownTableError, UntrackableRowError
from tidyrows.tracking.sessions import refuse_keyless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.sessions import Sessions

_KEYS_AT_ONCE = 200
Found: TypeAlias = "tuple[list[tuple[KeyedTable, list[Any]]], int]"
"""Rows by table, and how many the query found."""


def checked_keys(table: KeyedTable, keys: Iterable[Any], dialect: sa.Dialect) -> list[Any]:
    """Keys in the stored form."""
    columns = table.key_columns

    def refused(key: Any, text: str) -> KeyShapeError:
        return KeyShapeError(text, table=str(table.name), key=key)

    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise refused(
            keys,
            f"track_rows takes a list of keys of {table.name}, and {keys!r} is one value. Write "
            f"track_rows(model, [key]).",
        )
    checked: list[tuple[Any, ...]] = []
    for key in keys:
        values = tuple(key) if isinstance(key, (tuple, list, sa.Row)) else (key,)
        names = ", ".join(column.name for column in columns)
        if len(values) != len(columns):
            raise refused(
                key,
                f"The primary key of {table.name} is ({names}), and {key!r} has {len(values)} "
                f"value(s). Give one tuple of {len(columns)} per row.",
            )
        for column, value in zip(columns, values, strict=True):
            if value is None:
                raise refused(
                    key,
                    f"{key!r} has NULL for {table.name}.{column.name}: such a row cannot be named.",
                )
            if not _fits(column, value, dialect):
                raise refused(
                    key,
                    f"{value!r} is no value of {table.name}.{column.name} "
                    f"({type(column.type).__name__}). Give the Python value that the model's "
                    f"attribute would have.",
                )
        checked.append(values)
    own = own_keys(table, dialect, checked)[0]
    return [key[0] if len(columns) == 1 else key for key in own]


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
    sessions: Sessions, model: Any, keys: Iterable[Any]
) -> list[tuple[KeyedTable, list[Any]]]:
    """Rows that the user names, in every table of the model's hierarchy."""
    parts = parts_of(model)
    tables = [sessions.real_table(part.table) for part in parts]
    base = tables[0]  # whose key is the key of the class
    checked = checked_keys(base, keys, sessions.engines.by_database[base.name.database].dialect)
    rows = [key if len(base.key_columns) > 1 else (key,) for key in checked]
    _refuse_other_kinds(sessions, model, base.table, rows)
    return [
        (table, [part.key(row) for row in rows]) for part, table in zip(parts, tables, strict=True)
    ]


def _refuse_other_kinds(
    sessions: Sessions, model: Any, table: sa.Table, keys: list[tuple[Any, ...]]
) -> None:
    """Refuse rows of other classes in the table that a subclass shares with them."""
    mapper = mapper_of(model)
    kind = None if mapper is None or mapper.inherits is None else mapper.polymorphic_on
    if mapper is None or not isinstance(kind, sa.Column) or kind.table is not table:
        return
    columns = list(table.primary_key)
    with sessions.new_connection(table) as connection:
        for some in chunks(keys, _KEYS_AT_ONCE):
            named = [sa.and_(*map(operator.eq, columns, key)) for key in some]
            found = connection.execute(sa.select(*columns, kind).where(sa.or_(*named)))
            for *key, identity in found:
                own = mapper.polymorphic_map.get(identity)
                if own is not None and not own.isa(mapper):
                    name, other = mapper.class_.__name__, own.class_.__name__
                    shown = key[0] if len(key) == 1 else tuple(key)
                    raise KeyShapeError(
                        f"The row of {table.name} with the key {shown!r} is of {other}, and "
                        f"track_rows({name}, ...) takes rows of {name}. Write "
                        f"track_rows({other}, [{shown!r}]).",
                        table=table.name,
                        key=shown,
                    )


def rows_of_instance(
    sessions: Sessions, instance: Any, call: str = "track"
) -> Iterator[tuple[KeyedTable, Any]]:
    """The rows of a mapped object, one for each table of its inheritance hierarchy."""
    try:
        state = sa.inspect(instance)
    except NoInspectionAvailable:
        state = None
    if not isinstance(state, orm.InstanceState):
        several = isinstance(instance, (list, tuple, set))
        remedy = (
            "Pass the objects themselves, as in tracker.track(*users)."
            if several
            else "For rows without an object write tracker.track_rows(table, keys)."
        )
        shown = f"a {type(instance).__name__}" if several else f"{instance!r}"
        raise UntrackableRowError(
            f"tracker.{call}() takes mapped objects, and {shown} is no mapped object. {remedy}"
        )
    if state.identity is None:
        raise UntrackableRowError(
            f"{instance!r} has no row yet. Flush or commit its session first, then track it."
        )
    for part in parts_of(state.mapper.class_):
        table = sessions.real_table(part.table, near=state.session)
        dialect = sessions.engines.by_database[table.name.database].dialect
        sent = tuple(state.identity[place] for place in part.places)
        (key,), _exact = own_keys(table, dialect, [sent])
        yield table, key[0] if len(key) == 1 else key


def selected_model(select: sa.Select[Any]) -> Any:
    """The one mapped class or Table whose rows a query selects, all of them with a key."""
    if not isinstance(select, sa.Select):
        raise UnknownTableError(
            f"track_query takes a select(), and {select!r} is none. Write "
            f"tracker.track_query(select(User).where(...)).",
            table=select,
        )
    model = _selected(select)
    for part in _tables_of(model):
        refuse_keyless(part.table)
    return model


def rows_of_query(
    sessions: Sessions,
    select: sa.Select[Any],
    *,
    where: tuple[Any, Callable[[Any], bool]] | None = None,
) -> Found:
    """The rows that a query finds, committed ones only."""
    model = selected_model(select)
    mapper = mapper_of(model)
    columns = list(model.primary_key) if mapper is None else _attributes(mapper)
    query = select.with_only_columns(*columns, *([] if where is None else [where[0]]))
    found: dict[KeyedTable, list[Any]] = {}
    with sessions.new_connection(_tables_of(model)[0].table) as connection:
        rows = list(dict.fromkeys(map(tuple, connection.execute(query))))
        if where is not None:
            rows = [row[:-1] for row in rows if where[1](row[-1])]
        for row in rows:
            of_row, key = (model, row) if mapper is None else _class_of(mapper, row)
            for part in parts_of(of_row):
                keyed = sessions.real_table_on(connection, part.table)
                found.setdefault(keyed, []).append(part.key(key))
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
    columns = [getattr(mapper.class_, key) for key in _key_attributes(mapper)]
    kind = mapper.polymorphic_on
    if kind is not None and (has_concrete(mapper) or any(kind is each for each in mapper.columns)):
        # the discriminator of a polymorphic union is a column of it, and no attribute
        name = mapper.get_property_by_column(kind).key
        columns.append(getattr(mapper.class_, name, kind))
    return columns


def _key_attributes(mapper: orm.Mapper[Any]) -> list[str]:
    return [mapper.get_property_by_column(column).key for column in mapper.primary_key]


def _class_of(mapper: orm.Mapper[Any], row: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The class of a row that a query found, and its key in the order of that class."""
    width = len(mapper.primary_key)
    key, kind = row[:width], row[width:]
    own = mapper.polymorphic_map.get(kind[0]) if kind else mapper
    if own is None:
        if has_concrete(mapper):  # its row may be in any table, under a number that others have
            raise UnknownTableError(
                f"A row of {mapper.class_.__name__} is of kind {kind[0]!r}, which no class has as "
                f"its polymorphic_identity, so its table is unknown. Import the class that has it.",
                table=mapper.class_,
            )
        own = mapper
    if own is not mapper and own.concrete:
        values = dict(zip(_key_attributes(mapper), key, strict=True))
        key = tuple(values[name] for name in _key_attributes(own))
    return own.class_, key


def has_concrete(mapper: orm.Mapper[Any]) -> bool:
    """Whether rows of a class may be in a table of their own, by concrete inheritance."""
    return any(each.concrete for each in mapper.self_and_descendants)


def _tables_of(model: Any) -> list[Part]:
    """The tables in which a query of a model may find rows."""
    mapper = mapper_of(model)
    if mapper is None or isinstance(mapper.local_table, sa.Table):
        return parts_of(model)
    below = [each for each in mapper.self_and_descendants if isinstance(each.local_table, sa.Table)]
    if not (below and has_concrete(mapper)):
        return parts_of(model)  # which refuses it
    return [part for each in below for part in parts_of(each.class_)]


# -- the tables of a mapped class ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One table of a class.

    Attributes:
        table: the table.
        places: where in the class's primary key the values of the table's own stand.
    """

    table: sa.Table
    places: tuple[int, ...]

    def key(self, values: tuple[Any, ...]) -> Any:
        """The table's key, in the stored form, of a row with this primary key of the class."""
        key = tuple(values[place] for place in self.places)
        return key[0] if len(key) == 1 else key


def mapper_of(model: Any) -> orm.Mapper[Any] | None:
    """The mapper of a mapped class; None of anything else."""
    mapper = sa.inspect(model, raiseerr=False) if isinstance(model, type) else None
    return mapper if isinstance(mapper, orm.Mapper) else None


def table_of(model: Any) -> sa.Table:
    """The Table of a mapped class, or the Table itself."""
    if isinstance(model, sa.Table):
        return model
    mapper = mapper_of(model)
    if mapper is not None and isinstance(mapper.local_table, sa.Table):
        return mapper.local_table
    if mapper is not None:
        names = " and ".join(str(table) for table in mapper.tables) or "no table"
        raise UnknownTableError(
            f"{mapper.class_.__name__} is mapped to a join or a query (of {names}), so its rows "
            f"are in no one table. Name the rows of each table, as in "
            f"track_query(select(table).where(...)).",
            table=model,
        )
    raise UnknownTableError(
        f"{model!r} is neither a mapped class nor a Table. Pass the model, as in "
        f"track_rows(User, [1, 2]).",
        table=model,
    )


def parts_of(model: Any) -> list[Part]:
    """The tables of a class, the one that its primary key is in first; or the one Table."""
    mapper = mapper_of(model)
    if mapper is not None and isinstance(mapper.local_table, sa.Table):
        return sorted(
            _parts(mapper), key=lambda part: part.table is not mapper.primary_key[0].table
        )
    table = table_of(model)
    return [Part(table, tuple(range(len(table.primary_key))))]


def _parts(mapper: orm.Mapper[Any]) -> Iterator[Part]:
    identity = list(mapper.primary_key)
    for table in mapper.tables:
        if not isinstance(table, sa.Table):
            continue
        places = []
        for column in table.primary_key:
            same = _equated(mapper, column)
            places += [place for place, other in enumerate(identity) if other in same][:1]
        if len(places) != len(table.primary_key):
            raise UnknownTableError(
                f"{mapper.class_.__name__} has rows in {table.fullname}, whose primary key is not "
                f"part of its own. Name them with track_rows({table.name}_table, keys).",
                table=table,
            )
        yield Part(table, tuple(places))


def _equated(mapper: orm.Mapper[Any], column: sa.Column[Any]) -> set[Any]:
    """All columns that the join conditions of the hierarchy equate with one, and itself."""
    equivalent = mapper._equivalent_columns  # noqa: SLF001 -- nothing public tells them
    same: set[Any] = set()
    new: set[Any] = {column}
    while new:
        same |= new
        new = {other for one in new for other in equivalent.get(one, ())} - same
    return same
