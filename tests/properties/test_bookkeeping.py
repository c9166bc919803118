"""The commit is the truth, whatever sequence of transactions leads to it."""

from __future__ import annotations

from hypothesis.stateful import run_state_machine_as_test

from harness.databases import Database
from properties.machine import TransactionMachine


def test_the_tracker_holds_what_is_committed_after_each_step(database: Database) -> None:
    class Machine(TransactionMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(Machine)
