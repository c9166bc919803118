"""Pairs: two ways in turn, in one run, so that a slow moment of the machine hits both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any


@contextmanager
def undisturbed():
    """No garbage collection in the middle of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(work: Callable[[], Any]) -> float:
    with undisturbed():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def paired(
    one: Callable[[], float], other: Callable[[], float], pairs: int, *, least: bool = False
) -> tuple[float, float, float]:
    """Median of ``one``, median of ``other``, median of the ratios; each returns its seconds.

    With ``least``, the minimum of both and its ratio: processor time only ever grows by others.
    """
    ones, others = [], []
    one(), other()  # warm both
    for number in range(pairs):
        if number % 2:
            others.append(other())
            ones.append(one())
        else:
            ones.append(one())
            others.append(other())
    if least:
        return min(ones), min(others), min(ones) / min(others)
    ratios = [a / b for a, b in zip(ones, others, strict=True)]
    return statistics.median(ones), statistics.median(others), statistics.median(ratios)


def say(what: str, ours: float, theirs: float, ratio: float, goal: str) -> None:
    print(f"\n{what}: {ours * 1e3:.3f} ms against {theirs * 1e3:.3f} ms, {ratio:.2f}x ({goal})")
