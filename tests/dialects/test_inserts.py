"""Which rows of an upsert are new, and which were a stranger's before."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from harness.databases import Database
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import Dialect, RealTable, dialect_for

PG = ("postgresql+psycopg", "postgresql+psycopg2")
MYSQL = ("mysql+pymysql", "mysql+mysqldb")
PLAIN = RealTable("public", "table", plain=True)


def table(**options: Any) -> sa.Table:
    return sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20), unique=True),
        sa.Column("v", sa.Integer),
        **options,
    )


def upserts(name: str, things: sa.Table) -> dict[str, tuple[sa.Insert, bool]]:
    """By form: the statement, and whether its new rows can be told."""
    if name == "mysql":
        insert = mysql.insert(things)
        return {
            "IGNORE": (things.insert().prefix_with("IGNORE", dialect="mysql"), True),
            "two prefixes": (things.insert().prefix_with("LOW_PRIORITY ignore"), False),
            "DUPLICATE": (insert.on_duplicate_key_update(v=insert.inserted.v), False),
        }
    insert = postgresql.insert(things) if name == "postgresql" else sqlite.insert(things)
    forms = {
        "NOTHING": (insert.on_conflict_do_nothing(), True),
        "NOTHING by name": (insert.on_conflict_do_nothing(index_elements=["name"]), True),
        "UPDATE": (
            insert.on_conflict_do_update(index_elements=["name"], set_={"v": insert.excluded.v}),
            name == "postgresql",
        ),
    }
    if name == "sqlite":
        forms["OR IGNORE"] = (things.insert().prefix_with("OR IGNORE"), True)
        forms["or replace"] = (things.insert().prefix_with("or  replace", dialect="sqlite"), False)
    return forms


def inserted(
    connection: sa.Connection, dialect: Dialect, insert: sa.Insert, rows: list[dict[str, Any]]
) -> list[str]:
    """The names that the proof calls new."""
    provable, extra = dialect.inserted_proof(insert, PLAIN)
    assert provable
    columns: list[Any] = [insert.table.c.name]
    columns.append(sa.true() if extra is None else extra)
    return [name for name, new in connection.execute(insert.returning(*columns), rows) if new]


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("size", [1, 4, 1500])
def test_only_new_rows_are_proved(database: Database, size: int) -> None:
    """Row by row, and over several statements of SQLAlchemy's insertmanyvalues."""
    engine = database.engine()
    dialect = dialect_for(engine)
    things = table()
    things.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(things.insert(), [{"name": f"n{n}", "v": 0} for n in range(0, size, 3)])
    rows = [{"name": f"n{n}", "v": 1} for n in range(size)]
    new = [f"n{n}" for n in range(size) if n % 3]
    assert dialect.returning
    assert dialect.executemany_returning
    for form, (insert, provable) in upserts(engine.dialect.name, things).items():
        assert dialect.upsert(insert), form
        if not provable:
            assert dialect.inserted_proof(insert, PLAIN) == (False, None), form
            continue
        with engine.connect() as connection:
            assert inserted(connection, dialect, insert, rows) == new, form
            connection.rollback()


@on(*PG)
def test_a_partitioned_table_has_no_system_column_to_prove_with(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE things (id int PRIMARY KEY, name text, v int) PARTITION BY RANGE (id)"
        )
        real = dialect.resolve(connection, None, "things")
    assert real == RealTable("public", "table", plain=False)
    forms = upserts("postgresql", table())
    assert dialect.inserted_proof(forms["UPDATE"][0], real) == (False, None)
    assert dialect.inserted_proof(forms["NOTHING"][0], real) == (True, None)


@on(*ALL_DRIVERS)
def test_an_ordinary_insert_is_no_upsert(database: Database) -> None:
    dialect = dialect_for(database.engine())
    things = table()
    other = "sqlite" if database.backend == "mysql" else "mysql"
    for insert in (
        things.insert(),
        things.insert().values(id=1),
        things.insert().prefix_with("IGNORE", dialect=other),
        things.insert().prefix_with("/*+ hint */"),
        things.insert().prefix_with("LOW_PRIORITY", dialect="mysql"),
        things.insert().prefix_with("OR ABORT", dialect="sqlite"),
        sa.insert(sa.table("things", sa.column("id"))),
    ):
        assert not dialect.upsert(insert)


@on("sqlite")
@pytest.mark.parametrize("action", ["IGNORE", "REPLACE"])
def test_the_tables_own_conflict_clause_makes_every_insert_an_upsert(
    database: Database, action: str
) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    things = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
        sa.UniqueConstraint("name", sqlite_on_conflict=action),
    )
    things.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(things.insert(), [{"name": "stranger's"}])
    assert dialect.upsert(things.insert())
    if action == "REPLACE":
        assert dialect.inserted_proof(things.insert(), PLAIN) == (False, None)
        return
    with engine.connect() as connection:
        rows = [{"name": "stranger's"}, {"name": "new"}]
        assert inserted(connection, dialect, things.insert(), rows) == ["new"]


@on(*MYSQL)
def test_an_explicit_zero_becomes_another_number(database: Database) -> None:
    """The fact behind explicit_zero_is_generated."""
    engine = database.engine()
    things = table()
    things.metadata.create_all(engine)
    assert dialect_for(engine).explicit_zero_is_generated
    with engine.begin() as connection:
        connection.execute(things.insert().values(id=0, name="a"))
        assert connection.scalar(sa.select(things.c.id)) == 1
