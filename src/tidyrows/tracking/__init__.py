"""What was really committed: capture, the tracker and what it holds."""

from tidyrows.tracking.external import ExternalResource, external_handler
from tidyrows.tracking.tracker import ResourceTracker

__all__ = ["ExternalResource", "ResourceTracker", "external_handler"]
