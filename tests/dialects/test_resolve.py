"""What a table's name means inside the transaction that uses it."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import RealTable, dialect_for
from tidyrows.keys import KeyedTable, TableName

PG = ("postgresql+psycopg", "postgresql+psycopg2")
MYSQL = ("mysql+pymysql", "mysql+mysqldb")


def home(engine: sa.Engine) -> str:
    names = {"postgresql": "public", "sqlite": "main"}
    return names.get(engine.dialect.name, str(engine.url.database))


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("name", ["things", "Things", "order", 'it\'s 100% "a" `b` :c %s'])
def test_a_name_and_no_error_where_there_is_none(database: Database, name: str) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    schema = database.extra_schema("Odd")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE written (id INT PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO written VALUES (1)")
        assert dialect.resolve(connection, None, name) is None
        assert dialect.resolve(connection, home(engine), name) is None
        assert dialect.resolve(connection, "no schema", name) is None
        connection.commit()  # the transaction was not disturbed
    made = sa.Table(name, sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    made.create(engine)
    there = sa.Table(name, sa.MetaData(schema=schema), sa.Column("id", sa.Integer))
    there.create(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM written").scalar() == 1
        real = dialect.resolve(connection, None, name)
        assert real is not None
        assert (real.schema, real.kind) == (home(engine), "table")
        assert dialect.resolve(connection, home(engine), name) == real
        other = dialect.resolve(connection, schema, name)
        assert other is not None
        assert (other.schema, other.kind) == (schema, "table")


@on(*ALL_DRIVERS)
def test_a_temporary_table_hides_a_lasting_one(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id INT PRIMARY KEY)")
        connection.commit()
        before = dialect.resolve(connection, None, "things")
        connection.exec_driver_sql("CREATE TEMPORARY TABLE things (id INT PRIMARY KEY)")
        during = dialect.resolve(connection, None, "things")
        connection.exec_driver_sql(
            "DROP TEMPORARY TABLE things" if database.backend == "mysql" else "DROP TABLE things"
        )
        assert before is not None
        assert during is not None
        assert (before.kind, during.kind) == ("table", "temporary")
        assert dialect.resolve(connection, None, "things") == before


@on(*ALL_DRIVERS)
def test_a_view_is_no_table(database: Database) -> None:
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id INT PRIMARY KEY)")
        connection.exec_driver_sql("CREATE VIEW seen AS SELECT * FROM things")
        real = dialect_for(engine).resolve(connection, None, "seen")
        assert real == RealTable(home(engine), "other", plain=False)


@on(*PG)
def test_the_search_path_of_the_transaction_counts(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    schema = database.extra_schema("tenant")
    with engine.begin() as connection:
        for place in ("public", f'"{schema}"'):
            connection.exec_driver_sql(f"CREATE TABLE {place}.things (id INT PRIMARY KEY)")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'SET LOCAL search_path = "{schema}", public')
        real = RealTable(schema, "table", plain=True)
        assert dialect.resolve(connection, None, "things") == real
        connection.rollback()
        assert dialect.resolve(connection, None, "things") == RealTable(
            "public", "table", plain=True
        )
        connection.exec_driver_sql("CREATE TEMP TABLE things (id INT PRIMARY KEY)")
        found = dialect.resolve(connection, "pg_temp", "things")
        assert found is not None
        assert found.kind == "temporary"
        assert found.schema.startswith("pg_temp_")


@on(*PG)
def test_a_schema_that_the_role_may_not_enter_is_no_error(database: Database) -> None:
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL ROLE pg_monitor")
        assert dialect_for(engine).resolve(connection, "pg_toast", "nothing") is None
        connection.exec_driver_sql("SELECT 1")


@on(*MYSQL)
def test_use_changes_the_meaning(database: Database) -> None:
    engine = database.engine()
    schema = database.extra_schema("tenant")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE TABLE `{schema}`.things (id INT PRIMARY KEY)")
        assert dialect_for(engine).resolve(connection, None, "things") is None
        connection.exec_driver_sql(f"USE `{schema}`")
        real = dialect_for(engine).resolve(connection, None, "things")
        assert real == RealTable(schema, "table", plain=False)
        connection.invalidate()


@on("sqlite")
def test_temp_then_main_then_attached(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    schema = database.extra_schema("other")
    with engine.connect() as connection:
        for place in (schema, "main", "temp"):
            connection.exec_driver_sql(f"CREATE TABLE {place}.Things (id INT)")
            real = dialect.resolve(connection, None, "things")
            assert real is not None
            assert real.schema == place
        connection.exec_driver_sql("CREATE VIRTUAL TABLE words USING fts5 (body)")
        assert dialect.resolve(connection, None, "words") == RealTable("main", "other", plain=False)


SETTINGS = {
    "SET search_path TO x": True,
    "  /* why */ set role x": True,
    "-- why\nRESET ALL": True,
    "USE other": True,
    "ATTACH 'x' AS y": True,
    "DISCARD ALL": True,
    "create temp table t (i int)": True,
    "DROP TABLE t": True,
    "INSERT INTO settings VALUES (1)": False,
    "SELECT * FROM t FOR UPDATE": False,
    "/*! USE other */": True,
    "SELECT 1; USE other": True,
    "EXECUTE IMMEDIATE 'USE other'": True,
    "SAVEPOINT reset": False,
    "UPDATE users SET role = 1": False,
    "": False,
}


@pytest.mark.parametrize("sql", SETTINGS)
@pytest.mark.parametrize("url", ["sqlite://", "postgresql+psycopg://", "mysql+pymysql://"])
def test_sql_that_may_change_what_a_name_means(url: str, sql: str) -> None:
    assert dialect_for(sa.create_engine(url)).session_setting(sql) is SETTINGS[sql]


def test_set_config_is_a_setting() -> None:
    dialect = dialect_for(sa.create_engine("postgresql+psycopg://"))
    assert dialect.session_setting("SELECT set_config('search_path', 'x', false)")


@on(*PG)
def test_rows_that_row_level_security_hides_are_not_called_gone(database: Database) -> None:
    """A role with policies sees and deletes no row of others: 'not there' would be a lie."""
    engine = database.engine()
    role = f"role_{engine.url.database}"
    things = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    things.create(engine)
    with engine.begin() as connection:
        connection.execute(things.insert().values(id=1))
        connection.exec_driver_sql(f"CREATE ROLE {role} NOSUPERUSER LOGIN")
        connection.exec_driver_sql(f"GRANT ALL ON things TO {role}")
        connection.exec_driver_sql("ALTER TABLE things ENABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql("CREATE POLICY none_ ON things USING (false)")
    limited = database_as(engine, role)
    dialect = dialect_for(limited)
    real = KeyedTable(TableName("x", "public", "things"), things)
    try:
        with limited.connect() as connection:
            dialect.begin_cleanup(connection, lock_timeout=1)
            assert dialect.delete_by_keys(connection, real, [1]) == 0
            with pytest.raises(sa.exc.ProgrammingError) as caught:
                dialect.existing_keys(connection, real, [1])
            original: Any = caught.value.orig
            assert getattr(original, "sqlstate", None) or original.pgcode == "42501"
            connection.rollback()
            dialect.end_cleanup(connection)
    finally:
        limited.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE things")
            connection.exec_driver_sql(f"DROP ROLE {role}")


def database_as(engine: sa.Engine, role: str) -> sa.Engine:
    return sa.create_engine(engine.url.set(username=role))
