"""What was really committed: capture, the tracker and what it holds."""

from tidyrows.tracking.external import ExternalResource, external_handler
from tidyrows.tracking.ledger import Ledger
from tidyrows.tracking.tracker import ResourceTracker

__all__ = ["ExternalResource", "Ledger", "ResourceTracker", "external_handler"]
