"""Rows that another worker has entered are never taken: whoever made a row deletes it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa

from harness.blocks import INTEGER, insert
from harness.forks import Process
from harness.ledgers import (
    Worker,
    counted,
    dead_worker,
    entries,
    family,
    ids,
    numbered,
    orphans,
    sweep,
)
from tidyrows import CleanupManager, ResourceTracker
from tidyrows import sweep as swept

pytestmark = pytest.mark.slow

FORMS = {
    "cascade": {"ondelete": "CASCADE", "nullable": False},
    "set null": {"ondelete": "SET NULL"},
    "not null": {"nullable": False},
    "nullable": {},
}
forms = pytest.mark.parametrize("form", FORMS)


def references(engine, children):
    with engine.connect() as connection:
        return sorted(map(tuple, connection.execute(sa.select(children))))


def held(report):
    return sorted(each.row.key[0] for each in report.held)


@forms
def test_our_row_is_held_by_a_live_workers_until_that_is_gone(database, outside, ledgers, form):
    parents, children = family(outside, **FORMS[form])
    mine = Worker(database, ledgers, name="gw0").writes((parents, numbered([1, 2, 3])))
    theirs = Worker(database, ledgers, name="gw1")
    theirs.writes((children, numbered([7, 8], parent_id=2)))
    manager = CleanupManager(mine.tracker)
    report = manager.cleanup()
    assert held(report) == [2]
    assert "gw1" in report.held[0].by
    assert ids(outside, parents) == [2]
    assert references(outside, children) == [(7, 2), (8, 2)]
    assert [json.loads(each["body"])["ranges"] for each in entries(outside)
            if each["table_name"] == "parents"] == [[2, 2]]  # fmt: skip
    assert CleanupManager(theirs.tracker).cleanup().total_deleted == 2
    assert manager.cleanup().total_deleted == 1
    assert not ids(outside, parents)
    assert not entries(outside)


@forms
def test_what_was_held_goes_with_a_later_sweep(database, outside, ledgers, form):
    parents, children = family(outside, **FORMS[form])
    theirs = Worker(database, ledgers, name="gw1")
    dead_worker(database, ledgers, (parents, numbered([1, 2])), name="gw0")
    theirs.writes((children, numbered([7], parent_id=2)))
    report = sweep(outside)
    assert held(report) == [2]
    assert references(outside, children) == [(7, 2)]
    CleanupManager(theirs.tracker).cleanup()
    assert sweep(outside).total_deleted == 1
    assert not ids(outside, parents)
    assert not entries(outside)


@forms
def test_rows_of_the_application_go_all_the_same(database, outside, ledgers, form):
    """Nobody has entered them: the schema decides."""
    parents, children = family(outside, **FORMS[form])
    mine = Worker(database, ledgers).writes((parents, numbered([1, 2])))
    theirs = Worker(database, ledgers, name="gw1")
    theirs.writes((parents, numbered([9])), (children, numbered([7], parent_id=9)))
    insert(outside, (children, numbered([1], parent_id=1)))
    report = CleanupManager(mine.tracker).cleanup()
    assert not report.held
    assert ids(outside, parents) == [9]
    assert (7, 9) in references(outside, children)


def test_a_row_that_the_other_has_deleted_or_renamed_is_no_claim(database, outside, ledgers):
    parents, children = family(outside, nullable=False)
    mine = Worker(database, ledgers).writes((parents, numbered([1, 2, 3])))
    theirs = Worker(database, ledgers, name="gw1")
    with theirs:
        insert(theirs.engine, (children, numbered([7, 8], parent_id=1)))
        with theirs.engine.begin() as connection:
            connection.execute(sa.delete(children).where(children.c.id == 7))
            connection.execute(sa.update(children).where(children.c.id == 8).values(id=80))
    insert(outside, (children, numbered([7, 8], parent_id=2)))
    report = CleanupManager(mine.tracker).cleanup()
    assert held(report) == [1]
    assert references(outside, children) == [(80, 1)]


def test_rows_told_by_another_worker_are_claimed(database, outside, ledgers):
    parents, children = family(outside, ondelete="CASCADE")
    mine = Worker(database, ledgers).writes((parents, numbered([1])))
    theirs = Worker(database, ledgers, name="gw1")
    insert(outside, (children, numbered([7], parent_id=1)))
    with theirs:
        theirs.tracker.track_rows(children, [7])
        assert held(CleanupManager(mine.tracker).cleanup()) == [1]
    assert references(outside, children) == [(7, 1)]


@pytest.mark.parametrize("form", ["cascade", "set null"])
def test_rows_without_a_key_of_another_worker_are_claimed_too(database, outside, ledgers, form):
    metadata = sa.MetaData()
    parents = sa.Table("parents", metadata, sa.Column("id", sa.Integer, **INTEGER))
    action = {"cascade": "CASCADE", "set null": "SET NULL"}[form]
    notes = sa.Table(
        "notes",
        metadata,
        sa.Column("parent_id", sa.ForeignKey("parents.id", ondelete=action)),
        sa.Column("text", sa.String(9)),
    )
    metadata.create_all(outside)
    mine = Worker(database, ledgers).writes((parents, numbered([1, 2])))
    theirs = Worker(database, ledgers, name="gw1")
    theirs.writes((notes, [{"parent_id": 1, "text": "theirs"}]))
    report = CleanupManager(mine.tracker).cleanup()
    with outside.connect() as connection:
        assert connection.execute(sa.select(notes)).all() == [(1, "theirs")]
    assert held(report) == [1]


def test_a_claim_names_the_key_that_the_database_has(database, outside, ledgers):
    from harness.keykinds import Doubled  # noqa: PLC0415 -- of this test only

    metadata = sa.MetaData()
    parents = sa.Table("parents", metadata, sa.Column("id", sa.Integer, **INTEGER))
    children = sa.Table(
        "children",
        metadata,
        sa.Column("id", Doubled, primary_key=True, autoincrement=False),
        sa.Column("parent_id", sa.ForeignKey("parents.id", ondelete="CASCADE")),
    )
    metadata.create_all(outside)
    mine = Worker(database, ledgers).writes((parents, numbered([1])))
    Worker(database, ledgers, name="gw1").writes((children, numbered([5, 6], parent_id=1)))
    report = CleanupManager(mine.tracker).cleanup()
    assert ids(outside, children) == [5, 6]
    assert held(report) == [1]


def test_two_workers_whose_rows_need_each_other_are_swept_in_the_end(database, outside, ledgers):
    metadata = sa.MetaData()
    nodes = sa.Table(
        "nodes",
        metadata,
        sa.Column("id", sa.Integer, **INTEGER),
        sa.Column("next_id", sa.ForeignKey("nodes.id", name="fk_nodes_next")),
    )
    metadata.create_all(outside)
    mine, theirs = (Worker(database, ledgers, name=name) for name in ("gw0", "gw1"))
    mine.writes((nodes, numbered([1])))
    theirs.writes((nodes, numbered([2], next_id=1)))
    with mine.engine.begin() as connection:
        connection.execute(sa.update(nodes).where(nodes.c.id == 1).values(next_id=2))
    assert held(CleanupManager(mine.tracker).cleanup()) == [1]
    assert held(CleanupManager(theirs.tracker).cleanup()) == [2]
    assert ids(outside, nodes) == [1, 2]
    mine.dies()
    theirs.dies()
    sweep(outside)
    assert not ids(outside, nodes)
    assert not orphans(outside)


def test_a_claim_that_is_committed_while_we_look_is_seen(database, outside, ledgers):
    """Row and entry come in one transaction, so who sees one sees the other."""
    if database.backend == "sqlite":
        pytest.skip("SQLite has one writer")
    parents, children = family(outside, ondelete="CASCADE")
    mine = Worker(database, ledgers).writes((parents, numbered([1])))
    theirs = Worker(database, ledgers, name="gw1")
    theirs.tracker.start()
    connection = theirs.engine.connect()
    connection.execute(sa.insert(children), numbered([7], parent_id=1))
    reports = []
    manager = CleanupManager(mine.tracker)
    thread = threading.Thread(target=lambda: reports.append(manager.cleanup()))
    thread.start()
    thread.join(0.7)  # it waits for the reference to its row
    assert thread.is_alive()
    connection.commit()
    connection.close()
    thread.join(30)
    theirs.tracker.stop()
    assert held(reports[0]) == [1]
    assert references(outside, children) == [(7, 1)]


# -- rows that two workers have made under one key, one after the other ----------------------------


def later(engine, ledger):
    """Wait until the database's clock, by which entries are written, has gone on."""
    with engine.connect() as connection:
        then = ledger.now(connection)
        while ledger.now(connection) <= then:
            connection.rollback()


def natural(engine):
    """Currencies, whose key is given, and shops that take them, without any other column."""
    metadata = sa.MetaData()
    currencies = sa.Table(
        "currencies",
        metadata,
        sa.Column("code", sa.String(3), primary_key=True),
        sa.Column("name", sa.String(40)),
    )
    taken = sa.Table(
        "taken",
        metadata,
        sa.Column("shop", sa.String(9), primary_key=True),
        sa.Column("code", sa.String(3), primary_key=True),
    )
    metadata.create_all(engine)
    return (
        (currencies, [{"code": "USD", "name": "US Dollar"}]),
        (taken, [{"shop": "corner", "code": "USD"}]),
    )


def empty(engine, batches):
    """The application deletes everything."""
    with engine.begin() as connection:
        for table, _rows in batches:
            connection.execute(sa.delete(table))


def count(engine, batches):
    with engine.connect() as connection:
        select = sa.select(sa.func.count())
        return [connection.scalar(select.select_from(table)) for table, _rows in batches]


@pytest.fixture
def made_again(database, outside, ledgers):
    """Rows that gw0 has made, the application has deleted, and gw1 has made again."""
    batches = natural(outside)
    first, second = (Worker(database, ledgers, name=name) for name in ("gw0", "gw1"))
    first.writes(*batches)
    empty(outside, batches)
    later(outside, first.ledger)
    second.writes(*batches)
    return first, second, batches


def test_a_row_that_another_worker_made_again_is_deleted_by_that_worker(made_again, outside):
    first, second, batches = made_again
    report = CleanupManager(first.tracker).cleanup()
    assert count(outside, batches) == [1, 1]
    assert (report.total_deleted, sum(report.already_gone.values())) == (0, 2)
    assert not report.held
    assert {each["worker"] for each in entries(outside)} == {"gw1"}
    assert CleanupManager(second.tracker).cleanup().total_deleted == 2
    assert not entries(outside)


def test_the_worker_that_made_a_row_last_deletes_it_first_too(made_again, outside):
    first, second, batches = made_again
    assert CleanupManager(second.tracker).cleanup().total_deleted == 2
    assert count(outside, batches) == [0, 0]
    assert sum(CleanupManager(first.tracker).cleanup().already_gone.values()) == 2
    assert not entries(outside)


def test_a_row_beside_one_that_is_another_workers_by_now_is_deleted(made_again, outside):
    first, second, batches = made_again
    (currencies, _rows), _taken = batches
    first.writes((currencies, [{"code": "EUR", "name": "Euro"}]))
    with counted(first.engine, "FROM tidyrows_ledger") as asked:
        assert CleanupManager(first.tracker).cleanup().total_deleted == 1
    assert asked() <= 5
    assert count(outside, batches) == [1, 1]
    assert {each["worker"] for each in entries(outside)} == {"gw1"}
    CleanupManager(second.tracker).cleanup()


def write_anew(worker):
    """Its entries, as after a cleanup that has left rows."""
    database, journal = worker.ledger.database, worker.tracker.journals.of(worker.ledger.database)
    with worker.ledger.transaction(lock_timeout=5.0) as connection:
        left = list(worker.tracker.store.changes(database))
        added = journal.replace(connection, journal.numbers(), left, worker.tracker.context)
    journal.committed = set(added)


def test_entries_that_were_written_anew_do_not_take_a_later_row(made_again, outside):
    first, second, _batches = made_again
    write_anew(first)
    assert sum(CleanupManager(first.tracker).cleanup().already_gone.values()) == 2
    assert CleanupManager(second.tracker).cleanup().total_deleted == 2


def test_where_nobody_can_tell_whose_row_it_is_the_last_sweep_deletes_it(made_again, outside):
    """Entries that were written anew do not tell since when their rows are there."""
    first, second, batches = made_again
    write_anew(second)
    for worker in (first, second):
        report = CleanupManager(worker.tracker).cleanup()
        assert (len(report.held), report.total_deleted) == (2, 0)
    assert count(outside, batches) == [1, 1]
    first.dies()
    assert sweep(outside).total_deleted == 0
    second.dies()
    assert sweep(outside).total_deleted == 2
    assert not entries(outside)


def test_a_key_that_differs_in_case_alone_is_never_said_to_be_gone(database, outside, ledgers):
    """It may be another row."""
    if database.backend == "mysql":
        pytest.skip("it is the same key")
    (currencies, rows), taken = natural(outside)
    first, second = (Worker(database, ledgers, name=name) for name in ("gw0", "gw1"))
    first.writes((currencies, rows))
    later(outside, first.ledger)
    second.writes((currencies, [{"code": "usd", "name": "US Dollar"}]))
    manager = CleanupManager(first.tracker)
    assert held(manager.cleanup()) == ["USD"]
    assert CleanupManager(second.tracker).cleanup().total_deleted == 1
    assert manager.cleanup().total_deleted == 1
    assert count(outside, [(currencies, rows), taken]) == [0, 0]


@pytest.mark.parametrize("with_ledger", [False, True])
def test_of_two_trackers_of_a_process_the_one_that_made_the_row_deletes_it(
    engine, outside, ledgers, with_ledger
):
    batches = natural(outside)
    ledger = ledgers.installed(engine) if with_ledger else None
    first, second = (ResourceTracker(engine, ledger=ledger) for _ in range(2))
    for tracker in (first, second):
        empty(outside, batches)
        tracker.start()
        insert(engine, *batches)
        tracker.stop()
    assert CleanupManager(first).cleanup().total_deleted == 0
    assert count(outside, batches) == [1, 1]
    assert CleanupManager(second).cleanup().total_deleted == 2
    assert not with_ledger or not entries(outside)


_CHILD = """
import sys
import sqlalchemy as sa
from tidyrows import CleanupManager, Ledger, ResourceTracker, WorkerContext
engine = sa.create_engine(sys.argv[1])
metadata = sa.MetaData()
parents = sa.Table("parents", metadata, autoload_with=engine)
children = sa.Table("children", metadata, autoload_with=engine)
tracker = ResourceTracker(engine, ledger=Ledger(engine), context=WorkerContext("run", "gw5", 5))
with CleanupManager(tracker) as manager:
    with engine.begin() as connection:
        connection.execute(sa.insert(children).values(id=7, parent_id=2))
    print("made", flush=True)
    sys.stdin.readline()
print(manager.report.total_deleted, flush=True)
sys.stdin.readline()
"""


@forms
def test_a_row_of_another_live_process_stays_until_that_has_cleaned_up(
    database, outside, ledgers, form
):
    parents, children = family(outside, **FORMS[form])
    mine = Worker(database, ledgers).writes((parents, numbered([1, 2])))
    url = database.url.render_as_string(hide_password=False)
    process = Process(
        [sys.executable, "-c", _CHILD, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "made\n"
        manager = CleanupManager(mine.tracker)
        assert held(manager.cleanup()) == [2]
        assert references(outside, children) == [(7, 2)]
        assert swept(outside).total_deleted == 0
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n"
        assert manager.cleanup().total_deleted == 1
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
    assert not ids(outside, parents)
    assert not entries(outside)


_CROWD = """
import random, sys
import sqlalchemy as sa
from tidyrows import CleanupManager, Ledger, ResourceTracker, WorkerContext
me = int(sys.argv[2])
engine = sa.create_engine(sys.argv[1], pool_size=1)
metadata = sa.MetaData()
tables = {name: sa.Table(name, metadata, autoload_with=engine)
          for name in ("parents", "takes", "frees", "needs", "may")}
ledger = Ledger(engine)
draw = random.Random(me)
context = WorkerContext("crowd", f"gw{me}", me)
sys.stdin.readline()
for turn in range(2):
    tracker = ResourceTracker(engine, ledger=ledger, context=context)
    made = {name: [] for name in tables}
    with CleanupManager(tracker, lock_timeout=10) as manager:
        with engine.begin() as connection:
            for n in range(3):
                key = me * 1000 + turn * 10 + n
                connection.execute(sa.insert(tables["parents"]).values(id=key))
        with engine.connect() as connection:
            there = connection.execute(sa.select(tables["parents"].c.id)).scalars().all()
        for name in ("takes", "frees", "needs", "may"):
            for n in range(3):
                parent = draw.choice(there)
                key = me * 1000 + turn * 10 + n
                try:
                    with engine.begin() as connection:
                        row = {"id": key, "parent_id": parent}
                        connection.execute(sa.insert(tables[name]).values(row))
                    made[name].append((key, parent))
                except sa.exc.DBAPIError:
                    pass  # that parent is gone by now
        with engine.connect() as connection:
            for name, rows in made.items():
                for row in rows:
                    table = tables[name]
                    found = connection.execute(sa.select(table).where(table.c.id == row[0])).all()
                    assert found == [row], (name, row, found)
    assert not manager.report.leftovers
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(  # SQLite has one writer
    "database",
    ["postgresql+psycopg", pytest.param("mysql+pymysql", marks=pytest.mark.soak)],
    indirect=True,
)
def test_sixteen_processes_that_attach_rows_to_each_others_take_none(database, outside, ledgers):
    """Each looks, before its own cleanup, whether every row of its own stands as it was made."""
    metadata = sa.MetaData()
    sa.Table("parents", metadata, sa.Column("id", sa.Integer, **INTEGER))
    actions = {"takes": "CASCADE", "frees": "SET NULL", "needs": None, "may": None}
    for name, action in actions.items():
        sa.Table(
            name,
            metadata,
            sa.Column("id", sa.Integer, **INTEGER),
            sa.Column(
                "parent_id",
                sa.ForeignKey("parents.id", ondelete=action, name=f"fk_{name}"),
                nullable=name in {"frees", "may"},
                index=True,
            ),
        )
    metadata.create_all(outside)
    ledgers.installed(outside)
    url = database.url.render_as_string(hide_password=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", _CROWD, url]
    crowd = [Process([*command, str(number)], text=True, **pipes) for number in range(1, 17)]
    for process in crowd:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in crowd]
    assert [out for out, _error in said] == ["done\n"] * 16, [e[-800:] for _o, e in said if e]
    for _again in range(4):
        swept(outside)
    assert not [name for name, table in metadata.tables.items() if ids(outside, table)]
    assert not entries(outside)
