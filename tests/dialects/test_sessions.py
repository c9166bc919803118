"""A cleanup's transaction begins right on a connection that was left in any state."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import dialect_for
from tidyrows.errors import SessionStateError
from tidyrows.keys import KeyedTable, TableName

PG = ("postgresql+psycopg", "postgresql+psycopg2")
MYSQL = ("mysql+pymysql", "mysql+mysqldb")
THINGS = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))


def made(engine: sa.Engine) -> KeyedTable:
    THINGS.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(THINGS.insert(), [{"id": 1}, {"id": 2}])
    schema = {"postgresql": "public", "sqlite": "main"}.get(
        engine.dialect.name, str(engine.url.database)
    )
    return KeyedTable(TableName(str(engine.url), schema, "things"), THINGS)


def cleaned(engine: sa.Engine, table: KeyedTable, *, commit: bool = True) -> None:
    """A cleanup of row 1: still one transaction, which ends as the caller says."""
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        assert dialect.delete_by_keys(connection, table, [1]) == 1
        if commit:
            connection.commit()
        else:
            connection.rollback()
        dialect.end_cleanup(connection)
    with engine.connect() as connection:
        dialect.begin_reading(connection, lock_timeout=5)
        assert dialect.existing_keys(connection, table, [1, 2]) == ([2] if commit else [1, 2])
        connection.rollback()
        dialect.end_cleanup(connection)


LEVELS: list[tuple[str, str]] = [
    *((target, "SERIALIZABLE") for target in ALL_DRIVERS),
    *((target, "AUTOCOMMIT") for target in ALL_DRIVERS),
    *((target, "REPEATABLE READ") for target in (*PG, *MYSQL)),
]


@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
@pytest.mark.parametrize("commit", [True, False])
def test_any_isolation_level_of_the_engine(database: Database, level: str, commit: bool) -> None:
    engine = database.engine(
        isolation_level=level, pool_size=1, max_overflow=0, poolclass=sa.QueuePool
    )
    cleaned(engine, made(engine), commit=commit)
    with engine.connect() as connection:
        if level == "AUTOCOMMIT":  # and so it is again for the pool's next user
            connection.execute(THINGS.insert().values(id=9))
            assert not dialect_for(engine).in_transaction(connection.connection)
        else:
            assert connection.get_isolation_level() == level


LEFT: list[tuple[str, str]] = [
    *((target, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY") for target in PG),
    *((target, "SET default_transaction_isolation = 'serializable'") for target in PG),
    *((target, "SET search_path = nowhere") for target in PG),
    *((target, "SET ROLE pg_monitor") for target in PG),
    *((target, "SET row_security = off") for target in PG),
    *((target, "SET SESSION TRANSACTION READ ONLY") for target in MYSQL),
    *((target, "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE") for target in MYSQL),
    *((target, "SET SESSION sql_safe_updates = 1") for target in MYSQL),
    *((target, "SET SESSION foreign_key_checks = 0") for target in MYSQL),
    *((target, "SET SESSION autocommit = 1") for target in MYSQL),
    *((target, "USE information_schema") for target in MYSQL),
    *((target, "SET SESSION sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES'") for target in MYSQL),
    ("sqlite", "PRAGMA busy_timeout = 0"),
]


@pytest.mark.parametrize(("database", "left"), LEFT, indirect=["database"])
@pytest.mark.parametrize("commit", [True, False])
def test_what_was_left_on_a_pooled_connection_does_not_matter(
    database: Database, left: str, commit: bool
) -> None:
    engine = database.engine(pool_size=1, max_overflow=0, poolclass=sa.QueuePool)
    table = made(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(left)
        connection.commit()
    cleaned(engine, table, commit=commit)


@on(*MYSQL)
def test_mysqls_session_variables_come_back(database: Database) -> None:
    engine = database.engine(pool_size=1, max_overflow=0)
    table = made(engine)
    ask = (
        "SELECT @@foreign_key_checks, @@sql_safe_updates, @@innodb_lock_wait_timeout, "
        "@@lock_wait_timeout"
    )
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SET SESSION foreign_key_checks = 0, sql_safe_updates = 1, "
            "innodb_lock_wait_timeout = 77, lock_wait_timeout = 78"
        )
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=2.5)
        assert tuple(connection.exec_driver_sql(ask).one()) == (1, 0, 3, 3)
        dialect.delete_by_keys(connection, table, [1])
        connection.commit()
        dialect.end_cleanup(connection)
        dialect.end_cleanup(connection)  # once more does nothing
    with engine.connect() as connection:
        assert tuple(connection.exec_driver_sql(ask).one()) == (0, 1, 77, 78)


@on(*MYSQL)
def test_a_block_without_foreign_keys(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    ask = "SELECT @@foreign_key_checks"
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=2)
        with dialect.without_foreign_keys(connection):
            assert connection.exec_driver_sql(ask).scalar() == 0
        assert connection.exec_driver_sql(ask).scalar() == 1
        connection.rollback()
        dialect.end_cleanup(connection)


@on(*PG)
def test_postgresqls_settings_end_with_the_transaction(database: Database) -> None:
    engine = database.engine(pool_size=1, max_overflow=0)
    dialect = dialect_for(engine)
    ask = "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
    with engine.connect() as connection:
        before = tuple(connection.exec_driver_sql(ask).one())
        connection.rollback()
        dialect.begin_cleanup(connection, lock_timeout=0.0001, statement_timeout=9)
        assert tuple(connection.exec_driver_sql(ask).one()) == ("1ms", "9s")
        connection.commit()
        dialect.end_cleanup(connection)
        assert tuple(connection.exec_driver_sql(ask).one()) == before


@on(*ALL_DRIVERS)
def test_a_wait_for_a_lock_is_bounded(database: Database) -> None:
    engine = database.engine(connect_args={"timeout": 60} if database.backend == "sqlite" else {})
    table = made(engine)
    dialect = dialect_for(engine)
    with engine.connect() as theirs, engine.connect() as ours:
        theirs.execute(THINGS.delete())
        with pytest.raises(sa.exc.OperationalError):
            begin_and_delete(ours, table)
        ours.rollback()
        dialect.end_cleanup(ours)
        theirs.rollback()
    cleaned(engine, table)


def begin_and_delete(connection: sa.Connection, table: KeyedTable) -> None:
    dialect = dialect_for(connection)
    dialect.begin_cleanup(connection, lock_timeout=0.05)
    dialect.delete_by_keys(connection, table, [1])


@on(*ALL_DRIVERS)
def test_a_transaction_that_is_somebody_elses_is_not_joined(database: Database) -> None:
    engine = database.engine(poolclass=sa.StaticPool)
    table = made(engine)
    dialect = dialect_for(engine)
    with engine.connect() as theirs:
        theirs.execute(THINGS.delete())
        if dialect.in_transaction(theirs.connection):
            with engine.connect() as ours, pytest.raises(SessionStateError, match="transaction"):
                dialect.begin_cleanup(ours, lock_timeout=1)
        with pytest.raises(SessionStateError):
            dialect.begin_cleanup(theirs, lock_timeout=1)
    cleaned(engine, table)


@on(*PG, *MYSQL)
def test_a_broken_connection_can_be_ended(database: Database) -> None:
    engine = database.engine()
    dialect = dialect_for(engine)
    identity, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }[database.backend]
    with engine.connect() as ours:
        dialect.begin_cleanup(ours, lock_timeout=1)
        process = ours.exec_driver_sql(identity).scalar_one()
        with engine.connect() as other:
            other.exec_driver_sql(kill.format(process))
        dialect.end_cleanup(ours)  # MySQL: it cannot be restored, so it is thrown away
        ours.invalidate()
        dialect.end_cleanup(ours)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


# ----- SQLite, however its transactions are begun ----------------------------------------------


def by_recipe(database: Database, begin: str) -> sa.Engine:
    engine = database.engine(pool_size=1, poolclass=sa.QueuePool)

    @sa.event.listens_for(engine, "connect")
    def _connect(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


@on("sqlite")
@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
@pytest.mark.parametrize("commit", [True, False])
def test_transactions_begun_by_a_listener(database: Database, begin: str, commit: bool) -> None:
    engine = by_recipe(database, begin)
    cleaned(engine, made(engine), commit=commit)


@on("sqlite")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit= came with Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("commit", [True, False])
def test_the_newer_transaction_control(database: Database, autocommit: bool, commit: bool) -> None:
    engine = database.engine(
        pool_size=1, poolclass=sa.QueuePool, connect_args={"autocommit": autocommit}
    )
    cleaned(engine, made(engine), commit=commit)
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        assert raw.autocommit is autocommit
        assert raw.in_transaction is not autocommit


@on("sqlite")
def test_the_cleanup_holds_the_write_lock_from_its_beginning(database: Database) -> None:
    """BEGIN IMMEDIATE: a transaction that read first would fail, and wait for nothing."""
    engine = database.engine(connect_args={"timeout": 0})
    made(engine)
    dialect = dialect_for(engine)
    with engine.connect() as ours, engine.connect() as theirs:
        dialect.begin_cleanup(ours, lock_timeout=1)
        with pytest.raises(sa.exc.OperationalError, match="locked"):
            theirs.exec_driver_sql("BEGIN IMMEDIATE")
        ours.rollback()
        dialect.end_cleanup(ours)
        dialect.begin_reading(ours, lock_timeout=1)
        theirs.exec_driver_sql("BEGIN IMMEDIATE")
        theirs.rollback()
        ours.rollback()
        dialect.end_cleanup(ours)


@on("sqlite")
def test_the_busy_timeout_comes_back(database: Database) -> None:
    engine = database.engine(connect_args={"timeout": 7})
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=0.25)
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 250
        connection.rollback()
        dialect.end_cleanup(connection)
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 7000


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.SingletonThreadPool])
def test_a_database_in_memory(pool: type[sa.Pool]) -> None:
    engine = sa.create_engine("sqlite://", poolclass=pool)
    cleaned(engine, made(engine))
    engine.dispose()
