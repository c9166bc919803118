"""Rows that one process has made and another deletes, where a ledger names them."""

from __future__ import annotations

import gc
import json
import warnings

import pytest
import sqlalchemy as sa

from harness.blocks import insert
from harness.ledgers import Worker, entries, family, ids, numbered, sweep
from tidyrows import (
    CleanupManager,
    LedgerError,
    ResourceTracker,
    TakenOverError,
    external_handler,
)


@pytest.fixture
def parents(outside):
    return family(outside)[0]


@pytest.fixture
def taker(database, ledgers):
    """Another process, with an engine and a ledger of its own."""
    engine = database.engine()
    return lambda text: ResourceTracker.from_json(text, engine, ledger=ledgers.installed(engine))


def test_who_deletes_the_rows_takes_their_entries_along(worker, taker, outside, parents):
    """Else a key that comes back would be swept as ours."""
    worker.writes((parents, numbered([1, 2])))
    text = worker.tracker.to_json()
    worker.dies()
    assert CleanupManager(taker(text)).cleanup().total_deleted == 2
    assert not entries(outside)
    insert(outside, (parents, numbered([1], name="stranger")))
    assert sweep(outside).total_deleted == 0
    assert ids(outside, parents) == [1]


def test_without_the_ledger_it_is_refused(worker, database, outside, parents):
    worker.writes((parents, numbered([1])))
    with pytest.raises(LedgerError, match=r"from_json\(text, engine, ledger=Ledger\(engine\)\)"):
        ResourceTracker.from_json(worker.tracker.to_json(), database.engine())
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


@pytest.mark.parametrize("by", ["its own cleanup", "a sweep"])
def test_rows_that_are_gone_by_then_name_no_stranger(worker, taker, outside, parents, by):
    worker.writes((parents, numbered([1])))
    text = worker.tracker.to_json()
    if by == "a sweep":
        worker.dies()
        sweep(outside)
    else:
        CleanupManager(worker.tracker).cleanup()
    insert(outside, (parents, numbered([1], name="stranger")))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(TakenOverError, match=r"since to_json\(\) wrote them down"):
            taker(text)
        gc.collect()
    assert not [each for each in said if "is gone while it held" in str(each.message)]
    assert sweep(outside).total_deleted == 0
    assert ids(outside, parents) == [1]


def test_who_handed_them_on_deletes_them_no_more(worker, taker, outside, parents):
    worker.writes((parents, numbered([1])))
    other = taker(worker.tracker.to_json())
    with pytest.raises(TakenOverError, match=r"from_json\(\)"):
        CleanupManager(worker.tracker).cleanup()
    assert ids(outside, parents) == [1]
    assert CleanupManager(other).cleanup().total_deleted == 1
    assert not entries(outside)


def test_what_was_made_after_the_text_is_not_handed_on(worker, taker, outside, parents):
    worker.writes((parents, numbered([1])))
    text = worker.tracker.to_json()
    worker.writes((parents, numbered([2])))
    assert CleanupManager(taker(text)).cleanup().total_deleted == 1
    assert ids(outside, parents) == [2]
    worker.dies()
    assert sweep(outside).total_deleted == 1
    assert not entries(outside)


def test_a_process_that_dies_with_rows_it_took_over_is_swept(
    worker, database, ledgers, outside, parents
):
    worker.writes((parents, numbered([1])))
    heir = Worker(database, ledgers, name="gw1")
    taken = ResourceTracker.from_json(worker.tracker.to_json(), heir.engine, ledger=heir.ledger)
    taken.dismiss_leak_warning()
    assert sweep(outside).total_deleted == 0
    heir.dies()
    assert sweep(outside).total_deleted == 1
    assert not entries(outside)


def test_resources_are_handed_on_with_their_intents(worker, taker, outside, parents):
    removed = []
    external_handler("handed on", replace=True)(removed.append)
    with worker:
        worker.tracker.track_external("handed on", {"n": 1})
        insert(worker.engine, (parents, numbered([1])))
    text = worker.tracker.to_json()
    worker.dies()
    CleanupManager(taker(text)).cleanup()
    assert removed == [{"n": 1}]
    assert not entries(outside)
    assert not ids(outside, parents)


def test_without_entries_the_text_is_as_ever(database, outside, parents):
    engine = database.engine()
    tracker = ResourceTracker(engine)
    with tracker.start().session as session:
        session.execute(sa.insert(parents), numbered([1]))
        session.commit()
    tracker.stop()
    text = tracker.to_json()
    assert json.loads(text)["ledger"] is None
    assert CleanupManager(ResourceTracker.from_json(text, engine)).cleanup().total_deleted == 1
    tracker.dismiss_leak_warning()
