"""The sinks: those of a context, those that listen on an engine, and the owner of an INSERT."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from tidyrows.capture.changes import Sink

S = TypeVar("S", bound="Sink")

# Tasks and ``to_thread`` inherit a context variable, plain threads do not.
_entered: ContextVar[tuple[Sink, ...]] = ContextVar("tidyrows_sinks", default=())

entered_sinks = _entered.get
"""The sinks entered in this context, innermost last, stopped ones included."""


def enter(sink: Sink) -> None:
    """Make a sink the innermost of this context."""
    _entered.set((*_entered.get(), sink))


def leave(sink: Sink) -> None:
    """Remove a sink from this context, wherever it stands (blocks may end out of order)."""
    _entered.set(tuple(other for other in _entered.get() if other is not sink))


class entered:  # noqa: N801 -- used as a function is
    """A block in which a sink is the innermost.

    No generator: contextlib assigns to an error that passes, and one that is frozen would be
    replaced by the error of that.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __enter__(self) -> None:
        self._token = _entered.set((*_entered.get(), self._sink))

    def __exit__(self, *_error: object) -> None:
        _entered.reset(self._token)


class TrackerStack(Generic[S]):
    """What several trackers are bound to; the last one that was pushed owns the rows."""

    def __init__(self) -> None:
        self._stack: tuple[S, ...] = ()  # replaced, never changed: threads read it

    @property
    def top(self) -> S | None:
        """The tracker that owns the rows now; None where the last one is not active."""
        stack = self._stack
        return stack[-1] if stack and stack[-1].active else None

    def push(self, tracker: S) -> Callable[[], None]:
        """Let a tracker own the rows of every thread; returns what ends it."""
        self._stack = (*self._stack, tracker)

        def remove() -> None:
            last_first = [*reversed(self._stack)]
            if tracker in last_first:
                last_first.remove(tracker)
            self._stack = tuple(reversed(last_first))

        return remove

    @contextmanager
    def pushed(self, tracker: S) -> Iterator[None]:
        """In the block all rows are this tracker's, which has been started."""
        remove = self.push(tracker)
        try:
            yield
        finally:
            remove()


class EngineSinks:
    """The sinks that may hold rows of one engine, active or not.

    Attributes:
        idle: there are none, so no event matters; so in a forked child, which owns nothing.
        started: grows with each block that begins to listen.
        references: weak, and replaced as a whole: other threads read them without a lock.
        observers: are told too which rows of others are changed, beside the ``watcher``.
    """

    references: tuple[weakref.ref[Sink], ...]
    _listening: tuple[Sink, ...]  # replaced as a whole too
    _by_connection: weakref.WeakKeyDictionary[sa.Connection, weakref.WeakSet[Sink]]

    def __init__(self) -> None:
        self._fallback: Callable[[], Sink | None] | None = None
        self.started = 0
        self.forget_parent()

    def forget_parent(self) -> None:
        """In a forked child: all sinks are the parent's."""
        self.idle = True
        self.references, self._listening = (), ()
        self._attributes = False  # whether any connection is attributed
        self._by_connection = weakref.WeakKeyDictionary()
        self.observers: tuple[Sink, ...] = ()
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Sink]:
        return iter([sink for ref in self.references if (sink := ref()) is not None])

    def add(self, sink: Sink) -> None:
        """From now on this sink may hold rows of the engine."""
        with self._lock:
            known = [ref for ref in self.references if ref() is not None]
            others = [ref for ref in known if ref() is not sink]
            self.started += len(others) == len(known)
            self.references = (*others, weakref.ref(sink, self._forget))
            self.idle = False

    def listen(self, sink: Sink) -> Callable[[], None]:
        """Let a sink own all that is inserted through the engine; returns what undoes it."""
        self.add(sink)
        self.started += 1  # a sink that listens again may be known
        self._listening = (*self._listening, sink)

        def undo() -> None:
            self._listening = tuple(each for each in self._listening if each is not sink)

        return undo

    def attribute(self, connection: sa.Connection, sink: Sink) -> None:
        """What this connection writes belongs to a session of ``sink``."""
        self.add(sink)
        self._attributes = True
        self._by_connection.setdefault(connection, weakref.WeakSet()).add(sink)

    def set_fallback(
        self, fallback: Callable[[], Sink | None] | None
    ) -> Callable[[], Sink | None] | None:
        """Set what returns the owner of rows that no sink listens for; returns the one before."""
        before, self._fallback = self._fallback, fallback
        self._forget(None)
        return before

    def _forget(self, dead: weakref.ref[Sink] | None) -> None:
        with self._lock:
            self.references = tuple(ref for ref in self.references if ref is not dead)
            self.idle = not self.references and self._fallback is None

    @property
    def watcher(self) -> Sink | None:
        """The sink that wants to know which rows of others are changed, if there is one."""
        return self._fallback() if self._fallback is not None else None

    def owner(self, connection: sa.Connection) -> Sink | None:
        """The sink that owns what is inserted on this connection now.

        The innermost of the context that listens; in a thread that has none, the one that the
        connection is attributed to, or the only one that listens on the engine.
        """
        listening = self._listening
        if not (listening or self._attributes):
            return self._fallback() if self._fallback is not None else None
        attributed = self._by_connection.get(connection, ())
        for sink in reversed(_entered.get()):
            if sink.active and (sink in listening or sink in attributed):
                return sink
        active = [sink for sink in attributed if sink.active]
        if len(active) == 1:
            return active[0]
        active += [sink for sink in listening if sink.active and sink not in active]
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
