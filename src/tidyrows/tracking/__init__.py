"""What was really committed: capture, the tracker and what it holds."""

from tidyrows.tracking.tracker import ResourceTracker

__all__ = ["ResourceTracker"]
