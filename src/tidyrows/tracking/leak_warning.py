"""Say so where a tracker ends with rows that nobody will delete any more."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.external import Externals
    from tidyrows.tracking.store import Store

_SHOWN = 5
_LOOKED_UP = 12
_NOT_THE_USERS = {"tidyrows", "pytest_tidyrows", "contextlib", "unittest", "_pytest", "pluggy"}


def started_here() -> list[str]:
    """The nearest line of code that is the user's, as ``file:line``; none where it is far away."""
    frame = sys._getframe(1)  # noqa: SLF001 -- a traceback or inspect.stack() would read files
    for _ in range(_LOOKED_UP):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_USERS:
            return [f"{frame.f_code.co_filename}:{frame.f_lineno}"]
        if frame.f_back is None:
            break
        frame = frame.f_back
    return []


def warn_of_leak(
    store: Store, externals: Externals, tag: str, started: list[str], pid: int, *, entered: bool
) -> None:
    """Warn of what a tracker held that is garbage now; ``entered``: in a ledger."""
    if pid != os.getpid():
        return  # a forked child owns nothing of its parent's
    held = store.snapshot()
    count = sum(len(each.keys) + len(each.in_doubt) + each.keyless_count for each in held)
    count += len(externals)
    if not count:
        return
    rows = [str(each.table.row(key)) for each in held for key in each.keys.in_order()[:_SHOWN]]
    rows += [f"{each.keyless_count} of {each.table.name}" for each in held if each.keyless_count]
    rows += [str(tie.resource) for tie in externals]
    named = ", ".join(rows[:_SHOWN]) + (", ..." if count > _SHOWN else "")
    remedy = (
        "They stand in the ledger: sweep(engine) deletes them once this process has ended."
        if entered
        else "Nobody will delete them now. Write with CleanupManager(tracker): ... around what "
        "makes them, or give the tracker a ledger, so that a sweep can."
    )
    warnings.warn(
        f"The tracker {tag}{''.join(f', started at {place},' for place in started)} is gone while "
        f"it held {count} row(s) or resources: {named}. {remedy}",
        ResourceWarning,
        stacklevel=2,
    )
