"""Rows in foreign-key cycles go in one call where the database can."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import CommitOutcome, CycleForm, Fault, dialect_for
from tidyrows.keys import KeyedTable, TableName

ONE_GO = ("sqlite", "postgresql+psycopg", "postgresql+psycopg2")
ACTIONS = [
    "",
    "ON DELETE RESTRICT",
    "ON DELETE NO ACTION DEFERRABLE",
    "DEFERRABLE INITIALLY DEFERRED",
]


def place(engine: sa.Engine, name: str) -> KeyedTable:
    schema = "public" if engine.dialect.name == "postgresql" else "main"
    table = sa.Table(name, sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    return KeyedTable(TableName("x", schema, name), table)


def left(engine: sa.Engine, name: str) -> list[int]:
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(f"SELECT id FROM {name} ORDER BY id").scalars())


@on(*ALL_DRIVERS)
def test_each_database_says_its_form(database: Database) -> None:
    forms = {
        "postgresql": CycleForm.ONE_STATEMENT,
        "sqlite": CycleForm.DEFERRED,
        "mysql": CycleForm.LEVELS,
    }
    assert dialect_for(database.engine()).cycle_form is forms[database.backend]


@pairwise(database=ONE_GO, action=ACTIONS, turned=[False, True])
def test_a_cycle_of_three_tables_that_holds_row_cycles(
    database: Database, action: str, turned: bool
) -> None:
    """NOT NULL all around: no order of single deletes would do."""
    engine = database.engine()
    names = ["a", "b", "c"]
    with engine.begin() as connection:
        if database.backend == "sqlite":  # the driver begins too late for a PRAGMA
            connection.exec_driver_sql("BEGIN")
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        for name, other in zip(names, ["b", "c", "a"], strict=True):
            reference = f"REFERENCES {other} (id) {action}" if database.backend == "sqlite" else ""
            connection.exec_driver_sql(
                f"CREATE TABLE {name} (id INT PRIMARY KEY, other INT NOT NULL {reference})"
            )
        for number in (1, 2, 3):
            for name in names:
                connection.exec_driver_sql(f"INSERT INTO {name} VALUES ({number}, {number})")
        if database.backend == "postgresql":
            for name, other in zip(names, ["b", "c", "a"], strict=True):
                connection.exec_driver_sql(
                    f"ALTER TABLE {name} ADD FOREIGN KEY (other) REFERENCES {other} (id) {action}"
                )
    batch = [(place(engine, name), [1, 3]) for name in names]
    if turned:
        batch.reverse()
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=1)
        assert dialect.delete_cycle(connection, batch) == [2, 2, 2]
        connection.commit()
        dialect.end_cleanup(connection)
    assert [left(engine, name) for name in names] == [[2], [2], [2]]


@on(*ONE_GO)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_table_that_references_itself(database: Database, action: str) -> None:
    """Parents before children, a row that points at itself, many rows: one call."""
    engine = database.engine()
    count = 3000
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE t (id INT PRIMARY KEY, other INT NOT NULL REFERENCES t (id) {action})"
        )
        rows = ["(1, 1)", *(f"({n}, {n - 1})" for n in range(2, count)), "(9999, 9999)"]
        connection.exec_driver_sql(f"INSERT INTO t VALUES {', '.join(rows)}")
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=1)
        keys = list(range(1, count))
        assert dialect.delete_cycle(connection, [(place(engine, "t"), keys)]) == [count - 1]
        connection.commit()
        dialect.end_cleanup(connection)
    assert left(engine, "t") == [9999]


@on(*ONE_GO)
def test_a_reference_from_outside_stops_it(database: Database) -> None:
    """On SQLite it speaks at COMMIT, and the transaction must then not be left open."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (id INT PRIMARY KEY, other INT REFERENCES t (id))"
        )
        connection.exec_driver_sql("CREATE TABLE child (id INT PRIMARY KEY REFERENCES t (id))")
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 1)")
        connection.exec_driver_sql("INSERT INTO child VALUES (1)")
    dialect = dialect_for(engine)
    dialect.guard_pool(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=1)
        error = cycle_error(connection, place(engine, "t"))
        assert dialect.fault(error) is Fault.CONSTRAINT
        if database.backend == "sqlite":
            assert dialect.commit_outcome(error, connection) is CommitOutcome.OPEN
        connection.rollback()
        dialect.end_cleanup(connection)
        assert not dialect.in_transaction(connection.connection)
    assert left(engine, "t") == [1]


def cycle_error(connection: sa.Connection, table: KeyedTable) -> BaseException:
    dialect = dialect_for(connection)
    with pytest.raises(sa.exc.IntegrityError) as caught:
        dialect.delete_cycle(connection, [(table, [1])])
        connection.commit()
    return caught.value


@on(*ONE_GO)
def test_an_empty_part_of_a_batch(database: Database) -> None:
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE a (id INT PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE b (id INT PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO a VALUES (1)")
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=1)
        batch = [(place(engine, "b"), []), (place(engine, "a"), [1, 2])]
        assert dialect.delete_cycle(connection, batch) == [0, 1]
        connection.rollback()
        dialect.end_cleanup(connection)


@on(*ONE_GO)
def test_a_cycle_of_composite_keys_beside_strangers(database: Database) -> None:
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (id INT, part VARCHAR(9), other INT NOT NULL, "
            "PRIMARY KEY (id, part), FOREIGN KEY (other, part) REFERENCES t (id, part))"
        )
        connection.exec_driver_sql(
            "INSERT INTO t VALUES (1, 'a', 2), (2, 'a', 1), (1, 'b', 2), (2, 'b', 1), (7, 'a', 7)"
        )
    columns = [
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("part", sa.String(9), primary_key=True),
    ]
    real = KeyedTable(place(engine, "t").name, sa.Table("t", sa.MetaData(), *columns))
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=1)
        assert dialect.delete_cycle(connection, [(real, [(1, "a"), (2, "a")])]) == [2]
        connection.commit()
        dialect.end_cleanup(connection)
    assert left(engine, "t") == [1, 2, 7]
