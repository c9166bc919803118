"""A checkout, SELECT 1 and the return of a connection, against a plain engine with pre-ping.

Run: python -m pytest tests/benchmarks/test_connections.py -m benchmark -s
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from benchmarks.measure import paired, say, seconds
from tidyrows import worker_engine

TIMES, PAIRS = 50, 31
ONE = sa.text("SELECT 1")


def rounds(engine):
    def work():
        for _ in range(TIMES):
            with engine.connect() as connection:
                connection.scalar(ONE)

    return lambda: seconds(work) / TIMES


@pytest.mark.benchmark
def test_a_checkout_against_a_plain_engine(database):
    ours = worker_engine(database.url, reserve=0)
    theirs = sa.create_engine(database.url, pool_pre_ping=True)
    figures = paired(rounds(ours), rounds(theirs), PAIRS, least=True)
    say(f"checkout, SELECT 1, return on {database.target}", *figures, "at most 1.1x")
    ours.dispose()
    theirs.dispose()


@pytest.mark.benchmark
def test_a_new_name_for_each_checkout(database, monkeypatch):
    """Each checkout is another test's."""
    ours = worker_engine(database.url, reserve=0)
    theirs = sa.create_engine(database.url, pool_pre_ping=True)
    number = 0

    def named():
        nonlocal number
        for _ in range(TIMES):
            number += 1
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"test_a.py::test_{number} (call)")
            with ours.connect() as connection:
                connection.scalar(ONE)

    figures = paired(lambda: seconds(named) / TIMES, rounds(theirs), PAIRS, least=True)
    say(f"the same with another test each time on {database.target}", *figures, "no goal")
    ours.dispose()
    theirs.dispose()
