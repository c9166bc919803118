"""Run behave in several processes at once, on one database: each has its share of the features.

python behave_parallel.py -n 8

The database is SHOP_DATABASE_URL's, else a new SQLite file. What a killed process has left is
deleted when all have ended. Ends with 1 if a process has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.models import AuditRow
from tidyrows import sweep

HERE = Path(__file__).parent


def behave(arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", "behave", "--format=progress", *arguments],
        cwd=HERE,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main(processes, features, tags):
    run = uuid.uuid4().hex
    shares = [[*tags, *share] for n in range(processes) if (share := features[n::processes])]
    with tempfile.TemporaryDirectory() as folder:
        url = os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{Path(folder, 'shop.db')}"
        # One run, and a number for each worker: so the rows are entered into the ledger, and no two
        # processes ever make the same value.
        ours = {"SHOP_DATABASE_URL": url, "TIDYROWS_RUN": run}
        numbered = [{**ours, "TIDYROWS_WORKER_INDEX": str(n)} for n in range(len(shares))]
        with ThreadPoolExecutor(len(shares)) as pool:
            ended = list(pool.map(behave, shares, numbered))
        for each in ended:
            print(each.stdout)
        if any(each.returncode < 0 for each in ended):
            print("sweep:", sweep(url, run=run, own=[AuditRow]))
    return any(each.returncode for each in ended)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Run behave in several processes at once.")
    options.add_argument("-n", type=int, default=8, help="how many processes")
    options.add_argument("--tags", action="append", default=[], help="as behave's")
    options.add_argument("features", nargs="*", help="files; by default all in features/")
    given = options.parse_args()
    files = given.features or sorted(map(str, HERE.glob("features/*.feature")))
    sys.exit(main(given.n, files, [f"--tags={each}" for each in given.tags]))
