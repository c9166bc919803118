"""A second engine to the same database, where the suite's own connections cannot be used.

The suite's pool may be empty, since a test gave nothing back; and the connections of an
asynchronous engine belong to a loop that is over.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tidyrows.capture.changes import INTERNAL
from tidyrows.capture.engine import capture_for, share_capture
from tidyrows.dialects import database_name, dialect_for
from tidyrows.greenlets import spawn
from tidyrows.ledger.heartbeat import engine_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_SPARE = "_tidyrows_spare_engine"
"""An attribute of the engine: the spare engine refers to it, and both must become garbage."""


def spare_engine_of(engine: sa.Engine) -> sa.Engine:
    """An engine that connects as this one does, listeners included; it keeps no connection."""
    spare: sa.Engine | None = vars(engine).get(_SPARE)
    if spare is None:
        pool = engine.pool
        own = NullPool(
            pool._creator,  # noqa: SLF001 -- as recreate() of every pool does
            reset_on_return=pool._reset_on_return,  # noqa: SLF001 -- as above
            _dispatch=pool.dispatch,
            dialect=engine.dialect,
        )
        spare = engine_over(own, engine, **{INTERNAL: True})
        setattr(engine, _SPARE, spare)
        share_capture(spare, engine)
    return spare


def usable_engine(engine: sa.Engine) -> sa.Engine:
    """The engine itself, or its spare engine where its pool can give no connection now."""
    if dialect_for(engine).is_private(engine) or isinstance(engine.pool, sa.StaticPool):
        return engine  # there is no second way to it
    return (
        spare_engine_of(engine) if engine.dialect.is_async or not _has_room(engine.pool) else engine
    )


def _has_room(pool: sa.Pool) -> bool:
    """Whether the pool can give a connection without harm to the suite."""
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
