"""Rows of a failed test stay for study, and the message says which and what deletes them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

import tidyrows
from harness import forks
from harness.blocks import insert
from harness.ledgers import Worker, entries, family, ids, numbered, orphans, sweep
from tidyrows import CleanupManager, Ledger, ResourceTracker, external_handler

pytestmark = pytest.mark.slow

HELD = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "LOCK TABLE tidyrows_ledger IN EXCLUSIVE MODE",
    "mysql": "SELECT * FROM tidyrows_ledger FOR UPDATE",
}
"""Nobody else can write into the ledger."""


def failed(tracker, engine, *batches):
    """What the error of a failed test says, after its rows were made."""
    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(tracker, keep_on_failure=True):
            insert(engine, *batches)
            raise ZeroDivisionError
    return "\n".join(caught.value.__notes__)


def test_the_line_of_the_message_deletes_them_in_another_process(database, outside, ledgers):
    parents, children = family(outside, nullable=False)
    insert(outside, (parents, numbered([900], name="stranger")))
    worker = Worker(database, ledgers)
    note = failed(
        worker.tracker,
        worker.engine,
        (parents, numbered([1, 2])),
        (children, numbered([5], parent_id=1)),
    )
    assert "3 row(s)" in note
    assert all(f"{name}({key})" in note for name, key in (("parents", 1), ("children", 5)))
    assert len(worker.tracker) == 0
    sweep(outside)
    assert ids(outside, parents) == [1, 2, 900]  # nobody asked for them

    (code,) = re.findall(r'python -c "(.*)"', note)
    url = database.url.render_as_string(hide_password=False)
    source = str(Path(tidyrows.__file__).parent.parent)
    env = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": source}
    done = forks.run([sys.executable, "-c", code], env=env, check=True)
    assert "parents 2 deleted" in done.stdout
    assert ids(outside, parents) == [900]
    assert not entries(outside)


def test_the_line_of_the_message_names_another_ledger(database, outside, ledgers):
    parents, _children = family(outside)
    engine = database.engine()
    ledger = ledgers.installed(engine, name="elsewhere")
    tracker = ResourceTracker(engine, ledger=ledger)
    note = failed(tracker, engine, (parents, numbered([1])))
    (given,) = re.findall(r"sweep\(os.environ\['DATABASE_URL'\], (.*?)\)\)", note)
    ledger.close()
    assert eval(f"sweep(outside, {given})").total_deleted == 1
    assert not ids(outside, parents)


def test_the_line_of_the_message_deletes_as_the_test_would_have(database, outside, ledgers):
    parents, children = family(outside)
    worker = Worker(database, ledgers)
    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(worker.tracker, keep_on_failure=True, own=[children]):
            insert(worker.engine, (parents, numbered([1])))
            insert(outside, (children, numbered([5], parent_id=1)))
            raise ZeroDivisionError
    (note,) = caught.value.__notes__
    (given,) = re.findall(r"sweep\(os.environ\['DATABASE_URL'\], (.*?)\)\)", note)
    assert eval(f"sweep(outside, {given})").total_deleted == 1
    assert not ids(outside, children)


def test_a_test_that_succeeds_keeps_nothing(database, outside, ledgers):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with CleanupManager(worker.tracker, keep_on_failure=True) as cleanup:
        insert(worker.engine, (parents, numbered([1])))
    assert cleanup.report.total_deleted == 1
    assert orphans(outside) == []


def test_a_failed_test_without_rows_says_so(database, outside, ledgers):
    family(outside)
    worker = Worker(database, ledgers)
    assert "no rows to keep" in failed(worker.tracker, worker.engine)
    assert orphans(outside) == []


def test_rows_without_a_key_are_kept_and_counted(database, outside, ledgers):
    metadata = sa.MetaData()
    lines = sa.Table("lines", metadata, sa.Column("text", sa.String(9)))
    metadata.create_all(outside)
    insert(outside, (lines, [{"text": "theirs"}]))
    worker = Worker(database, ledgers)
    note = failed(worker.tracker, worker.engine, (lines, [{"text": "ours"}] * 2))
    assert "2 row(s)" in note
    assert "2 of " in note
    worker.dies()
    sweep(outside)
    (kept,) = orphans(outside)
    assert list(kept.rows.values()) == [2]
    assert sweep(outside, kept=True).total_deleted == 2
    with outside.connect() as connection:
        assert connection.scalars(sa.select(lines)).all() == ["theirs"]


def test_rows_that_were_told_and_not_yet_entered_are_kept(database, outside, ledgers, monkeypatch):
    """Somebody holds the ledger's lock, until the rows are put aside."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    insert(outside, (parents, numbered([1, 2])))
    transaction = Ledger.transaction
    holder = outside.connect()

    def free(ledger, *, lock_timeout):
        if lock_timeout > 1:
            holder.rollback()
        return transaction(ledger, lock_timeout=lock_timeout)

    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(worker.tracker, keep_on_failure=True):
            insert(worker.engine, (parents, numbered([3])))
            holder.exec_driver_sql(HELD[database.backend])
            worker.tracker.track_rows(parents, [1])
            monkeypatch.setattr(Ledger, "transaction", free)
            raise ZeroDivisionError
    holder.close()
    assert "2 row(s)" in caught.value.__notes__[0]
    worker.dies()
    assert sweep(outside).total_deleted == 0
    assert sweep(outside, kept=True).total_deleted == 2
    assert ids(outside, parents) == [2]
    assert not entries(outside)


def test_resources_are_kept_beside_their_rows(database, outside, ledgers):
    parents, _children = family(outside)
    removed = []
    kind = f"kept {database.url.database}"
    external_handler(kind)(removed.append)
    worker = Worker(database, ledgers)
    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(worker.tracker, keep_on_failure=True):
            insert(worker.engine, (parents, numbered([1])))
            worker.tracker.track_external(kind, {"id": 3}, after=[parents])
            raise ZeroDivisionError
    assert kind in caught.value.__notes__[0]
    CleanupManager(worker.tracker).cleanup()
    assert removed == []
    assert sweep(outside, kept=True).external == {kind: 1}
    assert removed == [{"id": 3}]
    assert not ids(outside, parents)


def test_without_a_ledger_they_stay_tracked(database, outside):
    parents, _children = family(outside)
    engine = database.engine()
    tracker = ResourceTracker(engine)
    note = failed(tracker, engine, (parents, numbered([1])))
    assert "manager.cleanup()" in note
    assert ids(outside, parents) == [1]
    assert CleanupManager(tracker).cleanup().total_deleted == 1


def test_the_tests_own_error_comes_first_where_keeping_fails(database, outside, ledgers):
    """The ledger's table has gone meanwhile."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with pytest.raises(ZeroDivisionError) as caught:
        with CleanupManager(worker.tracker, keep_on_failure=True):
            insert(worker.engine, (parents, numbered([1])))
            with outside.begin() as connection:
                connection.execute(sa.text("DROP TABLE tidyrows_ledger"))
            raise ZeroDivisionError
    assert "failed too" in "".join(caught.value.__notes__)
    assert len(worker.tracker) == 1
    worker.tracker.dismiss_leak_warning()
