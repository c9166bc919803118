"""The external resources of the kills: files in a folder."""

from __future__ import annotations

from pathlib import Path

from tidyrows import external_handler

FILE = "kills-file"


@external_handler(FILE, replace=True)
def remove(payload: dict[str, str]) -> None:
    """One that is gone already is no error."""
    Path(payload["path"]).unlink(missing_ok=True)
