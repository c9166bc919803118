"""When a transaction that failed is retried, how often, and after which wait.

The caller decides which errors are transient. A retry is always the whole transaction, since a
deadlock may have undone all of it.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import tenacity

from tidyrows.arguments import check, function, instance_of, number, optional, whole
from tidyrows.errors import add_note
from tidyrows.greenlets import sleep

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity.retry import retry_base
    from tenacity.stop import stop_base
    from tenacity.wait import wait_base

T = TypeVar("T")
logger = logging.getLogger("tidyrows")

# Not the global generator: where a suite gives it the same seed in every worker, all workers would
# wait equally long and collide again, and our draws would shift the suite's numbers.
_jitter = random.SystemRandom().uniform


_KINDS = {
    "attempts": whole("1 for no retry", least=1),
    "base": number("0.05", least=0),
    "max_wait": number("2.0", least=0),
    "deadline": number("60.0", least=0),
    "wait": optional(function("tenacity.wait_fixed(1)")),
    "stop": optional(function("tenacity.stop_after_delay(10)")),
    "retry": optional(function("tenacity.retry_if_exception_type(ConnectionResetError)")),
    "on_attempt": optional(function("print")),
    "sleep": function("time.sleep"),
    "clock": function("time.monotonic"),
    "uniform": function("random.uniform"),
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt that failed.

    Attributes:
        number: its number, from 1.
        error: the error with which it failed.
        seconds: the time since the first attempt began.
        wait: the seconds until the next attempt; None if this was the last.
    """

    number: int
    error: BaseException
    seconds: float
    wait: float | None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how long to retry; all times in seconds.

    The wait before attempt n+1 is drawn from 0 to ``base * 2**(n-1)``, at most ``max_wait``
    (exponential backoff with full jitter), and never ends after the deadline.

    The strategies of tenacity can be used: ``wait=tenacity.wait_fixed(1) +
    tenacity.wait_random(0, 1)``, ``stop=tenacity.stop_when_event_set(event)``.

    Attributes:
        attempts: the largest number of attempts, the first included.
        base: the longest wait before the second attempt.
        max_wait: the longest wait before any attempt.
        deadline: no attempt starts later than this after the first one; a running attempt is not
            interrupted (the database's lock and statement timeouts do that).
        wait: a wait strategy of tenacity, instead of the backoff.
        stop: a stop strategy of tenacity, in addition to ``attempts`` and ``deadline``.
        retry: a retry strategy of tenacity for further transient errors, in addition to those of
            the database.
        on_attempt: called with an :class:`Attempt` after each attempt that failed with a transient
            error, while no transaction is open. An error that it raises ends the retries and
            surfaces.
        sleep: waits for a number of seconds; by default other tasks of an event loop run meanwhile.
        clock: the time in seconds, from any origin, never going back.
        uniform: draws the wait between two bounds.

    Raises:
        ArgumentError: an attribute has an impossible value; the message names it.

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
        check("RetryPolicy", _KINDS, vars(self).items())
        least = number(f"{self.base}", least=self.base)
        check("RetryPolicy", {"max_wait": least}, [("max_wait", self.max_wait)])

    def run(
        self,
        fn: Callable[[], T],
        *,
        is_transient: Callable[[BaseException], bool],
        on_retry: Callable[[int, BaseException], None] | None = None,
        deadline: float | None = None,
    ) -> T:
        """Call ``fn``, and call it again as long as it fails with a transient error.

        Args:
            fn: a whole transaction: it begins, commits, and rolls back where it raises.
            is_transient: whether another attempt may succeed after an error. It is called with an
                ``Exception`` only: KeyboardInterrupt, SystemExit and a cancelled task are never
                retried.
            on_retry: called before each wait, with the number of the failed attempt (from 1) and
                its error; by default the retry is logged.
            deadline: a shorter deadline than the policy's, in seconds from now.

        Returns:
            The result of ``fn``.

        Raises:
            BaseException: the last error of ``fn`` itself, with a note of attempts and seconds
                where there was more than one attempt or the policy gave up.
        """
        began = self.clock()
        deadline = self.deadline if deadline is None else min(deadline, self.deadline)
        gave_up = False
        stop = tenacity.stop_after_attempt(self.attempts) | (self.stop or tenacity.stop_never)
        retry = tenacity.retry_any(
            tenacity.retry_if_exception(is_transient), self.retry or tenacity.retry_never
        )

        def seconds() -> float:
            return self.clock() - began

        def report(state: tenacity.RetryCallState, wait: float | None) -> None:
            if self.on_attempt is not None:
                self.on_attempt(Attempt(state.attempt_number, _error_of(state), seconds(), wait))

        def before_sleep(state: tenacity.RetryCallState) -> None:
            (on_retry or _log_retry)(state.attempt_number, _error_of(state))
            report(state, state.upcoming_sleep)

        def give_up(state: tenacity.RetryCallState) -> None:
            nonlocal gave_up
            gave_up = True
            report(state, None)
            raise _error_of(state)

        retrying = tenacity.Retrying(
            sleep=self.sleep,
            stop=lambda state: seconds() >= deadline or stop(state),
            wait=lambda state: self._wait(state, max(0.0, deadline - seconds())),
            retry=tenacity.retry_all(tenacity.retry_if_exception_type(Exception), retry),
            before_sleep=before_sleep,
            retry_error_callback=give_up,
        )
        try:
            return retrying(fn)
        except Exception as error:
            attempts = retrying.statistics["attempt_number"]
            if attempts > 1 or gave_up:
                plural = "attempt" if attempts == 1 else "attempts"
                add_note(error, f"tidyrows: failed after {attempts} {plural} in {seconds():.2f} s")
            raise

    def _wait(self, state: tenacity.RetryCallState, left: float) -> float:
        if self.wait is not None:
            return min(self.wait(state), left)
        backoff = tenacity.wait_exponential(multiplier=self.base, max=self.max_wait)(state)
        # Cut before the draw: the last attempts spread over the time that is left.
        return self.uniform(0.0, min(backoff, left))


RETRY = optional(instance_of(RetryPolicy, need="a RetryPolicy", example="RetryPolicy(attempts=3)"))
"""What an argument ``retry=`` takes."""


def _log_retry(attempt: int, error: BaseException) -> None:
    """The class of the error only: its text may contain values of rows."""
    kind = type(getattr(error, "orig", None) or error).__name__
    logger.info("Attempt %d failed with %s; the transaction is retried", attempt, kind)


def _error_of(state: tenacity.RetryCallState) -> BaseException:
    return cast("BaseException", cast("tenacity.Future", state.outcome).exception())
