"""Owners in the ledger whose entries a sweep leaves where they are, and why.

Whoever may INSERT into the ledger may have written an entry. One that cannot be read keeps its
owner from being swept, and nobody else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Leftover
from tidyrows.errors import LedgerError, TidyRowsError
from tidyrows.ledger.entry_checks import MOST_CHARACTERS, MOST_ENTRIES
from tidyrows.ledger.process import OwnerKind, is_process_id
from tidyrows.worker import printable, worker_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.ledger.table import Ledger
    from tidyrows.sweep.dead_workers import Candidate


class OwnerLeftError(Exception):
    """The entries of one owner stay; its argument is the TidyRowsError that says why."""


def leftover_of(candidate: Candidate, why: OwnerLeftError) -> Leftover:
    """The owner of a candidate in the report of the sweep."""
    owner, error = candidate.owner, why.args[0]
    name = f"owner {printable(owner)}, {worker_name(candidate.worker, candidate.run)}"
    reason = Reason(LeftoverKind.UNREADABLE, error, names=(printable(owner),))
    return Leftover(None, None, reason, 0, owner=name)


def check_owner(ledger: Ledger, connection: sa.Connection, owner: str) -> None:
    """Raise TidyRowsError for an owner that is none, or that has too many entries to be read."""
    if not is_process_id(owner) and not any(kind.includes(owner) for kind in OwnerKind):
        raise TidyRowsError("No process has such an id, so tidyrows did not write its entries.")
    table = ledger.table_on(connection)
    asked = sa.select(sa.func.count(), sa.func.sum(sa.func.length(table.c.body)))
    sizes = ledger.execute(connection, asked.where(table.c.owner == owner, table.c.seq > 0)).one()
    if sizes[0] > MOST_ENTRIES or (sizes[1] or 0) > MOST_CHARACTERS:
        raise TidyRowsError(
            f"It has {sizes[0]} entries of {sizes[1]} characters, more than a worker writes."
        )


def refuse_lesser_writers(ledger: Ledger, connection: sa.Connection) -> None:
    """Raise LedgerError where others than superusers may write what a superuser would carry out."""
    table = ledger.table_on(connection)
    place = (table.schema or ledger.dialect.default_schema(connection), table.name)
    others = ledger.dialect.lesser_writers(connection, place)
    if others:
        raise LedgerError(
            f"This role is a superuser, and may delete more than {names_in_short(others)}, who may "
            f"write to {ledger!r}: a sweep would carry out their entries with a superuser's "
            f"rights, so nothing was deleted. Sweep as one of them; or, if you trust whoever may "
            f"write to the ledger, write sweep(engine, as_superuser=True)."
        )


def names_in_short(names: Sequence[str], most: int = 5) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def forget_owners(
    ledger: Ledger, connection: sa.Connection, owners: Collection[str]
) -> dict[str, int]:
    """Delete the entries of these owners; returns how many each had.

    Raises:
        LedgerError: the ledger has no entry of one of them.
    """
    table = ledger.table_on(connection)
    forgotten = {}
    for owner in dict.fromkeys(owners):
        gone = sa.delete(table).where(table.c.owner == owner, table.c.seq > 0)
        forgotten[owner] = int(ledger.execute(connection, gone).rowcount)
        if not forgotten[owner]:
            raise LedgerError(
                f"{ledger!r} has no entries of an owner {owner!r}, so nothing was forgotten. "
                f"find_orphans(engine) and the error of a sweep name the owners."
            )
    return forgotten


def are_owners(forget: Any) -> bool:
    """Whether ``forget=`` names owners: one, or a collection of them."""
    names = (forget,) if isinstance(forget, str) else forget
    return isinstance(names, Collection) and all(isinstance(e, str) and bool(e) for e in names)
