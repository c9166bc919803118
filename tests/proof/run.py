"""The shop's suite again and again, in random order, with one worker killed at random each time.

python tests/proof/run.py --runs 20 --workers 8 [--url postgresql+psycopg://...]

Every row of every table is compared before and after each run. Prints a line per run, and at the
end how many rows were left. Linux only: it finds the workers in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent
SHOP = TESTS.parent / "examples" / "shop"
sys.path.insert(0, str(TESTS))

from harness.suites import fresh_environment  # noqa: E402 -- as a script it has no other way there

_WORKER = b"exec(eval(sys.stdin.readline()))"


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        killed: whether a worker was.
        left: how many rows were left.
        text: all that was printed.
    """

    killed: bool
    left: int
    text: str

    @property
    def as_expected(self) -> bool:
        """Whether nothing failed but the test whose worker was killed."""
        failed = re.search(r"(\d+) failed", self.last)
        return "error" not in self.last and int(failed[1] if failed else 0) <= self.killed

    @property
    def last(self) -> str:
        """Pytest's closing line."""
        found = re.findall(r"^=* ?(\d+ .* in [\d.]+s.*?) ?=*$", self.text, re.MULTILINE)
        return found[-1] if found else "no closing line"


def once(url: str | None, workers: int, chance: random.Random) -> Run:
    """One run, in which a worker is killed once tests are being run."""
    command = [sys.executable, "-u", "left.py", "--", sys.executable, "-u", "-m", "pytest"]
    command += ["tests_pytest", "-n", str(workers), "-p", "no:cacheprovider", "-v"]
    environment = fresh_environment()
    if url is not None:
        environment["SHOP_DATABASE_URL"] = url
    process = subprocess.Popen(
        [*command, f"--randomly-seed={chance.randrange(2**31)}"],
        cwd=SHOP,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    after = chance.randrange(1, 30)
    lines: list[str] = []
    killed = False
    for line in process.stdout:
        lines.append(line)
        done = sum("PASSED" in each for each in lines)
        if not killed and done >= after:
            killed = strike(process.pid, chance)
    process.wait(60)
    text = "".join(lines)
    (left,) = re.findall(r"^(\d+) rows left$", text, re.MULTILINE)[-1:] or ["-1"]
    return Run(killed, int(left), text)


def strike(root: int, chance: random.Random) -> bool:
    """Kill one of the workers below a process, at a moment nobody chose; whether there was one."""
    found = [pid for pid in descendants(root) if _WORKER in command_of(pid)]
    if not found:
        return False
    threading.Event().wait(chance.random() * 0.2)
    try:
        os.kill(chance.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def descendants(root: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> bytes:
    """What a process was started as; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main() -> int:
    """Run, print, and say by the exit code whether nothing was left."""
    parser = argparse.ArgumentParser(description="The shop's suite with a worker killed each time.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--url", help="the shop's database; a new SQLite file by default")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    print(f"seed {given.seed}", flush=True)
    left = 0
    for number in range(1, given.runs + 1):
        run = once(given.url, given.workers, chance)
        left += abs(run.left)
        killed = "a worker killed" if run.killed else "NO worker killed"
        print(f"run {number}: {killed}, {run.left} rows left; {run.last}", flush=True)
        if run.left or not run.as_expected:
            path = Path(tempfile.gettempdir()) / f"proof-{given.seed}-{number}.txt"
            path.write_text(run.text)
            print(f"  all that it printed: {path}", flush=True)
    print(f"{left} rows left in {given.runs} runs")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
