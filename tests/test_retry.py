"""When a transaction is tried again. Time stands still here except where a test moves it."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import threading
import time
from functools import partial
from itertools import pairwise

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.util import greenlet_spawn

from tidyrows.retry import Attempt, RetryPolicy


class DeadlockError(Exception):
    """Stands for what passes by itself."""


class Watch:
    """A clock that only sleeping, and working, moves."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def transient(error):
    return isinstance(error, DeadlockError)


def policy(watch, **options):
    """A policy that always draws the longest wait."""
    options.setdefault("uniform", max)
    return RetryPolicy(sleep=watch.sleep, clock=watch, **options)


def failing(times, *, watch=None, seconds=0.0, error=DeadlockError):
    """Raises a new error so many times, then returns 'done'."""
    errors = []

    def transaction():
        if watch is not None:
            watch.now += seconds
        if len(errors) < times:
            errors.append(error(f"failure {len(errors) + 1}"))
            raise errors[-1]
        return "done"

    transaction.errors = errors
    return transaction


def test_a_transaction_that_succeeds_is_run_once_without_waiting():
    watch = Watch()
    assert policy(watch).run(failing(0), is_transient=transient) == "done"
    assert watch.slept == []


def test_a_transient_error_is_tried_again_until_it_passes():
    watch = Watch()
    told = []
    fn = failing(3)
    done = policy(watch).run(
        fn, is_transient=transient, on_retry=lambda *what: told.append((*what, len(watch.slept)))
    )
    assert done == "done"
    assert told == [(number, fn.errors[number - 1], number - 1) for number in (1, 2, 3)]


def test_waits_grow_exponentially_up_to_the_longest():
    watch = Watch()
    policy(watch, base=0.1, max_wait=1.0).run(failing(7), is_transient=transient)
    assert watch.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])


def test_jitter_is_drawn_from_the_whole_range():
    bounds = []

    def lowest(low, high):
        bounds.append((low, high))
        return low

    watch = Watch()
    policy(watch, uniform=lowest).run(failing(3), is_transient=transient)
    assert bounds == [(0.0, 0.05), (0.0, 0.1), (0.0, 0.2)]
    assert watch.slept == [0.0, 0.0, 0.0]


def test_jitter_neither_reads_nor_moves_the_suites_own_random_numbers():
    """Workers that all seed ``random`` alike must not wait alike, and collide again."""

    def waits():
        watch = Watch()
        random.seed(7)
        RetryPolicy(sleep=watch.sleep, clock=watch).run(failing(5), is_transient=transient)
        return watch.slept, random.random()

    (first, number), (second, same) = waits(), waits()
    assert first != second
    assert number == same == random.Random(7).random()


def test_the_last_error_itself_surfaces_when_attempts_run_out():
    watch = Watch()
    fn = failing(99, watch=watch, seconds=1.0)
    with pytest.raises(DeadlockError) as raised:
        policy(watch, attempts=3, base=0.5).run(fn, is_transient=transient)
    assert raised.value is fn.errors[2]
    assert len(fn.errors) == 3
    assert raised.value.__notes__ == ["tidyrows: failed after 3 attempts in 4.50 s"]
    assert raised.value.__cause__ is None


def test_one_attempt_means_no_retry():
    watch = Watch()
    with pytest.raises(DeadlockError, match="failure 1") as raised:
        policy(watch, attempts=1).run(failing(9), is_transient=transient)
    assert watch.slept == []
    assert raised.value.__notes__ == ["tidyrows: failed after 1 attempt in 0.00 s"]


def test_the_deadline_stops_what_attempts_would_not():
    watch = Watch()
    fn = failing(99, watch=watch, seconds=4.0)
    with pytest.raises(DeadlockError):
        policy(watch, attempts=99, deadline=10.0, base=1.0).run(fn, is_transient=transient)
    # 4 s of work, 1 of waiting, 4 of work; 1 of the 2 it would wait; then the last attempt
    assert watch.slept == pytest.approx([1.0, 1.0])
    assert len(fn.errors) == 3


def test_an_attempt_that_outlasts_the_deadline_is_the_last():
    watch = Watch()
    fn = failing(99, watch=watch, seconds=61.0)
    with pytest.raises(DeadlockError, match="failure 1"):
        policy(watch).run(fn, is_transient=transient)
    assert watch.slept == []


@given(
    limits=st.tuples(st.integers(1, 30), st.floats(0, 2), st.floats(0, 5), st.floats(0, 20)),
    seconds=st.floats(0, 3),
    share=st.floats(0, 1),
)
def test_every_run_ends_and_none_waits_past_its_deadline(limits, seconds, share):
    attempts, base, extra, deadline = limits
    watch = Watch()
    fn = failing(math.inf, watch=watch, seconds=seconds)
    ours = policy(
        watch,
        attempts=attempts,
        base=base,
        max_wait=base + extra,
        deadline=deadline,
        uniform=lambda low, high: low + (high - low) * share,
    )
    with pytest.raises(DeadlockError):
        ours.run(fn, is_transient=transient)
    assert len(fn.errors) <= attempts
    assert all(0 <= wait <= base + extra for wait in watch.slept)
    last_start = watch.now - 1000.0 - seconds
    assert last_start <= deadline + 1e-6


def test_a_run_may_have_a_shorter_deadline_than_its_policy():
    for deadline, run in ((10.0, 99.0), (99.0, 10.0)):
        watch = Watch()
        fn = failing(99, watch=watch, seconds=4.0)
        with pytest.raises(DeadlockError):
            policy(watch, deadline=deadline, base=1.0).run(fn, is_transient=transient, deadline=run)
        assert watch.slept == pytest.approx([1.0, 1.0])


def test_a_retry_is_logged_without_the_text_of_its_error(caplog):
    """The text of a driver's error may contain values of rows."""
    caplog.set_level("INFO", "tidyrows")
    policy(Watch()).run(failing(1), is_transient=transient)
    (record,) = caplog.records
    assert record.name == "tidyrows"
    assert record.getMessage() == "Attempt 1 failed with DeadlockError; the transaction is retried"


def test_another_error_surfaces_at_once_and_untouched():
    watch = Watch()
    with pytest.raises(KeyError) as raised:
        policy(watch).run(failing(1, error=KeyError), is_transient=transient)
    assert watch.slept == []
    assert not hasattr(raised.value, "__notes__")


def test_another_error_after_a_retry_says_that_there_was_one():
    errors = iter([DeadlockError(), KeyError("x")])

    def transaction():
        raise next(errors)

    with pytest.raises(KeyError) as raised:
        policy(Watch()).run(transaction, is_transient=transient)
    assert raised.value.__notes__ == ["tidyrows: failed after 2 attempts in 0.05 s"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_an_interrupt_is_never_retried(error):
    fn = failing(1, error=error)
    with pytest.raises(error):
        policy(Watch()).run(fn, is_transient=bool)
    assert len(fn.errors) == 1


def test_an_interrupt_while_waiting_surfaces():
    def interrupted(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RetryPolicy(sleep=interrupted).run(failing(1), is_transient=transient)


def test_a_mistake_in_the_callers_own_question_surfaces():
    def broken(error):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        policy(Watch()).run(failing(1), is_transient=broken)


@pytest.mark.parametrize(
    "bad",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 2.5},
        {"attempts": True},
        {"attempts": None},
        {"base": -0.1},
        {"base": math.nan},
        {"base": "1"},
        {"max_wait": math.inf},
        {"max_wait": 0.01},
        {"deadline": -1},
        {"deadline": None},
        {"deadline": math.inf},
        {"sleep": 3},
        {"clock": None},
        {"uniform": 0.5},
    ],
    ids=repr,
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"RetryPolicy\({name}=.*(write|leave)"):
        RetryPolicy(**bad)


def test_a_policy_is_a_value():
    assert RetryPolicy() == RetryPolicy(attempts=20, base=0.05, max_wait=2.0, deadline=60.0)
    assert repr(RetryPolicy()) == (
        "RetryPolicy(attempts=20, base=0.05, max_wait=2.0, deadline=60.0)"
    )
    with pytest.raises(AttributeError):
        RetryPolicy().attempts = 3


def test_the_default_waits_add_up_to_less_than_the_deadline():
    watch = Watch()
    policy(watch).run(failing(7), is_transient=transient)
    assert sum(watch.slept) < 10
    assert all(later >= earlier for earlier, later in pairwise(watch.slept))


# --- tenacity's own strategies, and who is told of attempts


def test_a_wait_of_tenacitys_takes_the_place_of_the_backoff(monkeypatch):
    monkeypatch.setattr(tenacity.wait.random, "random", lambda: 0.25)
    watch = Watch()
    composed = tenacity.wait_fixed(1) + tenacity.wait_random(0, 1)
    policy(watch, wait=composed, base=0.0).run(failing(3), is_transient=transient)
    assert watch.slept == pytest.approx([1.25, 1.25, 1.25])


def test_a_wait_of_tenacitys_does_not_reach_past_the_deadline():
    watch = Watch()
    fn = failing(99, watch=watch, seconds=2.0)
    with pytest.raises(DeadlockError) as raised:
        policy(watch, wait=tenacity.wait_fixed(3), deadline=8.0).run(fn, is_transient=transient)
    # 2 s of work, 3 of waiting, 2 of work; 1 of the 3 it would wait; then the last attempt
    assert watch.slept == pytest.approx([3.0, 1.0])
    assert raised.value is fn.errors[2]
    assert raised.value.__notes__ == ["tidyrows: failed after 3 attempts in 10.00 s"]


def test_a_stop_of_tenacitys_ends_it_before_the_attempts_run_out():
    fn = failing(99)
    either = tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(1000)
    with pytest.raises(DeadlockError):
        policy(Watch(), stop=either, attempts=7).run(fn, is_transient=transient)
    assert len(fn.errors) == 3


@pytest.mark.parametrize(
    ("limits", "tries"),
    [({"attempts": 2}, 2), ({"deadline": 4.5}, 5), ({"attempts": 4, "deadline": 4.5}, 4)],
    ids=repr,
)
def test_a_stop_of_tenacitys_replaces_neither_the_attempts_nor_the_deadline(limits, tries):
    watch = Watch()
    fn = failing(99, watch=watch, seconds=1.0)
    never = tenacity.stop_never
    with pytest.raises(DeadlockError):
        policy(watch, stop=never, base=0.0, **limits).run(fn, is_transient=transient)
    assert len(fn.errors) == tries


def test_an_event_stops_the_trying():
    event = threading.Event()
    told = []

    def note(attempt):
        told.append(attempt.wait)
        if attempt.number == 2:
            event.set()

    stop = tenacity.stop_when_event_set(event)
    with pytest.raises(DeadlockError, match="failure 3"):
        policy(Watch(), stop=stop, base=0.0, on_attempt=note).run(
            failing(99), is_transient=transient
        )
    assert told == [0.0, 0.0, None]


def test_a_retry_of_tenacitys_adds_errors_to_those_that_pass():
    errors = iter([DeadlockError(), ConnectionResetError(), DeadlockError()])

    def transaction():
        for error in errors:
            raise error
        return "done"

    also = tenacity.retry_if_exception_type(ConnectionResetError)
    assert policy(Watch(), retry=also).run(transaction, is_transient=transient) == "done"


def test_a_retry_of_tenacitys_leaves_other_errors_alone():
    also = tenacity.retry_if_exception_type(ConnectionResetError) | (
        tenacity.retry_if_exception_message(message="failure 2")
    )
    fn = failing(9, error=KeyError)
    with pytest.raises(KeyError, match="failure 1") as raised:
        policy(Watch(), retry=also).run(fn, is_transient=transient)
    assert len(fn.errors) == 1
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_no_retry_of_tenacitys_makes_an_interrupt_pass(error):
    fn = failing(1, error=error)
    told = []
    with pytest.raises(error):
        policy(Watch(), retry=tenacity.retry_always, on_attempt=told.append).run(
            fn, is_transient=transient
        )
    assert len(fn.errors) == 1
    assert not told


def test_a_listener_is_told_of_every_attempt_that_failed():
    watch = Watch()
    fn = failing(99, watch=watch, seconds=1.0)
    told = []
    with pytest.raises(DeadlockError):
        policy(watch, attempts=3, base=0.5, on_attempt=told.append).run(fn, is_transient=transient)
    assert told == [
        Attempt(1, fn.errors[0], 1.0, 0.5),
        Attempt(2, fn.errors[1], 2.5, 1.0),
        Attempt(3, fn.errors[2], 4.5, None),
    ]
    assert watch.slept == [0.5, 1.0]


def test_a_listener_is_told_before_the_wait_and_not_of_a_success():
    watch = Watch()
    told = []
    policy(watch, on_attempt=lambda attempt: told.append((attempt.number, len(watch.slept)))).run(
        failing(2), is_transient=transient
    )
    assert told == [(1, 0), (2, 1)]


def test_a_listener_is_told_of_the_only_attempt():
    told = []
    with pytest.raises(DeadlockError) as raised:
        policy(Watch(), attempts=1, on_attempt=told.append).run(failing(9), is_transient=transient)
    assert told == [Attempt(1, raised.value, 0.0, None)]


def test_a_listener_is_not_told_of_an_error_that_does_not_pass():
    errors = iter([DeadlockError(), KeyError("x")])
    told = []

    def transaction():
        raise next(errors)

    with pytest.raises(KeyError):
        policy(Watch(), on_attempt=told.append).run(transaction, is_transient=transient)
    assert [type(attempt.error) for attempt in told] == [DeadlockError]


@pytest.mark.parametrize("attempts", [1, 5], ids=["the last attempt", "one of several"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_a_listener_raises_ends_the_trying_and_surfaces(attempts, error):
    fn = failing(99)

    def broken(attempt):
        raise error

    with pytest.raises(error):
        policy(Watch(), attempts=attempts, on_attempt=broken).run(fn, is_transient=transient)
    assert len(fn.errors) == 1


@pytest.mark.parametrize("name", ["wait", "stop", "retry", "on_attempt"])
@pytest.mark.parametrize("value", ["x", 3, True], ids=repr)
def test_a_strategy_that_cannot_be_called_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"RetryPolicy\({name}={value!r}\).*write {name}="):
        RetryPolicy(**{name: value})


def test_a_policy_with_strategies_can_be_replaced_in_part():
    told = []
    before = policy(
        Watch(),
        wait=tenacity.wait_fixed(1),
        stop=tenacity.stop_after_attempt(2),
        retry=tenacity.retry_if_exception_type(KeyError),
        on_attempt=told.append,
    )
    after = dataclasses.replace(before, deadline=7.0)
    assert (after.deadline, before.deadline) == (7.0, 60.0)
    for name in ("wait", "stop", "retry", "on_attempt", "sleep", "clock", "uniform"):
        assert getattr(after, name) is getattr(before, name)
    with pytest.raises(KeyError):
        after.run(failing(9, error=KeyError), is_transient=transient)
    assert [attempt.wait for attempt in told] == [1.0, None]


def test_the_default_wait_lets_the_other_tasks_of_a_loop_go_on():
    """Inside SQLAlchemy's greenlet, where the synchronous code of a task runs."""
    pytest.importorskip("greenlet")
    patient = RetryPolicy(base=30.0, max_wait=30.0, uniform=max)
    asked = []

    async def main():
        waits = asyncio.Event()

        def transaction():
            asked.append(waits.set())
            raise DeadlockError

        task = asyncio.create_task(
            greenlet_spawn(partial(patient.run, transaction, is_transient=transient))
        )
        await waits.wait()
        turns = 0
        while turns < 5:  # the loop turns, while the task is in the middle of its half a minute
            await asyncio.sleep(0)
            turns += 1
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 10
    assert len(asked) == 1
