"""The kills in short; ``run.py`` for any other number."""

from __future__ import annotations

import random

import pytest

from harness.targets import mostly_on
from kills.run import Result, Scene, kills
from tidyrows import sweep

pytestmark = pytest.mark.slow
KILLS = 4


def test_whatever_is_killed_a_sweep_leaves_nothing_and_touches_no_stranger(database, tmp_path):
    schema = None if database.backend == "sqlite" else database.extra_schema()
    result = kills(database.url, tmp_path, count=KILLS, schema=schema)
    print(result)
    assert result.wrong == []
    assert result.kills >= KILLS


@mostly_on("postgresql+psycopg")
def test_a_sweep_takes_nothing_of_workers_that_live(database, tmp_path):
    """They raise where a row of theirs has gone before their own cleanup, or was taken over."""
    result = Result()
    scene = Scene(database.url, tmp_path, result, random.Random(1))
    workers = [scene.worker(), scene.worker()]
    for each in workers:
        assert each.wait_for(b"i")
        each.line()
    for number in range(5):
        for each in workers:
            assert each.wait_for(b"c", number + 1), each.end()  # they are at it
        sweep(scene.url, patience=0.0)
    assert [each.leave() for each in workers] == ["", ""]
    assert all(each.trail.count(b"r") >= 4 for each in workers)
    scene.swept("plain", workers)
    scene.compared(workers)
    scene.engine.dispose()
    assert result.wrong == []
