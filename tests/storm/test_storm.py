"""The storm in short, with every fault; ``-m soak`` for the long one, ``run.py`` for any other."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from harness.own_servers import own_server
from harness.servers import AbsentError, everything_required
from storm.run import ALL, possible, storm, with_database

ROUNDS = 40


def run(backend, tmp_path, **options):
    with ExitStack() as stack:
        server = None
        if backend == "sqlite":
            url = sa.URL.create("sqlite", database=str(tmp_path / "storm.db"))
        else:
            try:
                server = stack.enter_context(own_server(backend))
            except AbsentError as absent:
                if everything_required():
                    pytest.fail(str(absent), pytrace=False)
                pytest.skip(f"{absent}; not at hand")
            url = with_database(server.start())
        result = storm(url, server=server, **options)
    print("\n".join(result.lines))
    assert result.wrong == []
    return result


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql", "mysql"])
def test_a_storm_of_eight_workers_leaks_nothing_and_no_error_reaches_a_test(backend, tmp_path):
    faults = possible(backend, own=True)
    result = run(backend, tmp_path, workers=8, rounds=ROUNDS, faults=faults, seconds=150)
    assert result.rounds == ROUNDS
    if backend != "sqlite":  # whose one writer is waited for, mostly without an error
        assert result.met.total() > 0  # or nothing was in the way


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["postgresql", pytest.param("mysql", marks=pytest.mark.soak)])
def test_without_faults_no_cleanup_deadlocks_with_another(backend, tmp_path):
    result = run(backend, tmp_path, workers=8, rounds=ROUNDS, faults=(), seconds=150)
    assert result.rounds == ROUNDS
    assert result.met["deadlocks in cleanup"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("faults", [ALL, ()], ids=["faults", "calm"])
@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_ten_thousand_rounds_of_thirty_two_workers(backend, faults, tmp_path):
    result = run(backend, tmp_path, workers=32, rounds=10_000, faults=faults, seconds=3600)
    assert result.rounds >= 10_000
    if not faults:
        assert result.met["deadlocks in cleanup"] == 0
