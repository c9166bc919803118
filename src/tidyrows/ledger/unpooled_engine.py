"""An engine that connects as another one does, and takes nothing from its pool."""

from __future__ import annotations

import sqlalchemy as sa


def engine_over(pool: sa.Pool, engine: sa.Engine, **options: object) -> sa.Engine:
    """An engine to the same database.

    Args:
        pool: made of the engine's own, so that the project's listeners are called.
        engine: the project's.
        options: execution options, besides the engine's.
    """
    return sa.Engine(
        pool,
        engine.dialect,
        engine.url,
        hide_parameters=engine.hide_parameters,
        execution_options={**engine.get_execution_options(), **options},
    )
