"""Is a transaction open, will its COMMIT persist anything, and what did a failed COMMIT leave?"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import CommitOutcome, Fault, dialect_for
from tidyrows.errors import SessionStateError

TELLING = tuple(target for target in ALL_DRIVERS if target != "mysql+mysqldb")
PG = ("postgresql+psycopg", "postgresql+psycopg2")
INSERT = "INSERT INTO things VALUES (7, NULL)"


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    engine = database.engine()
    make_things(engine)
    return engine


def make_things(engine: sa.Engine) -> None:
    late = "" if engine.dialect.name == "mysql" else "DEFERRABLE INITIALLY DEFERRED"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE things (id INT PRIMARY KEY, other INT, "
            f"FOREIGN KEY (other) REFERENCES things (id) {late})"
        )


def driver(connection: sa.Connection) -> Any:
    return connection.connection.dbapi_connection


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM things").scalar_one())


@on(*TELLING)
def test_the_driver_knows_whether_a_transaction_is_open(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        raw = driver(connection)
        if engine.dialect.name != "mysql":  # there, rows came last, and PyMySQL keeps no status
            assert dialect.in_transaction(raw) is False
        for end in (connection.rollback, connection.commit):
            connection.exec_driver_sql(INSERT)
            assert dialect.in_transaction(raw) is True
            assert dialect.in_transaction(connection.connection) is True  # as the pool hands it out
            end()
            assert dialect.in_transaction(raw) is False


@on(*ALL_DRIVERS)
def test_autocommit_is_no_transaction(database: Database) -> None:
    engine = database.engine(isolation_level="AUTOCOMMIT")
    make_things(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT)
        assert dialect_for(engine).in_transaction(driver(connection)) is False


@on("mysql+mysqldb")
def test_mysqlclient_cannot_tell(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT)
        assert dialect_for(engine).in_transaction(driver(connection)) is None


@on("mysql+pymysql")
def test_ddl_ends_the_transaction(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    assert dialect.ddl_commits
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT)
        connection.exec_driver_sql("CREATE TABLE more (id INT)")
        assert not dialect.in_transaction(driver(connection))


@on(*PG)
def test_the_commit_of_an_aborted_transaction_is_void(engine: sa.Engine) -> None:
    """PostgreSQL raises nothing and persists nothing."""
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT)
        assert not dialect.commit_is_void(connection)
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql(INSERT)
        assert dialect.commit_is_void(connection)
        assert dialect.in_transaction(driver(connection)) is True
        dialect.driver = "one that nobody knows"  # then the server is asked
        assert dialect.commit_is_void(connection)
        connection.commit()
        connection.exec_driver_sql(INSERT)
        assert not dialect.commit_is_void(connection)
        connection.rollback()
    assert count(engine) == 0


def commit_error(connection: sa.Connection) -> BaseException:
    with pytest.raises(Exception, match=r"(?s).*") as caught:
        connection.commit()
    return caught.value


@on("sqlite", *PG)
def test_a_commit_refused_by_a_deferred_foreign_key(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("INSERT INTO things VALUES (1, 99)")
        error = commit_error(connection)
        assert dialect.fault(error) is Fault.CONSTRAINT
        left = CommitOutcome.OPEN if engine.dialect.name == "sqlite" else CommitOutcome.GONE
        assert dialect.commit_outcome(error, connection) is left
        connection.invalidate()
    assert count(engine) == 0


@on("sqlite")
def test_a_commit_refused_by_a_reader_leaves_the_transaction_open(database: Database) -> None:
    engine = database.engine(connect_args={"timeout": 0})
    make_things(engine)
    dialect = dialect_for(engine)
    with engine.connect() as reader, engine.connect() as connection:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT * FROM things").all()
        connection.exec_driver_sql(INSERT)
        error = commit_error(connection)
        assert dialect.fault(error) is Fault.TRANSIENT
        assert dialect.commit_outcome(error, connection) is CommitOutcome.OPEN
        reader.rollback()
        driver(connection).rollback()
    assert count(engine) == 0


@on(*PG)
def test_a_commit_refused_by_serialization_is_gone(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    level = {"isolation_level": "SERIALIZABLE"}
    with (
        engine.connect().execution_options(**level) as one,
        engine.connect().execution_options(**level) as two,
    ):
        for number, connection in enumerate((one, two)):
            connection.exec_driver_sql("SELECT * FROM things").all()
            connection.exec_driver_sql(f"INSERT INTO things VALUES ({number}, NULL)")
        one.commit()
        error = commit_error(two)
        assert dialect.fault(error) is Fault.TRANSIENT
        assert dialect.commit_outcome(error, two) is CommitOutcome.GONE
    assert count(engine) == 1


@on(*PG, "mysql+pymysql", "mysql+mysqldb")
def test_a_commit_without_an_answer_is_in_doubt(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    identity, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }[engine.dialect.name]
    with engine.connect() as connection:
        process = connection.exec_driver_sql(identity).scalar_one()
        with engine.connect() as other:
            other.exec_driver_sql(kill.format(process))
        error = commit_error(connection)
        assert dialect.commit_outcome(error, connection) is CommitOutcome.UNKNOWN
        connection.invalidate()


def refuse(_connection: sa.Connection) -> None:
    raise RuntimeError("a listener said no")


@on("sqlite", *PG)
def test_a_listener_that_raised_before_the_commit_leaves_it_open(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        sa.event.listen(connection, "commit", refuse)
        connection.exec_driver_sql(INSERT)
        error = commit_error(connection)
        assert dialect_for(engine).commit_outcome(error, connection) is CommitOutcome.OPEN
        connection.invalidate()


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("guarded", [False, True])
def test_the_pools_next_user_does_not_commit_what_a_failed_commit_left(
    database: Database, guarded: bool
) -> None:
    """SQLAlchemy believes the transaction over, and returns the connection as it is."""
    engine = database.engine(poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0)
    make_things(engine)
    if guarded:
        dialect_for(engine).guard_pool(engine)
        dialect_for(engine).guard_pool(engine)
        assert len(engine.pool.dispatch.reset) == 1
    sa.event.listen(engine, "commit", refuse)
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT)
        commit_error(connection)
    sa.event.remove(engine, "commit", refuse)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO things VALUES (8, NULL)")
    assert count(engine) == (1 if guarded else 2)


@on(*ALL_DRIVERS)
def test_a_cleanup_does_not_commit_what_somebody_left_open(database: Database) -> None:
    """Past SQLAlchemy, with a pool that resets nothing."""
    engine = database.engine(
        poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0, pool_reset_on_return=None
    )
    make_things(engine)
    left = engine.raw_connection()
    left.cursor().execute(INSERT)
    left.close()
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        with pytest.raises(SessionStateError, match="has a transaction open"):
            dialect.begin_cleanup(connection, lock_timeout=1.0)
        dialect.end_cleanup(connection)
    engine.dispose()
    assert count(engine) == 0


@on(*ALL_DRIVERS)
def test_a_guarded_pool_survives_dispose(engine: sa.Engine) -> None:
    dialect_for(engine).guard_pool(engine)
    engine.dispose()
    dialect_for(engine).guard_pool(engine)
    assert len(engine.pool.dispatch.reset) == 1
    assert count(engine) == 0


@on(*TELLING)
def test_a_savepoint_stands_inside_a_transaction(engine: sa.Engine) -> None:
    """SQLite's driver begins nothing for a SAVEPOINT; its RELEASE then commits."""
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        dialect.before_savepoint(connection)
        with connection.begin_nested():
            connection.exec_driver_sql(INSERT)
        assert dialect.in_transaction(driver(connection)) is True
        connection.rollback()
    assert count(engine) == 0


@on("sqlite")
def test_without_it_the_outermost_savepoint_commits(engine: sa.Engine) -> None:
    """The fact that before_savepoint is for; if this fails, it can go."""
    with engine.connect() as connection:
        with connection.begin_nested():
            connection.exec_driver_sql(INSERT)
        connection.rollback()
    assert count(engine) == 1


@on("sqlite")
def test_a_savepoint_under_autocommit_stays_what_it_is(database: Database) -> None:
    engine = database.engine(isolation_level="AUTOCOMMIT")
    make_things(engine)
    with engine.connect() as connection:
        dialect_for(engine).before_savepoint(connection)
        assert dialect_for(engine).in_transaction(driver(connection)) is False


@on("sqlite")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit=False came with Python 3.12")
def test_the_newer_transaction_control_is_understood(database: Database) -> None:
    engine = database.engine(connect_args={"autocommit": False})
    make_things(engine)
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        assert dialect.in_transaction(driver(connection)) is True
        dialect.before_savepoint(connection)
        with connection.begin_nested():
            connection.exec_driver_sql(INSERT)
        connection.rollback()
    assert count(engine) == 0
