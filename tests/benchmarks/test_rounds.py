"""Create-and-clean rounds a second, of several processes at once, against cleaning by hand.

A round: an org, five users, four orders with two lines each, in four calls with a commit each; then
all of it deleted. By hand: plain factory_boy with the same declarations and commits, and four
DELETEs.

Run: python -m pytest tests/benchmarks/test_rounds.py -m benchmark -s
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from storm import shop

WORKER = Path(__file__).parent / "rounds_worker.py"
ROUNDS, PAIRS = 30, 3


def rate(url, kind, workers):
    """Rounds a second of all processes together."""
    given = json.dumps({"url": url, "kind": kind, "rounds": ROUNDS})
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(workers)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return sum(ROUNDS / float(output) for output in outputs)


@pytest.mark.benchmark
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["unverified", "verified"])
def test_rounds_against_cleaning_by_hand(database, kind, workers):
    engine = database.engine()
    shop.Base.metadata.create_all(engine)
    url = database.url.render_as_string(hide_password=False)
    ours, theirs = [], []
    for number in range(PAIRS):
        for which in (kind, "by hand") if number % 2 else ("by hand", kind):
            (theirs if which == "by hand" else ours).append(rate(url, which, workers))
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    goal = "0.6x or more" if kind == "verified" else "0.8x or more"
    print(
        f"\n{workers} workers, {kind}: {statistics.median(ours):.0f} against "
        f"{statistics.median(theirs):.0f} rounds a second, {ratio:.2f}x ({goal})"
    )
