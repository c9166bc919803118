"""The part of the server's connections that one worker may have."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import ConnectionLimit, database_name, dialect_for
from tidyrows.errors import ConnectionBudgetError, ServerAwayError, text_of
from tidyrows.greenlets import spawn

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECONDS = 5.0
"""The longest time in which the server must answer."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many connections each worker of a run may have.

    Attributes:
        limits: those of the server; where there are none, nothing limits the workers.
        workers: how many share them.
        reserve: connections that are left to others.
    """

    limits: Sequence[ConnectionLimit]
    workers: int
    reserve: int

    @property
    def beside(self) -> int:
        """Connections that a worker has beside its pool: one shows the others that it is alive."""
        return 1 if self.workers > 1 else 0

    def pool_size(self) -> int | None:
        """How many connections the pool of a worker may have; None where nothing limits them.

        Raises:
            ConnectionBudgetError: less than one.
        """
        if not self.limits:
            return None
        self.refuse(1)
        return self._share(self._tightest)

    def refuse(self, size: int) -> None:
        """Raise where not every worker can have a pool of this size.

        Raises:
            ConnectionBudgetError: it names the limit, the numbers, and what raises the limit.
        """
        if not self.limits or self._share(self._tightest) >= size:
            return
        limit = self._tightest
        each = size + self.beside
        need = self.workers * each + self.reserve
        fitting = (limit.free - self.reserve) // each
        used = f", of which others use {limit.used}" if limit.used else ""
        beside = " (one of them shows the others that it is alive)" if self.beside else ""
        fewer = f"Or run with {fitting} workers. " if 0 < fitting < self.workers else ""
        less = "Or keep less for others with reserve=. " if self.reserve else ""
        raise ConnectionBudgetError(
            f"{self.workers} workers with {each} connections each{beside} and reserve="
            f"{self.reserve} for others need {need} connections, and {limit.name} allows "
            f"{limit.most}{used}. Write {limit.remedy.format(need + limit.used)}. "
            f"{fewer}{less}".rstrip(),
            limit=limit.name,
            free=limit.free,
            workers=self.workers,
            need=need,
        )

    @property
    def _tightest(self) -> ConnectionLimit:
        return min(self.limits, key=attrgetter("free"))

    def _share(self, limit: ConnectionLimit) -> int:
        return (limit.free - self.reserve) // self.workers - self.beside


def ask_limits(engine: Any, run: str, workers: int, *, is_async: bool) -> list[ConnectionLimit]:
    """The limits of the server, by a connection of this engine.

    Raises:
        ServerAwayError: no server answers.
        ConnectionBudgetError: the server takes no more connections now.
    """
    if not is_async:
        return _ask(engine, run, workers)
    # In a loop of its own: the caller may be in one, and cannot await.
    with ThreadPoolExecutor(1) as thread:
        asking = partial(_ask, engine.sync_engine, run, workers)
        return thread.submit(lambda: asyncio.run(spawn(asking))).result()


def _ask(engine: sa.Engine, run: str, workers: int) -> list[ConnectionLimit]:
    dialect = dialect_for(engine)
    try:
        with dialect.connect(engine, _SECONDS) as connection:
            return dialect.connection_limits(connection, run=run, workers=workers)
    except (sa.exc.DBAPIError, OSError) as error:
        place = database_name(engine)
        if dialect.is_server_full(error):
            raise ConnectionBudgetError(
                f"The server of {place} takes no more connections now, so it could not be asked "
                f"how many this worker may have. End some, or let it take more: {_why(error)}",
                limit="",
                free=0,
                workers=workers,
                need=workers,
            ) from error
        if dialect.is_server_away(error):
            raise ServerAwayError(
                f"No server answers at {place}: {_why(error)}. Start it, or correct host and port "
                f"of the URL.",
                database=place,
            ) from error
        raise


def _why(error: BaseException) -> str:
    """The first line of what the driver says."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    lines = text_of(cause).splitlines()
    return lines[0].rstrip(". ") if lines else type(cause).__name__
