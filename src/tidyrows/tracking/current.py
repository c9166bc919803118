"""The tracker that is active in this context."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tidyrows.capture.ownership import entered_sinks

if TYPE_CHECKING:
    from tidyrows.tracking.tracker import ResourceTracker


def current_tracker() -> ResourceTracker | None:
    """The innermost active tracker of this context, or None outside of any block.

    A forked child has none of its parent's.
    """
    for sink in reversed(entered_sinks()):
        if sink.active:
            return cast("ResourceTracker", sink)  # nothing else is entered
    return None
