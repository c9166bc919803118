"""Runs of the same suite once more and in other orders, and the tests that fail only in some."""

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
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tidyrows.audit.findings import Finding, FindingKind, function
from tidyrows.audit.row_history import RowAccess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tidyrows.audit.row_history import RowHistory

T = TypeVar("T")

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
            with printed.open("wb") as output:
                fault = self._wait(command, output.fileno(), descriptors)
            written = outcomes.read_text(encoding="utf-8") if outcomes.exists() else ""
            failed: dict[str, bool] = dict(json.loads(line) for line in written.splitlines())
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


_NAMED = 3


def rerun(
    first: AuditRun, seeds: Sequence[int], run: Callable[[str, int | None], AuditRun]
) -> Iterator[AuditRun]:
    """The runs after the first, each when it is asked for.

    Once more in the same order, since a test that fails then fails in any order; in the order of
    each seed; and where a test failed in these only, in the first order again: it tells whether the
    order is the cause, or what the runs before have left.
    """
    again = run("once more in its own order", None)
    yield again
    others = []
    for seed in seeds:
        others.append(run(f"seed {seed}", seed))
        yield others[-1]
    passing = [test for test in first.failed if not _fails(first, test) and not _fails(again, test)]
    if any(_fails(each, test) for each in others for test in passing):
        yield run("at last in its own order", None)


def order_findings(runs: Sequence[AuditRun], history: RowHistory) -> Iterator[Finding]:
    """What is wrong by the outcomes of the runs."""
    own = [each for each in runs if each.seed is None]
    others = [each for each in runs if each.seed is not None]
    for test, failed in runs[0].failed.items():
        bad = [each for each in others if _fails(each, test)]
        good = [each for each in others if each.failed.get(test) is False]
        if failed:
            if good and all(_fails(each, test) for each in own[1:]):
                text = f"fails in its own order, passes with --tidy-audit-order {good[0].seed}"
                yield _ordered(test, text, own[0], good[0], history)
        elif any(_fails(each, test) for each in own[1:]):
            yield _not_twice(test, next(each for each in own[1:] if _fails(each, test)), history)
        elif bad:
            text = f"passes in its own order, fails with --tidy-audit-order {bad[0].seed}"
            if len(bad) > 1:
                text += f" ({len(bad)} of {len(others)} orders)"
            yield _ordered(test, text, bad[0], own[0], history)


def _ordered(test: str, text: str, bad: AuditRun, good: AuditRun, history: RowHistory) -> Finding:
    suspects = _suspects(test, bad, good, history)
    text += f"; perhaps because of {', '.join(suspects)}" if suspects else ""
    cure = "let it make all that it needs"
    if suspects:
        cure += f", and {function(suspects[0])} delete what it makes: take the tidy fixture"
    return Finding(test, FindingKind.ORDER, text, cure, others=suspects)


def _not_twice(test: str, run: AuditRun, history: RowHistory) -> Finding:
    leavers = history.leavers(test)
    suspects = [test] if test in leavers else [name for name, _n in leavers.most_common(_NAMED)]
    text = f"passes the first time, fails {run.name}"
    if suspects:
        named = "it" if suspects == [test] else ", ".join(suspects)
        text += f", in tables where {named} left rows"
    cure = "take the tidy fixture, or set tidy_autouse = true in the ini file"
    return Finding(test, FindingKind.TWICE, text, cure, others=suspects)


def _suspects(test: str, bad: AuditRun, good: AuditRun, history: RowHistory) -> list[str]:
    """The tests that ran before it in one run and after it in the other, and share its tables.

    First those whose rows it read or changed, then those that left rows in its tables.
    """
    moved = _before(bad, test) ^ _before(good, test)
    met = [
        maker.name
        for toucher, touched in history.touched.items()
        if toucher.name == test
        for (_access, _table, maker) in sorted(
            touched, key=lambda key: key[0] is not RowAccess.READS
        )
    ]
    leavers = [name for name, _count in history.leavers(test).most_common()]
    return [name for name in dict.fromkeys([*met, *leavers]) if name in moved and name != test][
        :_NAMED
    ]


def _before(run: AuditRun, test: str) -> set[str]:
    names = list(run.failed)
    return set(names[: names.index(test)]) if test in run.failed else set()


def _fails(run: AuditRun, test: str) -> bool:
    return run.failed.get(test) is True


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
