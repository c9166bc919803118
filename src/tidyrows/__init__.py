"""tidyrows: test data that leaves no trace.

Factories whose every committed row is remembered, and a cleanup that deletes exactly those rows,
in foreign-key order, on a database that other workers use at the same moment.

    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        UserFactory.create_batch(3)
    print(cleanup.report)
"""

from typing import TYPE_CHECKING

from tidyrows.cleanup.configuration import configure
from tidyrows.cleanup.manager import CleanupManager
from tidyrows.cleanup.options import Dependents
from tidyrows.cleanup.plan import Plan
from tidyrows.cleanup.reasons import LeftoverKind
from tidyrows.cleanup.report import (
    CleanupReport,
    Held,
    Leftover,
    Progress,
    TableRows,
    progress_bar,
)
from tidyrows.connections.engine import worker_async_engine, worker_engine
from tidyrows.connections.report import Lease, PoolReport, pool_report
from tidyrows.dialects import Blocker
from tidyrows.errors import (
    ArgumentError,
    AutoFactoryError,
    BulkError,
    CleanupError,
    ConnectionBudgetError,
    DataFileError,
    ExternalResourceError,
    IsolationError,
    KeyShapeError,
    LateCommitWarning,
    LeakedRowsError,
    LedgerError,
    LockLostError,
    LockTimeoutError,
    NoPrimaryKeyError,
    NoSessionError,
    NotBoundError,
    OncePerRunError,
    ProductionDatabaseError,
    ScopeError,
    ServerAwayError,
    SessionStateError,
    TakenOverError,
    TidyRowsError,
    TidyRowsWarning,
    UnknownTableError,
    UntrackableRowError,
    UntrackedRowsWarning,
    WorkerContextError,
)
from tidyrows.external import ExternalResource, external_handler
from tidyrows.factories import (
    Scoped,
    ScopedEmail,
    ScopedInteger,
    Setup,
    TrackedFactory,
    Unique,
    column_maker,
    create_tree,
    factory_for,
)
from tidyrows.isolation.isolate import isolate
from tidyrows.isolation.prune import prune, prune_async
from tidyrows.keys import RowKey, TableName
from tidyrows.ledger.once_per_run import once_per_run, once_per_run_async
from tidyrows.ledger.table import Ledger
from tidyrows.locks.advisory import LockManager, advisory_lock, try_advisory_lock
from tidyrows.locks.rows import locked, locked_async
from tidyrows.retry import Attempt, RetryPolicy
from tidyrows.sweep.proof import LeakedRows, assert_no_leaks, assert_no_leaks_async
from tidyrows.sweep.sweep import Orphans, find_orphans, find_orphans_async, sweep, sweep_async
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.transaction_retry import with_retries
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from tidyrows.accounts.accounts import AccountProvider, Accounts
    from tidyrows.accounts.login import Login
    from tidyrows.data.dumping import dump_rows
    from tidyrows.data.loading import load_rows, load_rows_async

__all__ = [
    "AccountProvider",
    "Accounts",
    "ArgumentError",
    "Attempt",
    "AutoFactoryError",
    "Blocker",
    "BulkError",
    "CleanupError",
    "CleanupManager",
    "CleanupReport",
    "ConnectionBudgetError",
    "DataFileError",
    "Dependents",
    "ExternalResource",
    "ExternalResourceError",
    "Held",
    "IsolationError",
    "KeyShapeError",
    "LateCommitWarning",
    "LeakedRows",
    "LeakedRowsError",
    "Lease",
    "Ledger",
    "LedgerError",
    "Leftover",
    "LeftoverKind",
    "LockLostError",
    "LockManager",
    "LockTimeoutError",
    "Login",
    "NoPrimaryKeyError",
    "NoSessionError",
    "NotBoundError",
    "OncePerRunError",
    "Orphans",
    "Plan",
    "PoolReport",
    "ProductionDatabaseError",
    "Progress",
    "ResourceTracker",
    "RetryPolicy",
    "RowKey",
    "ScopeError",
    "Scoped",
    "ScopedEmail",
    "ScopedInteger",
    "ServerAwayError",
    "SessionStateError",
    "Setup",
    "TableName",
    "TableRows",
    "TakenOverError",
    "TidyRowsError",
    "TidyRowsWarning",
    "TrackedFactory",
    "Unique",
    "UnknownTableError",
    "UntrackableRowError",
    "UntrackedRowsWarning",
    "WorkerContext",
    "WorkerContextError",
    "advisory_lock",
    "assert_no_leaks",
    "assert_no_leaks_async",
    "column_maker",
    "configure",
    "create_tree",
    "dump_rows",
    "external_handler",
    "factory_for",
    "find_orphans",
    "find_orphans_async",
    "isolate",
    "load_rows",
    "load_rows_async",
    "locked",
    "locked_async",
    "once_per_run",
    "once_per_run_async",
    "pool_report",
    "progress_bar",
    "prune",
    "prune_async",
    "sweep",
    "sweep_async",
    "try_advisory_lock",
    "with_retries",
    "worker_async_engine",
    "worker_engine",
]

__version__: str

if not TYPE_CHECKING:  # or a type checker would accept every name
    _ROOMS = {
        "AccountProvider": "accounts.accounts",
        "Accounts": "accounts.accounts",
        "Login": "accounts.login",
        "dump_rows": "data.dumping",
        "load_rows": "data.loading",
        "load_rows_async": "data.loading",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module, metadata  # noqa: PLC0415 -- read when somebody asks

        if name in _ROOMS:
            value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
            return globals().setdefault(name, value)
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError as error:
            raise AttributeError("tidyrows is not installed, so its version is unknown") from error
