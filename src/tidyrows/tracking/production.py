"""Refuse a database that looks like production (promise 9)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tidyrows.errors import ProductionDatabaseError

if TYPE_CHECKING:
    import sqlalchemy as sa

_LOOKS_LIKE = re.compile(r"(?<![a-z])(production|prod|prd|live)(?![a-z])", re.IGNORECASE)
_ELSEWHERE = ("host", "hostaddr", "dbname", "database", "service", "unix_socket")
"""Parameters of a URL that say what it has no place for."""


def refuse_production(url: sa.URL) -> None:
    """Raise if the URL's host or database name has a word for production in it.

    Args:
        url: where the tracker would delete rows. Its user and password are never shown.

    Raises:
        ProductionDatabaseError: the error names what matched.
    """
    database = re.split(r"[/\\]", url.database or "")[-1]  # of a file the name, not its folders
    found = [("host", url.host), ("database", database)]
    for part in _ELSEWHERE:  # postgresql://user@/?host=...&dbname=...
        values = url.query.get(part, ())
        found += [(part, value) for value in ([values] if isinstance(values, str) else values)]
    for part, value in found:
        match = _LOOKS_LIKE.search(value or "")
        if match:
            raise ProductionDatabaseError(
                f"The {part} {value!r} looks like production (it contains {match.group()!r}), and "
                f"tidyrows deletes rows. If it is a test database all the same, write "
                f"ResourceTracker(..., allow_production=True).",
                matched=match.group(),
            )
