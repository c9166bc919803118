"""Runs of the same suite in other processes: once more, and in other orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_TAIL = 2000
_AUDIT = ("--tidy-audit", "--tidy-audit-seeds", "--tidy-audit-json", "--tidy-audit-html")


@dataclass(frozen=True, slots=True)
class AuditRun:
    """One run of the suite."""

    name: str
    failed: dict[str, bool]
    seed: int | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class SuiteCommand:
    """How the suite was started."""

    arguments: Sequence[str]
    folder: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    separate: Callable[[Path], Iterable[str]] = lambda _folder: ()

    def run(self, name: str, order: Sequence[str], seed: int | None = None) -> AuditRun:
        """Run it again."""
        with tempfile.TemporaryDirectory(prefix="tidyrows-audit-") as made, _lifeline() as held:
            folder = Path(made)
            outcomes, plan, printed = folder / "outcomes", folder / "plan", folder / "printed"
            content = {"order": list(order), "seed": seed, "outcomes": str(outcomes)}
            plan.write_text(json.dumps({**content, "lifeline": [*held]}), encoding="utf-8")
            command = [
                *(sys.executable, "-m", "pytest", *without_audit(self.arguments)),
                *(*self.separate(folder), "--maxfail=0", f"--tidy-audit-again={plan}"),
            ]
            with printed.open("wb") as output:
                fault = self._wait(command, output.fileno(), held)
            failed = dict(_read_outcomes(outcomes))
            if order and not failed:
                fault = fault or "it ran no test"
            if fault is not None:
                end = printed.read_bytes()[-_TAIL:].decode(errors="replace")
                fault = f"{fault}; the end of what it printed:\n{end}"
            return AuditRun(name, failed, seed, fault)

    def _wait(self, command: list[str], output: int, held: Sequence[int]) -> str | None:
        """Wait for its end; kill its whole process group where it takes too long."""
        with subprocess.Popen(  # noqa: S603 -- the command that this very process was started with
            command,
            cwd=self.folder,
            env={**self.environment, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=held,
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
    held, ours = os.pipe()
    try:
        yield (held,)
    finally:
        os.close(ours)
        os.close(held)


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


def _read_outcomes(file: Path) -> Iterator[tuple[str, bool]]:
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            test, failed = json.loads(line)
            yield test, failed
