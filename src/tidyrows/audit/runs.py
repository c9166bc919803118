"""Runs of the same suite: once more, in other orders, and of a few of its tests."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

T = TypeVar("T")

_TAIL = 2000
_AUDIT = ("--tidy-audit", "--tidy-audit-seeds", "--tidy-audit-json", "--tidy-audit-html")


class RunKind(Enum):
    """Which tests ran, and in which order."""

    OWN = "own"  # all, in the order of the suite
    SEED = "seed"  # all, in another one
    ALONE = "alone"  # one
    AFTER = "after"  # one, after some of those that had run before it


@dataclass(frozen=True, slots=True)
class AuditRun:
    """One run of the suite.

    Attributes:
        name: for people.
        failed: whether it failed, by test, in the order in which they ran.
        seed: of its order.
        fault: why it did not come to its end.
        kind: see there.
        changed: what was not as before the audit when it began.
    """

    name: str
    failed: dict[str, bool]
    seed: int | None = None
    fault: str | None = None
    kind: RunKind = RunKind.OWN
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SuiteCommand:
    """How the suite was started.

    Attributes:
        arguments: of pytest.
        folder: where.
        seconds: how long a run may take.
        environment: of its start.
        separate: more arguments, which keep a run in its own folder.
        swept: is called with the id of a run that was killed or has crashed.
    """

    arguments: Sequence[str]
    folder: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    separate: Callable[[Path], Iterable[str]] = lambda _folder: ()
    swept: Callable[[str], None] = lambda _run: None

    def run(self, name: str, order: Sequence[str], seed: int | None = None) -> AuditRun:
        """Run these tests again."""
        with (
            tempfile.TemporaryDirectory(prefix="tidyrows-audit-") as made,
            _lifeline() as descriptors,
        ):
            folder = Path(made)
            outcomes, plan, printed = folder / "outcomes", folder / "plan", folder / "printed"
            content = {"order": list(order), "seed": seed, "outcomes": str(outcomes)}
            plan.write_text(json.dumps({**content, "lifeline": [*descriptors]}), encoding="utf-8")
            command = [
                *(sys.executable, "-m", "pytest", *without_audit(self.arguments)),
                *(*self.separate(folder), "--maxfail=0", f"--tidy-audit-again={plan}"),
            ]
            fault: str | None = "it was interrupted"
            try:
                with printed.open("wb") as output:
                    fault = self._wait(command, output.fileno(), descriptors)
            finally:
                written = outcomes.read_text(encoding="utf-8") if outcomes.exists() else ""
                told = [json.loads(line) for line in written.splitlines() if line.endswith("]")]
                if fault is not None:
                    for _nothing, run in (each for each in told if each[0] is None):
                        self.swept(run)
            failed: dict[str, bool] = dict(each for each in told if each[0] is not None)
            if order and not failed:
                fault = fault or "it ran no test"
            if fault is not None:
                end = printed.read_bytes()[-_TAIL:].decode(errors="replace")
                fault = f"{fault}; the end of what it printed:\n{end}"
            return AuditRun(name, failed, seed, fault)

    def _wait(self, command: list[str], output: int, descriptors: Sequence[int]) -> str | None:
        """Wait for its end; kill its whole process group where it takes too long."""
        with subprocess.Popen(  # noqa: S603 -- the command that this very process was started with
            command,
            cwd=self.folder,
            env={**self.environment, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
        ) as process:
            try:
                code = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                _kill(process)
                return f"it was ended after {self.seconds:.0f} s"
            except BaseException:
                _kill(process)
                raise
        return None if code in {0, 1} else f"it ended with exit code {code}"


@contextmanager
def _lifeline() -> Iterator[tuple[int, ...]]:
    """A pipe that closes when this process ends; the run ends with it."""
    if not hasattr(os, "killpg"):
        yield ()
        return
    theirs, ours = os.pipe()
    try:
        yield (theirs,)
    finally:
        os.close(ours)
        os.close(theirs)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and the processes that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def without_audit(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments without those of the audit."""
    skip = False
    for argument in arguments:
        name, equals, _value = argument.partition("=")
        if skip:
            skip = False
        elif name in _AUDIT:
            skip = not equals and name != _AUDIT[0]
        else:
            yield argument


def shuffled(items: Iterable[T], seed: int, name: Callable[[T], str]) -> list[T]:
    """The items in the order of a seed.

    Two tests keep their order whichever others are there, so that a few of them can be run alone in
    the order in which one failed.
    """

    def place(item: T) -> tuple[str, ...]:
        module, _, inner = name(item).partition("::")
        inner = inner.partition("[")[0]  # what a test is given may have colons too
        group = inner.rpartition("::")[0] or inner
        parts = (module, f"{module}::{group}", name(item))
        return tuple(hashlib.sha256(f"{seed} {part}".encode()).hexdigest() for part in parts)

    return sorted(items, key=place)


def as_listed(items: Iterable[T], order: Sequence[str], name: Callable[[T], str]) -> list[T]:
    """The items in the order of a list of their names, without those that are not in it."""
    places = {each: place for place, each in enumerate(order)}
    return sorted((i for i in items if name(i) in places), key=lambda item: places[name(item)])
