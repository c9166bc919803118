"""Circles of rows that belong to several workers, who clean up at once, and of whom one dies."""

from __future__ import annotations

import random
import threading

import pytest
import sqlalchemy as sa

from harness.blocks import INTEGER, reference, table
from harness.bystanders import snapshot
from harness.ledgers import NAME, Worker, entries, ids, numbered, sweep
from harness.targets import mostly_on, on
from tidyrows import CleanupManager

pytestmark = pytest.mark.slow

DEFERRED = {"deferrable": True, "initially": "DEFERRED"}
FORMS = {
    "nullable": ({"nullable": True}, {"nullable": True}),
    "set null": ({"nullable": True, "ondelete": "SET NULL"},) * 2,
    "cascade": ({"nullable": True, "ondelete": "CASCADE"},) * 2,
    "half": ({"ondelete": "CASCADE"}, {"nullable": True}),
}


def circle(engine, to_b, to_a):
    """Two tables that reference each other."""
    metadata = sa.MetaData()
    a = table(metadata, "a", reference("b_id", "b.id", use_alter=True, **to_b))
    b = table(metadata, "b", reference("a_id", "a.id", **to_a))
    metadata.create_all(engine)
    return a, b


def makes(worker, a, b, *numbers):
    """Pairs that reference each other, and nobody else's."""
    with worker, worker.engine.begin() as connection:
        for number in numbers:
            late = not b.c.a_id.nullable
            first = {"id": number, "a_id": number} if late else {"id": number}
            connection.execute(sa.insert(b).values(first))
            connection.execute(sa.insert(a).values(id=number, b_id=number))
            if not late:
                connection.execute(sa.update(b).where(b.c.id == number).values(a_id=number))


def hangs(worker, a, b, number, other):
    """One of its pairs on one of another's."""
    with worker, worker.engine.begin() as connection:
        connection.execute(sa.update(a).where(a.c.id == number).values(b_id=other))
        connection.execute(sa.update(b).where(b.c.id == number).values(a_id=other))


def at_once(*works):
    """Their results, in order."""
    ready, results = threading.Barrier(len(works)), {}

    def run(number, work):
        ready.wait(30)
        results[number] = work()

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(results) == len(works)
    return [results[number] for number in range(len(works))]


def rows_of(engine):
    """Every row but the ledger's."""
    return {name: rows for name, rows in snapshot(engine).items() if not name.endswith(NAME)}


def held(report):
    return sorted((each.row.table.name, each.row.key[0]) for each in report.held)


def go_in_the_end(database, outside, ledgers, a, b):
    """Two workers hang on each other; both clean up, one dies, the other ends."""
    mine, theirs = (Worker(database, ledgers, name=name) for name in ("gw0", "gw1"))
    makes(mine, a, b, 1)
    makes(theirs, a, b, 2)
    hangs(mine, a, b, 1, 2)
    hangs(theirs, a, b, 2, 1)
    tangle = rows_of(outside)
    makes(mine, a, b, 3)
    makes(theirs, a, b, 4)
    managers = [CleanupManager(each.tracker, lock_timeout=10) for each in (mine, theirs)]
    reports = at_once(*(each.cleanup for each in managers))
    assert [held(each) for each in reports] == [[("a", n), ("b", n)] for n in (1, 2)]
    assert [each.total_deleted for each in reports] == [2, 2]
    assert rows_of(outside) == tangle
    theirs.dies()
    for report in at_once(lambda: sweep(outside), managers[0].cleanup):
        assert not report.total_deleted
    assert rows_of(outside) == tangle
    mine.dies()
    at_once(lambda: sweep(outside), lambda: sweep(outside))
    sweep(outside)
    assert not any(rows_of(outside).values())
    assert not entries(outside)


@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize("form", FORMS)
def test_a_circle_of_two_workers_stays_whole_until_both_have_ended(
    database, outside, ledgers, form
):
    a, b = circle(outside, *FORMS[form])
    go_in_the_end(database, outside, ledgers, a, b)


@on("postgresql+psycopg", "sqlite")  # the MySQL family defers nothing
def test_so_does_one_of_not_null_keys_that_are_deferred(database, outside, ledgers):
    a, b = circle(outside, DEFERRED, DEFERRED)
    go_in_the_end(database, outside, ledgers, a, b)


@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize("ondelete", [None, "SET NULL", "CASCADE"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_whatever_hangs_on_whatever_no_row_that_stays_is_changed(
    database, outside, ledgers, seed, ondelete
):
    """Three workers clean up while a fourth's rows are swept; then all end."""
    draw = random.Random(seed)
    metadata = sa.MetaData()
    nodes = sa.Table(
        "nodes",
        metadata,
        sa.Column("id", sa.Integer, **INTEGER),
        sa.Column("next_id", sa.ForeignKey("nodes.id", name="fk_next", ondelete=ondelete)),
    )
    metadata.create_all(outside)
    workers = [Worker(database, ledgers, name=f"gw{n}") for n in range(4)]
    keys = {worker: range(n * 10, n * 10 + 4) for n, worker in enumerate(workers)}
    everything = [key for each in keys.values() for key in each]
    for worker in workers:
        worker.writes((nodes, numbered(keys[worker])))
    for worker in workers:
        with worker, worker.engine.begin() as connection:
            for key in keys[worker]:
                hung = sa.update(nodes).where(nodes.c.id == key)
                connection.execute(hung.values(next_id=draw.choice([*everything, None])))
    (before,) = rows_of(outside).values()
    dead, *live = workers
    dead.dies()
    managers = [CleanupManager(each.tracker, lock_timeout=10) for each in live]
    reports = at_once(lambda: sweep(outside), *(each.cleanup for each in managers))
    (after,) = rows_of(outside).values()
    assert set(after) <= set(before)
    stays = sorted(key for each in reports for _name, key in held(each))
    assert stays == sorted(key for key, _next in after)
    for each in live:
        each.dies()
    at_once(lambda: sweep(outside), lambda: sweep(outside))
    sweep(outside)
    assert not ids(outside, nodes)
    assert not entries(outside)


@pytest.mark.parametrize("limit", [1, 100])
def test_what_a_held_row_needs_is_held_too_in_whichever_transaction(
    database, outside, ledgers, limit
):
    metadata = sa.MetaData()
    nodes = table(metadata, "nodes", reference("next_id", "nodes.id", nullable=True))
    metadata.create_all(outside)
    mine, theirs = (Worker(database, ledgers, name=name) for name in ("gw0", "gw1"))
    mine.writes((nodes, [{"id": 1}, {"id": 2, "next_id": 1}, {"id": 3, "next_id": 2}]))
    theirs.writes((nodes, numbered([9], next_id=3)))
    manager = CleanupManager(mine.tracker, rows_per_transaction=limit)
    report = manager.cleanup()
    assert held(report) == [("nodes", 1), ("nodes", 2), ("nodes", 3)]
    assert all("gw1" in each.by for each in report.held)
    assert CleanupManager(theirs.tracker).cleanup().total_deleted == 1
    assert manager.cleanup().total_deleted == 3
