"""The tracker of a suite that knows nothing of it: it warns of nothing, and keeps what to tell."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tidyrows.suite.spare_engine import engine_at_hand
from tidyrows.tracking.tracker import ResourceTracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from tidyrows.capture.digests import Prints
    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.table import Ledger
    from tidyrows.suite.suite import Suite

_SHOWN = 3


class SuiteTracker(ResourceTracker):
    """Takes what no other tracker does; what it would warn of, it keeps for the end.

    Args:
        suite: whose.
        test: the test, or what else the rows are made for.
        is_shared: for several tests.
        ledgers: where they are entered.
    """

    def __init__(
        self, suite: Suite, test: str, *, is_shared: bool, ledgers: Sequence[Ledger]
    ) -> None:
        self._suite = suite
        self.test = test
        self.is_shared = is_shared
        self.touched: dict[tuple[str, str, str], None] = {}
        self.unheard: dict[str, None] = {}
        super().__init__(
            suite.everywhere,
            context=WorkerContext.current().for_test(test),
            ledger=ledgers or None,
            allow_production=True,  # the suite has looked at each engine
        )

    def engine_of(self, database: str) -> sa.Engine:
        """One that can be used now."""
        return engine_at_hand(super().engine_of(database))

    def own_engine_of(self, database: str) -> sa.Engine:
        """The suite's own."""
        return super().engine_of(database)

    def warn_once(self, subject: Any, message: str) -> None:
        """Keep it: a suite that knows nothing of this makes warnings its errors, perhaps."""
        self.unheard[_in_brief(subject, message)] = None

    def say_late(self, table: KeyedTable) -> None:
        """What a test left open is committed: it can be deleted now."""
        self._suite.wake(self)

    def note_touched(self, table: KeyedTable, keys: Sequence[Any], verb: str, count: int) -> None:
        """A row that several tests share was changed."""
        told = ", ".join(str(key) for key in keys[:_SHOWN]) or f"{count} row(s)"
        if len(keys) > _SHOWN:
            told += f" and {count - _SHOWN} more"
        self.touched[str(table.name), verb, told] = None
        if verb == "deleted":
            self._suite.note_lost(table, keys)

    def note_dropping(self, engine: sa.Engine, database: str) -> None:
        """Nothing of ours shall be in its way."""
        self._suite.leave(engine, database)

    def hold(
        self,
        table: KeyedTable,
        keys: Sequence[Any],
        *,
        prints: Prints | None = None,
        generated: bool = False,
    ) -> None:
        """Hold rows that were inserted; not those that are back again."""
        super().hold(table, keys, prints=prints, generated=generated)
        if not generated:
            self._suite.give_back(self, table, keys)


def _in_brief(subject: Any, message: str) -> str:
    """The first sentence: its remedy is for a test that has a tracker."""
    kinds: dict[str, str] = defaultdict(lambda: message.partition(". ")[0])
    kinds["raw"] = f"rows that raw SQL inserted into {subject[1]}"
    return kinds[subject[0]]
