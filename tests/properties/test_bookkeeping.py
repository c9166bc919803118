"""The commit is the truth, whatever sequence of transactions leads to it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from harness.databases import Database
from harness.targets import on
from properties.examples import emptied
from properties.machine import TransactionMachine

TIMES = 2
"""Sequences are short and many matter: so many times the examples of other tests."""


def _run(database: Database) -> None:
    class Machine(TransactionMachine):
        pass

    with emptied(database) as Machine.database:
        many = settings(max_examples=TIMES * settings().max_examples)
        run_state_machine_as_test(Machine, settings=many)


@on("sqlite", "postgresql+psycopg")
def test_the_tracker_holds_what_is_committed_after_each_step(database: Database) -> None:
    _run(database)


@pytest.mark.soak
@on("mysql+pymysql")
def test_so_it_does_on_mariadb(database: Database) -> None:
    """On request: what a busy server refuses there changes the sequence, which hypothesis minds."""
    _run(database)
