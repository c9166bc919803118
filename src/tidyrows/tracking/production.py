"""Refuse a database that looks like production (promise 9)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tidyrows.errors import ProductionDatabaseError

if TYPE_CHECKING:
    import sqlalchemy as sa

_LOOKS_LIKE = re.compile(r"(?<![a-z])(production|prod|prd|live)(?![a-z])", re.IGNORECASE)


def refuse_production(url: sa.URL) -> None:
    """Raise if the URL's host or database name has a word for production in it.

    Args:
        url: where the tracker would delete rows. Its user and password are never shown.

    Raises:
        ProductionDatabaseError: the error names what matched.
    """
    database = re.split(r"[/\\]", url.database or "")[-1]  # of a file the name, not its folders
    for part, value in (("host", url.host), ("database", database)):
        match = _LOOKS_LIKE.search(value or "")
        if match:
            raise ProductionDatabaseError(
                f"The {part} {value!r} looks like production (it contains {match.group()!r}), and "
                f"tidyrows deletes rows. If it is a test database all the same, write "
                f"ResourceTracker(..., allow_production=True).",
                matched=match.group(),
            )
