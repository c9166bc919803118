"""A second engine to the same database, for who cannot use the suite's own connections.

The suite's pool may be empty, since a test gave nothing back; and the connections of an
asynchronous engine belong to a loop that is over.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tidyrows.capture.engine import capture_for, share_capture
from tidyrows.dialects import database_name, dialect_for
from tidyrows.execution import INTERNAL
from tidyrows.greenlets import spawn
from tidyrows.ledger.unpooled_engine import engine_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_TWIN = "_tidyrows_twin"
"""An engine's own attribute: its twin leads back to it, and both are to be garbage in the end."""


def twin_of(engine: sa.Engine) -> sa.Engine:
    """An engine that connects as this one does, listeners included, and keeps no connection."""
    twin: sa.Engine | None = vars(engine).get(_TWIN)
    if twin is None:
        pool = engine.pool
        own = NullPool(
            pool._creator,  # noqa: SLF001 -- as recreate() of every pool does
            reset_on_return=pool._reset_on_return,  # noqa: SLF001 -- as above
            _dispatch=pool.dispatch,
            dialect=engine.dialect,
        )
        twin = engine_over(own, engine, **{INTERNAL: True})
        setattr(engine, _TWIN, twin)
        share_capture(twin, engine)
    return twin


def engine_at_hand(engine: sa.Engine) -> sa.Engine:
    """The engine itself, or its twin where no connection of its own can be had now."""
    if dialect_for(engine).is_private(engine) or isinstance(engine.pool, sa.StaticPool):
        return engine  # there is no second way to it
    return twin_of(engine) if engine.dialect.is_async or not _has_room(engine.pool) else engine


def _has_room(pool: sa.Pool) -> bool:
    """Whether a connection can be had of a pool that nobody minds having been taken."""
    if not isinstance(pool, sa.QueuePool):
        return isinstance(pool, NullPool)
    if pool.checkedin():
        return True
    if not pool.checkedout():  # disposed of: nobody would close a connection that is left in it now
        return False
    most: int = pool._max_overflow  # noqa: SLF001 -- it has no public name
    return most < 0 or pool.overflow() < most


def has_vanished(engine: sa.Engine) -> bool:
    """Whether to connect would only make a new, empty database."""
    if dialect_for(engine).is_private(engine):  # its name is its pool's, which dispose() replaces
        return database_name(engine) != capture_for(engine).database
    return dialect_for(engine).missing_file(engine) is not None


def run_for(engines: Iterable[sa.Engine], work: Callable[[], T]) -> T:
    """Do what waits for these engines, from code that is not asynchronous itself.

    Where one is, that is in a thread: this one may have a loop, or be about to have one again.
    """
    if not any(engine.dialect.is_async for engine in engines):
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="tidyrows: loop") as threads:
        return threads.submit(lambda: asyncio.run(spawn(work))).result()
