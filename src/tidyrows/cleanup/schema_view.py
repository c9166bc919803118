"""The foreign keys of a database, read once and cached; and the rows that reference others."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from tidyrows.dialects.keys import chunks, run
from tidyrows.errors import UnknownTableError
from tidyrows.keys import KeyedTable, TableName
from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph, merge
from tidyrows.schema.reflect import Columns, model_foreign_keys, with_real_columns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.options import DependentRules
    from tidyrows.dialects import Dialect
    from tidyrows.schema.graph import Place

_Part: TypeAlias = tuple[sa.MetaData, str | None, str]
"""The models of one MetaData, what they call a schema, and which schema that really is."""

_CACHED = 8
_NO_COLUMNS = Columns({}, (), frozenset())
CHUNK = 500
"""Keys in one statement."""
_UNENFORCED = "NOT ENFORCED"
"""In place of an action: the key is one of the models only, and the database ignores it."""
SILENT_ACTIONS = frozenset({"CASCADE", "SET NULL", "SET DEFAULT", _UNENFORCED})
"""What a foreign key may do silently to rows that reference a deleted one."""


class SchemaView:
    """The foreign keys and tables of one database, as far as cleanups have asked."""

    def __init__(
        self,
        database: str,
        dialect: Dialect,
        graph: ForeignKeyGraph,
        declared: dict[Place, sa.Table],
        hidden: set[Place],
    ) -> None:
        self.graph = graph
        self.hidden = hidden  # tables that may have rows which the cleanup is not shown
        self._database = database
        self._dialect = dialect
        self._declared = declared
        self._tables: dict[Place, KeyedTable] = {}
        self._wide: dict[Place, KeyedTable] = {}
        self._columns: dict[Place, Columns] = {}
        self._references: dict[ForeignKey, KeyedTable] = {}
        self._incoming: dict[Place, tuple[ForeignKey, ...]] = {}
        self.unique: dict[Place, bool] = {}  # whether the key of a table names one row
        self.ambiguous: set[Place] = set()  # tables of which it may name several
        self.roots: set[Place] = set()  # tables whose rows have been tracked
        # tables whose rows had untracked dependents the last time
        self.with_dependents: set[Place] = set()
        # the view with the models' keys that some rules speak of, by rules
        self.following: dict[DependentRules, SchemaView] = {}

    def incoming(self, place: Place) -> tuple[ForeignKey, ...]:
        """The keys by which the database lets rows reference this table's, each row once."""
        if place not in self._incoming:
            self._incoming[place] = tuple(
                key
                for key in self.graph.incoming(place)
                if key.source == "database" and not key.inherited
            )
        return self._incoming[place]

    def read_unique(self, database: Database, tables: Sequence[KeyedTable]) -> None:
        """Find out whether the keys of these tables are unique in the database."""
        with database.reading() as connection:
            unique = database.dialect.tables_of_unique_key(connection, tables)
        self.unique |= {table.place: table.place in unique for table in tables}
        self.ambiguous |= {table.place for table in tables} - unique

    def table(self, connection: sa.Connection, place: Place) -> KeyedTable:
        """The table there: the project's own, with the database's key, or a reflected one."""
        if place not in self._tables:
            (schema, name), own = place, self._declared.get(place)
            if own is None:
                found = self.columns(connection, [place])[place]
                if not found.types:
                    raise sa.exc.NoSuchTableError(name)
                columns = [sa.Column(*each) for each in found.types.items()]
                key = sa.PrimaryKeyConstraint(*found.key)
                own = sa.Table(name, sa.MetaData(), *columns, key, schema=schema)
            elif not own.primary_key.columns:
                own = with_real_columns(connection, own, schema)
            self._tables[place] = KeyedTable(TableName(self._database, *place), own)
        return self._tables[place]

    def with_referenced(self, connection: sa.Connection, place: Place) -> KeyedTable:
        """The table there, with every column that is referenced though no model knows it."""
        if place not in self._wide:
            names = {name for key in self.incoming(place) for name in key.parent_columns}
            self._wide[place] = with_columns(self.table(connection, place), names)
        return self._wide[place]

    def reference(self, connection: sa.Connection, key: ForeignKey) -> KeyedTable:
        """The child's table, as if the foreign key were its primary key: to look by it."""
        table = self._references.get(key)  # one hash of the key
        if table is None:
            child, parent = (self.table(connection, place) for place in (key.child, key.parent))
            types = {column.name: column.type for column in parent.table.columns}
            looked_by = [
                sa.Column(name, types.get(referenced, sa.types.NullType()))
                for name, referenced in zip(key.child_columns, key.parent_columns, strict=True)
            ]
            others = [c for c in child.key_columns if c.name not in key.child_columns]
            table = self._references[key] = with_key(child, looked_by, others)
        return table

    def nullable(self, connection: sa.Connection, place: Place) -> frozenset[str]:
        """The columns that a row of this table can lose to NULL and still be the same row."""
        return self.columns(connection, [place])[place].nullable

    def columns(
        self, connection: sa.Connection, places: Collection[Place]
    ) -> Mapping[Place, Columns]:
        """The columns that the database has, of these tables at least; none of a missing one.

        The first question is for all tables that it may be about: those whose rows have been
        tracked, and all that reference them.
        """
        known = self._columns
        if not known.keys() >= set(places):
            todo = [*places, *self.roots]
            wanted: set[Place] = set()
            while todo:
                place = todo.pop()
                if place not in wanted:
                    wanted.add(place)
                    todo += [key.child for key in self.graph.incoming(place)]
            wanted -= known.keys()
            found = self._dialect.columns_of(connection, sorted(wanted))
            known.update({place: found.get(place, _NO_COLUMNS) for place in wanted})
        return known

    def with_model_keys(self, database: Database, rules: DependentRules) -> SchemaView:
        """The same, with keys of the models that these rules speak of as if of the database.

        A key whose table or columns the database does not have is left out.

        Raises:
            UnknownTableError: the table is owned or protected, so that its rows are meant.
        """
        keys = [k for k in self.graph.foreign_keys if k.source == "models" and rules.speak_of(k)]
        if not keys:
            return self
        with database.reading() as connection:
            columns = self._dialect.columns_of(connection, {key.child for key in keys})
            named = {key.child for key in keys} & (rules.own | rules.protect)
            for place in sorted(named - columns.keys()):
                if self._dialect.resolve(connection, *place) is None:  # it is no view, either
                    argument = "own" if place in rules.own else "protect"
                    raise UnknownTableError(
                        f"{argument}= names the model of {'.'.join(place)}, and the database has "
                        f"no such table; nothing was deleted. Create the tables first "
                        f"(metadata.create_all(engine)), or leave it out of {argument}=.",
                        table=".".join(place),
                    )
        found = {
            key: replace(key, source="database", on_delete=_UNENFORCED)
            for key in keys
            if key.child in columns and set(key.child_columns) <= columns[key.child].types.keys()
        }
        graph = ForeignKeyGraph([found.get(key, key) for key in self.graph.foreign_keys])
        return SchemaView(self._database, self._dialect, graph, self._declared, self.hidden)


def with_key(
    table: KeyedTable, key: Iterable[sa.Column[Any]], others: Iterable[sa.Column[Any] | str]
) -> KeyedTable:
    """The same table, to be looked at by other columns than its primary key."""
    columns = [sa.Column(c.name, c.type, primary_key=True) for c in key]
    columns += [
        sa.Column(c, sa.types.NullType()) if isinstance(c, str) else sa.Column(c.name, c.type)
        for c in others
    ]
    made = sa.Table(table.table.name, sa.MetaData(), *columns, schema=table.table.schema)
    return KeyedTable(table.name, made)


def with_columns(table: KeyedTable, names: Iterable[str]) -> KeyedTable:
    """The table, with these columns though no model knows them."""
    extra = sorted(set(names) - {column.name for column in table.table.columns})
    if not extra:
        return table
    others = [each for each in table.table.columns if not each.primary_key]
    return with_key(table, table.key_columns, [*others, *extra])


_Views: TypeAlias = dict[frozenset[_Part], tuple[int, SchemaView]]
_views: weakref.WeakKeyDictionary[sa.Engine, _Views] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def schema_of(database: Database, tables: Iterable[KeyedTable]) -> SchemaView:
    """The foreign keys of the database and of the models, in the schemas of these tables.

    It is read again after DDL through the engine, after :func:`forget_schema`, and for a schema or
    model not seen before.
    """
    tables = list(tables)
    view = known_schema(database, tables)
    if view is None:
        parts, version = _parts(tables), database.capture.tables.schema_version
        found, hidden = _found(database, parts)
        declared, models = _models(parts)
        graph = ForeignKeyGraph(merge(found, declared))
        view = SchemaView(database.name, database.dialect, graph, models, hidden)
        with _lock:
            views = _views.setdefault(database.engine, {})
            views[parts] = (version, view)
            while len(views) > _CACHED:
                del views[next(iter(views))]
    return view


def known_schema(database: Database, tables: Sequence[KeyedTable]) -> SchemaView | None:
    """What :func:`schema_of` returns, if it has been read already."""
    version, parts = database.capture.tables.schema_version, _parts(tables)
    with _lock:
        for known, (known_version, view) in _views.get(database.engine, {}).items():
            if known_version == version and parts <= known:
                return view
    return None


def _parts(tables: Sequence[KeyedTable]) -> frozenset[_Part]:
    return frozenset(
        [(each.table.metadata, each.table.schema, each.name.schema) for each in tables]
    )


def forget_schema(engine: sa.Engine) -> None:
    """Read the schema anew next time: a delete has failed in a way that the graph did not know."""
    with _lock:
        _views.pop(engine, None)


def _found(database: Database, parts: frozenset[_Part]) -> tuple[list[ForeignKey], set[Place]]:
    """The foreign keys of these schemas and of those that they reach; tables that may hide rows."""
    dialect = database.dialect
    found: list[ForeignKey] = []
    wanted = {real for _metadata, _schema, real in parts}
    done: set[str] = set()
    with database.reading() as connection:
        while wanted:
            keys = dialect.foreign_keys(connection, sorted(wanted))
            found += keys
            done |= wanted
            parents = {key.parent[0] for key in keys}
            wanted = (parents | dialect.schemas_that_reference(connection, sorted(wanted))) - done
        hidden = dialect.hidden_tables(connection, sorted(done))
    return found, hidden


def _models(parts: frozenset[_Part]) -> tuple[list[ForeignKey], dict[Place, sa.Table]]:
    """The foreign keys of the project's tables; the tables at every place they may stand for."""
    reals: dict[str | None, set[str]] = {}
    for _metadata, schema, real in parts:
        reals.setdefault(schema, set()).add(real)
    keys: list[ForeignKey] = []
    places: dict[Place, sa.Table] = {}
    for metadata in {metadata for metadata, _schema, _real in parts}:
        tables = metadata.tables.values()
        for table in tables:
            found = reals.get(table.schema, {table.schema} if table.schema else set())
            places.update(((real, str(table.name)), table) for real in found)
        for default in sorted(reals.get(None, {""})):

            def real_schema(schema: str | None, default: str = default) -> str:
                return default if schema is None else min(reals.get(schema, {schema}))

            keys.extend(model_foreign_keys(tables, real_schema))
    return keys, places


# -- which rows reference which --------------------------------------------------------------------


def referencing_pairs(
    connection: sa.Connection,
    key: ForeignKey,
    child: KeyedTable,
    child_keys: Sequence[Any],
    parent: KeyedTable,
) -> Iterator[tuple[Any, Any]]:
    """Of these child rows, each one that references a parent, with the parent's key."""
    # Both have an alias: that of one alone may be the other's own name.
    children = with_columns(child, key.child_columns).clause.alias()
    parents = with_columns(parent, key.parent_columns).clause.alias()
    width = len(child.key_columns)
    query = sa.select(
        *(children.c[column.name] for column in child.key_columns),
        *(parents.c[column.name] for column in parent.key_columns),
    ).select_from(children.join(parents, _join(children, parents, key)))
    for chunk in chunks(child_keys, CHUNK):
        for row in run(connection, query.where(is_one_of(child, chunk, children))):
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
        children = with_columns(but_for[0], key.child_columns).clause.alias()
    parents = with_columns(parent, key.parent_columns).clause.alias()
    query = (
        sa.select(*(parents.c[column.name] for column in parent.key_columns))
        .distinct()
        .select_from(children.join(parents, _join(children, parents, key)))
    )
    if but_for is not None:
        query = query.where(sa.not_(is_one_of(*but_for, children)))
    found: set[Any] = set()
    for chunk in chunks(parent_keys, CHUNK):
        rows = run(connection, query.where(is_one_of(parent, chunk, parents)))
        found.update(stored(tuple(row)) for row in rows)
    return found


def _join(child: Any, parent: Any, key: ForeignKey) -> sa.ColumnElement[bool]:
    pairs = zip(key.child_columns, key.parent_columns, strict=True)
    return sa.and_(*(child.c[c] == parent.c[p] for c, p in pairs))


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
