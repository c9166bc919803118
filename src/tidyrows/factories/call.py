"""One commit per call that the test itself makes.

An application in another process must see an object whole or not at all: with its SubFactories'
rows and what its hooks added or changed. So whatever a call makes is flushed as it is made, and
committed once, when the outermost call returns.

A call whose transaction was lost (a deadlock, a connection that went down) is run again as a whole,
where all of that transaction was its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import event
from sqlalchemy.orm import SessionTransactionOrigin

from tidyrows.factories.asynchronous import make_usable, unexpired
from tidyrows.greenlets import in_greenlet

if TYPE_CHECKING:
    from contextvars import Token
    from types import TracebackType

    from sqlalchemy.orm import Session, SessionTransaction

    from tidyrows.factories.recorded_values import Draws
    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

_calls: ContextVar[tuple[Call, ...]] = ContextVar("tidyrows_calls", default=())


class Call:
    """An outermost call of a factory, and what it commits.

    Calls nest only where a hook enters another tracker's block: its rows must be committed before
    that block ends.

    Args:
        tracker: whose session is used.
        commits: whether the session is committed at the end.
        draws: what is drawn in it, if it may be run again.

    Attributes:
        session: the tracker's session, once the call has made an object in it.
        running: a task that a hook has started may outlive the call.
        began: whether the transaction, if there is one, began in this call.
        alone: whether nothing of the call went through another session, or was committed before
            its end.
        transaction: the session's, when the call made its first object.
        sent: whether the COMMIT has been sent.
        doubts: the rows that the tracker had doubts about before.
        error: what it failed with.
        result: what it is going to return.
        made: every object that the call has made.
        unkeyed: objects that the caller has built and passed in, without a key yet.
        expelled: the objects that a rollback has put out of the session.
    """

    __slots__ = (
        "_commits",
        "_token",
        "alone",
        "began",
        "doubts",
        "draws",
        "error",
        "expelled",
        "made",
        "result",
        "running",
        "sent",
        "session",
        "tracker",
        "transaction",
        "unkeyed",
    )

    def __init__(
        self, tracker: ResourceTracker, *, commits: bool = True, draws: Draws | None = None
    ) -> None:
        self.tracker = tracker
        self.draws = draws
        self.session: Session | None = None
        self.running = False
        self.began = draws is not None and not tracker.in_transaction
        self.alone = True
        self.transaction: SessionTransaction | None = None
        self.sent = False
        self.doubts: set[tuple[TableName, Any]] = set()
        self.error: BaseException | None = None
        self.result: Any = None
        self.made: list[Any] = []
        self.unkeyed: list[Any] = []
        self.expelled: list[Any] = []
        self._commits = commits
        self._token: Token[tuple[Call, ...]]

    def __enter__(self) -> Self:
        self.running = True
        self._token = _calls.set((*_calls.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.running = False
        _calls.reset(self._token)
        self.error = error
        if self.session is None:
            return
        if error is not None:
            self._roll_back(self.session, error)
        elif self._commits and not self._is_callers(self.session):
            try:
                self.session.flush()
                if in_greenlet():
                    make_usable(self.made)
                if self.draws is not None:
                    self.doubts = self.tracker.doubts()
                self.sent = True
                with unexpired(self.session):
                    self.session.commit()
                for outer in _calls.get():  # which cannot be run again: this has been committed
                    outer.alone = False
            except BaseException as failure:
                self.error = failure
                self._roll_back(self.session, failure)
                raise

    @property
    def is_whole(self) -> bool:
        """Whether all that was lost with the transaction was this call's."""
        return self.began and self.alone and self.session is not None

    def _is_callers(self, session: Session) -> bool:
        """Whether the transaction was begun by hand in a session that is the caller's."""
        if self.tracker.owns_session:
            return False
        transaction = session.get_nested_transaction() or session.get_transaction()
        return (
            transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        )

    def _roll_back(self, session: Session, error: BaseException) -> None:
        # a hook may have committed what was made before it
        self.alone &= session.get_transaction() is self.transaction
        lost = self.is_whole and self.tracker.may_pass(error)
        if not self.tracker.owns_session and not lost:
            return  # the caller may want to keep what was there before
        heard = lambda _session, instance: self.expelled.append(instance)  # noqa: E731 -- to be removed again
        if lost:
            event.listen(session, "persistent_to_transient", heard)
        try:
            session.rollback()
        except Exception as failure:  # noqa: BLE001 -- the test's own error must surface
            error.add_note(f"Afterwards the session could not be rolled back: {failure!r}")
        finally:
            if lost:
                event.remove(session, "persistent_to_transient", heard)


def innermost_call() -> Call | None:
    """The call under way in this context, of whatever tracker."""
    calls = _calls.get()
    return calls[-1] if calls and calls[-1].running else None


def running_call(tracker: ResourceTracker) -> Call | None:
    """The call under way that will commit this tracker's session."""
    calls = _calls.get()
    if not calls:
        return None
    for call in calls:
        if call.tracker is tracker and call.running:
            return call
    return None
