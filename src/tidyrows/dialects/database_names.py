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
    database = url.database or _elsewhere(url, "dbname", "database")
    if database in {"", ":memory:"}:
        return f"{backend}://#{id(engine.pool):x}"
    host = url.host or _elsewhere(url, "host", "hostaddr", "unix_socket", "service")
    port = url.port or _elsewhere(url, "port")
    return f"{backend}://{f'{host}:{port}' if port else host}/{database}"


def _elsewhere(url: sa.URL, *names: str) -> str:
    """What a URL says among its parameters: postgresql:///app?host=one."""
    for name in names:
        value = url.query.get(name, "")
        if value:
            return value if isinstance(value, str) else ",".join(value)
    return ""
