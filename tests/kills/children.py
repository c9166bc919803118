"""Real child processes, which tell where they are, and are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from harness.forks import Process

HERE = Path(__file__).parent
MARKS = {
    b"i": "imported everything, and waits for a line",
    b"o": "opens the ledger",
    b"c": "creates",
    b"k": "cleans up",
    b"s": "sweeps",
    b"e": "is about to send a statement",
    b"b": "is about to send a COMMIT",
    b"a": "has had the answer to a COMMIT",
    b"f": "keeps what it has made, since it has failed",
    b"<7:3>": "keeps 3 things under the name kept000000000007; <7:> lets go of them",
    b"(7)": "owns the notes 'told 7', which were committed before",
    b"!": "is where it was to be struck",
    b"r": "has ended a round",
}
PHASES = {"o": "opening", "c": "creation", "k": "cleanup", "f": "keeping", "s": "sweep"}
SINCE = {"b": "in COMMIT", "a": "after COMMIT", "e": "at a statement", "": "before anything"}
SECONDS = 60


def _alone() -> dict[str, str]:
    """The environment without what makes this process a worker: each child is one of its own."""
    mine = ("PYTEST_XDIST_", "TIDYROWS_", "_TIDYROWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(mine)}


class Child:
    """A worker or a sweep, of which the parent reads the marks.

    Args:
        given: the arguments of ``worker.main``.

    Attributes:
        trail: its marks so far.
        told: the names of notes that it owns since it was told.
    """

    def __init__(self, given: dict[str, Any], script: str = "worker.py") -> None:
        self.given = given
        self.trail = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the child
        self._news = threading.Condition()
        self._over = False
        self._process = Process(
            [sys.executable, str(HERE / script), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env=_alone(),
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        out = self._process.stdout
        assert out is not None
        while said := os.read(out.fileno(), 65536):
            with self._news:
                self.trail += said
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def line(self, text: str = "go") -> None:
        """Write a line to it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it is over is told at its end
            self._process.stdin.write(f"{text}\n".encode())

    def wait_for(self, mark: bytes, count: int = 1, *, seconds: float = SECONDS) -> bool:
        """Whether it has come to so many of these marks, before it ended."""
        with self._news:
            self._news.wait_for(lambda: self._over or self.trail.count(mark) >= count, seconds)
            return self.trail.count(mark) >= count

    def ended(self, seconds: float) -> bool:
        """Whether it ends by itself in that time."""
        with self._news:
            return self._news.wait_for(lambda: self._over, seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> str:
        """Kill it, whatever it does; what it complained of, where it had ended by itself."""
        alive = self._process.poll() is None
        if alive:
            os.kill(self.pid, signal.SIGKILL)
        code = self._process.wait(SECONDS)
        return self._closed(code) if code != -signal.SIGKILL else self._closed(0)

    def leave(self) -> str:
        """Let it end by itself; what it complained of."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = -1
        return self._closed(code)

    def _closed(self, code: int) -> str:
        if self._errors.closed:
            return ""
        self._reader.join(SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._errors.seek(0)
        said = self._errors.read().decode()
        self._errors.close()
        return f"ended with {code}:\n{said[-4000:]}" if code or said else ""

    @property
    def killed(self) -> bool:
        """Whether SIGKILL was its end."""
        return self._process.returncode == -signal.SIGKILL

    @property
    def told(self) -> set[int]:
        return {int(name) for name in re.findall(rb"\((\d+)\)", self.trail)}

    @property
    def kept(self) -> dict[str, int]:
        """How many things are kept, by name."""
        said = {int(n): count for n, count in re.findall(rb"<(\d+):(\d*)>", self.trail)}
        return {f"kept{n:012x}": int(count) for n, count in said.items() if count}

    def where(self) -> str:
        """Where it was struck."""
        marks = re.sub(r"\(\d*\)?|<[\d:]*>?|[!ir]", "", self.trail.decode())
        phase = max(PHASES, key=marks.rfind)
        since = marks[marks.rfind(phase) + 1 :][-1:]
        return f"{PHASES[phase]}, {SINCE[since]}"


def strike(child: Child, blow: dict[str, Any]) -> str:
    """Kill a child where the blow says, or when its seconds are over; what was wrong."""
    if "seconds" in blow:
        child.ended(blow["seconds"])
    else:
        child.wait_for(b"!")
        if blow["linger"]:
            time.sleep(blow["linger"])
    return child.end()


class Stepper(Child):
    """A worker that does what it is told: see ``stepper.Steps``."""

    def __init__(self, url: sa.URL, **given: Any) -> None:
        text = url.render_as_string(hide_password=False)
        super().__init__({"url": text, **given}, "stepper.py")
        self._answers = 0
        self._answer()

    def __call__(self, step: str, *given: Any) -> Any:
        """Its answer."""
        self.line(json.dumps([step, *given]))
        return self._answer()

    def _answer(self) -> Any:
        self._answers += 1
        if not self.wait_for(b"\n", self._answers):
            raise AssertionError(f"no answer: {self.end() or 'it goes on'}")
        return json.loads(self.trail.splitlines()[self._answers - 1])
