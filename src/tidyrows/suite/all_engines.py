"""Every engine of this process, also those that the application makes in the middle of a test.

SQLAlchemy reports each Connection of each engine (``engine_connect``, listened to on the class), so
an engine is known before its first statement. A Connection that is older (a conftest.py may open
one when it is imported) is reported by its next ``begin``.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.capture.engine import capture_for, root_engine
from tidyrows.capture.tracker_stack import TrackerStack
from tidyrows.execution import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.capture.sink import Sink
    from tidyrows.tracking.tracker import ResourceTracker

    Owner = Callable[[], Sink | None]

_EVENTS = ("engine_connect", "begin")


class AllEngines(TrackerStack["ResourceTracker"]):
    """Gives all rows that no other tracker listens for to one tracker at a time.

    Args:
        accept: called with each engine once, before its first statement; whether to listen to it.
    """

    def __init__(self, accept: Callable[[sa.Engine], bool]) -> None:
        super().__init__()
        self._accept = accept
        self._met: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        # with the owner before: a run of pytest may be going on within another one
        self._owners_before: weakref.WeakKeyDictionary[sa.Engine, Owner | None]
        self._owners_before = weakref.WeakKeyDictionary()
        self._captured: weakref.WeakKeyDictionary[sa.Engine, weakref.ref[ResourceTracker]]
        self._captured = weakref.WeakKeyDictionary()

    @property
    def known(self) -> list[sa.Engine]:
        """The engines that are listened to, as far as they are still alive."""
        return list(self._owners_before)

    def start(self) -> None:
        """Listen to every engine, those that are made later included."""
        for name in _EVENTS:
            event.listen(sa.Engine, name, self._meet)

    def stop(self) -> None:
        """Remove the listeners."""
        for name in _EVENTS:
            event.remove(sa.Engine, name, self._meet)
        for engine in self.known:
            capture_for(engine).set_fallback(self._owners_before[engine])
        self._met.clear()
        self._owners_before.clear()

    def _meet(self, connection: sa.Connection) -> None:
        engine = root_engine(connection.engine)
        if engine in self._met or INTERNAL in engine.get_execution_options():
            return
        self._met.add(engine)  # first: accept() may connect too
        if self._accept(engine):
            capture = capture_for(engine)
            capture.opened.add(connection)
            owner = partial(self._owner, weakref.ref(engine))
            self._owners_before[engine] = capture.set_fallback(owner)

    def _owner(self, reference: weakref.ref[sa.Engine]) -> ResourceTracker | None:
        engine, tracker = reference(), self.top
        if engine is None or tracker is None:
            return None
        captured = self._captured.get(engine)
        if captured is None or captured() is not tracker:
            tracker.capture(engine)
            self._captured[engine] = weakref.ref(tracker)
        return tracker
