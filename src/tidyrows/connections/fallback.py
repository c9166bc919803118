"""A database without a server, where the server is away; and what is said of it."""

from __future__ import annotations

import atexit
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import EMBEDDED
from tidyrows.errors import ServerAwayError, TidyRowsWarning, add_note

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.worker import WorkerContext

_CI = "CI"
_OFF = frozenset({"", "0", "false", "no"})
NOTES: dict[str, None] = {}
"""What is said again when the run ends."""
_files: list[Path] = []


def refuse_in_ci(away: ServerAwayError, name: str) -> None:
    """Raise in CI, where a run without the server would pass unnoticed."""
    if os.environ.get(_CI, "").lower() in _OFF:
        return
    raise ServerAwayError(
        f'{away} The environment variable {_CI} is set, so fallback="{name}" does not take its '
        f"place: start the server in a step before the tests, or unset {_CI}.",
        database=away.database,
    ) from away


def fallback_engine(
    make: Callable[[sa.URL], Any],
    away: ServerAwayError,
    *,
    context: WorkerContext,
    fallback: str,
    metadata: sa.MetaData,
    is_async: bool,
) -> Any:
    """An engine on a new file for this worker, with the tables of the metadata.

    The file is deleted when the process ends.
    """
    descriptor, path = tempfile.mkstemp(
        prefix=f"tidyrows-{context.run_id[:8]}-{context.worker_id}-", suffix=".db"
    )
    os.close(descriptor)
    _files.append(Path(path))
    plain = EMBEDDED[fallback](sa.create_engine, Path(path), is_async=False)
    try:
        metadata.create_all(plain)
    except sa.exc.SQLAlchemyError as error:
        add_note(error, f"tidyrows: fallback={fallback!r} cannot make these tables. {away}")
        raise
    finally:
        plain.dispose()
    text = f"the tests ran on {fallback}, since no server answers at {away.database}"
    NOTES[text] = None
    warnings.warn(
        f"{away} Until then the tests run on {fallback} in {path}, which behaves otherwise in many "
        f"ways.",
        TidyRowsWarning,
        stacklevel=4,
    )
    return EMBEDDED[fallback](make, Path(path), is_async=is_async)


def _delete_files() -> None:
    for path in _files:
        for each in (path, *(Path(f"{path}{end}") for end in ("-wal", "-shm", "-journal"))):
            with suppress(OSError):
                each.unlink()


atexit.register(_delete_files)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_files.clear)
