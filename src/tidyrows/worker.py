"""The run, the worker and the test that are running, and values that only they produce.

A **tag** is at most 16 lower-case letters and digits:

====== ======= ==============================================================================
part   length  meaning
====== ======= ==============================================================================
run    7       the run id's SHA-256, reduced to 36**7 values (36 bits)
worker 2       the worker's index, below 1000
test   2       the number of the test in this process (1 to 1295, then from 1 again);
               ``00`` outside a test
n      1 to 5  a counter: one per run and worker in a process, never reset
====== ======= ==============================================================================

Run, worker and counter make a tag unique; the test part is for people who look at the rows. Two
runs have the same run part with a probability of 1 in 7.8e10; among a thousand runs that share a
database, any two do with a probability of 6e-6. The first character of a counter gives its length,
so that no counter is the beginning of another: a tag with text behind it is never another tag.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import uuid
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from tidyrows.arguments import check, instance_of, optional, whole
from tidyrows.errors import ScopeError, WorkerContextError
from tidyrows.template import (
    ALPHABET,
    COUNTER_WIDTH,
    COUNTERS,
    RUN_WIDTH,
    TEST_WIDTH,
    WORKER_WIDTH,
    base36,
    counter_codes,
    fitted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

STRIDE = 1000
"""The distance between the integers of one worker of several; worker indexes are below it."""

_TESTS = len(ALPHABET) ** TEST_WIDTH - 1  # "00" is no test
_PYTEST, _TEST = "PYTEST_CURRENT_TEST", "TIDYROWS_TEST"
_CLAIM = "_TIDYROWS_CLAIM"  # the run and worker of a process, and its pid; children inherit it


class _ValueSource(NamedTuple):
    """What the values of one worker are made from."""

    run: str
    worker: str
    # next() on these is one step: two threads never get the same value.
    counters: Iterator[str]
    integers: Iterator[int]


class _ValueSources(dict[tuple[str, int], _ValueSource]):
    """The value source of each run id and worker index.

    The salt is mixed into the run part where this process has the run and worker ids of its parent:
    a child never produces its parent's values.
    """

    def __init__(self, salt: str) -> None:
        self.salt = salt

    def __missing__(self, key: tuple[str, int]) -> _ValueSource:
        run_id, worker_index = key
        digest = hashlib.sha256((run_id + self.salt).encode()).digest()
        run = int.from_bytes(digest, "big") % len(ALPHABET) ** RUN_WIDTH
        parts = base36(run, RUN_WIDTH), base36(worker_index, WORKER_WIDTH)
        return self.setdefault(key, _ValueSource(*parts, counter_codes(), count()))


def run_parts(run_id: str) -> set[str]:
    """What the tags of a run begin with: in its own processes, and in this one if it is a child."""
    return {sources[run_id, 0].run for sources in (_ValueSources(""), _process.sources)}


class _TestParts(dict[str | None, str]):
    """The test part of each test id."""

    def __init__(self) -> None:
        super().__init__({None: "0" * TEST_WIDTH})
        self._numbers = count()

    def __missing__(self, test_id: str) -> str:
        return self.setdefault(test_id, base36(next(self._numbers) % _TESTS + 1, TEST_WIDTH))


class _ProcessValues:
    """The values that this process has given out. A forked child begins anew."""

    def __init__(self, salt: str) -> None:
        self.begin(salt)

    def begin(self, salt: str) -> None:
        self.current: WorkerContext | None = None
        self.test: str | None = None
        self.sources = _ValueSources(salt)
        self.tests = _TestParts()

    def claim(self, run_and_worker: str) -> None:
        """Claim ids from the environment; add a salt if the parent process has claimed them."""
        mine = f"{run_and_worker} {os.getpid()}"
        before = os.environ.get(_CLAIM, "")
        if before.startswith(f"{run_and_worker} ") and before != mine and not self.sources.salt:
            self.sources = _ValueSources(uuid.uuid4().hex)
        os.environ[_CLAIM] = mine


def _initial_salt() -> str:
    # A child made by multiprocessing's spawn or forkserver imports this module again, so no fork
    # hook runs in it, but it has the environment of its parent.
    processes = sys.modules.get("multiprocessing.process")
    child = processes is not None and processes.parent_process() is not None
    return uuid.uuid4().hex if child else ""


_process = _ProcessValues(_initial_salt())

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _process.begin(uuid.uuid4().hex))


_TEXT = instance_of(str, need="a text", example="'gw3'")
_KINDS = {
    "run_id": _TEXT,
    "worker_id": _TEXT,
    "worker_index": whole("3"),
    "test_id": optional(_TEXT),
    "worker_count": whole("8"),
}


@dataclass(frozen=True)
class WorkerContext:
    """One test of one worker of one run.

    Attributes:
        run_id: one start of a test suite, the same in all its workers and in no other run.
        worker_id: the worker, as ``gw3``.
        worker_index: the worker's number, from 0 to 999, different in each worker of the run.
        test_id: the test, or None outside of one.
        worker_count: the number of workers with which the run began.

    Raises:
        WorkerContextError: an id is empty, or a number is out of its range.
        ArgumentError: an argument has a value of another type.

    Example:
        >>> context = WorkerContext("nightly-17", "gw3", 3, test_id="test_login", worker_count=8)
        >>> context.text("user-{tag}")
        'user-qr0wctk03010'
    """

    run_id: str
    worker_id: str
    worker_index: int
    test_id: str | None = None
    worker_count: int = 1

    def __post_init__(self) -> None:
        check("WorkerContext", _KINDS, vars(self).items())
        if not self.run_id or not self.worker_id:
            raise WorkerContextError(
                "A run and a worker need an id: give run_id and worker_id, or set TIDYROWS_RUN "
                "and TIDYROWS_WORKER."
            )
        if not 0 <= self.worker_index < STRIDE:
            raise WorkerContextError(
                f"The index of worker {self.worker_id!r} is {self.worker_index}, but a run can "
                f"number its workers from 0 to {STRIDE - 1} only. Set TIDYROWS_WORKER_INDEX to a "
                f"number of that range that no other worker of the run has."
            )
        if self.worker_count < 1:
            raise WorkerContextError(
                f"A run has at least one worker, not {self.worker_count}: see "
                f"TIDYROWS_WORKER_COUNT."
            )

    @classmethod
    def current(cls) -> WorkerContext:
        """The context of this process, read from the environment once, and again after a fork.

        TIDYROWS_RUN, TIDYROWS_WORKER, TIDYROWS_WORKER_INDEX, TIDYROWS_WORKER_COUNT and
        TIDYROWS_TEST come first, then the variables of pytest-xdist. Without a run id the run is
        this process alone.

        Raises:
            WorkerContextError: a variable cannot be used; the message names it.
        """
        context = _process.current
        if context is None:
            context = _process.current = cls._from_environment()
        return context

    @classmethod
    def _from_environment(cls) -> WorkerContext:
        read = os.environ.get
        worker = read("TIDYROWS_WORKER")
        index = _number("TIDYROWS_WORKER_INDEX")
        named = bool(worker) or index is not None
        worker = worker or read("PYTEST_XDIST_WORKER") or (f"w{index}" if index else "main")
        if index is None:
            index = index_of(worker)
        workers = _number("TIDYROWS_WORKER_COUNT")
        if workers is None:
            workers = _number("PYTEST_XDIST_WORKER_COUNT")
        if workers is None:
            # A named worker has others beside it, even where their number is not given.
            workers = max(2, index + 1) if named else 1
        run = read("TIDYROWS_RUN") or read("PYTEST_XDIST_TESTRUNUID")
        context = cls(
            run_id=run or uuid.uuid4().hex,
            worker_id=worker,
            worker_index=index,
            test_id=read("TIDYROWS_TEST") or None,
            worker_count=workers,
        )
        if run:
            _process.claim(f"{run} {index}")
        return context

    def for_test(self, test_id: str | None) -> WorkerContext:
        """The same worker in another test; the counters continue."""
        return replace(self, test_id=test_id)

    @property
    def tag(self) -> str:
        """The beginning of all tags of this test: run, worker and test, 11 characters."""
        source = _process.sources[self.run_id, self.worker_index]
        return source.run + source.worker + _process.tests[self.test_id]

    @cached_property
    def stride(self) -> int:
        """The distance between the integers of one worker.

        With several workers it is above any index that a run can have, not their number: xdist
        replaces a crashed worker under a new id. So an index above 0 means several workers too.
        """
        return STRIDE if self.worker_count > 1 or self.worker_index else 1

    def text(
        self,
        template: str,
        max_length: int | None = None,
        *,
        column: str | None = None,
        keep_end: bool = False,
    ) -> str:
        """A value that no other call, test, worker, run or host produces.

        Args:
            template: literal text with ``{tag}``, or ``{run}``, ``{worker}``, ``{n}`` and maybe
                ``{test}``.
            max_length: literal text is cut to fit this many characters, fields never.
            column: the column of the value, for the error.
            keep_end: do not cut the text after the last field.

        Raises:
            ScopeError: the template is wrong, its fields alone do not fit, or this worker has made
                27 million values.
        """
        pattern = fitted(template, max_length, column, keep_end=keep_end)
        run, worker, counters, _ = _process.sources[self.run_id, self.worker_index]
        test = _process.tests[self.test_id]
        n = next(counters, None)
        if n is None:
            raise ScopeError(
                f"This worker has made {COUNTERS} scoped values; {COUNTER_WIDTH} characters count "
                f"no more."
            )
        return pattern.format(tag=f"{run}{worker}{test}{n}", run=run, worker=worker, test=test, n=n)

    def integer(self, start: int = 0) -> int:
        """A number that no other call with this ``start`` returns in any worker of this run.

        A forked child repeats its parent's numbers: only texts differ between all processes.
        """
        n = next(_process.sources[self.run_id, self.worker_index].integers)
        return start + n * self.stride + self.worker_index


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise WorkerContextError(f"{variable} is {text!r}, which is not a number.")
    return int(text)


def index_of(worker_id: str) -> int:
    """The number of a worker by its id."""
    if worker_id == "main":
        return 0
    digits = re.search(r"[0-9]{1,9}$", worker_id)
    if digits is None:
        raise WorkerContextError(
            f"The worker id {worker_id!r} does not end in a number, so this worker could produce "
            f"the values of another. Set TIDYROWS_WORKER_INDEX to a number from 0 to "
            f"{STRIDE - 1} that no other worker of the run has."
        )
    return int(digits[0])


# -- ids in texts ----------------------------------------------------------------------------------


def worker_name(worker: str | None, run: str | None) -> str:
    """A worker and its run, for errors, reports and logs."""
    return f"worker {printable(worker)} of run {printable(run)}"


def printable(text: str | None) -> str:
    """A text from a ledger or the environment, with control characters as escapes."""
    text = "?" if text is None else text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def session_label(context: WorkerContext) -> str:
    """How a connection of a worker is named to those who look at the server's list."""
    test = (context.test_id or test_of_phase(running_phase()) or "").rpartition("::")[2]
    return printable(f"{label_of_run(context)}{context.worker_id} {test}".rstrip())


def label_of_run(context: WorkerContext) -> str:
    """What the labels of all workers of a run begin with."""
    return f"tidyrows run {context.run_id[:8]} "


def running_phase() -> str | None:
    """The test that is running; pytest adds the phase: ``test_a.py::test_login (call)``."""
    return os.environ.get(_PYTEST) or os.environ.get(_TEST) or _process.test


def note_test(test_id: str | None) -> None:
    """A test begins, or none is running any more, of a framework that does not tell."""
    _process.test = test_id


def test_of_phase(phase: str | None) -> str | None:
    """The test of :func:`running_phase`."""
    return phase and (phase.rpartition(" (")[0] or phase)


CONTEXT = optional(
    instance_of(WorkerContext, need="a WorkerContext", example="WorkerContext.current()")
)
"""What an argument ``context=`` takes."""
