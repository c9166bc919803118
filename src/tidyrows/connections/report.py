"""What has become of the connections of one worker, for people and programs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidyrows.connections.leases import uses
from tidyrows.dialects import database_name
from tidyrows.errors import NotBoundError
from tidyrows.greenlets import synchronous

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncEngine

_MOST_TESTS = 5


@dataclass(frozen=True, slots=True)
class Lease:
    """A connection that is checked out.

    Attributes:
        place: file and line that took it.
        test: the test that was running then, or ``outside of tests``.
        seconds: for how long it has been out.
        is_own: tidyrows took it, and gives it back itself.
    """

    place: str
    test: str
    seconds: float
    is_own: bool = False

    def __str__(self) -> str:
        own = " (by tidyrows)" if self.is_own else ""
        return f"{self.place}{own}, {self.seconds:.1f} s ago, {self.test}"


@dataclass(frozen=True, slots=True)
class PoolReport:
    """The connections of one engine of :func:`~tidyrows.worker_engine`, until now.

    Attributes:
        database: without user and password.
        most: connections that the engine may have at once; None where nothing limits them.
        peak: the most that were out at once.
        checkouts: how often a connection was taken.
        waits: how often one was waited for, since all were out.
        waited: seconds of all these waits.
        longest_wait: seconds of the longest.
        replaced: connections that were made anew in the place of broken or old ones.
        held: seconds that connections were out, by test, the longest first.
        out: what is out now, the oldest first.
    """

    database: str
    most: int | None
    peak: int
    checkouts: int
    waits: int
    waited: float
    longest_wait: float
    replaced: int
    held: Mapping[str, float]
    out: tuple[Lease, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        most = "" if self.most is None else f" of {self.most}"
        yield f"{self.database}: at most {self.peak}{most} connections at once"
        yield f"  taken {self.checkouts} times, {self.replaced} connections replaced"
        if self.waits:
            yield (
                f"  {self.waits} waits, {self.waited:.2f} s in all, the longest "
                f"{self.longest_wait:.2f} s"
            )
        for test, seconds in list(self.held.items())[:_MOST_TESTS]:
            yield f"  held for {seconds:.2f} s: {test}"
        for lease in self.out:
            yield f"  out now: {lease}"


def pool_report(engine: sa.Engine | AsyncEngine) -> PoolReport:
    """What has become of the connections of an engine.

    Args:
        engine: of :func:`~tidyrows.worker_engine` or :func:`~tidyrows.worker_async_engine`.

    Raises:
        NotBoundError: it is another engine, or no engine.

    Example:
        >>> engine = worker_engine("postgresql+psycopg://localhost/app")
        >>> print(pool_report(engine))
        postgresql://localhost/app: at most 0 of 92 connections at once
          taken 0 times, 0 connections replaced
    """
    source: Any = synchronous(engine)
    try:
        use = uses[source.dialect]
    except (AttributeError, KeyError, TypeError):
        raise NotBoundError(
            f"This {type(engine).__name__} was not made by worker_engine(), so nothing is known of "
            f"its connections. Write engine = worker_engine(url)."
        ) from None
    now = time.perf_counter()
    out = [taken for _record, taken in use.taken()]
    return PoolReport(
        database=database_name(source),
        most=use.most,
        peak=use.peak,
        checkouts=use.checkouts,
        waits=use.waits,
        waited=use.waited,
        longest_wait=use.longest_wait,
        replaced=use.replaced,
        held=use.held(),
        out=tuple(Lease(each.place, each.test, now - each.since, each.is_own) for each in out),
    )
