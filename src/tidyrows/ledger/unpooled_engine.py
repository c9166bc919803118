"""An engine that connects as another one does, without the other's pool."""

from __future__ import annotations

import sqlalchemy as sa


def engine_over(pool: sa.Pool, engine: sa.Engine, **options: object) -> sa.Engine:
    """An engine to the same database over another pool, with more execution options.

    Make the pool of the engine's own, so that the project's listeners are called.
    """
    return sa.Engine(
        pool,
        engine.dialect,
        engine.url,
        hide_parameters=engine.hide_parameters,
        execution_options={**engine.get_execution_options(), **options},
    )
