"""The ledgers of a whole suite: one in each database, installed when it is first used."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tidyrows.dialects import database_name, dialect_for
from tidyrows.errors import LedgerError
from tidyrows.ledger.table import Ledger
from tidyrows.suite.spare_engine import has_vanished, run_for, spare_engine_of
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tidyrows.suite.tracker import SuiteTracker


class SuiteLedgers:
    """The ledgers by database."""

    def __init__(
        self,
        trackers: Callable[[], Iterable[SuiteTracker]],
        on_ledger: Callable[[Ledger, WorkerContext], None],
        refuse: Callable[[str], None],
        *,
        are_wanted: bool,
    ) -> None:
        self._trackers = trackers
        self._on_ledger = on_ledger
        self._refuse = refuse
        self._are_wanted = are_wanted
        self._known: dict[str, Ledger | None] = {}
        self._later: dict[str, sa.Engine] = {}

    @property
    def all(self) -> list[Ledger]:
        """The installed ledgers."""
        return [each for each in self._known.values() if each is not None]

    def meet(self, engine: sa.Engine) -> None:
        """An engine connects for the first time."""
        name, dialect = database_name(engine), dialect_for(engine)
        if not self._are_wanted or name in self._known or dialect.is_private(engine):
            return
        if dialect.has_row_locks:
            self._install(name, engine)
        else:  # the installation would wait for a transaction of the suite that may be open
            self._later[name] = engine

    def install_those_met(self) -> None:
        """Install the ledgers that could not be installed when their database was first used."""
        later, self._later = self._later, {}
        for name, engine in later.items():
            if name not in self._known and not has_vanished(engine):
                run_for([engine], partial(self._install, name, engine))

    def close(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped, through an engine to its server: end its ledger."""
        wanted = (database, engine.url.host, engine.url.port)
        for name, ledger in list(self._known.items()):
            url = None if ledger is None else ledger.engine.url
            if ledger is not None and url and (url.database, url.host, url.port) == wanted:
                del self._known[name]
                for tracker in self._trackers():
                    tracker.journals.drop_ledger(ledger)
                ledger.close()

    def _install(self, name: str, engine: sa.Engine) -> None:
        ledger = Ledger(spare_engine_of(engine), allow_production=True)
        try:
            ledger.install()
        except (LedgerError, sa.exc.DBAPIError) as error:
            self._known[name] = None
            self._refuse(f"rows of {name} in a ledger: {error}")
            return
        self._known[name] = ledger
        for tracker in self._trackers():
            tracker.journals.add_ledger(ledger)
        self._on_ledger(ledger, WorkerContext.current())
