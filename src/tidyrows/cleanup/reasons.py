"""Why a row or an external resource stays: an object until it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.errors import TidyRowsError, text_of
from tidyrows.keys import TableName

if TYPE_CHECKING:
    from tidyrows.dialects import Blocker
    from tidyrows.external import Item


class LeftoverKind(Enum):
    """Why a row of ours, or an external resource, is still there."""

    LOCKED = auto()
    """Somebody holds a lock; waiting and retries did not help."""
    DISCONNECTED = auto()
    """The connection was lost in every attempt."""
    REFUSED = auto()
    """The database raised an error that no retry mends: a foreign key, a missing right."""
    IGNORED = auto()
    """The DELETE removed nothing and raised nothing."""
    REFERENCED = auto()
    """A row that stays references it."""
    PROTECTED = auto()
    """A row of a table in ``protect=`` references it."""
    UNTRACKED = auto()
    """A row that nobody tracks references it, and ``Dependents.ERROR`` leaves that row alone."""
    HIDDEN = auto()
    """Row-level security may hide rows that reference it."""
    HELD = auto()
    """A row of another tracker references it."""
    UNCERTAIN = auto()
    """The key may have been given to a row of somebody else, or the table was emptied."""
    AMBIGUOUS = auto()
    """Several rows have the key, which is not unique in the database."""
    ALTERED = auto()
    """The key is as it was sent, and the database may have stored another."""
    IN_DOUBT = auto()
    """The answer to the COMMIT that inserted it was lost."""
    PREPARED = auto()
    """Its transaction is prepared (two-phase commit), and neither committed nor rolled back."""
    UNANSWERED = auto()
    """The answer to the COMMIT that deleted it was lost, and it has no primary key."""
    UNNAMED = auto()
    """Its table has no primary key, and the values of the row are not known."""
    UNCONFIRMED = auto()
    """The DELETE may have succeeded; the database could not be asked."""
    LATE = auto()
    """The deadline of the cleanup had passed."""
    CIRCULAR = auto()
    """``after=``, ``before=`` and foreign keys form a circle with an external resource in it."""
    NEEDED = auto()
    """An external resource, or a row, that needs it is still there."""
    NO_HANDLER = auto()
    """No function is registered that removes this kind of external resource."""
    HANDLER_FAILED = auto()
    """The function that removes the external resource raised an error."""
    CHANGED = auto()
    """A preserved row was changed by somebody else too, or does not stay as it is written."""
    NOT_RESTORED = auto()
    """The database refused to write a preserved row back."""
    UNREADABLE = auto()
    """An entry of its owner in the ledger cannot be read, or names what is never a target."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one row or external resource stays.

    Attributes:
        kind: what kind of reason.
        error: the exception, if there was one.
        item: the row, table or resource that references or needs it.
        columns: the foreign key's columns; for ``UNCERTAIN`` the columns of which one differs.
        names: for ``IGNORED`` triggers, rules and policies; for ``ALTERED`` the table where a row
            has the key that was sent; for ``REFUSED`` the tables whose rows reference it; for
            ``CIRCULAR`` the members of the circle; for ``UNCERTAIN`` the table, where it was
            emptied or rebuilt, or has no column but these; for ``PREPARED`` the transaction's id.
        holder: the other tracker whose row needs it, if nothing else keeps it.
        blockers: the transactions that hold the lock.
        trouble: why the blockers are not known.
        also: a second reason.
    """

    kind: LeftoverKind
    error: BaseException | None = None
    item: Item | None = None
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    holder: str | None = None
    blockers: tuple[Blocker, ...] = ()
    trouble: Exception | None = None
    also: Reason | None = None

    def __str__(self) -> str:
        item = f"a row of {self.item}" if isinstance(self.item, TableName) else str(self.item)
        text = _TEXTS[self.kind].format(
            error="" if self.error is None else in_short(self.error),
            item=item,
            columns=", ".join(self.columns),
            holder=self.holder,
            names=f" ({', '.join(self.names)})" if self.names else "",
            tables=f"; referenced by rows of {', '.join(self.names)}" if self.names else "",
            joined=" before ".join(self.names),
            forget=list(self.names),
            table=self.item,
            blockers=_blockers(self),
            identity=_identity(self),
            stored="a row with this key may be somebody else's" if self.names else "no row has it",
        )
        return text if self.also is None else f"{text}; {self.also}"


_REFERENCES = "references it by ({columns})"
_PRESERVED = "preserved, and not as it was: "
LATE = Reason(LeftoverKind.LATE)
_TEXTS = {
    LeftoverKind.LOCKED: "gave up: {error}{blockers}{tables}",
    LeftoverKind.DISCONNECTED: "gave up: {error}{blockers}{tables}",
    LeftoverKind.REFUSED: "{error}{tables}",
    LeftoverKind.IGNORED: "DELETE removed nothing and raised nothing: a trigger, a rule or "
    "row-level security keeps it{names}",
    LeftoverKind.REFERENCED: "{item} stays and " + _REFERENCES,
    LeftoverKind.PROTECTED: "{item} is protected and " + _REFERENCES,
    LeftoverKind.UNTRACKED: "{item} is not tracked (Dependents.ERROR leaves it alone) and "
    + _REFERENCES,
    LeftoverKind.HIDDEN: "row-level security may hide rows of {table} that reference it by "
    "({columns}), and ON DELETE would change them unseen; clean up with a role that has BYPASSRLS",
    LeftoverKind.HELD: "{item} of {holder} " + _REFERENCES,
    LeftoverKind.UNCERTAIN: "identity uncertain: {identity}",
    LeftoverKind.AMBIGUOUS: "several rows have this key, which is not unique in the database, so "
    "nobody can say which one was inserted. Delete it yourself, and give the model a key that is "
    "unique",
    LeftoverKind.ALTERED: "{stored}, and the key is as it was sent: the database may have stored "
    "another, by the column's type or by a trigger, and it was not read back. Look for the row and "
    "delete it; send a key that is stored as it is, or let the user SELECT",
    LeftoverKind.IN_DOUBT: "the answer to its COMMIT was lost, or its transaction was ended past "
    "SQLAlchemy, and a row with this key may as well be somebody else's; look at it, and delete it "
    "yourself or call tracker.track_rows() to own it",
    LeftoverKind.PREPARED: "inserted by the prepared transaction {joined!r}, which anybody may yet "
    "commit. End it with COMMIT PREPARED or ROLLBACK PREPARED (MariaDB, MySQL: XA COMMIT or XA "
    "ROLLBACK), then clean up again; where it was entered into a ledger, a later sweep deletes it",
    LeftoverKind.UNANSWERED: "the table has no primary key, and a COMMIT was never answered: the "
    "rows may be gone, and a row that equals them may be somebody else's. Look yourself, or give "
    "the table a primary key",
    LeftoverKind.UNNAMED: "the table has no primary key, so its rows cannot be named; delete them "
    "yourself, or give it a primary key",
    LeftoverKind.UNCONFIRMED: "cannot be looked at, so nobody knows whether it is gone: "
    "{error}{names}",
    LeftoverKind.LATE: "the cleanup's deadline had passed before it was tried",
    LeftoverKind.CIRCULAR: "there is no order in which these can go: {joined}; nothing in this "
    "circle was touched. Take one of them out of after= or before=",
    LeftoverKind.NEEDED: "{item} needs it and is still there",
    LeftoverKind.NO_HANDLER: "no handler for kind {joined!r}: write "
    '@external_handler("{joined}") above the function that removes it, and import it before the '
    "cleanup",
    LeftoverKind.HANDLER_FAILED: "its handler failed: {error}",
    LeftoverKind.CHANGED: _PRESERVED + "{error}",
    LeftoverKind.UNREADABLE: "{error} None of its rows was touched: look at the entries, "
    "then forget them with sweep(engine, forget={forget})",
    LeftoverKind.NOT_RESTORED: _PRESERVED + "it could not be put back: {error}",
}
_UNKNOWN = (
    "nobody can say whether it is still the row that was inserted: its key may have been given "
    "again, to somebody else's row, or the application may have changed ours. Look at it; own it "
    "with tracker.track(row) or tracker.track_rows(table, keys), or let "
    "CleanupManager(tracker, trust_keys=True) delete by key alone"
)
_COLUMNS_SHOWN = 4


def _blockers(reason: Reason) -> str:
    if reason.blockers:
        return f"; blocked by {'; and by '.join(map(str, reason.blockers))}"
    if reason.trouble is None:
        return ""
    return f"; who blocks it cannot be seen: {in_short(reason.trouble)}"


def _identity(reason: Reason) -> str:
    if reason.item is not None:
        return f"it belongs to {reason.item}, which see"
    if reason.names and reason.columns:
        alone = ", ".join(reason.columns)
        return f"{reason.names[0]} has no column to compare but {alone}, and {_UNKNOWN}"
    if reason.names:
        anew = "was emptied or rebuilt, or its keys began anew, after the INSERT"
        return f"{reason.names[0]} {anew}, and {_UNKNOWN}"
    if not reason.columns:
        return f"what it referenced is gone, and {_UNKNOWN}"
    more = ", ..." if len(reason.columns) > _COLUMNS_SHOWN else ""
    some = "" if len(reason.columns) == 1 else "one or more of "
    shown = ", ".join(reason.columns[:_COLUMNS_SHOWN]) + more
    return f"{some}{shown} differs from what was inserted, and {_UNKNOWN}"


def in_full(error: BaseException) -> str:
    """An error of tidyrows whole; another in one line, as SQL and parameters may hold secrets."""
    return text_of(error) if isinstance(error, TidyRowsError) else in_short(error)


def in_short(error: BaseException) -> str:
    """An error in one line, without the statement and its parameters."""
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in text_of(original).splitlines() if line.strip()]
    notes = getattr(error, "__notes__", ())
    more = [str(note) for note in notes] if isinstance(notes, (list, tuple)) else []
    if isinstance(original, BaseExceptionGroup):
        more += [in_short(each) for each in original.exceptions]
    text = "; ".join([*lines[:2], *more])
    name = type(original).__name__
    known = isinstance(error, (sa.exc.DBAPIError, TidyRowsError))
    return (text or name) if known else f"{name}: {text}"
