"""Looking for rows by any columns, whether any are there, and detaching them."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.keykinds import COMPOSITES, KINDS, Boxed, keyed, make
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS
from tidyrows.dialects import dialect_for
from tidyrows.keys import KeyedTable

every_driver = pytest.mark.parametrize("database", ALL_DRIVERS, indirect=True)
pytestmark = pytest.mark.filterwarnings("ignore:Dialect .* does \\*not\\* support Decimal")


def by(engine: sa.Engine, table: sa.Table, *names: str) -> KeyedTable:
    """The table, looked at by these columns."""
    columns = [sa.Column(c.name, c.type, primary_key=c.name in names) for c in table.columns]
    ordered = sorted(columns, key=lambda c: names.index(c.name) if c.name in names else len(names))
    return keyed(engine, sa.Table(table.name, sa.MetaData(), *ordered, schema=table.schema))


def plain(value: Any) -> Any:
    return value.inside if isinstance(value, Boxed) else value


@every_driver
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"boolean"}))
def test_rows_are_found_by_a_column_of_any_type(database: Database, kind: str) -> None:
    """Several rows for a value, none for a NULL, the columns as the model's Python values."""
    engine = database.engine()
    type_, make_key = KINDS[kind]
    table = sa.Table(
        "children",
        sa.MetaData(),
        sa.Column("id", type_, primary_key=True, autoincrement=False),
        sa.Column("parent", type_, index=True),
    )
    value = {n: make_key(n) for n in range(1, 5)}
    make(
        engine,
        table,
        [(value[1], value[1]), (value[2], value[1]), (value[3], value[2]), (value[4], None)],
    )
    dialect, real = dialect_for(engine), by(engine, table, "parent")
    columns = [real.clause.c.id]
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        found = dialect.find(connection, real, [value[1], value[3]], columns)
        same = connection.execute(sa.select(table.c.id).where(table.c.parent == value[1]))
        assert len(found) == 2
        assert {repr(plain(row[0])) for row in found} == {repr(plain(row[0])) for row in same}
        asked = [(real, [value[3]]), (real, [value[2]]), (real, []), (real, [value[4], value[1]])]
        assert dialect.tables_with_rows(connection, asked) == [1, 3]
        dialect.lock(connection, real, [value[1], value[3]])
        dialect.set_null(connection, real, [value[1]], ["parent"])
        assert dialect.find(connection, real, [value[1]], columns) == []
        assert len(dialect.find(connection, real, [value[2]], columns)) == 1
        connection.commit()
        dialect.end_cleanup(connection)


@every_driver
@pytest.mark.parametrize("kind", COMPOSITES)
def test_rows_are_found_by_several_columns_together(database: Database, kind: str) -> None:
    engine = database.engine()
    parts = [KINDS[name] for name in COMPOSITES[kind]]
    names = [f"part {i}" for i in range(len(parts))]
    columns = [sa.Column(name, type_) for name, (type_, _) in zip(names, parts, strict=True)]
    table = sa.Table(
        "children",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        *columns,
    )
    pairs = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3)]
    keys = {
        pair: (parts[0][1](pair[0]), *(make_key(pair[1]) for _, make_key in parts[1:]))
        for pair in pairs
    }
    half = (keys[1, 1][0], *(None for _ in parts[1:]))
    make(engine, table, [(n, *key) for n, key in enumerate([*keys.values(), half, keys[1, 1]])])
    dialect, real = dialect_for(engine), by(engine, table, *names)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        asked = [keys[1, 1], keys[2, 3]]
        found = dialect.find(connection, real, asked, [real.clause.c.id])
        assert sorted(found) == [(0,), (5,), (10,)]
        assert dialect.tables_with_rows(connection, [(real, asked)]) == [0]
        dialect.set_null(connection, real, asked, names[1:])
        assert dialect.tables_with_rows(connection, [(real, asked)]) == []
        connection.commit()
        dialect.end_cleanup(connection)


@pairwise(database=ALL_DRIVERS, count=[1, 20, 21, 101, 501, 2100], composite=[False, True])
def test_however_many_keys(database: Database, count: int, composite: bool) -> None:
    engine = database.engine()
    table = sa.Table(
        "children",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("a", sa.Integer, index=True),
        sa.Column("b", sa.Integer),
    )
    make(engine, table, [(n, n // 2, n // 2) for n in range(2 * count)])
    real = by(engine, table, *("ab" if composite else "a"))
    keys: list[Any] = [(n, n) if composite else n for n in range(0, count, 2)]
    expected = [(n,) for n in range(2 * count) if n // 2 % 2 == 0]
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert sorted(dialect.find(connection, real, keys, [real.clause.c.id])) == expected
        gone = [(-1, -1) if composite else -1] * len(keys)
        assert dialect.tables_with_rows(connection, [(real, gone), (real, keys)]) == [1]
        dialect.set_null(connection, real, keys, ["a"])
        assert dialect.find(connection, real, keys, [real.clause.c.id]) == []
        connection.commit()
        dialect.end_cleanup(connection)
    with engine.connect() as connection:
        untouched = sa.select(sa.func.count()).where(table.c.a.is_not(None))
        assert connection.scalar(untouched) == 2 * count - len(expected)


@every_driver
@pytest.mark.parametrize("count", [1, 150])
def test_any_name_may_be_looked_for(database: Database, count: int) -> None:
    engine = database.engine()
    table = sa.Table(
        'Order "100%" it\'s `so` :x',
        sa.MetaData(schema=database.extra_schema("Odd")),
        sa.Column("select %(k)s", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column('Group "%" `q` :y', sa.Integer, index=True),
    )
    make(engine, table, [(n, n) for n in range(300)])
    schema = table.schema
    columns = [
        sa.Column('Group "%" `q` :y', sa.Integer, primary_key=True),
        sa.Column("select %(k)s", sa.Integer),
    ]
    real = keyed(engine, sa.Table(table.name, sa.MetaData(), *columns, schema=schema), schema)
    dialect, keys = dialect_for(engine), list(range(count))
    key = real.clause.c["select %(k)s"]
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert sorted(dialect.find(connection, real, keys, [key])) == [(n,) for n in keys]
        assert dialect.tables_with_rows(connection, [(real, keys), (real, [999])]) == [0]
        dialect.lock(connection, real, keys)
        dialect.set_null(connection, real, keys, ['Group "%" `q` :y'])
        assert dialect.find(connection, real, keys, [key]) == []
        connection.commit()
        dialect.end_cleanup(connection)


@pytest.mark.parametrize("kind", ["INTEGER", "NUMERIC", "TEXT", ""])
def test_a_run_of_keys_finds_no_value_in_between(sqlite_engine: sa.Engine, kind: str) -> None:
    table = sa.Table(
        "children",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("a", sa.Integer),
    )
    with sqlite_engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE children (id INTEGER PRIMARY KEY, a {kind})")
        values = [(n, n) for n in range(1000)] + [(1000, 5.5), (1001, "5 and more"), (1002, None)]
        connection.exec_driver_sql("INSERT INTO children VALUES (?, ?)", values)
    dialect, real = dialect_for(sqlite_engine), by(sqlite_engine, table, "a")
    for keys in (range(600), [*range(300), *range(400, 900)]):
        with sqlite_engine.connect() as connection:
            found = dialect.find(connection, real, list(keys), [real.clause.c.id])
        assert sorted(found) == [(n,) for n in keys]
