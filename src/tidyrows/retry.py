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

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Not the module's own generator: a suite that seeds it the same in every worker would have all
# workers wait equally long and collide again, and our draws would shift the suite's numbers.
_jitter = random.SystemRandom().uniform


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how long to try again; all times in seconds.

    The wait before attempt n+1 is drawn from 0 to ``base * 2**(n-1)``, at most ``max_wait``
    (exponential backoff with full jitter), and never reaches past the deadline.

    Attributes:
        attempts: how often the transaction is tried, the first time included.
        base: the longest wait before the second attempt.
        max_wait: the longest wait before any attempt.
        deadline: no attempt starts later than this after the first one; an attempt that is
            under way is not interrupted (the database's lock and statement timeouts do that).
        sleep: waits for the seconds given.
        clock: the time in seconds, from any origin, never going back.
        uniform: draws the wait between two bounds.

    Raises:
        ValueError: a value that cannot be meant; the message names it.

    Example:
        >>> policy = RetryPolicy(attempts=3, base=0.0)
        >>> policy.run(lambda: "done", is_transient=lambda error: False)
        'done'
    """

    attempts: int = 8
    base: float = 0.05
    max_wait: float = 2.0
    deadline: float = 60.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    uniform: Callable[[float, float], float] = field(default=_jitter, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int):
            _refuse("attempts", self.attempts, "a whole number", "attempts=8")
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
        for name in ("sleep", "clock", "uniform"):
            if not callable(getattr(self, name)):
                _refuse(name, getattr(self, name), "callable", f"leave {name} out")

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
        began = self.clock()
        tries = 0
        last_transient = False

        def elapsed() -> float:
            return self.clock() - began

        def counted() -> T:
            nonlocal tries
            tries += 1
            return fn()

        def retryable(error: BaseException) -> bool:
            nonlocal last_transient
            last_transient = isinstance(error, Exception) and is_transient(error)
            return last_transient

        def wait(state: tenacity.RetryCallState) -> float:
            backoff = tenacity.wait_exponential(multiplier=self.base, max=self.max_wait)(state)
            # Clipped before the draw: the last attempts spread over what time is left.
            return self.uniform(0.0, max(0.0, min(backoff, self.deadline - elapsed())))

        def stop(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number >= self.attempts or elapsed() >= self.deadline

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if on_retry is not None and error is not None:
                on_retry(state.attempt_number, error)

        retrying = tenacity.Retrying(
            sleep=self.sleep,
            stop=stop,
            wait=wait,
            retry=tenacity.retry_if_exception(retryable),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return retrying(counted)
        except Exception as error:
            if tries > 1 or last_transient:
                plural = "attempt" if tries == 1 else "attempts"
                error.add_note(f"tidyrows: failed after {tries} {plural} in {elapsed():.2f} s")
            raise


def _refuse(name: str, value: object, need: str, example: str) -> None:
    message = f"RetryPolicy({name}={value!r}): {name} must be {need}; write {example}"
    raise ValueError(message)
