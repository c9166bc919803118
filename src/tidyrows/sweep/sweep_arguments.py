"""What a sweep is asked for; an argument without a meaning is refused."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.cleanup.manager import CleanupManager
from tidyrows.errors import LedgerError
from tidyrows.ledger.entry_table import RUN, WORKER
from tidyrows.ledger.process import is_kept
from tidyrows.sweep.orphans import first_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.ledger.table import Ledger

PATIENCE = 15.0
"""Seconds without a heartbeat after which a worker that holds no lock is dead."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class SweepArguments:
    """Which entries a sweep recovers, as :func:`tidyrows.sweep` describes them."""

    run: str | None = None
    worker: str | None = None
    older_than: float | None = None
    kept: bool | str = False
    patience: float = PATIENCE
    handed: bool = False
    """Also what a worker has just handed to its controller: the controller itself asks for it."""

    def __post_init__(self) -> None:
        for name, seconds, example in (
            ("older_than", self.older_than, "older_than=3600, or older_than=0 for all"),
            ("patience", self.patience, "patience=15"),
        ):
            if seconds is not None and not seconds >= 0:
                raise ValueError(
                    f"{name}={seconds!r} is no length of time; give seconds, as in {example}."
                )
        for name, text, others in (
            ("run", self.run, "leave run= out for all runs"),
            ("worker", self.worker, "leave worker= out for all workers"),
            ("kept", self.kept, "write kept=True for all that is kept"),
        ):
            if text == "":
                raise ValueError(
                    f"{name}='' names nothing; a shell variable that is not set gives that. Give "
                    f"the name, as find_orphans(engine) shows it, or {others}."
                )

    def names(self, run: str, worker: str) -> bool:
        """Whether entries of this run and worker are asked for."""
        return (self.run is None or run == self.run[:RUN]) and (
            self.worker is None or worker == self.worker[:WORKER]
        )


def refuse_unknown_options(options: Iterable[str], own: Iterable[str]) -> None:
    """Raise TypeError for an argument that neither ``sweep`` nor ``CleanupManager`` has."""
    theirs = [name for name in signature(CleanupManager).parameters if name != "tracker"]
    unknown = [f"{name}=" for name in options if name not in theirs]
    if unknown:
        taken = [name for name in own if name not in {"place", "options"}]
        raise TypeError(
            f"sweep() does not take {', '.join(unknown)}. Beside the engine, URL or ledger it "
            f"takes {', '.join(taken)}, and what CleanupManager takes: {', '.join(theirs)}."
        )


def refuse_unknown_kept(ledger: Ledger, connection: sa.Connection, kept: bool | str) -> None:
    """Raise LedgerError for a name under which no rows are kept."""
    if not isinstance(kept, str):
        return
    table = ledger.table_on(connection)
    owners = sa.select(table.c.owner).where(table.c.seq > 0).distinct().order_by(table.c.owner)
    names = [owner for owner in ledger.run(connection, owners).scalars() if is_kept(owner)]
    if kept not in names:
        there = "Nothing else is, either."
        if names:
            there = f"What is kept: {first_names(names, _SHOWN)}."
        raise LedgerError(
            f"Nothing is kept as {kept!r} in {ledger!r}; it may have been swept already. "
            f"{there} find_orphans(engine) shows all that there is."
        )
