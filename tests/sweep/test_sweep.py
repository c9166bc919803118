"""What dead workers left is found in the ledger and deleted; nothing else is."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness import forks
from harness.blocks import refuse_deletes
from harness.bystanders import Bystanders, snapshot
from harness.keykinds import COMPOSITES, KINDS
from harness.ledgers import (
    Worker,
    dead_worker,
    entries,
    family,
    ids,
    numbered,
    orphans,
    sweep,
)
from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    Dependents,
    Ledger,
    LedgerError,
    Orphans,
    ResourceTracker,
    RetryPolicy,
    TakenOverError,
    WorkerContext,
    external_handler,
)
from tidyrows import sweep as swept
from tidyrows.ledger.process import OwnerKind
from tidyrows.sweep import dead_workers

pytestmark = pytest.mark.slow


def empty(engine):
    """Whether the ledger has neither entries nor dead owners."""
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT maker, kind FROM tidyrows_ledger").all()
    return not [row for row in rows if row[0] != "tidyrows"]


# --- what is dead goes, and what lives stays


def test_what_a_dead_worker_left_is_gone_and_its_entries_too(database, outside, ledgers):
    parents, children = family(outside)
    bystanders = Bystanders(outside, database.engine())
    bystanders.insert(parents, {"id": 900, "name": "stranger"})
    bystanders.insert(children, {"id": 900, "parent_id": 900})
    dead_worker(
        database,
        ledgers,
        (parents, numbered(range(1, 6))),
        (children, numbered(range(1, 6), parent_id=3)),
    )
    (found,) = orphans(outside)
    assert {name.name: count for name, count in found.rows.items()} == {
        "parents": 5,
        "children": 5,
    }
    assert (found.run, found.worker) == ("run-1", "gw0")
    report = sweep(outside)
    assert report.total_deleted == 10
    assert ids(outside, parents) == ids(outside, children) == [900]
    assert empty(outside)
    assert not orphans(outside)
    assert sweep(outside).total_deleted == 0


def test_what_a_live_worker_has_stays(database, outside, ledgers):
    parents, _children = family(outside)
    live = Worker(database, ledgers).writes((parents, numbered([1])))
    before = snapshot(outside)
    assert not orphans(outside)
    assert sweep(outside).total_deleted == 0
    assert ids(outside, parents) == [1]
    assert len(entries(outside)) == len(
        [row for row in before[next(n for n in before if "ledger" in n)] if row[4] == "rows"]
    )
    assert CleanupManager(live.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


def test_a_worker_whose_heart_stopped_a_moment_ago_is_not_dead_yet(database, outside, ledgers):
    """Its process lives and has not said that it has ended, so only time can tell."""
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])))
    with outside.begin() as connection:
        connection.execute(sa.text("UPDATE tidyrows_ledger SET body = '{}' WHERE kind = 'owner'"))
    assert swept(outside).total_deleted == 0
    assert ids(outside, parents) == [1]
    assert sweep(outside).total_deleted == 1


def test_the_log_tells_why_rows_are_taken_or_left(database, outside, ledgers, caplog):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])))
    Worker(database, ledgers, name="gw1").writes((parents, numbered([2])))
    with caplog.at_level("DEBUG", logger="tidyrows"):
        sweep(outside)
    found = sorted(each for each in caplog.messages if each.startswith("A sweep"))
    assert found == [
        "A sweep leaves the rows of worker gw1 of run run-1: the worker may be alive",
        "A sweep takes the rows of worker gw0 of run run-1: the worker is dead",
    ]


def test_find_orphans_changes_nothing_in_the_whole_database(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1, 2])))
    Worker(database, ledgers, name="gw1").writes((parents, numbered([3])))
    ledgers.close()  # hearts write
    before = snapshot(outside)
    beside = (
        sorted(Path(str(database.url.database)).parent.glob("*"))
        if (database.backend == "sqlite")
        else []
    )
    found = orphans(outside)
    assert sorted(each.worker for each in found) == ["gw0", "gw1"]
    assert "parents 2" in str(next(each for each in found if each.worker == "gw0"))
    assert snapshot(outside) == before
    if beside:
        assert sorted(Path(str(database.url.database)).parent.glob("*")) == beside


def test_a_sweep_takes_only_the_run_that_it_is_told(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])), run="monday")
    dead_worker(database, ledgers, (parents, numbered([2])), run="tuesday")
    assert [each.run for each in orphans(outside, run="tuesday")] == ["tuesday"]
    assert sweep(outside, run="tuesday").total_deleted == 1
    assert ids(outside, parents) == [1]
    assert sweep(outside, run="wednesday").total_deleted == 0
    assert sweep(outside).total_deleted == 1


def test_a_sweep_takes_only_the_worker_that_it_is_told(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])), name="gw1")
    dead_worker(database, ledgers, (parents, numbered([2])), name="gw11")
    assert [each.worker for each in orphans(outside, worker="gw1")] == ["gw1"]
    assert sweep(outside, worker="gw1").total_deleted == 1
    assert ids(outside, parents) == [2]
    assert sweep(outside, worker="gw1").total_deleted == 0
    assert sweep(outside, worker="gw11").total_deleted == 1


def test_the_lock_of_a_process_that_has_just_ended_is_waited_for(
    database, outside, ledgers, monkeypatch
):
    """A server notices only after a moment that it is gone."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers).writes((parents, numbered([1])))
    monkeypatch.setattr(dead_workers, "has_ended", bool)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        worker.dies()

    assert sweep(outside, retry=RetryPolicy(sleep=wait)).total_deleted == 1
    assert len(waits) == 1


def test_a_lock_that_somebody_holds_on_to_is_not_waited_for_for_ever(
    database, outside, ledgers, monkeypatch
):
    """A forked child may hold that of its parent."""
    parents, _children = family(outside)
    Worker(database, ledgers).writes((parents, numbered([1])))
    monkeypatch.setattr(dead_workers, "has_ended", bool)
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    policy = RetryPolicy(sleep=wait, clock=lambda: now[0])
    assert sweep(outside, retry=policy).total_deleted == 0
    assert ids(outside, parents) == [1]
    assert 4 < now[0] < 6


def test_what_is_older_than_an_age_goes_though_its_worker_lives(database, outside, ledgers):
    parents, _children = family(outside)
    live = Worker(database, ledgers).writes((parents, numbered([1])))
    assert sweep(outside, older_than=3600).total_deleted == 0
    assert sweep(outside, older_than=0).total_deleted == 1
    assert not ids(outside, parents)
    with pytest.raises(TakenOverError):
        CleanupManager(live.tracker).cleanup()
    assert len(live.tracker) == 0


def test_rows_kept_for_study_go_only_when_they_are_asked_for(database, outside, ledgers):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(worker.tracker, keep_on_failure=True):
            with worker.engine.begin() as connection:
                connection.execute(sa.insert(parents), numbered([1]))
            raise ZeroDivisionError
    worker.dies()
    assert "kept" in caught.value.__notes__[0]
    assert sweep(outside).total_deleted == 0
    (found,) = orphans(outside)
    assert found.kept
    assert found.kept in caught.value.__notes__[0]
    for asked in (sweep, orphans):
        with pytest.raises(LedgerError, match=f"kept as 'kept0000'.*What is kept: {found.kept}"):
            asked(outside, kept="kept0000")
    assert sweep(outside, kept=found.kept).total_deleted == 1
    with pytest.raises(LedgerError, match=r"swept already\. Nothing else"):
        sweep(outside, kept=found.kept)


@on("sqlite")
def test_rows_handed_to_a_controller_are_anybodys_once_it_has_not_come(database, outside, ledgers):
    """It may have been killed. Kept rows would stay for ever."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers).writes((parents, numbered([1])))
    (place,) = worker.tracker.journals.databases
    assert worker.tracker.journals.put_aside(place, OwnerKind.HANDED.new_id())
    worker.dies()
    assert swept(outside).total_deleted == 0
    assert swept(outside, patience=0).total_deleted == 1
    assert not ids(outside, parents)


# --- what is asked for


@pytest.mark.parametrize("asked", [sweep, orphans])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"older_than": -1}, "older_than=-1.*number of seconds"),
        ({"older_than": float("nan")}, "older_than=nan"),
        ({"patience": -0.5}, "patience=-0.5"),
        ({"kept": ""}, "kept=''.*a shell variable that is not set"),
        ({"run": ""}, "run='nightly-17'"),
        ({"worker": ""}, "worker='gw3'"),
    ],
)
def test_a_time_or_a_name_that_cannot_be_meant_is_refused(asked, options, said):
    with pytest.raises(ValueError, match=said):
        asked("sqlite://", **options)


def test_an_argument_that_there_is_not_is_named_with_those_that_there_are():
    with pytest.raises(TypeError) as caught:
        swept("sqlite://", keep="kept0000", dependents=Dependents.DELETE)
    said = str(caught.value)
    assert said.startswith("sweep() takes no keep=. Did you mean kept=?")
    assert all(f" {name}," in said for name in ("run", "kept", "dependents", "protect"))
    assert "tracker," not in said


@pytest.mark.parametrize("form", ["{}", "file:{}?uri=true", "file:{}?mode=rwc&uri=true"])
def test_a_file_that_is_not_there_is_not_made(tmp_path, form):
    """Connecting would make it, and "has no ledger" would send the reader the wrong way."""
    file = tmp_path / "missing.db"
    url = f"sqlite:///{form.format(file)}"
    engine = sa.create_engine(url)
    for place in (url, engine, Ledger(engine)):
        for asked in (sweep, orphans):
            with pytest.raises(LedgerError, match=r"no file .*missing\.db"):
                asked(place)
    assert not list(tmp_path.iterdir())
    file.touch()
    with pytest.raises(LedgerError, match="has no ledger"):
        sweep(url)


def test_orphans_in_words_name_the_first_tests():
    def told(count):
        return str(Orphans("r", "gw0", tuple("abcdefg"[:count]), "ci", 7, 12.3, {"users": 2}))

    assert told(0) == "worker gw0 of run r on ci, 12 s ago: users 2"
    assert told(3).endswith("users 2, made in a, b, c")
    assert told(5).endswith("users 2, made in a, b, c and 2 more")


def test_a_worker_that_was_taken_for_dead_takes_no_row_of_its_heir(database, outside, ledgers):
    """The sweep has deleted its row; a stranger has the key by now."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers).writes((parents, numbered([1])))
    sweep(outside, older_than=0)
    with outside.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1], name="stranger"))
    with pytest.raises(TakenOverError):
        CleanupManager(worker.tracker, trust_keys=True).cleanup()
    assert ids(outside, parents) == [1]


def test_a_sweep_that_runs_where_a_worker_lives_leaves_its_rows(database, outside, ledgers):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    dead_worker(database, ledgers, (parents, numbered([2])), name="gw1")
    with CleanupManager(worker.tracker) as manager:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
        assert sweep(worker.ledger).total_deleted == 1
        assert ids(outside, parents) == [1]
    assert manager.report.total_deleted == 1
    assert not entries(outside)


# --- by the keys that the database has


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_every_type_are_found_again(database, outside, ledgers, kind):
    type_, value = KINDS[kind]
    if kind == "bind expression":
        pytest.skip("SQL makes the value, so it cannot be written down")
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", type_, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(10)),
    )
    table.metadata.create_all(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(table), [{"id": value(1), "name": "theirs"}])
    theirs = snapshot(outside)
    numbers = [2] if kind == "boolean" else [2, 3]
    rows = [{"id": value(n), "name": "ours"} for n in numbers]
    worker = dead_worker(database, ledgers, (table, rows))
    assert sweep(outside, trust_keys=True).total_deleted == len(numbers)
    after = snapshot(outside)
    assert {n: r for n, r in after.items() if "things" in n} == {
        n: r for n, r in theirs.items() if "things" in n
    }
    assert not entries(worker.engine)


def test_a_key_that_is_another_integer_in_the_database_names_no_stranger(
    database, outside, ledgers
):
    """Python's 5 and 6 are the database's 10 and 12 here; 5 and 6 are strangers'."""
    type_, _value = KINDS["type decorator"]
    table = sa.Table(
        "things",
        sa.MetaData(),
        sa.Column("id", type_, primary_key=True, autoincrement=False),
    )
    table.metadata.create_all(outside)
    with outside.begin() as connection:
        connection.exec_driver_sql("INSERT INTO things VALUES (5), (6)")
    dead_worker(database, ledgers, (table, numbered([5, 6])))
    assert sweep(outside, trust_keys=True).total_deleted == 2
    with outside.connect() as connection:
        assert sorted(connection.exec_driver_sql("SELECT id FROM things").scalars()) == [5, 6]


@pytest.mark.parametrize("names", COMPOSITES.values(), ids=COMPOSITES)
def test_composite_keys_are_found_again(database, outside, ledgers, names):
    if "bind expression" in names:
        pytest.skip("SQL makes the value, so it cannot be written down")
    columns = [
        sa.Column(f"k{at}", KINDS[name][0], primary_key=True, autoincrement=False)
        for at, name in enumerate(names)
    ]
    table = sa.Table("things", sa.MetaData(), *columns)
    table.metadata.create_all(outside)

    def row(n):
        return {f"k{at}": KINDS[name][1](n) for at, name in enumerate(names)}

    with outside.begin() as connection:
        connection.execute(sa.insert(table), [row(1)])
    dead_worker(database, ledgers, (table, [row(2), row(3)]))
    assert sweep(outside, trust_keys=True).total_deleted == 2
    with outside.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 1


def test_rows_without_a_key_go_as_often_as_they_were_inserted(database, outside, ledgers):
    table = sa.Table(
        "notes", sa.MetaData(), sa.Column("a", sa.Integer), sa.Column("b", sa.String(9))
    )
    table.metadata.create_all(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(table), [{"a": 1, "b": "x"}] * 2)
    dead_worker(database, ledgers, (table, [{"a": 1, "b": "x"}] * 3))
    assert sweep(outside).total_deleted == 3
    with outside.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 2


def test_rows_without_a_key_are_not_taken_twice_where_reading_the_ledger_fails_once(
    database, outside, ledgers
):
    """Strangers have equal rows."""
    metadata = sa.MetaData()
    notes = sa.Table("notes", metadata, sa.Column("a", sa.Integer), sa.Column("b", sa.Integer))
    parents = sa.Table("parents", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(outside)
    rows = [{"a": 1, "b": 1}] * 2
    with outside.begin() as connection:
        connection.execute(sa.insert(notes), rows)
    dead_worker(database, ledgers, (notes, rows), (parents, [{"id": 1}]))
    failed = []

    @sa.event.listens_for(sa.Table, "column_reflect")
    def lose(_inspector, table, _info):
        if table.name == "parents" and not failed:
            failed.append(table)
            error = {
                "sqlite": sa.exc.OperationalError("", {}, locked()),
                "postgresql": sa.exc.OperationalError("", {}, deadlocked()),
                "mysql": sa.exc.OperationalError("", {}, Exception(1213, "deadlock")),
            }
            raise error[database.backend]

    try:
        sweep(outside)
    finally:
        sa.event.remove(sa.Table, "column_reflect", lose)
    assert failed
    with outside.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(notes)).scalar() == 2


def locked():
    import sqlite3  # noqa: PLC0415 -- an error of one driver

    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = 5
    return error


def deadlocked():
    import psycopg  # noqa: PLC0415 -- an error of one driver

    return psycopg.errors.DeadlockDetected("deadlock")


# --- several dead workers and the order in which things happened


def currencies(engine):
    table = sa.Table(
        "currencies",
        sa.MetaData(),
        sa.Column("code", sa.String(3), primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    table.metadata.create_all(engine)
    return table


@pytest.mark.parametrize("attempt", range(4))  # whose number is smaller is left to chance
def test_a_key_that_two_dead_workers_had_in_turn_is_the_laters(database, outside, ledgers, attempt):
    """The first deleted its row, and the second made the row that is there now."""
    table = currencies(outside)
    first = Worker(database, ledgers, name="gw0")
    with first:
        with first.engine.begin() as connection:
            connection.execute(sa.insert(table), [{"code": "USD"}, {"code": "EUR"}])
        with first.engine.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.code == "USD"))
    second = dead_worker(database, ledgers, (table, [{"code": "USD"}]), name="gw1")
    first.dies()
    sweep(outside, trust_keys=True)
    assert not ids(outside, table), (first.ledger, second.ledger, attempt)
    assert empty(outside)


@on("sqlite")
def test_rows_that_two_dead_workers_inserted_under_one_key_are_compared_with_both(
    database, outside, ledgers
):
    """Somebody emptied the table in between, and SQLite gives its keys again."""
    table = currencies(outside)
    first, second = Worker(database, ledgers, name="gw0"), Worker(database, ledgers, name="gw1")
    for code, (before, after) in {"AAA": (first, second), "BBB": (second, first)}.items():
        for each in (before, after):
            with outside.begin() as connection:
                connection.execute(sa.delete(table).where(table.c.code == code))
            each.writes((table, [{"code": code, "name": f"of {each.tracker.context.worker_id}"}]))
    for each in (first, second):
        each.writes((table, [{"code": "CCC", "name": each.tracker.context.worker_id}])).dies()
        with outside.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.code == "CCC"))
    with outside.begin() as connection:
        connection.execute(sa.insert(table), [{"code": "CCC", "name": "stranger"}])
    with pytest.raises(CleanupError, match="identity uncertain: name") as caught:
        sweep(outside)
    assert [each.row.key for each in caught.value.leftovers] == [("CCC",)]
    assert ids(outside, table) == ["CCC"]
    with outside.begin() as connection:
        connection.execute(sa.delete(table))
    sweep(outside)
    assert empty(outside)


@pytest.mark.parametrize("attempt", range(6))  # whose number is smaller is left to chance
def test_what_a_sweep_had_deleted_before_it_was_killed_is_not_deleted_again(
    database, outside, ledgers, attempt
):
    """Between the two sweeps a stranger has taken a natural key that was free."""
    table = currencies(outside)
    codes = ["AAA", "BBB", "CCC"]
    dead_worker(database, ledgers, (table, [{"code": code} for code in codes]))

    class Killed(BaseException):
        pass

    def after_one(_progress):
        if not ids(outside, table)[0:1] == ["AAA"]:
            raise Killed

    first = database.engine()
    ledger = ledgers.installed(first)
    with pytest.raises(Killed):
        sweep(ledger, rows_per_transaction=1, on_progress=after_one, trust_keys=True)
    ledger.close()
    gone = sorted(set(codes) - set(ids(outside, table)))
    assert gone, attempt
    with outside.begin() as connection:
        connection.execute(sa.insert(table), [{"code": gone[0], "name": "stranger"}])
    sweep(outside, trust_keys=True)
    assert ids(outside, table) == gone[:1]


def test_a_sweep_that_left_something_leaves_it_to_the_next_of_that_run(database, outside, ledgers):
    parents, children = family(outside, nullable=False)
    dead_worker(database, ledgers, (parents, numbered([1, 2, 3])), run="monday", name="gw7")
    with outside.begin() as connection:
        connection.execute(sa.insert(children), numbered([1], parent_id=2))
    with pytest.raises(CleanupError):
        sweep(outside, protect=[children])
    assert ids(outside, parents) == [2]
    assert [json.loads(each["body"])["ranges"] for each in entries(outside)] == [[2, 2]]
    with outside.begin() as connection:
        connection.execute(sa.delete(children))
    assert [(each.run, each.worker) for each in orphans(outside)] == [("monday", "gw7")]
    assert sweep(outside, run="monday").total_deleted == 1
    assert empty(outside)


def test_what_a_sweep_left_goes_with_the_next_sweep_of_the_same_process(database, outside, ledgers):
    """The process has the ledger open for itself, as one has that runs tests and sweeps."""
    parents, children = family(outside, nullable=False)
    dead_worker(database, ledgers, (parents, numbered([1])))
    with outside.begin() as connection:
        connection.execute(sa.insert(children), numbered([1], parent_id=1))
    mine = Worker(database, ledgers, name="gw9")
    with mine:
        with pytest.raises(CleanupError):
            sweep(mine.ledger, protect=[children])
        with outside.begin() as connection:
            connection.execute(sa.delete(children))
        assert sweep(mine.ledger).total_deleted == 1
    assert not ids(outside, parents)


def test_a_row_that_a_trigger_keeps_stays_in_the_ledger_alone(database, outside, ledgers):
    parents, _children = family(outside)
    refuse_deletes(outside, parents, [2])
    dead_worker(database, ledgers, (parents, numbered([1, 2, 3])))
    with pytest.raises(CleanupError) as caught:
        sweep(outside)
    assert [each.row.key for each in caught.value.leftovers] == [(2,)]
    (left,) = entries(outside)
    assert json.loads(left["body"])["ranges"] == [2, 2]


def test_a_table_that_was_dropped_meanwhile_hinders_nothing(database, outside, ledgers):
    parents, children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])), (children, numbered([1])))
    children.drop(outside)
    (found,) = orphans(outside)
    assert [name.name for name in found.rows] == ["parents"]
    assert sweep(outside).total_deleted == 1
    assert empty(outside)


def test_two_sweeps_at_once_delete_every_row_once(database, outside, ledgers):
    parents, _children = family(outside)
    for worker in range(3):
        rows = numbered(range(worker * 10, worker * 10 + 10))
        dead_worker(database, ledgers, (parents, rows), name=f"gw{worker}")
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 -- of this test only

    engines = [database.engine() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(sweep, engines))
    assert sum(report.total_deleted for report in reports) == 30
    assert not ids(outside, parents)
    assert not entries(outside)


# --- what is no row


def test_an_unknown_kind_of_resource_stays_and_so_does_its_entry(database, outside, ledgers):
    family(outside)
    kind = f"unheard-of-{uuid.uuid4().hex}"  # handlers stay, for all tests of the process
    worker = Worker(database, ledgers)
    with worker:
        worker.tracker.track_external(kind, {"id": 7})
    worker.dies()
    with pytest.raises(CleanupError) as caught:
        sweep(outside)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 row(s) and resources are still there; they stay in the ledger:"
    assert kind in lines[1]
    assert lines[-1] == "Remove the cause, then run sweep() again."
    assert [each["kind"] for each in entries(outside)] == ["external"]
    removed: list[Any] = []
    external_handler(kind)(removed.append)
    sweep(outside)
    assert removed == [{"id": 7}]
    assert empty(outside)


def test_resources_and_rows_go_in_the_order_that_was_tied(database, outside, ledgers):
    parents, _children = family(outside)
    seen: list[Any] = []

    def remove(payload):
        seen.append((payload, ids(outside, parents)))

    external_handler("sweep-tied", replace=True)(remove)
    worker = Worker(database, ledgers)
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1, 2]))
        table = next(iter(worker.tracker.rows())).table
        from tidyrows import RowKey  # noqa: PLC0415 -- of this test only

        last = worker.tracker.track_external("sweep-tied", "last", after=[RowKey(table, (1,))])
        worker.tracker.track_external("sweep-tied", "first", before=[parents, last])
    worker.dies()
    assert sweep(outside).total_deleted == 2
    assert [name for name, _rows in seen] == ["first", "last"]
    assert seen[0][1] == [1, 2]
    assert 1 not in seen[1][1]
    assert empty(outside)


def test_secrets_of_the_url_are_in_no_entry_report_or_error(database, outside, ledgers):
    password = database.url.password
    if not password:
        pytest.skip("the database has no password")
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])))
    text = repr(snapshot(outside)) + repr(orphans(outside)) + str(orphans(outside)[0])
    refuse_deletes(outside, parents, [1])
    with pytest.raises(CleanupError) as caught:
        sweep(outside)
    text += repr(caught.value) + str(caught.value) + repr(caught.value.report)
    with pytest.raises(LedgerError) as refused:
        swept(outside, ledger="nowhere")
    text += str(refused.value) + repr(Ledger(outside))
    assert password not in text


def test_a_database_without_a_ledger_is_said_to_have_none(outside):
    family(outside)
    with pytest.raises(LedgerError, match=r"has no ledger .*install\(\)"):
        swept(outside)
    with pytest.raises(LedgerError, match=r"has no ledger .*install\(\)"):
        orphans(outside)


def test_a_url_is_enough(database, outside, ledgers):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1])))
    url = database.url.render_as_string(hide_password=False)
    assert len(orphans(url)) == 1
    assert sweep(url).total_deleted == 1


# --- killed processes

_KILLED = """
import os, signal, sys
import sqlalchemy as sa
from tidyrows import Ledger, ResourceTracker
engine = sa.create_engine(sys.argv[1])
parents = sa.Table("parents", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
                   sa.Column("name", sa.String(30)))
ledger = Ledger(engine)
tracker = ResourceTracker(engine, ledger=ledger).start()
with engine.begin() as connection:
    connection.execute(sa.insert(parents), [{"id": n} for n in range(5)])
connection = engine.connect()
connection.execute(sa.insert(parents), [{"id": 77}])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_at_once(database, outside, ledgers):
    """Its process has ended on this machine, so nobody need wait for the heart."""
    parents, _children = family(outside)
    ledgers.installed(outside)
    url = database.url.render_as_string(hide_password=False)
    done = forks.run([sys.executable, "-c", _KILLED, url])
    assert done.returncode == -9
    ledgers.close()
    assert swept(outside).total_deleted == 5
    assert not ids(outside, parents)
    assert empty(outside)


def _in_child(ledger, parents, said):
    """After a fork: a tracker of the child's own, which dies with it."""
    ledger.engine.dispose(close=False)
    tracker = ResourceTracker(ledger.engine, ledger=ledger).start()
    with ledger.engine.begin() as connection:
        connection.execute(sa.insert(parents), numbered([2]))
    said.put([row.key for row in tracker.rows()])
    said.close()
    said.join_thread()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_is_a_worker_of_its_own(database, outside, ledgers):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    fork = multiprocessing.get_context("fork")
    with CleanupManager(worker.tracker) as manager:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
        said = fork.Queue()
        child = fork.Process(target=_in_child, args=(worker.ledger, parents, said))
        child.start()
        assert said.get(timeout=30) == [(2,)]
        child.join(30)
        assert len({each["owner"] for each in entries(outside)}) == 2
        assert swept(outside).total_deleted == 1
        assert ids(outside, parents) == [1]
    assert manager.report.total_deleted == 1
    assert not entries(outside)


def test_a_session_of_the_application_in_this_process_is_entered_too(database, outside, ledgers):
    class Base(orm.DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parents"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
        name: orm.Mapped[str] = orm.mapped_column(sa.String(20))

    Base.metadata.create_all(outside)
    worker = Worker(database, ledgers)
    with worker, orm.Session(worker.engine) as session:
        session.add_all([Parent(name="ours"), Parent(name="ours")])
        session.commit()
    worker.dies()
    assert sweep(outside).total_deleted == 2


def test_a_context_of_long_names_is_found_by_its_run(database, outside, ledgers):
    parents, _children = family(outside)
    worker = Worker(database, ledgers, run="r" * 200, name="w" * 200, test="t" * 600)
    worker.writes((parents, numbered([1]))).dies()
    assert sweep(outside, run="r" * 200).total_deleted == 1


def test_a_context_of_any_script_is_written(database, outside, ledgers):
    parents, _children = family(outside)
    context = {"run": "läuft \U0001f600", "name": "gw0", "test": "Szenario: 測試 100% \\ '\""}
    Worker(database, ledgers, **context).writes((parents, numbered([1]))).dies()
    (found,) = orphans(outside)
    assert (found.run, found.tests) == (context["run"], (context["test"],))
    assert sweep(outside, run=context["run"]).total_deleted == 1
    assert WorkerContext(context["run"], "gw0", 0).run_id == context["run"]


@on("mysql+pymysql")  # which has databases of few characters
def test_a_database_of_few_characters_refuses_no_commit(database, outside, ledgers):
    with outside.begin() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {database.url.database} CHARACTER SET latin1")
    parents, _children = family(outside)
    Worker(database, ledgers, test="測試 \U0001f600").writes((parents, numbered([1]))).dies()
    assert sweep(outside).total_deleted == 1
