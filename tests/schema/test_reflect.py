"""What the database and the models say of their foreign keys, on every database."""

import warnings

import pytest
import sqlalchemy as sa

from harness.models import zoo_metadata
from harness.targets import on
from tidyrows.dialects import dialect_for
from tidyrows.dialects.mysql.reflection import read_foreign_keys
from tidyrows.dialects.sqlite import pragma_foreign_keys
from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph, merge
from tidyrows.schema.reflect import (
    Columns,
    model_foreign_keys,
    reflect_columns,
    reflect_foreign_keys,
)


def home_schema(database):
    """The real schema of a name that says none."""
    return {"sqlite": "main", "postgresql": "public", "mysql": database.url.database}[
        database.backend
    ]


def run(engine, *statements):
    """Run DDL in which ``[name]`` stands for a quoted name."""
    opening, closing = engine.dialect.identifier_preparer.quote_identifier("x").split("x")
    with engine.begin() as connection:
        for statement in statements:
            quoted = statement.replace("[", opening).replace("]", closing)
            connection.execute(sa.text(quoted.replace(":", r"\:")))


def reflect(engine, *schemas, search_path=None, read=None):
    if read is None:
        read = {"sqlite": pragma_foreign_keys, "mysql": read_foreign_keys}.get(engine.dialect.name)
    with engine.connect() as connection:
        if search_path is not None:
            connection.execute(sa.text(f"SET search_path = {search_path}"))
        return reflect_foreign_keys(connection, schemas, read=read)


def spelled(column):
    """A column's name and type, without the collation, which is not asked for."""
    name, kind = column
    return name, type(kind), getattr(kind, "length", None), getattr(kind, "scale", None)


def columns(engine, *places):
    """The columns of tables: few statements find what SQLAlchemy's Inspector finds."""
    with engine.connect() as connection:
        found = dialect_for(engine).columns_of(connection, places)
        inspected = reflect_columns(connection, places)
    assert found.keys() == inspected.keys()
    for place, each in inspected.items():
        assert found[place].key == each.key
        assert found[place].nullable == each.nullable
        assert [*map(spelled, found[place].types.items())] == [*map(spelled, each.types.items())]
    return found


def nullable(engine, place):
    return columns(engine, place).get(place, Columns({}, (), frozenset())).nullable


def tables_of(keys):
    return {(key.child, key.child_columns, key.parent, key.parent_columns) for key in keys}


def test_the_zoo_is_reflected_as_its_models_declare_it(zoo_database, zoo_engine):
    """Nothing of the models is missing in the database, and nothing is read in another form."""
    home = home_schema(zoo_database)
    reflected = reflect(zoo_engine, home)
    tables = [
        table
        for metadata in zoo_metadata(zoo_database.backend)
        for table in metadata.tables.values()
    ]
    declared = model_foreign_keys(tables, lambda schema: schema or home)
    assert declared
    assert {key.meaning for key in reflected} == {key.meaning for key in declared}
    assert merge(reflected, declared) == reflected
    actions = {key.meaning: key.on_delete for key in reflected}
    for key in declared:
        if key.on_delete != "RESTRICT":  # the MySQL family tells it from NO ACTION to nobody
            assert actions[key.meaning] == key.on_delete


def test_what_on_delete_does_is_known(database, engine):
    run(
        engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (id INTEGER PRIMARY KEY, none_ INTEGER, cascade_ INTEGER,"
        " null_ INTEGER, restrict_ INTEGER,"
        " FOREIGN KEY (none_) REFERENCES parent (id),"
        " FOREIGN KEY (cascade_) REFERENCES parent (id) ON UPDATE CASCADE ON DELETE CASCADE,"
        " FOREIGN KEY (null_) REFERENCES parent (id) ON DELETE SET NULL,"
        " FOREIGN KEY (restrict_) REFERENCES parent (id) ON DELETE RESTRICT)",
    )
    keys = reflect(engine, home_schema(database))
    actions = {key.child_columns[0]: key.on_delete for key in keys}
    held_back = "NO ACTION" if database.backend == "mysql" else "RESTRICT"
    assert actions == {
        "none_": "NO ACTION",
        "cascade_": "CASCADE",
        "null_": "SET NULL",
        "restrict_": held_back,
    }


def test_every_key_between_two_tables_and_within_one_is_read(database, engine):
    home = home_schema(database)
    run(
        engine,
        "CREATE TABLE pair (a INTEGER, b INTEGER, PRIMARY KEY (b, a))",
        "CREATE TABLE item (id INTEGER PRIMARY KEY, code INTEGER UNIQUE, above INTEGER,"
        " pair_a INTEGER, pair_b INTEGER, other_a INTEGER, other_b INTEGER,"
        " FOREIGN KEY (above) REFERENCES item (code),"
        " FOREIGN KEY (pair_b, pair_a) REFERENCES pair (b, a),"
        " FOREIGN KEY (other_b, other_a) REFERENCES pair (b, a))",
    )
    item, pair = (home, "item"), (home, "pair")
    keys = reflect(engine, home)
    assert tables_of(keys) == {
        (item, ("above",), item, ("code",)),
        (item, ("pair_b", "pair_a"), pair, ("b", "a")),
        (item, ("other_b", "other_a"), pair, ("b", "a")),
    }
    assert all(key.source == "database" for key in keys)
    assert len(ForeignKeyGraph(keys).incoming(pair)) == 2


def test_names_that_need_quoting_come_back_as_they_are(database, engine):
    home = home_schema(database)
    run(
        engine,
        "CREATE TABLE [Order] ([select] INTEGER PRIMARY KEY)",
        "CREATE TABLE [50% off 'x'] (id INTEGER PRIMARY KEY, [Ein Ärger] INTEGER,"
        " FOREIGN KEY ([Ein Ärger]) REFERENCES [Order] ([select]))",
    )
    place = (home, "50% off 'x'")
    assert tables_of(reflect(engine, home)) == {
        (place, ("Ein Ärger",), (home, "Order"), ("select",))
    }
    assert nullable(engine, place) == {"Ein Ärger"}


@on("postgresql+psycopg", "mysql+pymysql")  # SQLite has no keys between schemas
def test_keys_between_schemas_name_the_real_ones(database, engine):
    home, other = home_schema(database), database.extra_schema()
    run(
        engine,
        "CREATE TABLE item (id INTEGER PRIMARY KEY)",
        f"CREATE TABLE [{other}].item (id INTEGER PRIMARY KEY, item_id INTEGER,"
        f" FOREIGN KEY (item_id) REFERENCES [{home}].item (id))",
        "CREATE TABLE back (id INTEGER PRIMARY KEY, item_id INTEGER,"
        f" FOREIGN KEY (item_id) REFERENCES [{other}].item (id))",
    )
    there = ((other, "item"), ("item_id",), (home, "item"), ("id",))
    back = ((home, "back"), ("item_id",), (other, "item"), ("id",))
    assert tables_of(reflect(engine, home, other)) == {there, back}
    assert tables_of(reflect(engine, home)) == {back}
    assert tables_of(reflect(engine, other, other)) == {there}
    run(engine, "DROP TABLE back")  # keys both ways would keep MariaDB from dropping the databases


def test_tables_of_one_name_in_two_schemas_keep_their_own_keys(database, engine):
    home, other = home_schema(database), database.extra_schema()
    for schema in (home, other):
        run(engine, f"CREATE TABLE [{schema}].parent (id INTEGER PRIMARY KEY)")
        run(
            engine,
            f"CREATE TABLE [{schema}].child (id INTEGER PRIMARY KEY, parent_id INTEGER,"
            " FOREIGN KEY (parent_id) REFERENCES"
            f" {'' if database.backend == 'sqlite' else f'[{schema}].'}parent (id))",
        )
    assert tables_of(reflect(engine, home, other)) == {
        ((schema, "child"), ("parent_id",), (schema, "parent"), ("id",)) for schema in (home, other)
    }


@pytest.mark.parametrize(
    "search_path", ["public", "a", "b", "a, b, public", "b, public, a", "nowhere", "''"]
)
def test_the_search_path_changes_nothing(postgresql_engine, search_path):
    """PostgreSQL writes no schema before a parent that the path reaches.

    Read as the child's schema, the key would lead to a table of the same name, and the children
    of our rows would be looked for, and deleted, in the wrong place.
    """
    run(
        postgresql_engine,
        "CREATE SCHEMA a",
        "CREATE SCHEMA b",
        *(
            f"CREATE TABLE {schema}.item (id INTEGER PRIMARY KEY)"
            for schema in ("public", "a", "b")
        ),
        *(
            f"CREATE TABLE {schema}.holder (id INTEGER PRIMARY KEY,"
            " x INTEGER REFERENCES public.item, y INTEGER REFERENCES a.item,"
            " z INTEGER REFERENCES b.item)"
            for schema in ("public", "a", "b")
        ),
    )
    found = tables_of(reflect(postgresql_engine, "a", "public", "b", search_path=search_path))
    assert found == {
        ((schema, "holder"), (column,), (parent, "item"), ("id",))
        for schema in ("public", "a", "b")
        for column, parent in (("x", "public"), ("y", "a"), ("z", "b"))
    }


@pytest.mark.parametrize("path_at_first", ["a", "a, public", "nowhere"])
def test_nor_does_the_path_that_the_engine_first_connected_with(postgresql_engine, path_at_first):
    """SQLAlchemy takes the default schema of the first connection for that of all."""
    run(
        postgresql_engine,
        "CREATE SCHEMA a",
        *(f"CREATE TABLE {schema}.item (id INTEGER PRIMARY KEY)" for schema in ("public", "a")),
        *(
            f"CREATE TABLE {schema}.holder (id INTEGER PRIMARY KEY,"
            " x INTEGER REFERENCES public.item, y INTEGER REFERENCES a.item)"
            for schema in ("public", "a")
        ),
    )
    engine = sa.create_engine(
        postgresql_engine.url,
        connect_args={"options": f"-csearch_path={path_at_first.replace(' ', '')}"},
    )
    try:
        for path in ("public", "a", "a, public", "nowhere"):
            assert tables_of(reflect(engine, "public", "a", search_path=path)) == {
                ((schema, "holder"), (column,), (parent, "item"), ("id",))
                for schema in ("public", "a")
                for column, parent in (("x", "public"), ("y", "a"))
            }
    finally:
        engine.dispose()


def test_deferrable_keys_are_known_as_such(postgresql_engine):
    run(
        postgresql_engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (id INTEGER PRIMARY KEY, a INTEGER REFERENCES parent,"
        " b INTEGER REFERENCES parent DEFERRABLE,"
        " c INTEGER REFERENCES parent ON DELETE SET DEFAULT DEFERRABLE INITIALLY DEFERRED)",
    )
    keys = {key.child_columns[0]: key for key in reflect(postgresql_engine, "public")}
    assert [(k.deferrable, k.initially_deferred, k.on_delete) for _, k in sorted(keys.items())] == [
        (False, False, "NO ACTION"),
        (True, False, "NO ACTION"),
        (True, True, "SET DEFAULT"),
    ]
    assert keys["a"].name == "child_a_fkey"


def test_an_action_on_some_columns_of_a_key_is_the_action(postgresql_engine):
    run(
        postgresql_engine,
        "CREATE TABLE pair (a INTEGER, b INTEGER, PRIMARY KEY (a, b))",
        "CREATE TABLE child (a INTEGER NOT NULL, b INTEGER,"
        " FOREIGN KEY (a, b) REFERENCES pair ON DELETE SET NULL (b))",
    )
    (key,) = reflect(postgresql_engine, "public")
    assert key.on_delete == "SET NULL"


def test_partitioned_tables_hold_and_take_keys(postgresql_engine):
    """A row is deleted through the table that it was inserted through, partition or not."""
    run(
        postgresql_engine,
        "CREATE TABLE owner (id INTEGER PRIMARY KEY)",
        "CREATE TABLE event (id INTEGER PRIMARY KEY, owner_id INTEGER REFERENCES owner)"
        " PARTITION BY RANGE (id)",
        "CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE note (id INTEGER PRIMARY KEY, event_id INTEGER REFERENCES event)",
    )
    keys = reflect(postgresql_engine, "public")
    graph = ForeignKeyGraph(keys)
    places = [("public", name) for name in ("owner", "event", "event_1", "note")]
    ordered = [name for group in graph.order(places) for _, name in group]
    assert ordered[0] == "note"
    assert ordered[-1] == "owner"


def test_a_reference_in_the_column_itself_keeps_its_on_delete(sqlite_engine):
    """The Inspector reads only FOREIGN KEY clauses, and would detach where SQLite deletes."""
    run(
        sqlite_engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (id INTEGER PRIMARY KEY,"
        " a INTEGER REFERENCES parent ON DELETE CASCADE,"
        " b INTEGER REFERENCES parent (id) ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED)",
    )
    keys = reflect(sqlite_engine, "main")
    assert {key.child_columns[0]: key.on_delete for key in keys} == {
        "a": "CASCADE",
        "b": "SET NULL",
    }


def test_sqlite_spells_parents_as_the_parents_do(sqlite_engine):
    run(
        sqlite_engine,
        "CREATE TABLE [Parent] ([Id] INTEGER PRIMARY KEY)",
        "CREATE TABLE [Pair] (a INTEGER, b INTEGER, PRIMARY KEY (b, a))",
        "CREATE TABLE child (x INTEGER REFERENCES PARENT, y INTEGER REFERENCES parent(ID),"
        " p INTEGER, q INTEGER, FOREIGN KEY (p, q) REFERENCES pair)",
    )
    child = ("main", "child")
    assert tables_of(reflect(sqlite_engine, "main")) == {
        (child, ("x",), ("main", "Parent"), ("Id",)),
        (child, ("y",), ("main", "Parent"), ("Id",)),
        (child, ("p", "q"), ("main", "Pair"), ("b", "a")),
    }


@pytest.mark.parametrize("read", [pragma_foreign_keys, None])
def test_keys_that_lead_nowhere_are_left_out(sqlite_engine, read):
    """SQLite takes a key to a table that is not there, and one to a table without a key."""
    run(
        sqlite_engine,
        "CREATE TABLE keyless (a INTEGER)",
        "CREATE TABLE child (x INTEGER REFERENCES gone, y INTEGER REFERENCES gone(id),"
        " z INTEGER REFERENCES keyless)",
    )
    with sqlite_engine.connect() as connection:
        assert reflect_foreign_keys(connection, ["main"], read=read) == ()


def test_sqlite_reads_attached_and_temporary_schemas(database_with_attached):
    connection, other = database_with_attached
    keys = reflect_foreign_keys(connection, ["main", other, "temp"], read=pragma_foreign_keys)
    assert tables_of(keys) == {
        ((schema, "child"), ("parent_id",), (schema, "parent"), ("id",))
        for schema in (other, "temp")
    }


@pytest.fixture
def database_with_attached(sqlite_engine):
    with sqlite_engine.connect() as connection:
        connection.exec_driver_sql('ATTACH \':memory:\' AS "odd ""name"')
        for schema in ('"odd ""name"', "temp"):
            for ddl in (
                "parent (id INTEGER PRIMARY KEY)",
                "child (parent_id INTEGER REFERENCES parent)",
            ):
                connection.execute(sa.text(f"CREATE TABLE {schema}.{ddl}"))
        yield connection, 'odd "name'


def test_a_virtual_table_of_an_unknown_module_stops_nothing(sqlite_engine):
    """SpatiaLite's, opened without SpatiaLite: SQLite refuses to describe it."""
    run(
        sqlite_engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (parent_id INTEGER REFERENCES parent)",
        "PRAGMA writable_schema = ON",
        "INSERT INTO sqlite_master (type, name, tbl_name, rootpage, sql) VALUES ('table',"
        " 'shapes', 'shapes', 0, 'CREATE VIRTUAL TABLE shapes USING unknown_module (x)')",
    )
    sqlite_engine.dispose()
    with sqlite_engine.connect() as connection:
        with pytest.raises(sa.exc.OperationalError, match="no such module"):
            connection.execute(sa.text("SELECT * FROM shapes"))
        assert len(reflect_foreign_keys(connection, ["main"], read=pragma_foreign_keys)) == 1


def test_nullable_columns_are_those_that_can_be_set_to_null(database, engine):
    run(
        engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (id INTEGER PRIMARY KEY, must INTEGER NOT NULL, may INTEGER,"
        " twice INTEGER GENERATED ALWAYS AS (may * 2) STORED,"
        " FOREIGN KEY (id) REFERENCES parent (id))",
        "CREATE TABLE pair (a INTEGER, b INTEGER, c INTEGER, PRIMARY KEY (a, b))",
    )
    home = home_schema(database)
    assert nullable(engine, (home, "child")) == {"may"}
    assert nullable(engine, (home, "pair")) == {"c"}
    assert nullable(engine, (home, "nowhere")) == frozenset()
    other = database.extra_schema()
    run(engine, f"CREATE TABLE [{other}].child (id INTEGER PRIMARY KEY, x INTEGER)")
    assert nullable(engine, (other, "child")) == {"x"}
    assert nullable(engine, (home, "child")) == {"may"}


def test_the_columns_of_the_zoo_are_those_that_the_inspector_reads(zoo_database, zoo_engine):
    home = home_schema(zoo_database)
    tables = [
        table
        for metadata in zoo_metadata(zoo_database.backend)
        for table in metadata.tables.values()
    ]
    places = [(table.schema or home, table.name) for table in tables]
    found = columns(zoo_engine, *places, (home, "nowhere"), ("nowhere", "nowhere"))
    assert found.keys() == set(places)
    for table, place in zip(tables, places, strict=True):
        assert list(found[place].types) == [column.name for column in table.columns]
        assert set(found[place].key) == {column.name for column in table.primary_key}


def test_columns_of_rare_types_are_read(database, engine):
    text = {"sqlite": "ODD TYPE(3, 4)", "postgresql": "POINT", "mysql": "GEOMETRY"}
    run(
        engine,
        f"CREATE TABLE shapes ([a b] {text[database.backend]}, [Per cent %] DECIMAL(7, 2) NOT NULL,"
        " [quo'ted] VARCHAR(30), id BIGINT, [Second] CHAR(3), PRIMARY KEY ([Second], id))",
        "CREATE VIEW looks AS SELECT * FROM shapes",
    )
    home = home_schema(database)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = columns(engine, (home, "shapes"), (home, "looks"))
    assert found.keys() == {(home, "shapes")}
    assert found[home, "shapes"].key == ("Second", "id")
    assert found[home, "shapes"].nullable == {"a b", "quo'ted"}


@on("mysql+pymysql")
@pytest.mark.parametrize("right", ["SELECT", "SELECT, DELETE", "DELETE"])
def test_a_user_with_few_rights_is_shown_every_key(database, engine, right):
    """information_schema hides keys from a user with SELECT alone; SHOW CREATE TABLE does not."""
    home = home_schema(database)
    run(
        engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY, other INTEGER UNIQUE)",
        "CREATE TABLE child (id INTEGER PRIMARY KEY, a INTEGER, b INTEGER, c INTEGER, d INTEGER,"
        " FOREIGN KEY (a) REFERENCES parent (id) ON DELETE CASCADE,"
        " FOREIGN KEY (b) REFERENCES parent (other) ON DELETE SET NULL,"
        " FOREIGN KEY (c) REFERENCES parent (id) ON DELETE RESTRICT,"
        " FOREIGN KEY (d) REFERENCES parent (id))",
        "CREATE USER tidyrows_few@'%'",
    )
    try:
        run(engine, f"GRANT {right} ON {home}.* TO tidyrows_few@'%'")
        few = sa.create_engine(engine.url.set(username="tidyrows_few", password=None))
        with few.connect() as connection:
            keys = dialect_for(few).foreign_keys(connection, [home])
        few.dispose()
    finally:
        run(engine, "DROP USER tidyrows_few@'%'")
    actions = {key.child_columns[0]: key.on_delete for key in keys}
    assert actions == {"a": "CASCADE", "b": "SET NULL", "c": "NO ACTION", "d": "NO ACTION"}
    assert set(keys) == set(reflect(engine, home))


@on("mysql+pymysql")
def test_keys_to_a_table_with_system_versioning_are_read(database, engine):
    """MariaDB and SQLAlchemy's Inspector do not list it among the tables."""
    home = home_schema(database)
    run(
        engine,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY, x INTEGER) WITH SYSTEM VERSIONING",
        "CREATE TABLE child (id INTEGER PRIMARY KEY, a INTEGER REFERENCES parent (id))",
    )
    assert tables_of(reflect(engine, home)) == {
        ((home, "child"), ("a",), (home, "parent"), ("id",))
    }
    with engine.connect() as connection:
        found = dialect_for(engine).columns_of(connection, [(home, "parent")])
    assert found[home, "parent"].nullable == {"x"}


def test_a_type_that_sqlalchemy_does_not_know_raises_no_warning(postgresql_engine):
    """Suites turn warnings into errors; a column's type is not asked for here."""
    run(
        postgresql_engine,
        "CREATE TABLE shape (id INTEGER PRIMARY KEY, spot POINT, area POLYGON NOT NULL)",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nullable(postgresql_engine, ("public", "shape")) == {"spot"}


def test_models_say_their_keys_in_real_schemas_and_column_names():
    metadata = sa.MetaData()
    sa.Table("parent", metadata, sa.Column("id", sa.Integer, primary_key=True), schema="app")
    child = sa.Table(
        "child",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("parent_column", sa.ForeignKey("app.parent.id", ondelete="set null"), key="up"),
        sa.Column(
            "above",
            sa.ForeignKey("child.id", name="above", deferrable=True, initially="DEFERRED"),
        ),
    )
    keys = model_foreign_keys(
        metadata.tables.values(), {None: "public", "app": "app_7"}.__getitem__
    )
    assert set(keys) == {
        ForeignKey(
            name=None,
            child=("public", "child"),
            child_columns=("parent_column",),
            parent=("app_7", "parent"),
            parent_columns=("id",),
            on_delete="SET NULL",
            source="models",
        ),
        ForeignKey(
            name="above",
            child=("public", "child"),
            child_columns=("above",),
            parent=("public", "child"),
            parent_columns=("id",),
            deferrable=True,
            initially_deferred=True,
            source="models",
        ),
    }
    assert model_foreign_keys([child], lambda schema: schema or "public")


def test_a_models_key_to_a_table_that_its_metadata_lacks_is_left_to_the_database():
    table = sa.Table(
        "child",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("elsewhere_id", sa.ForeignKey("elsewhere.id")),
        sa.Column("above", sa.ForeignKey("child.id")),
        sa.Column("lost", sa.ForeignKey("child.no_such_column")),
    )
    keys = model_foreign_keys([table], lambda schema: schema or "main")
    assert [key.child_columns for key in keys] == [("above",)]
