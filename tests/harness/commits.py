"""COMMITs that make something true: a cleanup also commits where it only looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa


@contextmanager
def deleting(engine: sa.Engine, heard: Callable[[], None]) -> Iterator[None]:
    """In the block, tell of each COMMIT that follows a DELETE, just before it is sent."""
    dirty: set[int] = set()

    def look(connection: Any, _cursor: Any, sql: str, *_more: Any) -> None:
        if "DELETE FROM" in sql:
            dirty.add(id(connection))

    def commit(connection: Any) -> None:
        if id(connection) in dirty:
            dirty.discard(id(connection))
            heard()

    sa.event.listen(engine, "before_cursor_execute", look)
    sa.event.listen(engine, "commit", commit)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", look)
        sa.event.remove(engine, "commit", commit)
