"""A folder among the temporary files that belongs to one user alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from stat import S_IRWXG, S_IRWXO, S_ISDIR
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.errors import TidyRowsError


def private_folder(error: type[TidyRowsError]) -> Path:
    """The folder, which is made if it is not there.

    Args:
        error: raised where somebody else could read or write in it.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folder = Path(tempfile.gettempdir()) / f"tidyrows-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    is_private = S_ISDIR(facts.st_mode) and not facts.st_mode & (S_IRWXG | S_IRWXO)
    if hasattr(os, "getuid") and not (is_private and facts.st_uid == os.getuid()):
        raise error(
            f"{folder} is not a folder of this user alone (mode 0700), so what is in it may come "
            f"from somebody else. Delete it, or set TMPDIR to another folder."
        )
    return folder
