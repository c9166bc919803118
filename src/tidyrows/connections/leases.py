"""Who has taken which connection, and what is given back when a test ends."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from collections import deque
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.errors import TidyRowsWarning, add_note, text_of
from tidyrows.greenlets import in_greenlet, outer_frame
from tidyrows.worker import running_phase, session_label, test_of_phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

    from tidyrows.dialects import Dialect
    from tidyrows.worker import WorkerContext

OUTSIDE = "outside of tests"
_OWN = "tidyrows"
_MOST_ENDED = 1000
_CONNECT: Any = sa.Engine.connect
_PASSING = {each: each for each in (_OWN, "sqlalchemy", "contextlib", "asyncio")}
_passed: dict[int, str] = {}  # packages, by the id of the names of a module
_modules: list[dict[str, Any]] = []


class Taken(NamedTuple):
    """A connection that is checked out.

    Attributes:
        since: the time by ``time.perf_counter``.
        code: what took it, and the line; the code is None where nothing but SQLAlchemy did.
        is_own: tidyrows took it, and gives it back itself.
        thread: the thread that took it.
        phase: the test that was running, as pytest names it: with its phase.
    """

    since: float
    code: CodeType | None
    line: int
    is_own: bool
    thread: int
    phase: str | None

    @property
    def place(self) -> str:
        """File and line."""
        if self.code is None:
            return "an unknown line"
        file = Path(self.code.co_filename)
        if file.is_relative_to(Path.cwd()):
            file = file.relative_to(Path.cwd())
        return f"{file}:{self.line}"

    @property
    def test(self) -> str:
        """The test that was running."""
        return test_of_phase(self.phase) or OUTSIDE


class PoolUse:
    """What the pool of one engine gives out.

    Attributes:
        most: how many connections may be out at once; None where there is no limit.
        replaced: connections that were made anew in the place of others.
        waits: checkouts that had to wait.
        waited: seconds of all waits.
        longest_wait: seconds of the longest.
    """

    def __init__(self, dialect: Dialect, context: WorkerContext) -> None:
        self.most: int | None = None
        self._dialect = dialect
        self._context = context
        self._names: dict[int, str] = {}  # of connections, by the id of the driver's object
        self._label = "", session_label(context)
        self.begin()

    def begin(self) -> None:
        """Count from zero."""
        # Connections that are collected come back inside of any code, so it is entered again.
        self._lock = threading.RLock()
        self._out: dict[Any, tuple[Any, ...]] = {}  # a Taken each, by the entry in the pool
        self._sizes = {0}  # how many were out at once
        self._ended: deque[tuple[str | None, float]] = deque()  # phase and seconds, not summed yet
        self._held: dict[str | None, float] = {}  # seconds by phase
        self._summed = self.waits = self.replaced = 0
        self.waited = self.longest_wait = 0.0

    def listen(self, engine: sa.Engine) -> None:
        """Name the engine's connections, and those of pools that are made from its own."""
        event.listen(engine, "do_connect", self._before_connect)
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "close", self._closed)
        if not self._dialect.renames_connections:
            return
        ping = engine.dialect.do_ping

        def ping_and_name(driver: Any) -> bool:
            label = self.label()
            if self._names.get(id(driver), label) == label:
                return ping(driver)
            self._dialect.rename_connection(driver, label)  # it is a ping too
            self._names[id(driver)] = label
            return True

        engine.dialect.do_ping = ping_and_name  # type: ignore[assignment,method-assign]  # of one engine

    def label(self) -> str:
        """Run, worker and test, as the server shows it."""
        phase, label = self._label
        now = running_phase() or ""
        if now != phase:
            label = session_label(self._context)
            self._label = now, label
        return label

    # -- events ------------------------------------------------------------------------------

    def _before_connect(
        self, _dialect: Any, record: Any, _positional: Any, arguments: dict[str, Any]
    ) -> None:
        label = self.label()
        if self._dialect.name_connection(arguments, label) and record is not None:
            record.info[self] = label

    def _connected(self, driver: Any, record: Any) -> None:
        label = record.info.pop(self, None)
        if label is not None:
            self._names[id(driver)] = label
        if self in record.record_info:
            self.replaced += 1
        record.record_info[self] = True

    def _closed(self, driver: Any, _record: Any) -> None:
        self._names.pop(id(driver), None)

    # -- checkouts ---------------------------------------------------------------------------

    def take(self, record: Any) -> None:
        """A connection leaves the pool."""
        # Each step is one that no other thread can divide, which costs less than a lock.
        self._out[record] = (perf_counter(), *_caller(), get_ident(), running_phase())
        size = len(self._out)
        if size not in self._sizes:
            self._sizes.add(size)

    def give_back(self, record: Any) -> None:
        """A connection comes back."""
        taken = self._out.pop(record, None)
        if taken is not None:
            self._ended.append((taken[-1], perf_counter() - taken[0]))
            if len(self._ended) > _MOST_ENDED:
                self._sum()

    def _sum(self) -> None:
        with self._lock:
            while self._ended:
                phase, seconds = self._ended.popleft()
                self._held[phase] = self._held.get(phase, 0.0) + seconds
                self._summed += 1

    def count_wait(self, seconds: float) -> None:
        """A checkout had to wait until another connection came back."""
        with self._lock:
            self.waits += 1
            self.waited += seconds
            self.longest_wait = max(self.longest_wait, seconds)

    # -- what is out --------------------------------------------------------------------------

    def taken(self) -> list[tuple[Any, Taken]]:
        """What is out, the oldest first."""
        out = ((record, Taken(*each)) for record, each in self._out.copy().items())
        return sorted(out, key=lambda each: each[1].since)

    @property
    def checkouts(self) -> int:
        """How often a connection was taken."""
        self._sum()
        return self._summed + len(self._out)

    @property
    def peak(self) -> int:
        """The most that were out at once."""
        return max(self._sizes)

    def held(self) -> dict[str, float]:
        """For how many seconds each test has held connections, the longest first."""
        self._sum()
        now, held = perf_counter(), dict[str, float]()
        known = [(test_of_phase(phase) or OUTSIDE, s) for phase, s in self._held.copy().items()]
        for test, seconds in known + [(each.test, now - each.since) for _, each in self.taken()]:
            held[test] = held.get(test, 0.0) + seconds
        return dict(sorted(held.items(), key=itemgetter(1), reverse=True))

    def explain_timeout(self, error: sa.exc.TimeoutError) -> None:
        """Say who has the connections for which a checkout waited too long."""
        now = perf_counter()
        held = [f"  {t.place}, {now - t.since:.1f} s ago, {t.test}" for _, t in self.taken()]
        most = "its" if self.most is None else f"the {self.most}"
        add_note(
            error,
            "\n".join(
                [
                    f"tidyrows: all of {most} connections of this worker are out, taken by",
                    *held,
                    "Close them sooner, or let the server take more; pool_report(engine) has more.",
                ]
            ),
        )


uses: WeakKeyDictionary[Any, PoolUse] = WeakKeyDictionary()
"""By SQLAlchemy's dialect object, which an engine keeps when its pool is made anew."""


class CountedPool(sa.Pool):
    """A pool that knows who has its connections.

    It does not hear of them by events, which would cost twice as much.

    Attributes:
        use: set in the class that is made for an engine.
    """

    use: PoolUse

    def _do_get(self) -> Any:
        record = super()._do_get()
        self.use.take(record)
        return record

    def _do_return_conn(self, record: Any) -> None:
        self.use.give_back(record)  # before another thread can take it
        super()._do_return_conn(record)


class WaitingPool(sa.QueuePool):
    """A pool that counts how often a checkout waits, and says who has the connections.

    Attributes:
        use: as in :class:`CountedPool`.
    """

    use: PoolUse

    def _do_get(self) -> Any:
        # No public names; a place that is free needs no look at the queue.
        if self._overflow < self._max_overflow or self._max_overflow < 0 or self.checkedin():
            return super()._do_get()
        began = perf_counter()
        try:
            record = super()._do_get()
        except sa.exc.TimeoutError as error:
            self.use.explain_timeout(error)
            raise
        finally:
            self.use.count_wait(perf_counter() - began)
        return record


def _caller() -> tuple[CodeType | None, int, bool]:
    """The code and line outside of SQLAlchemy that is running, and whether tidyrows called it."""
    # The pool's own calls come first, and mostly those of engine.connect(); each frame that is
    # looked at has to be made. A greenlet has few.
    get = sys._getframe  # noqa: SLF001 -- the only cheap way
    try:
        frame = get(9) if get(8).f_code is _CONNECT.__code__ else get(6)
    except ValueError:
        frame = get(3)
    is_own = is_outside = False
    while True:
        module = _passed.get(id(frame.f_globals)) or _pass(frame.f_globals)
        if module is None:
            return frame.f_code, frame.f_lineno, is_own
        is_own = is_own or module is _OWN
        outer = frame.f_back
        if outer is None and not is_outside:
            is_outside, outer = True, outer_frame()
        if outer is None:
            return None, 0, is_own
        frame = outer


def _pass(names: dict[str, Any]) -> str | None:
    """The package of a module that only passes a call on."""
    package = names.get("__name__", "").partition(".")[0]
    if package not in _PASSING:
        return None
    _modules.append(names)  # so that no other module gets its id
    return _passed.setdefault(id(names), _PASSING[package])


@contextmanager
def leases_returned(
    since: float, release: Callable[[], None], failure: BaseException | None = None
) -> Iterator[None]:
    """Before the block, the end of a test, give back each connection that is out since its start.

    After the block they are named in a warning, which cannot keep it from running. What tidyrows
    took is left alone. What another thread took that is still alive is named, and left to it.

    Args:
        since: when the test began, by ``time.perf_counter``.
        release: ends what tidyrows itself has open for the test.
        failure: of the test, which gets a note in place of the warning.
    """
    if not any(_left(since)):
        yield
        return
    release()
    alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    left = [(taken, _give_back(record, taken.thread in alive)) for record, taken in _left(since)]
    text = "\n".join(
        f"A connection was still checked out when its test ended: {taken.place} took it in "
        f"{taken.test}. {done} Close it in the test: with engine.connect() as connection: ..., or "
        f"with Session(engine) as session: ..."
        for taken, done in left
    )
    try:
        yield
    except Exception as error:
        if left:
            add_note(error, f"tidyrows: {text}")
        raise
    if left and failure is not None:
        add_note(failure, f"tidyrows: {text}")
    elif left:
        (first, _done), *_more = left
        file = first.code.co_filename if first.code is not None else __file__
        warnings.warn_explicit(text, TidyRowsWarning, file, first.line)


def _left(since: float) -> Iterator[tuple[Any, Taken]]:
    for use in list(uses.values()):
        for record, taken in use.taken():
            if taken.since > since and not taken.is_own:
                yield record, taken


def _give_back(record: Any, is_busy: bool) -> str:
    """Roll back, and return to the pool; what became of it."""
    if is_busy:
        return "Its thread is still running, so it was left to it."
    fairy = record.fairy_ref and record.fairy_ref()
    if fairy is None:
        return "It has been given back since."
    if fairy._pool._dialect.is_async and not in_greenlet():  # noqa: SLF001 -- no public names
        return "It is asynchronous and no event loop runs, so it was not given back."
    try:
        fairy._checkin()  # noqa: SLF001 -- close() only counts down
        for holder in _holders(fairy):
            holder.invalidate()  # it has no driver's connection any more, and has to know
    except Exception as error:  # noqa: BLE001 -- whatever a driver raises in an odd state
        fairy.invalidate(error)
        return f"It was thrown away, since its rollback failed: {text_of(error)}"
    return "It was rolled back and given back."


def _holders(fairy: Any) -> list[sa.Connection]:
    """The connections of SQLAlchemy that have this proxy, which does not know them."""
    found = gc.get_referrers(fairy)
    found += gc.get_referrers(*[each for each in found if type(each) is dict])  # their attributes
    return [each for each in found if isinstance(each, sa.Connection)]


def _forget_all() -> None:
    for use in list(uses.values()):
        use.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
