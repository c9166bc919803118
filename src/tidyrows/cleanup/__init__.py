"""From tracked rows to rows that are gone: plan, executor, verification, report."""

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.plan import Batch, Plan, Step
from tidyrows.cleanup.progress import Progress, progress_bar
from tidyrows.cleanup.report import CleanupReport, Held, Leftover, TableRows
from tidyrows.cleanup.rules import Dependents

__all__ = [
    "Batch",
    "CleanupManager",
    "CleanupReport",
    "Dependents",
    "Held",
    "Leftover",
    "Plan",
    "Progress",
    "Step",
    "TableRows",
    "progress_bar",
]
