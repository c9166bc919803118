"""Every engine that this process opens, whoever makes it and when.

SQLAlchemy tells of each Connection of each engine (``engine_connect``, listened to on the class):
so an engine is met before its first statement, also one that the application makes in the middle
of a test. Of a Connection that is older than that (a conftest.py may open one when it is imported)
the next ``begin`` tells.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.capture.engine import capture_for, root_engine
from tidyrows.capture.tracker_stack import Turns
from tidyrows.execution import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.tracking.tracker import ResourceTracker

_EVENTS = ("engine_connect", "begin")


class Everywhere(Turns):
    """What a tracker is bound to that takes all rows which no other tracker listens for.

    Args:
        met: told of each engine once, before its first statement; whether to listen to it.
    """

    def __init__(self, met: Callable[[sa.Engine], bool]) -> None:
        super().__init__()
        self._tell = met
        self._met: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        # and who was told before: a run of pytest may be going on within another one
        self._heard: weakref.WeakKeyDictionary[
            sa.Engine, Callable[[], ResourceTracker | None] | None
        ]
        self._heard = weakref.WeakKeyDictionary()
        self._given: weakref.WeakKeyDictionary[sa.Engine, weakref.ref[ResourceTracker]]
        self._given = weakref.WeakKeyDictionary()

    @property
    def engines(self) -> list[sa.Engine]:
        """Those that are listened to, and still there."""
        return list(self._heard)

    # -- listening -----------------------------------------------------------------------------

    def start(self) -> None:
        """Listen to every engine, those that are made later included."""
        for name in _EVENTS:
            event.listen(sa.Engine, name, self._meet)

    def stop(self) -> None:
        """Listen no more."""
        for name in _EVENTS:
            event.remove(sa.Engine, name, self._meet)
        for engine in self.engines:
            capture_for(engine).listen_last(self._heard[engine])
        self._met.clear()
        self._heard.clear()

    def _meet(self, connection: sa.Connection) -> None:
        engine = root_engine(connection.engine)
        if engine in self._met or INTERNAL in engine.get_execution_options():
            return
        self._met.add(engine)  # first: what is told of it may connect too
        if self._tell(engine):
            capture = capture_for(engine)
            capture.opened.add(connection)
            whose = partial(self._owner, weakref.ref(engine))
            self._heard[engine] = capture.listen_last(whose)

    def _owner(self, reference: weakref.ref[sa.Engine]) -> ResourceTracker | None:
        engine, tracker = reference(), self.whose
        if engine is None or tracker is None:
            return None
        given = self._given.get(engine)
        if given is None or given() is not tracker:
            tracker.capture(engine)
            self._given[engine] = weakref.ref(tracker)
        return tracker
