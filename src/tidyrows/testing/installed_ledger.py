"""The ledger of a test's rows: whether there is one, and that its table is there."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.errors import LedgerError, SessionStateError, TidyRowsWarning
from tidyrows.greenlets import in_greenlet, is_async
from tidyrows.ledger.table import Ledger
from tidyrows.tracking.binding import Binding

if TYPE_CHECKING:
    from collections.abc import Collection

    import sqlalchemy as sa

_installed: weakref.WeakKeyDictionary[sa.Engine, bool] = weakref.WeakKeyDictionary()
"""True: the database of the engine has a ledger; False: this role may not make one."""


def installed_ledger(
    bind: Any,
    wanted: Ledger | bool | None,
    allow_production: bool | Collection[str],
    *,
    by_default: bool,
) -> Ledger | None:
    """The ledger to use; where this role may not make one that was not asked for, None.

    Args:
        bind: where the rows go.
        wanted: a ledger, or whether to use one; None where it depends.
        allow_production: as for ``Ledger``.
        by_default: whether to use one where it depends.

    Raises:
        LedgerError: one was asked for, and this role may not make it.
        SessionStateError: it is to be made through an asynchronous engine, and nothing awaits it.
    """
    ledger = _chosen(bind, wanted, allow_production, by_default=by_default)
    if ledger is None or ledger is wanted or _installed.get(ledger.engine):
        return ledger
    if is_async(bind) and not in_greenlet():
        raise SessionStateError(
            "The ledger of an asynchronous engine is installed by await: write async with "
            "Tidy(...), or await tidy.start_async()."
        )
    try:
        ledger.install()
    except LedgerError as error:
        if wanted:
            raise
        _installed[ledger.engine] = False
        warnings.warn(
            f"Rows of a worker that is killed, and those of failed tests that are kept, would "
            f"have to be deleted by hand: {error}",
            TidyRowsWarning,
            stacklevel=5,
        )
        return None
    _installed[ledger.engine] = True
    return ledger


def _chosen(
    bind: Any,
    wanted: Ledger | bool | None,
    allow_production: bool | Collection[str],
    *,
    by_default: bool,
) -> Ledger | None:
    """The ledger to use, which may have to be installed."""
    if isinstance(wanted, Ledger):
        return wanted
    engine = Binding(bind).engine() if wanted or by_default else None
    if engine is None or wanted is False:
        return None
    if wanted is None and not _installed.get(engine, True):
        return None
    ledger = Ledger(engine, allow_production=allow_production)
    return None if ledger.is_private else ledger
