"""Removing schemas and databases that tests used, and nobody uses any more."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.arguments import checked, number
from tidyrows.errors import NotBoundError, SessionStateError
from tidyrows.greenlets import in_greenlet, is_async, spawn, synchronous
from tidyrows.isolation.own_loop import in_own_loop
from tidyrows.isolation.pool import prune_spaces, refuse_production_of
from tidyrows.production import PERMISSION

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.ext.asyncio import AsyncEngine


@checked(
    older_than=number("86400.0, or older_than=0 for all", least=0), allow_production=PERMISSION
)
def prune(
    engine: sa.Engine | AsyncEngine,
    *,
    older_than: float,
    allow_production: bool | Collection[str] = False,
) -> list[str]:
    """Drop the schemas, databases or files that ``isolate()`` keeps and nobody uses.

    What a running worker holds stays. Only those are dropped that were made through an engine on
    the same database.

    Args:
        engine: on the suite's database.
        older_than: drop what was last taken so many seconds ago; what a killed worker has left
            half built goes in any case.
        allow_production: as for ``ResourceTracker``.

    Returns:
        The names of what was dropped.

    Raises:
        NotBoundError: ``engine`` is no engine.
        ProductionDatabaseError: the database looks like production.

    Example:
        >>> prune(engine, older_than=7 * 86400)
        []
    """
    found = synchronous(engine) if is_async(engine) else engine
    if not isinstance(found, sa.Engine):
        raise NotBoundError(
            f"prune() needs an Engine, and a {type(engine).__name__} is none. Write "
            f"prune(create_engine(...), older_than=86400)."
        )
    if is_async(engine) and not in_greenlet():
        raise SessionStateError(
            "The engine of prune() is asynchronous. Write await prune_async(engine, "
            "older_than=86400)."
        )
    refuse_production_of(found, allow_production)
    return in_own_loop(found, partial(prune_spaces, found, older_than))


async def prune_async(
    engine: AsyncEngine,
    *,
    older_than: float,
    allow_production: bool | Collection[str] = False,
) -> list[str]:
    """As :func:`prune`, of an asynchronous engine."""
    return await spawn(prune, engine, older_than=older_than, allow_production=allow_production)
