"""Say so where a tracker ends with rows that nobody will delete any more."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.tracking.external import Externals
    from tidyrows.tracking.holdings import Holdings
    from tidyrows.tracking.tracker import ResourceTracker

_SHOWN = 5


def watch(tracker: ResourceTracker) -> weakref.finalize[..., ResourceTracker]:
    """Look at what a tracker holds once it is garbage, or the process ends.

    Returns:
        What undoes it.
    """
    return weakref.finalize(
        tracker,
        _say,
        tracker.holdings,
        tracker.external_resources,
        tracker.context.tag,
        os.getpid(),
        entered=tracker.has_ledger,
    )


def _say(holdings: Holdings, externals: Externals, tag: str, pid: int, *, entered: bool) -> None:
    if pid != os.getpid():
        return  # a forked child owns nothing of its parent's
    held = holdings.copy()
    count = sum(len(each.keys) + len(each.doubtful) + each.nameless for each in held)
    count += len(externals)
    if not count:
        return
    rows = [str(each.table.row(key)) for each in held for key in each.keys.in_order()[:_SHOWN]]
    rows += [f"{each.nameless} of {each.table.name}" for each in held if each.nameless]
    rows += [str(tie.resource) for tie in externals]
    named = ", ".join(rows[:_SHOWN]) + (", ..." if count > _SHOWN else "")
    remedy = (
        "They stand in the ledger: sweep(engine) deletes them."
        if entered
        else "Nobody will delete them now. Write with CleanupManager(tracker): ... around what "
        "makes them, or give the tracker a ledger, so that a sweep can."
    )
    warnings.warn(
        f"The tracker {tag} is gone while it held {count} row(s) or resources: {named}. {remedy}",
        ResourceWarning,
        stacklevel=2,
    )
