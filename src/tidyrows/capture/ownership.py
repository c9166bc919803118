"""Whose is what is inserted on a connection now?"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from tidyrows.capture import ambient

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from tidyrows.tracking.tracker import ResourceTracker


class Listeners:
    """The trackers that listen on one engine, or to single connections of it.

    Attributes:
        otherwise: says whose it is where none of them hears it; None where nobody does.
    """

    def __init__(self) -> None:
        self.otherwise: Callable[[], ResourceTracker | None] | None = None
        self._everywhere: tuple[ResourceTracker, ...] = ()  # replaced, never changed: threads read
        self._sessions: weakref.WeakKeyDictionary[
            sa.Connection, weakref.WeakSet[ResourceTracker]
        ] = weakref.WeakKeyDictionary()

    def forget_parent(self) -> None:
        """After a fork: whoever listens, listens in the parent."""
        self._everywhere = ()
        self._sessions = weakref.WeakKeyDictionary()

    @property
    def watcher(self) -> ResourceTracker | None:
        """Who wants to know which rows of others are changed, if anybody does."""
        return self.otherwise() if self.otherwise is not None else None

    def listen(self, tracker: ResourceTracker) -> Callable[[], None]:
        """Let a tracker hear all that is written through the engine; returns what undoes it."""
        self._everywhere = (*self._everywhere, tracker)

        def undo() -> None:
            self._everywhere = tuple(t for t in self._everywhere if t is not tracker)

        return undo

    def attribute(self, connection: sa.Connection, tracker: ResourceTracker) -> None:
        """What this connection writes belongs to a session of ``tracker``."""
        self._sessions.setdefault(connection, weakref.WeakSet()).add(tracker)

    def owner(self, connection: sa.Connection) -> ResourceTracker | None:
        """The tracker that owns what is inserted on this connection now.

        The innermost of the context that hears it; in a thread that has none, the one whose
        session it is, or the only one that listens on the engine.
        """
        everywhere = self._everywhere
        sessions = self._sessions.get(connection, ())
        for tracker in reversed(ambient.trackers()):
            if tracker.active and (tracker in everywhere or tracker in sessions):
                return tracker
        active = [tracker for tracker in sessions if tracker.active]
        if len(active) == 1:
            return active[0]
        active += [tracker for tracker in everywhere if tracker.active and tracker not in active]
        if len(active) == 1:
            return active[0]
        if active:
            active[0].warn_once(
                "unattributed",
                "Rows were inserted in a thread that belongs to no tracker, while several trackers "
                "listen on this engine, so nobody knows whose they are and none will delete them. "
                "In that thread write UserFactory.scoped_to(tracker).create().",
            )
            return None
        return self.watcher
