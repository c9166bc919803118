"""What an error means: provoked on real servers, never told from its text."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.targets import ALL_DRIVERS, on
from tidyrows.dialects import Fault, Loss, dialect_for

PG = ("postgresql+psycopg", "postgresql+psycopg2")
MYSQL = ("mysql+pymysql", "mysql+mysqldb")


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """Parents 1 and 2, a child of 1."""
    engine = database.engine()
    metadata = sa.MetaData()
    parents = sa.Table(
        "parents",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("v", sa.Integer),
    )
    parent = sa.ForeignKey("parents.id", deferrable=True, initially="DEFERRED")
    if engine.dialect.name == "mysql":
        parent = sa.ForeignKey("parents.id")
    children = sa.Table(
        "children",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("parent", sa.Integer, sa.ForeignKey("parents.id")),
        sa.Column("late", sa.Integer, parent),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(parents.insert(), [{"id": 1}, {"id": 2}])
        connection.execute(children.insert().values(id=1, parent=1))
    return engine


def raised(connection: sa.Connection, *statements: str) -> sa.exc.DBAPIError:
    *before, last = statements
    for statement in before:
        connection.exec_driver_sql(statement)
    with pytest.raises(sa.exc.DBAPIError) as caught:
        connection.exec_driver_sql(last)
    return caught.value


def driver(connection: sa.Connection) -> Any:
    return connection.connection.dbapi_connection


@on(*ALL_DRIVERS)
def test_a_foreign_key_in_the_way_is_a_constraint(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        error = raised(connection, "UPDATE parents SET v = 1 WHERE id = 2", "DELETE FROM parents")
        assert dialect.fault(error) is Fault.CONSTRAINT
        assert error.orig is not None
        assert dialect.fault(error.orig) is Fault.CONSTRAINT
        assert dialect.loss(error, driver(connection)) is Loss.NOTHING
        connection.rollback()


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), sa.exc.TimeoutError("x")])
def test_what_no_database_said_is_raised(engine: sa.Engine, error: BaseException) -> None:
    assert dialect_for(engine).fault(error) is Fault.OTHER


@on(*ALL_DRIVERS)
def test_wrong_sql_is_raised(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert dialect_for(engine).fault(raised(connection, "SELEKT 1")) is Fault.OTHER


@on(*PG, *MYSQL)
def test_a_lock_that_is_not_given_is_transient(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    wait = {
        "postgresql": "SET LOCAL lock_timeout = '10ms'",
        "mysql": "SET SESSION innodb_lock_wait_timeout = 1",
    }[engine.dialect.name]
    with engine.connect() as theirs, engine.connect() as ours:
        theirs.exec_driver_sql("UPDATE parents SET v = 1 WHERE id = 2")
        error = raised(ours, wait, "UPDATE parents SET v = 2 WHERE id = 2")
        assert dialect.fault(error) is Fault.TRANSIENT
        doubt = Loss.DOUBT if engine.dialect.name == "mysql" else Loss.NOTHING
        assert dialect.loss(error, driver(ours)) is doubt
        ours.rollback()
        ours.invalidate()


@on(*PG, *MYSQL)
def test_a_deadlock_is_transient_and_takes_everything_on_mysql(engine: sa.Engine) -> None:
    """After 1213 the transaction is gone: what is done next stands alone, and commits alone."""
    dialect = dialect_for(engine)
    errors: list[tuple[sa.exc.DBAPIError, Loss]] = []
    meet = threading.Barrier(2, timeout=20)

    def run(first: int, second: int) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"UPDATE parents SET v = 9 WHERE id = {first}")
            meet.wait()
            try:
                connection.exec_driver_sql(f"UPDATE parents SET v = 9 WHERE id = {second}")
            except sa.exc.DBAPIError as error:
                errors.append((error, dialect.loss(error, driver(connection))))
            connection.rollback()

    threads = [threading.Thread(target=run, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    ((error, loss),) = errors
    assert dialect.fault(error) is Fault.TRANSIENT
    assert loss is (Loss.EVERYTHING if engine.dialect.name == "mysql" else Loss.NOTHING)


@on(*PG, *MYSQL)
def test_a_killed_connection_is_lost(engine: sa.Engine) -> None:
    dialect = dialect_for(engine)
    identity, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }[engine.dialect.name]
    with engine.connect() as ours:
        process = ours.exec_driver_sql(identity).scalar_one()
        with engine.connect() as other:
            other.exec_driver_sql(kill.format(process))
        error = raised(ours, "SELECT 1")
        assert dialect.fault(error) is Fault.LOST
        assert error.orig is not None
        assert dialect.fault(error.orig) is Fault.LOST
        assert dialect.loss(error, None) is Loss.EVERYTHING
        ours.invalidate()


@on(*PG, *MYSQL)
def test_a_server_that_is_down_is_lost(engine: sa.Engine) -> None:
    nobody = sa.create_engine(engine.url.set(host="127.0.0.1", port=1, query={}))
    with pytest.raises(sa.exc.DBAPIError) as caught:
        nobody.connect()
    assert dialect_for(nobody).fault(caught.value) is Fault.LOST
    assert dialect_for(nobody).fault(ConnectionRefusedError()) is Fault.LOST


@on(*PG, *MYSQL)
def test_a_statement_that_takes_too_long_is_transient(engine: sa.Engine) -> None:
    if not (engine.dialect.name == "postgresql" or is_mariadb(engine)):
        pytest.skip("MySQL bounds SELECT only")
    dialect = dialect_for(engine)
    sleep = {"postgresql": "SELECT pg_sleep(5)", "mysql": "SELECT sleep(5)"}[engine.dialect.name]
    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5, statement_timeout=0.02)
        assert dialect.fault(raised(connection, sleep)) is Fault.TRANSIENT
        connection.rollback()
        dialect.end_cleanup(connection)


def is_mariadb(engine: sa.Engine) -> bool:
    return bool(getattr(engine.dialect, "is_mariadb", False))


@on("sqlite")
@pytest.mark.parametrize("read_first", [False, True])
def test_a_busy_file_is_transient(database: Database, engine: sa.Engine, read_first: bool) -> None:
    """BUSY (5) after the timeout, and at once (517) where the snapshot is older than the file."""
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    impatient = database.engine(connect_args={"timeout": 0})
    dialect = dialect_for(impatient)
    with engine.connect() as theirs, impatient.connect() as ours:
        if read_first:
            ours.exec_driver_sql("BEGIN")
            ours.exec_driver_sql("SELECT * FROM parents").all()
        theirs.exec_driver_sql("UPDATE parents SET v = 1")
        if read_first:
            theirs.commit()
        error = raised(ours, "UPDATE parents SET v = 2")
        assert dialect.fault(error) is Fault.TRANSIENT


@on("sqlite")
@pytest.mark.parametrize(("action", "loss"), [("ROLLBACK", "EVERYTHING"), ("ABORT", "NOTHING")])
def test_sqlite_says_whether_an_error_took_the_transaction(
    engine: sa.Engine, action: str, loss: str
) -> None:
    dialect = dialect_for(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER no BEFORE UPDATE ON parents BEGIN SELECT RAISE({action}, 'no'); END"
        )
        connection.exec_driver_sql("INSERT INTO parents (id) VALUES (7)")
        error = raised(connection, "UPDATE parents SET v = 1")
        assert dialect.loss(error, driver(connection)) is Loss[loss]
        connection.rollback()


CODES: list[tuple[str, str, Any, Fault]] = [
    *(("postgresql", "sqlstate", code, Fault.TRANSIENT) for code in ("40001", "40P01", "55P03")),
    *(("postgresql", "pgcode", code, Fault.TRANSIENT) for code in ("57014", "53300")),
    *(
        ("postgresql", "sqlstate", code, Fault.LOST)
        for code in ("08006", "57P01", "57P03", "25P03")
    ),
    ("postgresql", "sqlstate", "23505", Fault.CONSTRAINT),
    *(
        ("postgresql", "sqlstate", code, Fault.OTHER)
        for code in ("42501", "25P02", "53100", "42P01")
    ),
    *(("mysql", "args", code, Fault.TRANSIENT) for code in (1213, 1205, 1020, 1969, 1040)),
    *(("mysql", "errno", code, Fault.LOST) for code in (2002, 2003, 2006, 2013)),
    *(("mysql", "args", code, Fault.CONSTRAINT) for code in (1451, 1452)),
    *(("mysql", "args", code, Fault.OTHER) for code in (1153, 1146, 1142, 1317, "1213")),
    *(("sqlite", "sqlite_errorcode", code, Fault.TRANSIENT) for code in (5, 6, 517, 261, 262)),
    *(("sqlite", "sqlite_errorcode", code, Fault.CONSTRAINT) for code in (787, 1811, 19)),
    *(("sqlite", "sqlite_errorcode", code, Fault.OTHER) for code in (9, 10, 13, 1)),
]
URLS = {"postgresql": "postgresql+psycopg://", "mysql": "mysql+pymysql://", "sqlite": "sqlite://"}


@pytest.mark.parametrize(("name", "where", "code", "fault"), CODES)
def test_every_code_of_the_table(name: str, where: str, code: Any, fault: Fault) -> None:
    """What cannot be provoked here, as it comes from the drivers."""
    error = RuntimeError(code, "text") if where == "args" else RuntimeError("40001 1213 text")
    if where != "args":
        setattr(error, where, code)
    dialect = dialect_for(sa.create_engine(URLS[name]))
    assert dialect.fault(error) is fault
    wrapped = sa.exc.DBAPIError("sql", {}, error)
    assert dialect.fault(wrapped) is fault
    wrapped.connection_invalidated = True
    assert dialect.fault(wrapped) is Fault.LOST


def test_one_dialect_per_engine() -> None:
    one, two = sa.create_engine("sqlite://"), sa.create_engine("sqlite://")
    assert dialect_for(one) is dialect_for(one)
    assert dialect_for(one) is not dialect_for(two)
    with one.connect() as connection:
        assert dialect_for(connection) is dialect_for(one)
    one.dispose()
