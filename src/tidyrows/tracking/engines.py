"""The engines through which a tracker's rows are written."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture.engine import Capture, capture_for, root_engine
from tidyrows.dialects import Fault
from tidyrows.production import refuse_production

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import sqlalchemy as sa

    from tidyrows.capture.changes import Change, Sink


class Engines:
    """What is known of each engine that a tracker may hold rows of."""

    def __init__(self, sink: Sink, allow_production: bool | Collection[str]) -> None:
        self._sink = weakref.ref(sink)
        self._allow_production = allow_production
        self._by_database: dict[str, sa.Engine] = {}
        self._captures: dict[Capture, int] = {}  # with the version of the schema at first use

    @property
    def sink(self) -> Sink:
        """The tracker."""
        sink = self._sink()
        if sink is None:
            raise ReferenceError("the tracker does not exist any more")
        return sink

    def capture(self, engine: sa.Engine) -> Capture:
        """The capture of an engine, which tells the tracker of its changes from now on."""
        self.refuse_production(engine)
        capture = capture_for(engine)
        capture.sinks.add(self.sink)
        if capture not in self._captures:
            self._captures[capture] = capture.tables.schema_version
            self._by_database.setdefault(capture.database, root_engine(engine))
        return capture

    def refuse_production(self, engine: sa.Engine) -> None:
        """Raise if the engine's database looks like production and nobody allowed it."""
        if root_engine(engine) not in self._by_database.values():  # those have been looked at
            refuse_production(engine.url, self._allow_production)

    def knows(self, database: str) -> bool:
        """Whether an engine is known that reaches a database."""
        return database in self._by_database

    def of(self, database: str) -> sa.Engine:
        """The engine that reaches a database."""
        return self._by_database[database]

    def set(self, database: str, engine: sa.Engine) -> None:
        """From now on this engine reaches a database."""
        self._by_database[database] = engine

    def saw_ddl(self, capture: Capture) -> bool:
        """Whether the schema was changed through an engine since its first use."""
        return self._captures.get(capture) != capture.tables.schema_version

    def fault(self, error: BaseException) -> Fault:
        """What an error means, of whichever of the databases it is."""
        faults = (capture.dialect.fault(error) for capture in self._captures)
        return next((fault for fault in faults if fault is not Fault.OTHER), Fault.OTHER)

    def is_transient(self, error: BaseException) -> bool:
        """Whether a transaction that failed so may succeed another time."""
        return isinstance(error, Exception) and self.fault(error) in {Fault.TRANSIENT, Fault.LOST}

    def resolve(self) -> None:
        """Apply the changes of every COMMIT that is over."""
        for capture in list(self._captures):
            capture.resolve()

    def pending_changes(self) -> Iterator[Change]:
        """What is inserted for the tracker and not committed."""
        for capture in list(self._captures):
            yield from capture.uncommitted(self.sink)

    def pending_keys(self, table: sa.Table) -> list[Any]:
        """Keys of a table that are inserted and not committed."""
        return [
            key
            for change in self.pending_changes()
            if change.table.table is table and change.table.key_columns
            for key in change.keys
        ]
