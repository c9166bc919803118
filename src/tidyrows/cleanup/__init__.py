"""From tracked rows to rows that are gone: plan, executor, verification, report."""

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.plan import Batch, Plan, Step
from tidyrows.cleanup.progress import Progress, progress_bar
from tidyrows.cleanup.report import CleanupReport, Held, Leftover, TableRows
from tidyrows.cleanup.rules import Dependents
from tidyrows.cleanup.sweep import (
    Orphans,
    find_orphans,
    find_orphans_async,
    sweep,
    sweep_async,
)

__all__ = [
    "Batch",
    "CleanupManager",
    "CleanupReport",
    "Dependents",
    "Held",
    "Leftover",
    "Orphans",
    "Plan",
    "Progress",
    "Step",
    "TableRows",
    "find_orphans",
    "find_orphans_async",
    "progress_bar",
    "sweep",
    "sweep_async",
]
