"""The ledger's table, and what is entered into it: what was committed, in the same transaction."""

from __future__ import annotations

import gc
import json
import random
import secrets
import sys
import warnings
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness import forks
from harness.blocks import insert
from harness.bystanders import snapshot
from harness.keykinds import KINDS
from harness.ledgers import (
    Worker,
    counted,
    dead_worker,
    entries,
    family,
    ids,
    kinds,
    numbered,
    orphans,
    sweep,
)
from harness.servers import end_elsewhere, prepares
from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    Ledger,
    LedgerError,
    ResourceTracker,
    UntrackedRowsWarning,
    external_handler,
)
from tidyrows.sweep import recovery

pytestmark = pytest.mark.slow

POSTGRESQL, SQLITE, MYSQL = "postgresql+psycopg", "sqlite", "mysql+pymysql"


# --- the table


def test_installing_twice_changes_nothing(engine, ledgers):
    ledgers.installed(engine)
    before = snapshot(engine)
    Ledger(engine).install()
    assert snapshot(engine) == before


def test_ledgers_of_other_names_and_schemas_know_nothing_of_each_other(database, engine, ledgers):
    other = database.extra_schema()
    parents, _children = family(engine)
    for place in ({}, {"name": "my_ledger"}, {"schema": other}):
        ledger = ledgers.installed(engine, **place)
        with CleanupManager(ResourceTracker(engine, ledger=ledger)):
            insert(engine, (parents, numbered([1])))
            assert len(entries(engine, **place)) == 1
        assert not entries(engine, **place)
    tracker = ResourceTracker(engine, ledger=Ledger(engine, name="my_ledger")).start()
    insert(engine, (parents, numbered([1])))
    tracker.stop()
    ledgers.close()
    assert not orphans(engine)
    assert sweep(engine, ledger="my_ledger").total_deleted == 1


_INSTALL = """
import multiprocessing, sys
import sqlalchemy as sa
from tidyrows import Ledger

def install(together, url):
    together.wait(60)
    Ledger(sa.create_engine(url)).install()

fork = multiprocessing.get_context("fork")
together = fork.Barrier(8)
started = [fork.Process(target=install, args=(together, sys.argv[1])) for _ in range(8)]
for process in started:
    process.start()
for process in started:
    process.join(60)
print([process.exitcode for process in started])
"""


def test_eight_processes_install_at_once(database, engine):
    url = database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", "-c", _INSTALL, url]
    done = forks.run(command)
    assert done.stdout.strip() == str([0] * 8), done.stderr
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT seq FROM tidyrows_ledger").scalars().all()
    assert sorted(rows) == [0, 1]


@on(POSTGRESQL)  # whose roles are easily made
def test_who_may_not_make_the_table_is_told_what_to_have_run(database, engine, ledgers):
    with engine.begin() as connection:
        for statement in (
            "DROP ROLE IF EXISTS ledger_guest",
            "CREATE ROLE ledger_guest",
            "GRANT USAGE ON SCHEMA public TO ledger_guest",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        ):
            connection.exec_driver_sql(statement)
    guest = database.engine(connect_args={"options": "-crole=ledger_guest"})
    try:
        with pytest.raises(LedgerError, match="cannot make the ledger") as caught:
            Ledger(guest).install()
        ddl = str(caught.value).partition("\n")[2]
        assert ddl == Ledger(guest).ddl()
        with engine.begin() as connection:
            for statement in ddl.split(";"):
                if statement.strip():
                    connection.exec_driver_sql(statement)
            connection.exec_driver_sql(
                "GRANT SELECT, INSERT, UPDATE, DELETE ON tidyrows_ledger TO ledger_guest"
            )
        ledgers.installed(guest)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE things (id int PRIMARY KEY)")
            connection.exec_driver_sql("GRANT ALL ON things TO ledger_guest")
        things = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
        with CleanupManager(ResourceTracker(guest, ledger=Ledger(guest))) as manager:
            insert(guest, (things, numbered([1])))
        assert manager.report.total_deleted == 1
    finally:
        ledgers.close()
        guest.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY ledger_guest")
            connection.exec_driver_sql("DROP ROLE ledger_guest")


@pytest.fixture
def clerk(database):
    """An engine of a role with no rights, and what gives it some on a table."""
    owner = database.engine()
    role = f"clerk_{secrets.token_hex(4)}"
    with owner.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'clerk'")
    engine = sa.create_engine(database.url.set(username=role, password="clerk"))

    def grant(rights, table):
        with owner.begin() as connection:
            connection.exec_driver_sql(f"GRANT {rights} ON {table} TO {role}")

    yield engine, grant
    engine.dispose()
    with owner.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


@on(POSTGRESQL)  # whose roles are easily made
@pytest.mark.parametrize(
    ("rights", "refused"),
    [
        ("REFERENCES", {"install", "orphans", "start", "sweep"}),
        ("INSERT", {"install", "orphans", "start", "sweep"}),
        ("SELECT", {"start", "sweep"}),
        ("SELECT, INSERT", {"integer", "cleanup", "sweep"}),
        ("SELECT, INSERT, UPDATE", {"cleanup", "sweep"}),
        ("SELECT, INSERT, UPDATE, DELETE", set()),
    ],
)
def test_a_role_that_lacks_a_right_on_the_table_is_told_which_it_needs(
    engine, ledgers, clerk, rights, refused
):
    ledgers.installed(engine)
    parents, _children = family(engine)
    guest, grant = clerk
    grant(rights, "tidyrows_ledger")
    grant("ALL", "parents, children")
    ledger = Ledger(guest)
    tracker = ResourceTracker(guest, ledger=ledger)
    told = {}

    def attempt(name, deed):
        try:
            deed()
        except LedgerError as error:
            told[name] = str(error)
            assert "GRANT SELECT, INSERT, UPDATE, DELETE ON public.tidyrows_ledger" in told[name]
        except CleanupError as error:
            told[name] = str(error)
            assert "permission denied for table tidyrows_ledger" in told[name]

    attempt("install", ledger.install)
    attempt("start", tracker.start)
    if tracker.active:
        insert(guest, (parents, numbered([1])))
        attempt("integer", tracker.integer)
        tracker.stop()
        attempt("cleanup", CleanupManager(tracker).cleanup)
        ledger.close()
        tracker.dismiss_leak_warning()
    attempt("orphans", lambda: orphans(guest))
    attempt("sweep", lambda: sweep(guest))
    assert set(told) == refused


@pytest.mark.parametrize("version", ["0", "2"])
def test_a_ledger_of_another_version_is_left_alone(engine, ledgers, version):
    ledgers.installed(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE tidyrows_ledger SET body = '{version}' WHERE kind = 'version'"
        )
    before = snapshot(engine)
    for refused in (
        Ledger(engine).install,
        ResourceTracker(engine, ledger=Ledger(engine)).start,
        lambda: sweep(engine),
        lambda: orphans(engine),
    ):
        with pytest.raises(LedgerError, match=f"has version {version}"):
            refused()
    assert snapshot(engine) == before


def test_a_tracker_without_its_table_does_not_start(engine):
    with pytest.raises(LedgerError, match=r"install\(\)"):
        ResourceTracker(engine, ledger=Ledger(engine)).start()


def test_what_is_no_ledger_is_refused(engine):
    for url in ("sqlite://", engine.url):
        with pytest.raises(LedgerError, match=r"Write Ledger\(create_engine\(url\)\)\."):
            Ledger(url)
    with pytest.raises(LedgerError, match=r"Write Ledger\(engine\)\."):
        Ledger(None)
    with pytest.raises(LedgerError):
        ResourceTracker(engine, ledger=["here"])


# --- in the transaction of the rows


def test_what_is_committed_is_entered_and_nothing_before(worker, outside):
    parents, _children = family(outside)
    with worker:
        with worker.engine.connect() as connection:
            connection.execute(sa.insert(parents), numbered([1, 2, 3]))
            assert not entries(outside)
            connection.commit()
        (entry,) = entries(outside)
    assert entry["kind"] == "rows"
    assert json.loads(entry["body"])["ranges"] == [1, 3]
    assert (entry["run"], entry["worker"], entry["table_name"]) == ("run-1", "gw0", "parents")
    worker.dies()
    assert sweep(outside).total_deleted == 3


@pytest.mark.parametrize("end", ["rollback", "close", "savepoint"])
def test_what_is_rolled_back_is_not_entered(worker, outside, end):
    parents, _children = family(outside)
    with worker:
        with worker.engine.connect() as connection:
            if end == "savepoint":
                with connection.begin(), connection.begin_nested() as savepoint:
                    connection.execute(sa.insert(parents), numbered([1]))
                    savepoint.rollback()
            else:
                connection.execute(sa.insert(parents), numbered([1]))
                getattr(connection, end)()
        assert not entries(outside)
        assert len(worker.tracker) == 0


def test_a_released_savepoint_in_one_that_is_rolled_back_is_not_entered(worker, outside):
    parents, _children = family(outside)
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
            with connection.begin_nested() as outer:
                with connection.begin_nested():
                    connection.execute(sa.insert(parents), numbered([2]))
                outer.rollback()
            connection.execute(sa.insert(parents), numbered([3]))
        says = [json.loads(each["body"])["ranges"] for each in entries(outside)]
        assert says == [[1, 1, 3, 3]]
        assert ids(outside, parents) == [1, 3]


def test_a_savepoint_that_a_string_released_in_one_that_is_rolled_back_is_not_entered(
    worker, outside
):
    parents, _children = family(outside)
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
            connection.exec_driver_sql("SAVEPOINT a")
            connection.exec_driver_sql("SAVEPOINT b")
            connection.execute(sa.insert(parents), numbered([2]))
            connection.exec_driver_sql("RELEASE SAVEPOINT b")
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT a")
        assert ids(outside, parents) == [1]
        assert [json.loads(each["body"])["ranges"] for each in entries(outside)] == [[1, 1]]
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1


def test_one_transaction_sends_one_insert_whatever_it_did(worker, outside):
    parents, children = family(outside)
    with worker, counted(worker.engine, "INSERT INTO tidyrows_ledger") as plain:
        with counted(worker.engine, "tidyrows_ledger") as sent:
            with worker.engine.begin() as connection:
                for number in range(5):
                    connection.execute(sa.insert(parents), numbered([number]))
                    connection.execute(sa.insert(children), numbered([number]))
                connection.execute(sa.delete(parents).where(parents.c.id == 3))
            assert sent() == 1
            with worker.engine.begin() as connection:
                connection.execute(sa.select(parents)).all()
            with worker.engine.begin() as connection:
                connection.execute(sa.update(parents).values(name="x"))
            assert sent() <= 2
    assert plain() <= sent()
    worker.dies()
    assert sweep(outside).total_deleted == 9


def test_savepoints_send_no_more_inserts(worker, outside):
    parents, _children = family(outside)
    with worker, counted(worker.engine, "tidyrows_ledger") as sent:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([99]))  # or SQLite commits at RELEASE
            for number in range(5):
                with connection.begin_nested():
                    connection.execute(sa.insert(parents), numbered([number]))
    assert sent() == 1


def test_a_raw_commit_is_entered(worker, outside):
    parents, _children = family(outside)
    with worker, worker.engine.connect() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
        connection.exec_driver_sql("COMMIT")
        assert len(entries(outside)) == 1
    worker.dies()
    assert sweep(outside).total_deleted == 1


def test_autocommit_is_entered_with_each_statement(worker, outside):
    parents, _children = family(outside)
    engine = worker.engine.execution_options(isolation_level="AUTOCOMMIT")
    with worker, engine.connect() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
        assert len(entries(outside)) == 1
        connection.execute(sa.insert(parents), numbered([2]))
        connection.execute(sa.delete(parents).where(parents.c.id == 1))
    assert [row.key for row in worker.tracker.rows()] == [(2,)]
    worker.dies()
    insert(outside, (parents, numbered([1], name="stranger")))
    assert sweep(outside, trust_keys=True).total_deleted == 1
    assert ids(outside, parents) == [1]


@on(MYSQL)  # where DDL commits what came before it
@pytest.mark.parametrize("form", ["string", "object"])
def test_what_ddl_commits_is_entered(worker, outside, form):
    parents, _children = family(outside)
    extra = sa.Table("extra", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with worker, worker.engine.connect() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
        if form == "string":
            connection.exec_driver_sql("CREATE TABLE extra (id INTEGER)")
        else:
            extra.create(connection)
        assert ids(outside, parents) == [1]
        assert len(entries(outside)) == 1
        connection.rollback()
    worker.dies()
    assert sweep(outside).total_deleted == 1


@on(MYSQL)
def test_what_a_begin_commits_is_entered(worker, outside):
    parents, _children = family(outside)
    with worker, worker.engine.connect() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
        connection.exec_driver_sql("START TRANSACTION")
        assert len(entries(outside)) == 1
        connection.rollback()


@on(SQLITE)  # where releasing the outermost savepoint commits
def test_the_release_of_an_outermost_savepoint_is_entered(worker, outside):
    parents, _children = family(outside)
    with worker, worker.engine.connect() as connection:
        connection.exec_driver_sql("SAVEPOINT mine")
        connection.execute(sa.insert(parents), numbered([1]))
        connection.exec_driver_sql("RELEASE mine")
        assert ids(outside, parents) == [1]
        assert len(entries(outside)) == 1
    worker.dies()
    assert sweep(outside).total_deleted == 1


@on(SQLITE)
def test_what_the_release_of_sqlalchemys_own_savepoint_commits_is_entered(worker, outside):
    """Where no statement came before it the driver has sent no BEGIN."""
    parents, _children = family(outside)
    with worker, worker.engine.connect() as connection:
        with connection.begin_nested():
            connection.execute(sa.insert(parents), numbered([1]))
        assert len(entries(outside)) == len(ids(outside, parents)) == 1
        connection.commit()
        assert len(entries(outside)) == 1


@on(POSTGRESQL)
def test_an_aborted_transaction_is_not_entered(worker, outside):
    parents, _children = family(outside)
    with worker, worker.engine.connect() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("SELECT 1/0")
        connection.commit()
    assert not entries(outside)
    assert len(worker.tracker) == 0


@on(POSTGRESQL, MYSQL)
@pytest.mark.parametrize("end", ["commit", "rollback", "elsewhere"])
def test_a_prepared_transaction_is_entered_when_it_commits(worker, outside, end):
    if not prepares(outside):
        pytest.skip("this server prepares no transactions")
    parents, _children = family(outside)
    xid = f"ledger_{end}_{secrets.token_hex(8)}"
    with worker, worker.engine.connect() as connection:
        transaction = connection.begin_twophase(xid)
        connection.execute(sa.insert(parents), numbered([1]))
        transaction.prepare()
        assert not entries(outside)
        if end == "elsewhere":
            connection.invalidate()
            end_elsewhere(outside, "COMMIT", xid)
        else:
            getattr(transaction, end)()
    assert len(entries(outside)) == (end != "rollback")
    worker.dies()
    assert sweep(outside).total_deleted == (end != "rollback")


@on(POSTGRESQL, MYSQL)
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_what_was_prepared_before_a_kill_is_swept_once_it_is_committed(worker, outside, end):
    if not prepares(outside):
        pytest.skip("this server prepares no transactions")
    parents, _children = family(outside)
    xid = f"ledger_{secrets.token_hex(8)}"
    with worker, worker.engine.connect() as connection:
        transaction = connection.begin_twophase(xid)
        connection.execute(sa.insert(parents), numbered([1]))
        transaction.prepare()
        connection.invalidate()
    worker.dies()
    try:
        report = sweep(outside)
        assert report.total_deleted == 0
        assert xid in report.prepared
        assert f"transaction {xid!r}; end it, then sweep again" in str(report)
    finally:
        end_elsewhere(outside, end, xid)
    assert ids(outside, parents) == [1] * (end == "COMMIT")
    swept = sweep(outside)
    assert swept.total_deleted == (end == "COMMIT")
    assert xid not in swept.prepared
    assert not ids(outside, parents)
    assert not entries(outside)


@on(POSTGRESQL, MYSQL)
def test_a_prepared_row_that_a_cleanup_left_is_deleted_by_the_next_one(worker, outside):
    if not prepares(outside):
        pytest.skip("this server prepares no transactions")
    parents, _children = family(outside)
    xid = f"ledger_{secrets.token_hex(8)}"
    manager = CleanupManager(worker.tracker)
    try:
        with pytest.raises(CleanupError, match=xid), manager:
            with worker.engine.connect() as connection:
                transaction = connection.begin_twophase(xid)
                connection.execute(sa.insert(parents), numbered([1]))
                transaction.prepare()
                connection.invalidate()
            insert(worker.engine, (parents, numbered([2])))
        assert manager.report.total_deleted == 1
    finally:
        end_elsewhere(outside, "COMMIT", xid)
    assert (ids(outside, parents), len(entries(outside))) == ([1], 1)
    assert manager.cleanup().total_deleted == 1
    assert not ids(outside, parents)
    assert not entries(outside)


@on(SQLITE)
@pytest.mark.parametrize("emptied", [True, False])
def test_a_row_that_a_dead_worker_was_told_of_is_compared(worker, outside, emptied):
    """Another suite may have emptied the table since: on SQLite its numbers begin anew."""
    named = sa.Table(
        "named",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("text", sa.String(20)),
    )
    named.create(outside)
    insert(outside, (named, [{"id": 1, "text": "ours"}]))
    with worker:
        worker.tracker.track_rows(named, [1])
    worker.dies()
    if emptied:
        with outside.begin() as connection:
            connection.execute(sa.delete(named))
        insert(outside, (named, [{"text": "theirs"}]))
        with pytest.raises(CleanupError, match="text differs"):
            sweep(outside)
    else:
        assert sweep(outside).total_deleted == 1
    assert ids(outside, named) == [1] * emptied


@on(SQLITE)  # where a COMMIT may fail and leave its transaction open
def test_a_commit_that_failed_and_is_sent_again_is_entered_once(worker, outside):
    parents, _children = family(outside)
    with worker, outside.connect() as reader, worker.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 50")
        connection.execute(sa.insert(parents), numbered([1]))
        reader.exec_driver_sql("BEGIN")
        reader.execute(sa.select(parents)).all()
        with pytest.raises(sa.exc.OperationalError):
            connection.exec_driver_sql("COMMIT")
        reader.rollback()
        connection.exec_driver_sql("COMMIT")
    assert kinds(outside) == ["rows"]
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


@on(POSTGRESQL)  # the MySQL family has no roles of this kind, SQLite none at all
def test_a_role_without_the_right_is_told_what_to_grant_and_nothing_is_committed(worker, outside):
    parents, _children = family(outside)
    with outside.begin() as connection:
        connection.exec_driver_sql("DROP ROLE IF EXISTS ledger_stranger")
        connection.exec_driver_sql("CREATE ROLE ledger_stranger")
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO ledger_stranger")
        connection.exec_driver_sql("GRANT ALL ON parents TO ledger_stranger")
    try:
        with worker, worker.engine.connect() as connection:
            connection.exec_driver_sql("SET ROLE ledger_stranger")
            connection.execute(sa.insert(parents), numbered([1]))
            with pytest.raises(sa.exc.ProgrammingError) as caught:
                connection.commit()
            assert "INSERT on that table" in "".join(caught.value.__notes__)
            connection.rollback()
            connection.invalidate()
        assert not ids(outside, parents)
        assert len(worker.tracker) == 0
    finally:
        with outside.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY ledger_stranger")
            connection.exec_driver_sql("DROP ROLE ledger_stranger")


@on(POSTGRESQL)
def test_a_row_that_autocommit_made_is_held_though_it_could_not_be_entered(worker, outside):
    parents, _children = family(outside)
    with outside.begin() as connection:
        connection.exec_driver_sql("DROP ROLE IF EXISTS ledger_auto")
        connection.exec_driver_sql("CREATE ROLE ledger_auto")
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO ledger_auto")
        connection.exec_driver_sql("GRANT ALL ON parents TO ledger_auto")
    try:
        engine = worker.engine.execution_options(isolation_level="AUTOCOMMIT")
        with CleanupManager(worker.tracker):
            with engine.connect() as connection:
                connection.exec_driver_sql("SET ROLE ledger_auto")
                with pytest.raises(sa.exc.ProgrammingError):
                    connection.execute(sa.insert(parents), numbered([1]))
                connection.invalidate()
        assert not ids(outside, parents)
    finally:
        with outside.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY ledger_auto")
            connection.exec_driver_sql("DROP ROLE ledger_auto")


# --- where the rows really are


def test_rows_of_another_schema_are_found_there(database, outside, ledgers):
    other = database.extra_schema()
    worker = Worker(database, ledgers)
    parents, _children = family(outside)
    moved = outside.execution_options(schema_translate_map={None: other})
    parents.metadata.create_all(moved)
    insert(moved, (parents, numbered([1], name="stranger")))
    ours = worker.engine.execution_options(schema_translate_map={None: other})
    with worker:
        insert(ours, (parents, numbered([2])))
        insert(worker.engine, (parents, numbered([1])))
    assert sorted(each["schema_name"] == other for each in entries(outside)) == [False, True]
    worker.dies()
    assert sweep(outside).total_deleted == 2
    assert ids(moved, parents) == [1]
    assert not ids(outside, parents)


@on(POSTGRESQL)
def test_rows_under_a_search_path_are_found_where_they_are(database, outside, ledgers):
    other = database.extra_schema()
    worker = Worker(database, ledgers)
    parents, _children = family(outside)
    insert(outside, (parents, numbered([1], name="stranger")))
    moved = outside.execution_options(schema_translate_map={None: other})
    parents.metadata.create_all(moved)
    with worker, worker.engine.connect() as connection:
        connection.exec_driver_sql(f'SET search_path = "{other}"')
        connection.execute(sa.insert(parents), numbered([1]))
        connection.commit()
        connection.invalidate()
    worker.dies()
    assert sweep(outside, trust_keys=True).total_deleted == 1
    assert ids(outside, parents) == [1]
    assert not ids(moved, parents)


def test_several_databases_have_a_ledger_each(database, outside, ledgers, tmp_path):
    aside = sa.create_engine(f"sqlite:///{tmp_path / 'aside.db'}")
    parents, _children = family(outside)
    family(aside)
    here, there = ledgers.installed(database.engine()), ledgers.installed(aside)
    tracker = ResourceTracker(orm.sessionmaker(binds={parents: here.engine}), ledger=[here, there])
    session = orm.Session(aside)
    try:
        with CleanupManager(tracker) as manager:
            tracker.sessions.watch(session)
            session.execute(sa.insert(parents).values(id=2))
            session.commit()
            tracker.session.execute(sa.insert(parents).values(id=1))
            tracker.session.commit()
            assert len(entries(aside)) == len(entries(outside)) == 1
            tracker.engines.resolve()  # both COMMITs are over; the next one concerns one ledger
            tracker.session.execute(sa.insert(parents).values(id=3))
            tracker.session.commit()
            assert [json.loads(each["body"])["ranges"] for each in entries(outside)] == [
                [1, 1],
                [3, 3],
            ]
        assert manager.report.total_deleted == 3
        assert not entries(aside)
        assert not entries(outside)
    finally:
        session.close()
        ledgers.close()
        aside.dispose()


def test_a_database_without_its_ledger_is_said(database, outside, ledgers, tmp_path):
    aside = sa.create_engine(f"sqlite:///{tmp_path / 'aside.db'}")
    parents, _children = family(outside)
    family(aside)
    tracker = ResourceTracker(
        orm.sessionmaker(outside), ledger=ledgers.installed(database.engine())
    )
    try:
        with CleanupManager(tracker), orm.Session(aside) as session:
            tracker.sessions.watch(session)
            session.execute(sa.insert(parents).values(id=2))
            with pytest.warns(UntrackedRowsWarning, match="no ledger"):
                session.commit()
            assert ids(aside, parents) == [2]
        assert not ids(aside, parents)
        other = ResourceTracker(aside, ledger=ledgers.installed(outside))
        with pytest.raises(LedgerError, match="share transactions"):
            other.start()
    finally:
        aside.dispose()


def test_a_tracker_and_its_ledger_may_have_engines_of_different_drivers(database, outside, ledgers):
    """The lock may go through one driver and the rows through another one of the same database."""
    drivers = {"postgresql": "postgresql+psycopg2", "mysql": "mysql+mysqldb", "sqlite": "sqlite"}
    parents, _children = family(outside)
    other = sa.create_engine(database.url.set(drivername=drivers[database.backend]))
    try:
        with CleanupManager(ResourceTracker(other, ledger=ledgers.installed(outside))) as manager:
            insert(other, (parents, numbered([1])))
            assert len(entries(outside)) == 1
        assert manager.report.total_deleted == 1
    finally:
        other.dispose()


@on(POSTGRESQL)  # one driver counts its parameters, the other names them
def test_an_asynchronous_driver_writes_through_a_synchronous_ledger(database, outside, ledgers):
    import asyncio  # noqa: PLC0415 -- of this test only

    from harness.asynchronous import engine_on  # noqa: PLC0415 -- as above

    parents, _children = family(outside)
    ledger = ledgers.installed(outside)

    async def main():
        async with engine_on(database, "postgresql+asyncpg") as engine:
            async with CleanupManager(ResourceTracker(engine, ledger=ledger)) as manager:
                async with engine.begin() as connection:
                    await connection.execute(sa.insert(parents), numbered([1]))
                assert len(entries(outside)) == 1
            return manager.report.total_deleted

    assert asyncio.run(main()) == 1


# --- keys and tables of every kind


def test_a_table_of_one_column_and_no_key_can_be_written(worker, outside):
    notes = sa.Table("notes", sa.MetaData(), sa.Column("a", sa.Integer))
    notes.metadata.create_all(outside)
    insert(outside, (notes, [{"a": 1}]))
    worker.writes((notes, [{"a": 1}, {"a": 2}])).dies()
    assert sweep(outside).total_deleted == 2
    with outside.connect() as connection:
        assert connection.execute(sa.select(notes.c.a)).scalars().all() == [1]


def test_a_key_that_only_sql_can_make_hinders_no_commit(worker, outside):
    """Nobody can write it down, so a kill would leave the row: said, not refused."""
    type_, value = KINDS["bind expression"]
    things = sa.Table("things", sa.MetaData(), sa.Column("id", type_, primary_key=True))
    things.metadata.create_all(outside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrackedRowsWarning)
        with CleanupManager(worker.tracker) as manager:
            insert(worker.engine, (things, [{"id": value(1)}]))
    assert manager.report.total_deleted == 1


@on(MYSQL)  # which takes no statement of more than its packet, often 16 MiB
def test_a_transaction_of_very_many_keys_can_be_committed(worker, outside):
    with outside.connect() as connection:
        most = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar()
    if most > 20_000_000:
        pytest.skip("this server takes larger packets")
    table = sa.Table("things", sa.MetaData(), sa.Column("id", sa.String(250), primary_key=True))
    table.metadata.create_all(outside)
    count = most // 250
    with worker:
        insert(worker.engine, (table, [{"id": "first"}]))
        worker.tracker.engines.resolve()
        keyed = next(iter(worker.tracker.store.snapshot())).table
        worker.tracker._hold(keyed, [f"{n:0250d}" for n in range(count)])
    said = sum(len(json.loads(each["body"])["keys"]) for each in entries(outside))
    assert said == count + 1
    worker.tracker.dismiss_leak_warning()


# --- what is played again is what is held


def held_of(store):
    """What a store holds, in words."""
    return {
        held.table.name.name: (
            sorted(map(repr, held.keys.in_order())),
            sorted(map(repr, held.named.in_order())),
            sorted((repr(key), made) for key, made in held.in_doubt.items()),
            sorted(map(repr, held.keyless_rows)),
            held.keyless_unknown,
            held.keyless_in_doubt,
        )
        for held in store.snapshot()
        if held
    }


def played(tracker, ledger):
    """A store of the entries of a tracker."""
    book = tracker.journals.of(ledger.database)
    with tracker.bound_engine.connect() as connection:
        return recovery.read_entries(ledger, connection, book.process.id)[book.scope].store


STEPS = (
    "insert", "insert", "many", "update", "delete", "rename", "swap", "savepoint", "undone",
    "rollback", "commit", "whole", "whole gone", "told", "composite", "composite gone", "text",
    "text gone",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_whoever_plays_the_entries_holds_what_the_tracker_holds(  # noqa: C901 -- a step for each thing that can happen
    worker, outside, seed
):
    draw = random.Random(seed)
    parents, _children = family(outside)
    notes = sa.Table("notes", metadata := sa.MetaData(), sa.Column("a", sa.Integer),
                     sa.Column("b", sa.String(9)))  # fmt: skip
    pairs = sa.Table(
        "pairs",
        metadata,
        sa.Column("a", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("b", sa.String(9), primary_key=True),
    )
    texts = sa.Table("texts", metadata, sa.Column("id", sa.String(9), primary_key=True))
    metadata.create_all(outside)
    insert(outside, (parents, numbered(range(500, 520))))
    number = iter(range(1000))
    told = iter(range(500, 520))
    done = []

    def step(connection, what):  # noqa: C901, PLR0912 -- as above
        done.append(what)
        some = connection.execute(
            sa.select(parents.c.id).where(parents.c.id < 500).order_by(parents.c.id)
        ).scalars().all()  # fmt: skip  # the statement, then what is read from it
        one = draw.choice(some) if some else None
        match what:
            case "insert":
                connection.execute(sa.insert(parents), numbered([next(number)]))
            case "many":
                rows = numbered([next(number) for _ in range(3)])
                connection.execute(sa.insert(parents), rows[::-1] if draw.random() < 0.5 else rows)
            case "update":
                connection.execute(sa.update(parents).where(parents.c.id == one).values(name="new"))
            case "delete":
                connection.execute(sa.delete(parents).where(parents.c.id == one))
                if one is not None and draw.random() < 0.5:
                    connection.execute(sa.insert(parents), numbered([one]))
            case "rename" if one is not None:
                new = next(number)
                connection.execute(sa.update(parents).where(parents.c.id == one).values(id=new))
            case "swap" if one is not None:
                connection.execute(sa.delete(parents).where(parents.c.id.in_(some[:2])))
            case "savepoint":
                with connection.begin_nested():
                    step(connection, "insert")
                    step(connection, "delete")
            case "undone":
                with connection.begin_nested() as savepoint:
                    step(connection, "insert")
                    step(connection, "delete")
                    savepoint.rollback()
            case "whole":
                connection.execute(sa.insert(notes), [{"a": draw.randrange(2), "b": "x"}] * 2)
            case "whole gone":
                connection.execute(sa.delete(notes).where(notes.c.a == draw.randrange(2)))
            case "composite":
                connection.execute(sa.insert(pairs), [{"a": next(number), "b": "x"}])
            case "composite gone":
                connection.execute(sa.delete(pairs).where(pairs.c.a < draw.randrange(100)))
            case "text":
                connection.execute(sa.insert(texts), [{"id": f"t{next(number)}"}])
            case "text gone":
                connection.execute(sa.delete(texts).where(texts.c.id > "t5"))
            case _:
                pass

    with worker:
        for _transaction in range(8):
            with worker.engine.connect() as connection:
                for _step in range(draw.randrange(1, 5)):
                    what = draw.choice(STEPS)
                    if what == "rollback":
                        done.append(what)
                        connection.rollback()
                    elif what == "commit":
                        done.append(what)
                        connection.commit()
                    elif what == "told":
                        done.append(what)
                        worker.tracker.track_rows(parents, [next(told)])
                    else:
                        step(connection, what)
                connection.commit()
    tracker = worker.tracker
    tracker.engines.resolve()
    heir = played(tracker, worker.ledger)
    assert held_of(heir) == held_of(tracker.store), done
    assert CleanupManager(tracker).cleanup() is not None
    assert not entries(outside)


# --- external resources, and the life of a ledger


def test_a_resource_is_entered_before_it_is_made_and_its_entry_goes_with_it(worker, outside):
    family(outside)
    removed: list[Any] = []
    external_handler("ledger-thing", replace=True)(removed.append)
    with CleanupManager(worker.tracker):
        worker.tracker.track_external("ledger-thing", {"id": 1})
        assert kinds(outside) == ["external"]
    assert removed == [{"id": 1}]
    assert not entries(outside)


def test_a_resource_can_be_tracked_in_an_open_transaction(worker, outside):
    """But where that very transaction is the one writer: it says so."""
    parents, _children = family(outside)
    removed: list[Any] = []
    external_handler("ledger-open", replace=True)(removed.append)
    with CleanupManager(worker.tracker):
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
            if worker.engine.dialect.name == "sqlite":
                with pytest.raises(LedgerError, match="Commit, then call"):
                    worker.tracker.track_external("ledger-open", {"id": 1})
            else:
                worker.tracker.track_external("ledger-open", {"id": 1})
    if worker.engine.dialect.name != "sqlite":
        assert removed == [{"id": 1}]
    assert not entries(outside)


def test_a_tracker_that_starts_after_its_ledger_was_closed_lives(worker, outside):
    parents, _children = family(outside)
    worker.writes((parents, numbered([1])))
    worker.ledger.close()
    with CleanupManager(worker.tracker):
        insert(worker.engine, (parents, numbered([2])))
        assert not [each for each in orphans(outside) if each.rows and 2 in ids(outside, parents)
                    and sum(each.rows.values()) > 1]  # fmt: skip
        sweep(outside)
        assert 2 in ids(outside, parents)


def test_a_new_tracker_after_its_ledger_was_closed_lives(worker, outside):
    parents, _children = family(outside)
    with CleanupManager(worker.tracker):
        insert(worker.engine, (parents, numbered([1])))
    worker.ledger.close()
    with CleanupManager(ResourceTracker(worker.engine, ledger=worker.ledger)) as manager:
        insert(worker.engine, (parents, numbered([2])))
        assert sweep(outside).total_deleted == 0
    assert manager.report.total_deleted == 1


def test_an_engine_that_is_gone_lets_go_of_its_lock(database, outside, ledgers):
    parents, _children = family(outside)
    ledgers.installed(outside)
    engine = sa.create_engine(database.url)
    ledger = Ledger(engine, beat=0.05)
    tracker = ResourceTracker(engine, ledger=ledger).start()
    insert(engine, (parents, numbered([1])))
    tracker.stop()
    tracker.dismiss_leak_warning()
    owner = ledger.open()
    thread = owner._heartbeat._thread
    engine.dispose()
    del tracker, ledger, engine, owner
    for _ in range(50):  # a beat under way holds the engine, which is garbage right after it
        gc.collect()
        thread.join(0.2)
        if not thread.is_alive():
            break
    assert not thread.is_alive()
    assert sweep(outside).total_deleted == 1


def test_a_database_of_one_process_needs_no_ledger():
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    parents, _children = family(engine)
    with CleanupManager(ResourceTracker(engine, ledger=Ledger(engine))) as manager:
        insert(engine, (parents, numbered([1])))
    assert manager.report.total_deleted == 1
    with pytest.raises(LedgerError):
        sweep(engine)
    engine.dispose()


def test_the_run_of_a_row_is_in_its_entry_and_no_secret_is(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])), run="nightly", test="test_one")
    (entry,) = entries(outside)
    assert (entry["run"], entry["test"]) == ("nightly", "test_one")
    if database.url.password:
        assert database.url.password not in repr(entry)
