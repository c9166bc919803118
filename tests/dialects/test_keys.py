"""Deleting and finding by key: every type a key may have, strangers' rows beside ours."""

from __future__ import annotations

import datetime as dt
import decimal
import warnings
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from harness.databases import Database
from harness.keykinds import (
    COMPOSITES,
    KINDS,
    keyed,
    make,
)
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import dialect_for
from tidyrows.keys import KeyedTable

every_driver = pytest.mark.parametrize("database", ALL_DRIVERS, indirect=True)


def contents(engine: sa.Engine, table: sa.Table) -> list[Any]:
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.select(table.c.note)))


@every_driver
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Dialect .* does \\*not\\* support Decimal")
def test_exactly_the_rows_of_the_keys_go_and_nobody_waits_for_others(
    database: Database, kind: str
) -> None:
    """On MariaDB a full scan waits for every locked row, and a small table invites one."""
    engine = database.engine()
    type_, make_key = KINDS[kind]
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", type_, primary_key=True, autoincrement=False),
        sa.Column("note", sa.String(20)),
    )
    numbers = (1, 2) if kind == "boolean" else (1, 2, 3, 4)
    keys = {n: make_key(n) for n in numbers}
    make(engine, table, [(key, f"row {n}") for n, key in keys.items()])
    ours, theirs = ([keys[n] for n in numbers[at::2]] for at in (0, 1))
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as other, engine.connect() as connection:
        if database.backend != "sqlite" and kind != "boolean":  # by which no index leads to a row
            other.execution_options(isolation_level="READ COMMITTED")
            locked = sa.select(table).where(table.c.id.in_(theirs)).with_for_update()
            assert len(other.execute(locked).all()) == len(theirs)
        dialect.begin_cleanup(connection, lock_timeout=1)
        assert dialect.existing_keys(connection, real, list(keys.values())) == list(keys.values())
        assert dialect.delete_by_keys(connection, real, ours) == len(ours)
        assert dialect.existing_keys(connection, real, ours) == []
        assert dialect.delete_by_keys(connection, real, ours) == 0
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == [f"row {n}" for n in numbers[1::2]]


@every_driver
@pytest.mark.parametrize("kind", COMPOSITES)
@pytest.mark.filterwarnings("ignore:Dialect .* does \\*not\\* support Decimal")
def test_composite_keys_are_matched_whole(database: Database, kind: str) -> None:
    """A row that has the first half of one key and the second of another is a stranger's."""
    engine = database.engine()
    parts = [KINDS[name] for name in COMPOSITES[kind]]
    columns = [
        sa.Column(f"part {i}", type_, primary_key=True, autoincrement=False)
        for i, (type_, _) in enumerate(parts)
    ]
    table = sa.Table("things", sa.MetaData(), *columns, sa.Column("note", sa.String(20)))
    pairs = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3)]
    keys = {
        pair: (parts[0][1](pair[0]), *(make_key(pair[1]) for _, make_key in parts[1:]))
        for pair in pairs
    }
    make(engine, table, [(*key, f"row {pair}") for pair, key in keys.items()])
    ours = [(1, 1), (2, 2), (3, 1)]
    ask = [keys[pair] for pair in ours]
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, real, ask) == ask
        assert dialect.delete_by_keys(connection, real, ask) == len(ask)
        assert dialect.existing_keys(connection, real, list(keys.values())) == [
            keys[pair] for pair in pairs if pair not in ours
        ]
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == [f"row {pair}" for pair in pairs if pair not in ours]


@every_driver
def test_any_name_may_be_used(database: Database) -> None:
    engine = database.engine()
    table = sa.Table(
        'Order "100%" it\'s `so` :x',
        sa.MetaData(schema=database.extra_schema("Odd")),
        sa.Column("select %(k)s", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column('Group "%" `q` :y', sa.String(10), primary_key=True),
        sa.Column("note", sa.String(20)),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for n in (1, 2):
            connection.execute(table.insert().values([n, "a", f"row {n}"]))
    dialect, real = dialect_for(engine), keyed(engine, table, table.schema)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, real, [(1, "a")]) == [(1, "a")]
        assert dialect.delete_by_keys(connection, real, [(1, "a")]) == 1
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == ["row 2"]


@pairwise(database=ALL_DRIVERS, count=[1, 251, 501, 2100], composite=[False, True])
def test_counts_are_exact_over_chunks(database: Database, count: int, composite: bool) -> None:
    engine = database.engine()
    columns = [sa.Column("a", sa.Integer, primary_key=True, autoincrement=False)]
    if composite:
        columns.append(sa.Column("b", sa.Integer, primary_key=True, autoincrement=False))
    table = sa.Table("things", sa.MetaData(), *columns, sa.Column("note", sa.Integer))
    rows = range(2 * count)
    keys: list[Any] = [(n % 7, n) if composite else n for n in rows]
    make(
        engine,
        table,
        [(*key, n) if composite else (n, n) for n, key in zip(rows, keys, strict=True)],
    )
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.delete_by_keys(connection, real, keys[::2]) == count
        assert dialect.existing_keys(connection, real, keys) == keys[1::2]
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == list(rows[1::2])


@every_driver
def test_no_keys_are_no_rows(database: Database) -> None:
    engine = database.engine()
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("note", sa.Integer),
    )
    make(engine, table, [(1, 1)])
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.delete_by_keys(connection, real, []) == 0
        assert dialect.existing_keys(connection, real, []) == []
        connection.rollback()
        dialect.end_cleanup(connection)


UNFIT: dict[str, tuple[sa.types.TypeEngine[Any], list[Any], list[Any]]] = {
    "integer": (sa.Integer(), [2147483647, -2147483648, 5], [5_000_000_000, -5_000_000_000]),
    "text": (sa.String(3), ["too", "abc"], ["toolong", "abcabc"]),
    "numeric": (
        sa.Numeric(10, 2),
        [decimal.Decimal("1.00"), decimal.Decimal("1.01")],
        [decimal.Decimal("1.005"), decimal.Decimal("1.0049"), decimal.Decimal("1E-40")],
    ),
    "datetime": (
        sa.DateTime().with_variant(postgresql.TIMESTAMP(precision=0), "postgresql"),
        [dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 1, 0, 0, 1)],
        [
            dt.datetime(2020, 1, 1, 0, 0, 0, 400000),
            dt.datetime(2020, 1, 1, 0, 0, 0, 600000),
        ],
    ),
}


@pairwise(database=ALL_DRIVERS, kind=tuple(UNFIT), composite=[False, True])
@pytest.mark.filterwarnings("ignore:Dialect .* does \\*not\\* support Decimal")
def test_a_key_that_its_column_cannot_hold_is_nobodys(
    database: Database, kind: str, composite: bool
) -> None:
    """It must not be cut, rounded or clamped into a stranger's key; an error harms nobody."""
    engine = database.engine()
    type_, theirs, wrong = UNFIT[kind]
    columns = [sa.Column("id", type_, primary_key=True, autoincrement=False)]
    if composite:
        columns.append(sa.Column("b", sa.Integer, primary_key=True, autoincrement=False))
    table = sa.Table("things", sa.MetaData(), *columns, sa.Column("note", sa.Integer))
    make(engine, table, [(key, 1, 1) if composite else (key, 1) for key in theirs])
    ask = [(key, 1) if composite else key for key in wrong]
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        try:
            assert dialect.delete_by_keys(connection, real, ask) == 0
            assert dialect.existing_keys(connection, real, ask) == []
        except sa.exc.DataError:  # PostgreSQL: out of range
            refuses = engine.dialect.name == "postgresql"
            assert refuses
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == [1] * len(theirs)


@every_driver
def test_an_engine_wide_translate_map_does_not_touch_real_schemas(database: Database) -> None:
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("note", sa.Integer),
    )
    engine = database.engine()
    make(engine, table, [(1, 1), (2, 2)])
    real = keyed(engine, table)
    mapped = database.engine(
        execution_options={"schema_translate_map": {real.name.schema: "elsewhere", None: "nowhere"}}
    )
    dialect = dialect_for(mapped)
    with mapped.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, real, [1]) == [1]
        assert dialect.delete_by_keys(connection, real, [1]) == 1
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == [2]


COLLATIONS = {
    "postgresql": ["citext"],
    "mysql": [
        "varchar(40) character set utf8mb4 collate utf8mb4_general_ci",
        "varchar(40) character set latin1 collate latin1_swedish_ci",
        "char(40) character set utf8mb3 collate utf8mb3_general_ci",
    ],
    "sqlite": ["varchar(40) collate nocase"],
}


@pairwise(
    database=ALL_DRIVERS,
    type_=[each for types in COLLATIONS.values() for each in types],
    composite=[False, True],
    allowed=lambda target, type_, _composite: type_ in COLLATIONS[target.partition("+")[0]],
)
def test_the_database_decides_which_text_is_equal(
    database: Database, type_: str, composite: bool
) -> None:
    """A key asked for as 'ABC' is there where the database says that 'abc' is the same."""
    engine = database.engine()
    with engine.begin() as connection:
        if type_ == "citext":
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS citext")
        key = "id, part" if composite else "id"
        connection.exec_driver_sql(
            f"CREATE TABLE things (id {type_}, part int, note int, PRIMARY KEY ({key}))"
        )
    columns = [sa.Column("id", sa.String(40), primary_key=True)]
    columns.append(sa.Column("part", sa.Integer, primary_key=composite, autoincrement=False))
    table = sa.Table("things", sa.MetaData(), *columns, sa.Column("note", sa.Integer))
    make(engine, table, [("Ärger", 1, 1), ("abc", 1, 2), ("abd", 1, 3), ("é", 1, 4)])
    dialect, real = dialect_for(engine), keyed(engine, table)
    ask: list[Any] = ["ABC", "nix", "é", "Ärger"]
    if composite:
        ask = [(text, 1) for text in ask]
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, real, ask) == [ask[0], *ask[2:]]
        assert dialect.delete_by_keys(connection, real, ask) == 3
        assert dialect.existing_keys(connection, real, ask) == []
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, table) == [3]


@pytest.mark.parametrize(
    "database", [target for target in ALL_DRIVERS if target != "sqlite"], indirect=True
)
def test_keys_that_are_gone_lock_nothing(database: Database) -> None:
    """At REPEATABLE READ, MariaDB locks the gap where the row was, and strangers wait for it."""
    engine = database.engine()
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("note", sa.Integer),
    )
    make(engine, table, [(n, n) for n in (1, 9)])
    dialect, real = dialect_for(engine), keyed(engine, table)
    with engine.connect() as ours, engine.connect() as theirs:
        dialect.begin_cleanup(ours, lock_timeout=1)
        assert dialect.delete_by_keys(ours, real, [4, 5, 6, 20]) == 0
        dialect.begin_cleanup(theirs, lock_timeout=1)
        theirs.execute(table.insert(), [{"id": n, "note": n} for n in (4, 5, 7, 19, 20)])
        theirs.commit()
        ours.commit()
        dialect.end_cleanup(ours)
        dialect.end_cleanup(theirs)


@every_driver
def test_several_tables_asked_at_once_tell_each_its_own_rows(database: Database) -> None:
    """That nothing is left of one must not hide what is left of another."""
    engine = database.engine()
    metadata = sa.MetaData()
    tables = [
        sa.Table(
            name,
            metadata,
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("note", sa.Integer),
        )
        for name in ("things", "others", "empty")
    ]
    for table, rows in zip(tables, ([(1, 1), (2, 2)], [(2, 2)], []), strict=True):
        table.create(engine)
        with engine.begin() as connection:
            for row in rows:
                connection.execute(sa.insert(table).values(row))
    dialect = dialect_for(engine)
    asked: list[tuple[Any, list[Any]]] = [(keyed(engine, table), [1, 2, 3]) for table in tables]
    with engine.connect() as connection:
        dialect.begin_reading(connection, lock_timeout=5)
        assert dialect.existing_keys_of_each(connection, asked) == [[1, 2], [2], []]
        assert dialect.existing_keys_of_each(connection, asked[1:2]) == [[2]]
        connection.commit()
        dialect.end_cleanup(connection)


@every_driver
@pytest.mark.parametrize("type_", [sa.Integer(), sa.Numeric(10, 1)], ids=["integer", "numeric"])
def test_runs_of_integers_take_nothing_in_between(database: Database, type_: Any) -> None:
    """The model says Integer, whatever the column is; strangers have 5.5 and what has no number."""
    engine = database.engine()
    columns = [sa.Column("id", type_, primary_key=True, autoincrement=False)]
    real = sa.Table("things", sa.MetaData(), *columns, sa.Column("note", sa.String(20)))
    real.create(engine)
    is_numeric = isinstance(type_, sa.Numeric)
    ours = [*range(-150, 151), *range(1000, 1400)]
    theirs: list[Any] = [-151, 151, 999, 1400]
    with engine.begin() as connection:
        rows = [{"id": key, "note": "ours"} for key in ours if key != 7]  # 7 is gone already
        rows += [{"id": key, "note": "theirs"} for key in theirs]
        if is_numeric:
            between = [decimal.Decimal("5.5"), decimal.Decimal("7.5"), decimal.Decimal("1200.1")]
            rows += [{"id": key, "note": "theirs"} for key in between]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sa.exc.SAWarning)  # SQLite has no decimals
            connection.execute(sa.insert(real), rows)
    model = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("note", sa.String(20)),
    )
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.delete_by_keys(connection, keyed(engine, model), ours) == len(ours) - 1
        connection.commit()
        dialect.end_cleanup(connection)
    assert contents(engine, real) == ["theirs"] * (7 if is_numeric else 4)


def _integers(engine: sa.Engine, definition: str, *values: Any) -> KeyedTable:
    """A SQLite table made by hand, seen as one with an integer key."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE things ({definition}")
        for value in values:
            connection.exec_driver_sql("INSERT INTO things VALUES (?)", (value,))
    return keyed(
        engine, sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    )


@on("sqlite")  # elsewhere a column holds values of one type
@pytest.mark.parametrize(
    "definition",
    [
        "id INT PRIMARY KEY)",
        "id INTEGER PRIMARY KEY DESC)",
        "id INTEGER PRIMARY KEY) WITHOUT ROWID",
    ],
)
def test_a_range_of_integers_holds_nothing_else(engine: sa.Engine, definition: str) -> None:
    table = _integers(engine, definition, *range(1, 201), 5.5, 300)
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.delete_by_keys(connection, table, list(range(1, 201))) == 200
        left = connection.exec_driver_sql("SELECT id FROM things ORDER BY id").scalars().all()
        connection.rollback()
        dialect.end_cleanup(connection)
    assert left == [5.5, 300]


@on("sqlite")
def test_many_integers_in_a_column_of_text_are_verified_as_text(engine: sa.Engine) -> None:
    """As text, '100' is not between '5' and '604'."""
    table = _integers(engine, "id VARCHAR PRIMARY KEY)", "100")
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, table, list(range(5, 605))) == [100]
        connection.rollback()
        dialect.end_cleanup(connection)
