"""What the audit sees of a database between two looks, on every database."""

from __future__ import annotations

import asyncio
import uuid

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from harness.asynchronous import ONE_EACH
from harness.targets import DEFAULT, on
from tidyrows.audit import tables
from tidyrows.audit.connections import AuditConnection, AuditThread
from tidyrows.audit.observer import DatabaseObservations
from tidyrows.audit.watch import DatabaseWatch
from tidyrows.ledger.table import Ledger

metadata = sa.MetaData()
orgs = sa.Table(
    "orgs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(40)),
)
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("text", sa.String(40)),
)
bare = sa.Table("bare", metadata, sa.Column("x", sa.Integer))


@pytest.fixture
def thread():
    made = AuditThread()
    yield made
    made.close()


@pytest.fixture
def watched(engine, thread):
    """A watch that has looked once, at tables with one row each; and what it has said."""
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(orgs.insert(), {"id": 1, "name": "was there"})
        connection.execute(notes.insert(), {"id": uuid.UUID(int=1), "text": "was there"})
        connection.execute(bare.insert(), {"x": 1})
    said = []
    watch = DatabaseWatch(engine, "here", AuditConnection(engine, thread), said.append)
    assert watch.look(DatabaseObservations()) == []
    watch.said = said
    yield watch
    watch.release()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tables, "SMALL", 5)


def seen(watch, observed=None):
    return {
        each.table.name: (len(each.appeared) + each.more, len(each.gone), len(each.changed))
        for each in watch.look(observed or DatabaseObservations())
    }


def do(engine, *statements):
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)


def test_rows_that_appear_change_or_go_are_seen_whoever_did_it(engine, watched):
    assert seen(watched) == {}
    do(
        engine,
        orgs.insert().values(id=2, name="new"),
        notes.update().values(text="changed"),
        bare.delete(),
    )
    assert seen(watched) == {"orgs": (1, 0, 0), "notes": (0, 0, 1), "bare": (0, 1, 0)}
    assert seen(watched) == {}
    assert watched.said == []


def test_rows_are_seen_in_other_tables_than_those_that_were_heard_of(engine, watched):
    """As by a trigger, or an application at work at the same time."""
    do(engine, orgs.insert().values(id=2), notes.delete())
    assert seen(watched, DatabaseObservations(written={(None, "orgs")})) == {
        "orgs": (1, 0, 0),
        "notes": (0, 1, 0),
    }


def test_what_is_rolled_back_is_not_seen(engine, watched):
    with engine.connect() as connection:
        connection.execute(orgs.insert().values(id=2))
        assert seen(watched) == {}
        connection.rollback()
    assert seen(watched) == {}


@on("sqlite")
def test_where_nobody_has_committed_no_table_is_read(engine, watched, monkeypatch):
    """The promise on large databases: a test that writes nothing costs one question.

    The servers' marks are those of all their databases, in which other tests are at work.
    """
    reads = []
    seen(watched)
    monkeypatch.setattr(DatabaseWatch, "_changes", lambda *_anything: reads.append(1) or [])
    with engine.connect() as connection:
        connection.execute(sa.select(orgs)).all()
    watched.look(DatabaseObservations())
    assert reads == []
    do(engine, orgs.insert().values(id=2))
    watched.look(DatabaseObservations())
    assert reads == [1]


def test_of_a_large_table_only_what_comes_after_is_read(engine, watched):
    do(engine, orgs.insert().values([{"id": n} for n in range(10, 20)]))
    assert seen(watched) == {"orgs": (10, 0, 0)}
    do(engine, orgs.insert().values(id=20), orgs.delete().where(orgs.c.id == 10))
    assert seen(watched) == {"orgs": (1, 0, 0)}
    do(engine, orgs.update().where(orgs.c.id == 20).values(name="changed"))
    assert seen(watched) == {"orgs": (0, 0, 1)}
    do(engine, orgs.delete().where(orgs.c.id == 20))
    assert seen(watched) == {"orgs": (0, 1, 0)}
    (table,) = (name for name in watched._tables if name.name == "orgs")
    assert watched.sees(table, (20,))
    assert not watched.sees(table, (10,))


def test_a_large_table_without_a_number_is_said(engine, watched):
    do(engine, notes.insert().values([{"id": uuid.uuid4()} for _ in range(10)]))
    seen(watched)
    (said,) = watched.said
    assert "notes has more than" in said
    do(engine, notes.delete(), orgs.insert().values(id=2))
    assert seen(watched) == {"orgs": (1, 0, 0)}


def test_tables_that_come_and_go_are_followed(engine, watched):
    metadata.drop_all(engine, tables=[orgs])
    (gone,) = watched.look(DatabaseObservations())
    assert (gone.table.name, gone.dropped, len(gone.gone)) == ("orgs", True, 1)
    metadata.create_all(engine)
    do(engine, orgs.insert().values(id=1))
    assert seen(watched) == {"orgs": (1, 0, 0)}
    assert watched.said == []


def test_the_ledger_is_nobodys_table(engine, watched):
    Ledger(engine).install()
    assert seen(watched) == {}


def test_a_table_that_is_locked_is_said_and_not_waited_for(database, watched):
    """On SQLite the whole file is; the look is made up for once the lock is gone."""
    locking = database.engine()
    lock = {
        "sqlite": "BEGIN EXCLUSIVE",
        "postgresql": "LOCK TABLE orgs IN ACCESS EXCLUSIVE MODE",
        "mysql": "LOCK TABLES orgs WRITE",
    }[database.backend]
    do(locking, orgs.insert().values(id=2))
    with locking.connect() as connection:
        connection.exec_driver_sql(lock)
        assert seen(watched) == {}
        connection.rollback()
        if database.backend == "mysql":
            connection.exec_driver_sql("UNLOCK TABLES")
    assert "could not be looked at" in watched.said[0]
    assert seen(watched) == {"orgs": (1, 0, 0)}


def test_a_database_can_be_dropped_once_the_connection_is_released(engine, watched):
    do(engine, orgs.insert().values(id=2))
    assert seen(watched) == {"orgs": (1, 0, 0)}
    watched.release()
    do(engine, orgs.insert().values(id=3))
    assert seen(watched) == {"orgs": (1, 0, 0)}


@on("postgresql+psycopg", "mysql+pymysql")
def test_a_table_that_the_role_may_not_read_is_said_and_the_others_are_tables(
    database, engine, thread
):
    """SQLite has no roles."""
    metadata.create_all(engine)
    role = f"audit_{uuid.uuid4().hex[:12]}"
    quoted = {"postgresql": role, "mysql": f"{role}@'%%'"}[database.backend]
    make = {
        "postgresql": f"CREATE ROLE {quoted} LOGIN PASSWORD 'secret'",
        "mysql": f"CREATE USER {quoted} IDENTIFIED BY 'secret'",
    }[database.backend]
    limited = sa.create_engine(database.url.set(username=role, password="secret"))
    said = []
    with engine.begin() as connection:
        connection.exec_driver_sql(make)
        connection.exec_driver_sql(f"GRANT SELECT, INSERT ON orgs TO {quoted}")
        connection.exec_driver_sql(f"GRANT INSERT ON notes TO {quoted}")
    try:
        watch = DatabaseWatch(limited, "here", AuditConnection(limited, thread), said.append)
        watch.look(DatabaseObservations())
        do(engine, orgs.insert().values(id=1), notes.insert().values(id=uuid.uuid4()))
        assert seen(watch) == {"orgs": (1, 0, 0)}
        assert any("notes: this role may not read it" in each for each in said)
        watch.release()
    finally:
        limited.dispose()
        with engine.begin() as connection:
            if database.backend == "postgresql":
                connection.exec_driver_sql(f"DROP OWNED BY {quoted}")
            connection.exec_driver_sql(f"DROP {'USER' if '@' in quoted else 'ROLE'} {quoted}")


@on("sqlite")
def test_a_file_that_is_made_anew_is_another_database(database, thread, tmp_path):
    file = tmp_path / "anew.db"
    made = sa.create_engine(f"sqlite:///{file}")
    metadata.create_all(made)
    do(made, orgs.insert().values(id=1))
    watch = DatabaseWatch(made, "here", AuditConnection(made, thread), pytest.fail)
    watch.look(DatabaseObservations())
    made.dispose()
    file.rename(tmp_path / "kept.db")  # its inode must not be given again
    (gone,) = watch.look(DatabaseObservations())
    assert (gone.dropped, watch.gone) == (True, True)
    assert not file.exists()
    metadata.create_all(made)
    do(made, orgs.insert().values(id=1))
    assert seen(watch, DatabaseObservations()) == {"orgs": (1, 0, 0)}
    watch.release()
    made.dispose()


@pytest.mark.parametrize(
    ("database", "driver"),
    list(zip(DEFAULT, ONE_EACH, strict=True)),
    indirect=["database"],
)
def test_an_asynchronous_engine_is_tables_in_a_loop_of_its_own(database, driver, thread):
    """Also where the suite's own loop runs, as it does when its engine first connects."""
    engine = database.engine()
    metadata.create_all(engine)
    made = create_async_engine(database.url.set(drivername=driver))
    watch = DatabaseWatch(
        made.sync_engine, "here", AuditConnection(made.sync_engine, thread), pytest.fail
    )

    async def first_look():
        return watch.look(DatabaseObservations())

    assert asyncio.run(first_look()) == []
    do(engine, orgs.insert().values(id=1))
    assert seen(watch) == {"orgs": (1, 0, 0)}
    watch.release()
