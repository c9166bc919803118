"""Runs of the same suite in children of pytest: once more, and in other orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TAIL = 2000
_OURS = ("--tidy-audit", "--tidy-audit-seeds", "--tidy-audit-json", "--tidy-audit-html")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the suite.

    Attributes:
        name: ``as it is``, ``once more``, ``seed 1``.
        failed: by test, whether it failed; in the order in which they ran.
        seed: of its order; None for the suite's own.
        said: what went wrong with the run itself, with the end of what it printed.
    """

    name: str
    failed: dict[str, bool]
    seed: int | None = None
    said: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """How the suite was started.

    Attributes:
        arguments: of pytest, as they were given.
        folder: where.
        seconds: the longest that a run may take.
        extra: arguments that keep a run from writing over what the first one wrote.
    """

    arguments: Sequence[str]
    folder: Path
    seconds: float
    extra: Sequence[str] = field(default=())

    def run(self, name: str, order: Sequence[str], seed: int | None = None) -> Run:
        """Run it again.

        Args:
            name: what to call this run.
            order: the ids of the tests, in the order in which they ran first.
            seed: run them in the order of this seed instead.
        """
        with tempfile.TemporaryDirectory(prefix="tidyrows-audit-") as made:
            folder = Path(made)
            told, plan, printed = folder / "told", folder / "plan", folder / "printed"
            said = {"order": list(order), "seed": seed, "told": str(told)}
            plan.write_text(json.dumps(said), encoding="utf-8")
            command = [
                *(sys.executable, "-m", "pytest", *without_ours(self.arguments), *self.extra),
                *(
                    "--maxfail=0",
                    "-o",
                    f"cache_dir={folder / 'cache'}",
                    f"--tidy-audit-again={plan}",
                ),
            ]
            with printed.open("wb") as output:
                fault = self._wait(command, output.fileno())
            failed = dict(_told(told))
            if fault is None and order and not failed:
                fault = "it ran no test"
            if fault is not None:
                end = printed.read_bytes()[-_TAIL:].decode(errors="replace")
                fault = f"{fault}; the end of what it printed:\n{end}"
            return Run(name, failed, seed, fault)

    def _wait(self, command: list[str], output: int) -> str | None:
        """Until it has ended; its whole group is ended where it takes too long."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_CURRENT")}
        with subprocess.Popen(  # noqa: S603 -- the command that this very process was started with
            command,
            cwd=self.folder,
            env={**inherited, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                _end(process)
                return f"it was ended after {self.seconds:.0f} s"
            except BaseException:
                _end(process)
                raise
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started itself."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def without_ours(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, but for those that ask for the audit."""
    skip = False
    for argument in arguments:
        name, equals, _value = argument.partition("=")
        if skip:
            skip = False
        elif name in _OURS:
            skip = not equals and name != _OURS[0]
        else:
            yield argument


def _told(file: Path) -> Iterator[tuple[str, bool]]:
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            test, failed = json.loads(line)
            yield test, failed
