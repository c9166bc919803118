"""The audit beside databases that are not as usual: it says so, and stays out of the way."""

from __future__ import annotations

import os
import sqlite3
import threading
import uuid

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness.audits import Audited, Base, Org
from harness.targets import on
from tidyrows.audit import connections, tables

psycopg = on("postgresql+psycopg")
psycopg2 = on("postgresql+psycopg2")
sqlite = on("sqlite")


@pytest.fixture
def audited():
    made = Audited()
    yield made
    made.observer.close()
    made.watches.close()


def do(engine, *statements):
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def notes(audited):
    return " ".join(audited.watches.notes)


@on("sqlite", "postgresql+psycopg", "postgresql+psycopg2")
def test_a_value_that_the_driver_cannot_read_hides_its_own_table_only(database, audited):
    """The suite itself may never read it; and the driver's error is not always one of its own."""
    odd = {
        "sqlite": "CAST(x'ff' AS TEXT)",
        "postgresql": "CAST('0044-03-15 BC' AS date)",
    }[database.backend]
    engine = database.engine()
    do(
        engine,
        "CREATE TABLE odd (id INTEGER PRIMARY KEY, at DATE)",
        "CREATE TABLE even (id INTEGER PRIMARY KEY)",
    )
    do(engine, f"INSERT INTO odd VALUES (1, {odd})")
    audited.test("odd")
    do(engine, "INSERT INTO even VALUES (1)")
    audited.test("even")
    assert audited.found == {("even", "leaves", "even", 1)}
    assert "odd: not read" in notes(audited)


def test_a_converter_of_the_projects_own_that_raises_is_said(tmp_path, audited):
    """Python's own for timestamps raises a bare ValueError."""
    declared = {"detect_types": sqlite3.PARSE_DECLTYPES}
    engine = sa.create_engine(f"sqlite:///{tmp_path}/typed.db", connect_args=declared)
    do(engine, "CREATE TABLE odd (id INTEGER PRIMARY KEY, at timestamp)")
    audited.test("before", is_test=False)
    do(engine, "INSERT INTO odd VALUES (1, 'no date')")
    audited.test("one")
    assert "odd: not read (ValueError" in notes(audited)
    engine.dispose()


def test_a_run_without_sqlalchemy_is_said():
    nobody = Audited()
    nobody.observer.close()
    nobody.watches.close()
    assert "no database was met" in notes(nobody)


@psycopg2
def test_a_binary_key_is_the_same_at_the_next_look(database, audited):
    """psycopg2 reads it as memory, whose text is its address."""
    engine = database.engine()
    do(engine, "CREATE TABLE blobs (id bytea PRIMARY KEY)", "INSERT INTO blobs VALUES ('\\x01')")
    audited.test("before", is_test=False)
    do(engine, "INSERT INTO blobs VALUES ('\\x02')")
    audited.test("one")
    assert ("one", "leaves", "blobs", 1) in audited.found
    assert len(audited.found) == 2


@psycopg
def test_a_row_of_a_partition_is_counted_once(database, audited):
    engine = database.engine()
    do(
        engine,
        "CREATE TABLE orders (id int, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (0) TO (100)",
    )
    audited.test("before", is_test=False)
    do(engine, "INSERT INTO orders VALUES (1)", "INSERT INTO orders_1 VALUES (2)")
    audited.test("one")
    assert audited.found == {("one", "leaves", "orders", 2)}


@on("mysql+pymysql")
@pytest.mark.parametrize("kept_by", ["MyISAM", "Aria"])
def test_a_table_that_innodb_does_not_keep_is_tables_too(database, audited, kept_by):
    engine = database.engine()
    do(engine, f"CREATE TABLE old (id int PRIMARY KEY) ENGINE = {kept_by}")
    audited.test("before", is_test=False)
    do(engine, "INSERT INTO old VALUES (1)")
    audited.test("one")
    assert audited.found == {("one", "leaves", "old", 1)}


@sqlite
def test_what_sqlite_keeps_of_a_virtual_table_is_nobodys_table(database, audited):
    """Each insert changes rows there that nobody has made."""
    engine = database.engine()
    do(engine, "CREATE VIRTUAL TABLE docs USING fts5(body)")
    audited.test("before", is_test=False)
    for name in ("one", "two"):
        do(engine, f"INSERT INTO docs VALUES ('{name}')")
        audited.test(name)
    assert audited.found == {("one", "leaves", "docs", 1), ("two", "leaves", "docs", 1)}


@sqlite
def test_sqlite_takes_text_for_a_number(database, audited, monkeypatch):
    engine = database.engine()
    do(engine, "CREATE TABLE odd (id INT PRIMARY KEY)", "INSERT INTO odd VALUES ('abc'), (1)")
    audited.test("before", is_test=False)
    do(engine, "INSERT INTO odd VALUES (2)")
    audited.test("one")
    assert ("one", "leaves", "odd", 1) in audited.found
    monkeypatch.setattr(tables, "SMALL", 3)
    do(engine, "INSERT INTO odd VALUES ('x'), ('y'), (3)")
    audited.test("many")
    table = sa.Table("odd", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with engine.begin() as connection:
        connection.execute(table.delete().where(table.c.id == 1))
    audited.test("by key")
    assert ("many", "leaves", "odd", 3) in audited.found
    assert ("by key", "deletes", "odd", 1) in audited.found


def test_a_table_that_each_test_makes_anew_holds_no_others_rows(engine, audited):
    """The keys are the same again, and the rows are not."""
    for name in ("one", "two"):
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Org(id=1, name=name))
            session.commit()
        audited.test(name)
    assert audited.found == {("one", "leaves", "orgs", 1), ("two", "leaves", "orgs", 1)}


def test_what_is_committed_by_itself_is_believed(database, audited, monkeypatch):
    """Of a large table, what was heard is all that is known: a commit is not heard here."""
    monkeypatch.setattr(tables, "SMALL", 2)
    Base.metadata.create_all(database.engine())
    with Session(database.engine()) as session:
        session.add_all([Org(id=number) for number in range(1, 6)])
        session.commit()
    engine = database.engine(isolation_level="AUTOCOMMIT")
    audited.test("before", is_test=False)
    with engine.connect() as connection:
        connection.execute(sa.update(Org).where(Org.id == 1).values(name="changed"))
    audited.test("one")
    assert ("one", "changes", "orgs", 1) in audited.found


@psycopg
def test_the_audit_is_not_in_the_way_of_a_database_made_from_another(database, audited):
    """Nobody may be connected to a template, and suites make one database per test of it."""
    names = [f"tidyrows_{uuid.uuid4().hex[:12]}" for _ in range(2)]
    server = database.engine(isolation_level="AUTOCOMMIT")
    template = sa.create_engine(database.url.set(database=names[0]))
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {names[0]}")
        try:
            do(template, "CREATE TABLE orgs (id int PRIMARY KEY)")
            audited.test("before", is_test=False)
            template.dispose()
            connection.exec_driver_sql(f"CREATE DATABASE {names[1]} TEMPLATE {names[0]}")
        finally:
            audited.watches.release()
            template.dispose()
            for name in names:
                connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name}")


@psycopg
def test_where_somebody_ends_its_connection_the_rows_are_still_that_tests(database, audited):
    engine = database.engine()
    Base.metadata.create_all(engine)
    audited.test("before", is_test=False)
    ((_name, watch),) = audited.watches._watches.items()
    number = watch.connection._connection.connection.driver_connection.info.backend_pid
    do(engine, "INSERT INTO orgs VALUES (1, '')", f"SELECT pg_terminate_backend({number}, 5000)")
    audited.test("one")
    audited.test("two")
    assert audited.found == {("one", "leaves", "orgs", 1)}
    assert notes(audited) == ""


def test_a_look_leaves_the_suites_own_connection_as_it_was(audited):
    """A database in memory is looked at through it."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    do(engine, "PRAGMA busy_timeout = 7777")
    audited.test("one")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 7777
    engine.dispose()


@sqlite
def test_a_database_that_does_not_answer_is_not_waited_for_twice(database, audited, monkeypatch):
    """Nor does its thread keep the process from ending."""
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    engine = database.engine()
    ended = threading.Event()

    @sa.event.listens_for(engine, "connect")
    def hang(_connection, _record):
        if threading.current_thread() is not threading.main_thread():
            assert threading.current_thread().daemon
            ended.wait()

    Base.metadata.create_all(engine)
    audited.test("one")
    ((_name, watch),) = audited.watches._watches.items()
    monkeypatch.setattr(watch, "_call", pytest.fail)
    audited.test("two")
    ended.set()
    assert "did not answer" in notes(audited)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # of Python 3.12 on: there are threads
@sqlite
def test_a_child_that_was_forked_does_not_wait_for_the_audit(database, audited, tmp_path):
    """The audit's thread is not there."""
    engine = database.engine()
    Base.metadata.create_all(engine)
    child = os.fork()
    if child == 0:
        other = sa.create_engine(f"sqlite:///{tmp_path}/child.db")
        try:
            Base.metadata.create_all(other)
        finally:
            os._exit(0 if not audited.watches.notes else 1)
    _number, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_the_project_has_made_itself_may_refuse_the_audit_and_not_the_suite(tmp_path, audited):
    """A type that does not take back what it has made, a session, a pool."""

    class OneWay(sa.types.TypeDecorator):
        impl = sa.String
        cache_ok = True

        def process_bind_param(self, value, dialect):
            return value.upper()

        def process_result_value(self, value, dialect):
            return (value,)

    class Own(DeclarativeBase):
        pass

    class Odd(Own):
        __tablename__ = "odd"
        id: Mapped[str] = mapped_column(OneWay, primary_key=True)

    class Routed(Session):
        def get_bind(self, mapper=None, **options):
            if not options:
                raise LookupError
            return super().get_bind(mapper, **options)

    class Pool(sa.NullPool):
        def recreate(self):
            raise LookupError("once only")

    for name, pool in (("first", sa.NullPool), ("second", Pool)):
        engine = sa.create_engine(f"sqlite:///{tmp_path}/{name}.db", poolclass=pool)
        Own.metadata.create_all(engine)
        do(engine, "INSERT INTO odd VALUES ('A')")
        for kind in (Session, Routed):
            with kind(engine) as session:
                assert session.scalars(sa.select(Odd)).one().id == ("A",)
    audited.test("one")
    assert "second.db was not looked at: its pool cannot be made again" in notes(audited)
