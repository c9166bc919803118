"""Decide which sink owns an INSERT on a connection."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from tidyrows.capture import ambient

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from tidyrows.capture.sink import Sink


class Ownership:
    """The sinks that listen on one engine, or to single connections of it.

    Attributes:
        fallback: returns the sink of what no other sink owns; None where there is none.
    """

    def __init__(self) -> None:
        self.fallback: Callable[[], Sink | None] | None = None
        self._everywhere: tuple[Sink, ...] = ()  # replaced, never changed: threads read
        self._sessions: weakref.WeakKeyDictionary[sa.Connection, weakref.WeakSet[Sink]]
        self._sessions = weakref.WeakKeyDictionary()

    def forget_parent(self) -> None:
        """After a fork: all sinks are the parent's."""
        self._everywhere = ()
        self._sessions = weakref.WeakKeyDictionary()

    @property
    def watcher(self) -> Sink | None:
        """The sink that wants to know which rows of others are changed, if there is one."""
        return self.fallback() if self.fallback is not None else None

    def listen(self, sink: Sink) -> Callable[[], None]:
        """Let a sink own all that is inserted through the engine; returns what undoes it."""
        self._everywhere = (*self._everywhere, sink)

        def undo() -> None:
            self._everywhere = tuple(each for each in self._everywhere if each is not sink)

        return undo

    def attribute(self, connection: sa.Connection, sink: Sink) -> None:
        """What this connection writes belongs to a session of ``sink``."""
        self._sessions.setdefault(connection, weakref.WeakSet()).add(sink)

    def owner(self, connection: sa.Connection) -> Sink | None:
        """The sink that owns what is inserted on this connection now.

        The innermost of the context that listens; in a thread that has none, the one that the
        connection is attributed to, or the only one that listens on the engine.
        """
        everywhere = self._everywhere
        sessions = self._sessions.get(connection, ())
        for sink in reversed(ambient.sinks()):
            if sink.active and (sink in everywhere or sink in sessions):
                return sink
        active = [sink for sink in sessions if sink.active]
        if len(active) == 1:
            return active[0]
        active += [sink for sink in everywhere if sink.active and sink not in active]
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
