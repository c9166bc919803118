"""Behind PgBouncer in transaction mode ledger, heartbeat, cleanup and sweep are as right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from harness.bystanders import Bystanders
from harness.forks import Process
from harness.pgbouncer import DRIVER_OPTIONS, pgbouncer
from harness.servers import AbsentError, everything_required
from storm import shop
from tidyrows import (
    ArgumentError,
    CleanupManager,
    IsolationError,
    Ledger,
    ResourceTracker,
    advisory_lock,
    find_orphans,
    isolate,
    prune,
    sweep,
    try_advisory_lock,
)

pytestmark = pytest.mark.slow

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
import sqlalchemy as sa
from storm import shop
from tidyrows import CleanupManager, Ledger, ResourceTracker

engine = sa.create_engine(sys.argv[1], connect_args={"prepare_threshold": None})
manager = CleanupManager(ResourceTracker(engine, ledger=Ledger(engine)))
with manager:
    shop.OrderFactory()
    print("made", flush=True)
    sys.stdin.readline()
print(manager.report.total_deleted, flush=True)
"""


@pytest.fixture
def pooled(postgresql_engine):
    """An engine through the pooler, whose two servers its clients share with two hearts' locks."""
    try:
        with pgbouncer(postgresql_engine.url, servers=4) as url:
            engine = sa.create_engine(url, connect_args=DRIVER_OPTIONS)
            shop.Base.metadata.create_all(engine)
            Ledger(engine).install()
            yield engine
            engine.dispose()
    except AbsentError as absent:
        if everything_required():
            pytest.fail(str(absent), pytrace=False)
        pytest.skip(str(absent))


def worker(engine):
    url = engine.url.render_as_string(hide_password=False)
    tests = str(Path(__file__).parent.parent)
    process = Process(
        [sys.executable, "-c", WORKER, url, tests],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "made\n"
    return process


def test_what_a_killed_worker_left_is_swept_and_a_live_one_keeps_its_rows(
    pooled, postgresql_engine
):
    with postgresql_engine.begin() as connection:
        connection.execute(sa.insert(shop.Org).values(name="a stranger's"))
    bystanders = Bystanders(postgresql_engine)
    dead, alive = worker(pooled), worker(pooled)
    dead.kill()
    dead.communicate()

    (left,) = find_orphans(pooled)
    assert sum(left.rows.values()) == 5
    assert sweep(pooled).total_deleted == 5
    assert find_orphans(pooled) == []

    out, _ = alive.communicate("clean up\n", timeout=60)
    assert (alive.returncode, out) == (0, "5\n")
    bystanders.assert_untouched()


def test_creating_and_cleaning_leaves_nothing_in_the_ledger(pooled, postgresql_engine):
    ledger = Ledger(pooled, beat=0.05)  # many beats on whatever server is free
    bystanders = Bystanders(postgresql_engine)
    for _ in range(5):
        tracker = ResourceTracker(pooled, ledger=ledger)
        with CleanupManager(tracker) as cleanup:
            shop.UserFactory.create_batch(3)
        assert cleanup.report.total_deleted == 6
    ledger.close()
    bystanders.assert_untouched()


@pytest.mark.parametrize("level", ["worker", "transaction"])
def test_levels_without_a_lock_of_a_session_are_as_right(pooled, postgresql_engine, level):
    before = Bystanders(postgresql_engine)
    with isolate(pooled, level) as db:
        shop.OrderFactory.scoped_to(db.tracker).create()
        assert len(db.tracker) > 1
    before.assert_untouched()


def test_what_a_session_would_have_to_hold_is_refused_by_name(pooled, postgresql_engine):
    for level in ("schema", "database"):
        with pytest.raises(IsolationError, match=r"PgBouncer.*an engine that connects to the ser"):
            isolate(pooled, level, metadata=shop.Base.metadata).open()
    with pytest.raises(IsolationError, match="PgBouncer"):
        prune(pooled, older_than=0)
    with pytest.raises(ArgumentError, match="Leave session=True away"):
        advisory_lock(pooled, "seed", session=True).__enter__()
    with advisory_lock(pooled, "seed"), try_advisory_lock(postgresql_engine, "seed") as held:
        assert not held
    with advisory_lock(postgresql_engine, "seed", timeout=0, session=True):
        pass  # nobody was left with it
