"""How a database is named in row keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlalchemy as sa


def database_name(engine: sa.Engine) -> str:
    """The database without user and password, as ``postgresql://host:5432/app``.

    One in memory is named after its pool: two engines never share it.
    """
    url = engine.url
    backend = url.get_backend_name()
    if url.database in {None, "", ":memory:"}:
        return f"{backend}://#{id(engine.pool):x}"
    host = f"{url.host}:{url.port}" if url.port else url.host or ""
    return f"{backend}://{host}/{url.database}"
