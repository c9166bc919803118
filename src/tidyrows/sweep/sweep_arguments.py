"""What a sweep is asked for, refused where it cannot be meant."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.errors import LedgerError
from tidyrows.ledger.process import is_kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.ledger.table import Ledger

_NAMES = 5


def refuse_missing(ledger: Ledger) -> None:
    """Raise where connecting would make the database, empty.

    Raises:
        LedgerError: there is no such file.
    """
    path = ledger.dialect.missing_file(ledger.engine)
    if path is not None:
        raise LedgerError(
            f"There is no file {path}, so there is nothing to sweep; connecting would make an "
            f"empty one. Look at the path in the URL: one that does not begin with / is looked "
            f"for in the folder that the program runs in."
        )


def refuse_unknown(options: Iterable[str], own: Iterable[str]) -> None:
    """Raise where neither a sweep nor a CleanupManager has an argument of this name.

    Args:
        options: what a sweep was given besides.
        own: the sweep's own arguments.

    Raises:
        TypeError: the error names those that there are.
    """
    theirs = [name for name in signature(CleanupManager).parameters if name != "tracker"]
    unknown = [f"{name}=" for name in options if name not in theirs]
    if unknown:
        taken = [name for name in own if name not in {"place", "options"}]
        raise TypeError(
            f"sweep() does not take {', '.join(unknown)}. Beside the engine, URL or ledger it "
            f"takes {', '.join(taken)}, and what CleanupManager takes: {', '.join(theirs)}."
        )


def refuse_unkept(ledger: Ledger, connection: sa.Connection, kept: bool | str) -> None:
    """Raise where a name was given that nothing is kept under.

    Raises:
        LedgerError: the error names what is kept.
    """
    if not isinstance(kept, str):
        return
    table = ledger.table_on(connection)
    owners = sa.select(table.c.owner).where(table.c.seq > 0).distinct().order_by(table.c.owner)
    names = [owner for owner in ledger.run(connection, owners).scalars() if is_kept(owner)]
    if kept not in names:
        there = f"What is kept: {some(names, _NAMES)}." if names else "Nothing else is, either."
        raise LedgerError(
            f"Nothing is kept as {kept!r} in {ledger!r}; it may have been swept already. "
            f"{there} find_orphans(engine) shows all that there is."
        )


def some(names: Sequence[str], most: int) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
