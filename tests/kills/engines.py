"""The engine of a child."""

from __future__ import annotations

import sqlalchemy as sa


def engine_of(url: str) -> sa.Engine:
    """Foreign keys are enforced on SQLite too."""
    engine = sa.create_engine(url, pool_size=2, max_overflow=2)
    if engine.dialect.name == "sqlite":
        sa.event.listen(
            engine, "connect", lambda raw, _record: raw.execute("PRAGMA foreign_keys = ON")
        )
    return engine
