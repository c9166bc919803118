"""Every engine of this process, also those that the application makes in the middle of a test.

:class:`AllEngines` gives their rows to a sink; :class:`ObservingSink` is one that holds no rows.

SQLAlchemy reports each Connection of each engine (``engine_connect``, listened to on the class), so
an engine is known before its first statement. A Connection that is older (a conftest.py may open
one when it is imported) is reported by its next ``begin``.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.capture.changes import INTERNAL, ROLLED_BACK
from tidyrows.capture.engine import capture_for, root_engine
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.capture.changes import Change, Sink, Untracked
    from tidyrows.keys import KeyedTable, TableName

_EVENTS = ("engine_connect", "begin")
_UNOBSERVED = frozenset({INTERNAL, ROLLED_BACK})


class AllEngines:
    """Sets the sink of all rows that no other sink listens for, on every engine."""

    def __init__(
        self,
        accept: Callable[[sa.Engine], bool],
        sink: Callable[[weakref.ref[sa.Engine]], Sink | None],
    ) -> None:
        self._accept = accept
        self._sink = sink
        self._met: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        # with the fallback before: a run of pytest may be going on within another one
        self._before: weakref.WeakKeyDictionary[sa.Engine, Callable[[], Sink | None] | None]
        self._before = weakref.WeakKeyDictionary()

    @property
    def known(self) -> list[sa.Engine]:
        """The engines that are observed, as far as they are still alive."""
        return list(self._before)

    def start(self) -> None:
        """Observe every engine, those that are made later included."""
        for name in _EVENTS:
            event.listen(sa.Engine, name, self._meet)

    def stop(self) -> None:
        """Remove the listeners."""
        for name in _EVENTS:
            event.remove(sa.Engine, name, self._meet)
        for engine in self.known:
            capture_for(engine).sinks.set_fallback(self._before[engine])
        self._met.clear()
        self._before.clear()

    def _meet(self, connection: sa.Connection) -> None:
        engine = root_engine(connection.engine)
        if engine in self._met or not _UNOBSERVED.isdisjoint(engine.get_execution_options()):
            return
        self._met.add(engine)  # first: accept() may connect too
        if self._accept(engine):
            capture = capture_for(engine)
            capture.opened.add(connection)
            fallback = partial(self._sink, weakref.ref(engine))
            self._before[engine] = capture.sinks.set_fallback(fallback)


class ObservingSink:
    """Implements :class:`tidyrows.capture.changes.Sink`; a subclass records the changes."""

    active = True
    is_shared = True

    def __init__(self) -> None:
        self.context = WorkerContext.current()

    def before_commit(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Nothing is written."""

    def apply(self, change: Change) -> Change:
        """A change has been committed."""
        return change

    def mark_uncertain(self, change: Change) -> Change:
        """It is not known whether a change has been committed."""
        return change

    def note_untracked(self, untracked: Untracked) -> None:
        """Nobody can name these rows."""

    def after_commit(self, changes: Sequence[Change], *, certain: bool) -> None:
        """All changes of a transaction have been applied, or marked uncertain."""

    def holds(self, table: TableName) -> bool:
        """It holds no rows."""
        return False

    def held_keys(self, table: TableName, keys: Iterable[Any]) -> list[Any]:
        """It holds no rows."""
        return []

    def count_of(self, table: TableName) -> int:
        """It holds no rows."""
        return 0

    def keys_by_table(self) -> list[tuple[KeyedTable, list[Any]]]:
        """It holds no rows."""
        return []

    def warn_once(self, subject: Any, message: str) -> None:
        """Rows were inserted whose keys are not known."""

    def warn_late(self, table: KeyedTable) -> None:
        """It never stops."""

    def before_drop(self, engine: sa.Engine, database: str) -> None:
        """A database is about to be dropped."""
