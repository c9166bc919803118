"""The commit is the truth, whatever sequence of transactions leads to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from harness.databases import Database
from properties.examples import emptied
from properties.machine import TransactionMachine

TIMES = 3
"""Sequences are short and many matter: so many times the examples of other tests."""


def test_the_tracker_holds_what_is_committed_after_each_step(database: Database) -> None:
    class Machine(TransactionMachine):
        pass

    with emptied(database) as Machine.database:
        many = settings(max_examples=TIMES * settings().max_examples)
        run_state_machine_as_test(Machine, settings=many)
