"""Databases in a file of their own, in place of a server that is away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _sqlite_engine(make: Callable[[sa.URL], Any], file: Path, *, is_async: bool) -> Any:
    """An engine on a file. Foreign keys are enforced, as a server does."""
    driver = "sqlite+aiosqlite" if is_async else "sqlite"
    engine = make(sa.URL.create(driver, database=str(file)))

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "connect")
    def enforce(dbapi_connection: Any, _record: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    return engine


EMBEDDED = {"sqlite": _sqlite_engine}
"""Makers of engines on databases that need no server."""
