"""When a transaction that failed is run again, how often, and how long to wait in between.

Which errors are worth another try is the database's affair: the caller says so. What is called
again is a whole transaction, since a deadlock may have undone all of it.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import tenacity

from tidyrows.greenlets import sleep

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity.retry import retry_base
    from tenacity.stop import stop_base
    from tenacity.wait import wait_base

T = TypeVar("T")

# Not the module's own generator: a suite that seeds it the same in every worker would have all
# workers wait equally long and collide again, and our draws would shift the suite's numbers.
_jitter = random.SystemRandom().uniform


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt that failed.

    Attributes:
        number: which one it was, from 1.
        error: what it failed with.
        seconds: the time since the first one began.
        wait: the seconds until the next one; None where there is none.
    """

    number: int
    error: BaseException
    seconds: float
    wait: float | None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how long to try again; all times in seconds.

    The wait before attempt n+1 is drawn from 0 to ``base * 2**(n-1)``, at most ``max_wait``
    (exponential backoff with full jitter), and never reaches past the deadline.

    tenacity's own strategies compose with it: ``wait=tenacity.wait_fixed(1) +
    tenacity.wait_random(0, 1)``, ``stop=tenacity.stop_when_event_set(event)``.

    Attributes:
        attempts: how often the transaction is tried, the first time included.
        base: the longest wait before the second attempt.
        max_wait: the longest wait before any attempt.
        deadline: no attempt starts later than this after the first one; an attempt that is
            under way is not interrupted (the database's lock and statement timeouts do that).
        wait: a strategy of tenacity's for the waits, instead of the backoff.
        stop: a strategy of tenacity's that ends it too, besides ``attempts`` and ``deadline``.
        retry: a strategy of tenacity's for errors that are worth another try, besides those of
            which the database says so.
        on_attempt: told an :class:`Attempt` after each that failed with such an error, while no
            transaction is open. What it raises ends the trying and surfaces.
        sleep: waits for the seconds given; by default the other tasks of an event loop go on.
        clock: the time in seconds, from any origin, never going back.
        uniform: draws the wait between two bounds.

    Raises:
        ValueError: a value that cannot be meant; the message names it.

    Example:
        >>> policy = RetryPolicy(attempts=3, base=0.0)
        >>> policy.run(lambda: "done", is_transient=lambda error: False)
        'done'
    """

    attempts: int = 20
    base: float = 0.05
    max_wait: float = 2.0
    deadline: float = 60.0
    wait: wait_base | None = field(default=None, repr=False)
    stop: stop_base | None = field(default=None, repr=False)
    retry: retry_base | None = field(default=None, repr=False)
    on_attempt: Callable[[Attempt], None] | None = field(default=None, repr=False, compare=False)
    sleep: Callable[[float], None] = field(default=sleep, repr=False, compare=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    uniform: Callable[[float, float], float] = field(default=_jitter, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._refuse_numbers()
        for name in ("sleep", "clock", "uniform"):
            if not callable(getattr(self, name)):
                _refuse(name, getattr(self, name), "callable", f"leave {name} out")
        for name in ("wait", "stop", "retry", "on_attempt"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                _refuse(name, value, "callable, or None", _EXAMPLES[name])

    def _refuse_numbers(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int):
            _refuse("attempts", self.attempts, "a whole number", "attempts=20")
        if self.attempts < 1:
            _refuse("attempts", self.attempts, "at least 1", "attempts=1 for no retry")
        for name in ("base", "max_wait", "deadline"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                _refuse(name, value, "a number of seconds", f"{name}=2.0")
            if not math.isfinite(value) or value < 0:
                _refuse(name, value, "finite and not negative", f"{name}=2.0")
        if self.max_wait < self.base:
            _refuse("max_wait", self.max_wait, f"at least base ({self.base})", "max_wait=2.0")

    def run(
        self,
        fn: Callable[[], T],
        *,
        is_transient: Callable[[BaseException], bool],
        on_retry: Callable[[int, BaseException], None] | None = None,
    ) -> T:
        """Call ``fn``, and call it again as long as it fails with a transient error.

        Args:
            fn: a whole transaction: it begins, commits, and rolls back where it raises.
            is_transient: whether an error may pass by itself. Not asked about what is no
                ``Exception`` (KeyboardInterrupt, SystemExit, a cancelled task): never retried.
            on_retry: told the number of the attempt that failed (from 1) and its error, before
                the wait.

        Returns:
            What ``fn`` returned.

        Raises:
            BaseException: the last error of ``fn`` itself, with a note of attempts and seconds
                where there was more than one attempt or the policy gave up.
        """
        trying = _Trying(self, is_transient, on_retry)

        def counted() -> T:
            trying.tries += 1
            return fn()

        retrying = tenacity.Retrying(
            sleep=self.sleep,
            stop=trying.is_over,
            wait=trying.wait,
            retry=trying.passes,
            before_sleep=trying.goes_on,
            reraise=True,
        )
        try:
            return retrying(counted)
        except Exception as error:
            tries = trying.tries
            if tries > 1 or trying.last_passes:
                plural = "attempt" if tries == 1 else "attempts"
                error.add_note(
                    f"tidyrows: failed after {tries} {plural} in {trying.seconds():.2f} s"
                )
            raise


class _Trying:
    """One use of a policy."""

    def __init__(
        self,
        policy: RetryPolicy,
        is_transient: Callable[[BaseException], bool],
        on_retry: Callable[[int, BaseException], None] | None,
    ) -> None:
        self._policy = policy
        self._is_transient = is_transient
        self._on_retry = on_retry
        self._began = policy.clock()
        self.tries = 0
        self.last_passes = False

    def seconds(self) -> float:
        return self._policy.clock() - self._began

    def passes(self, state: tenacity.RetryCallState) -> bool:
        error, also = _error_of(state), self._policy.retry
        self.last_passes = isinstance(error, Exception) and (
            self._is_transient(error) or (also is not None and bool(also(state)))
        )
        return self.last_passes

    def wait(self, state: tenacity.RetryCallState) -> float:
        policy = self._policy
        left = max(0.0, policy.deadline - self.seconds())
        if policy.wait is not None:
            return min(policy.wait(state), left)
        backoff = tenacity.wait_exponential(multiplier=policy.base, max=policy.max_wait)(state)
        # Clipped before the draw: the last attempts spread over what time is left.
        return policy.uniform(0.0, min(backoff, left))

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        policy = self._policy
        over = (
            state.attempt_number >= policy.attempts
            or self.seconds() >= policy.deadline
            or (policy.stop is not None and bool(policy.stop(state)))
        )
        if over:
            self._tell(state, None)
        return over

    def goes_on(self, state: tenacity.RetryCallState) -> None:
        error = _error_of(state)
        if self._on_retry is not None and error is not None:
            self._on_retry(state.attempt_number, error)
        self._tell(state, state.upcoming_sleep)

    def _tell(self, state: tenacity.RetryCallState, wait: float | None) -> None:
        error = _error_of(state)
        if self._policy.on_attempt is not None and error is not None:
            self._policy.on_attempt(Attempt(state.attempt_number, error, self.seconds(), wait))


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


_EXAMPLES = {
    "wait": "wait=tenacity.wait_fixed(1)",
    "stop": "stop=tenacity.stop_after_delay(10)",
    "retry": "retry=tenacity.retry_if_exception_type(ConnectionResetError)",
    "on_attempt": "on_attempt=print",
}


def _refuse(name: str, value: object, need: str, example: str) -> None:
    message = f"RetryPolicy({name}={value!r}): {name} must be {need}; write {example}"
    raise ValueError(message)
