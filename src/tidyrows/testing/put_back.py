"""Each run of the audit leaves the database as it was: what its tests left is deleted.

That is done as ``tidy_autouse = session`` does it: by a tracker of all rows of the process, with a
ledger, so that the rows of a run that is killed can be swept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import in_short
from tidyrows.errors import TidyRowsError
from tidyrows.suite.spare_engine import run_for
from tidyrows.suite.suite import WholeSuite
from tidyrows.sweep.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from tidyrows.capture.changes import Sink
    from tidyrows.ledger.table import Ledger
    from tidyrows.suite.cleanups import Record
    from tidyrows.worker import WorkerContext


class PutBack:
    """The rows of one run, the fixtures of the session included.

    Where the ini file asks for ``tidy_autouse``, that deletes them, the session's too.
    """

    def __init__(self, config: pytest.Config, observer: Sink | None = None) -> None:
        self.notes: dict[str, None] = {}
        self._config = config
        self._ledgers: list[Ledger] = []
        self._suite: WholeSuite | None = None
        if not config.pluginmanager.has_plugin("tidyrows autouse"):
            self._suite = WholeSuite(
                self._add,
                with_ledger=config.getini("tidy_ledger") != "off",
                on_ledger=self._add_ledger,
                everything=True,
                observer=observer,
            )
            self._suite.start()

    def begin_test(self) -> None:
        """A test is about to begin: SQLite's ledger is installed while nobody writes."""
        if self._suite is not None:
            self._suite.install_ledgers()

    def end(self) -> None:
        """Delete the rows."""
        suite, self._suite = self._suite, None
        if suite is not None:
            suite.install_ledgers()  # for the next run, from its first test on
            suite.end()
        for ledger in self._ledgers:
            ledger.close()

    def sweep(self, run: str) -> None:
        """Delete what another run has left that was killed."""
        plugin: Any = self._config.pluginmanager.get_plugin("tidyrows plugin")
        for ledger in [*self._ledgers, *(plugin.ledgers if plugin is not None else ())]:
            work = partial(sweep, ledger, run=run, as_superuser=True)
            try:
                run_for([ledger.engine], work)
            except (TidyRowsError, sa.exc.SQLAlchemyError) as error:
                self._note([f"rows of the run that was killed: {in_short(error)}"])

    def _add(self, record: Record) -> None:
        self._note(record.get("undeleted", ()))
        self._note(f"not tracked: {each}" for each in record.get("untracked", ()))

    def _add_ledger(self, ledger: Ledger, _context: WorkerContext) -> None:
        self._ledgers.append(ledger)

    def _note(self, notes: Iterable[str]) -> None:
        self.notes |= dict.fromkeys(notes)
