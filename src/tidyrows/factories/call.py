"""One commit per call that the test itself makes.

An application in another process must see an object whole or not at all: with the rows of its
SubFactories and with everything that its hooks added or changed. So each object is flushed when it
is made, and one commit follows when the outermost call returns.
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

    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

_calls: ContextVar[tuple[Call, ...]] = ContextVar("tidyrows_calls", default=())


class Call:
    """An outermost factory call, and the transaction that it commits.

    Calls nest only where a hook enters another tracker's block: the rows of the inner call must be
    committed before that block ends.

    Args:
        tracker: the tracker whose session is used.
        commits: whether the session is committed at the end.
        retriable: whether the call may be run again after its transaction was lost.

    Attributes:
        session: the tracker's session, once the call has made an object in it.
        running: False once the call has ended; a task that a hook started may outlive the call.
        began: whether the transaction, if there is one, began in this call.
        alone: False once a part of the call went through another session, or was committed before
            the end of the call.
        transaction: the session's transaction when the call made its first object.
        sent: whether the COMMIT has been sent.
        doubts: the rows that the tracker held as in doubt before the COMMIT.
        error: the error with which the call failed.
        result: what the call returns.
        made: every object that the call has made.
        unkeyed: objects that the caller built and passed in, and that have no key yet.
        expelled: objects that a rollback removed from the session.
    """

    __slots__ = (
        "_commits",
        "_token",
        "alone",
        "began",
        "doubts",
        "error",
        "expelled",
        "made",
        "result",
        "retriable",
        "running",
        "sent",
        "session",
        "tracker",
        "transaction",
        "unkeyed",
    )

    def __init__(
        self, tracker: ResourceTracker, *, commits: bool = True, retriable: bool = False
    ) -> None:
        self.tracker = tracker
        self.retriable = retriable
        self.session: Session | None = None
        self.running = False
        self.began = retriable and not tracker.in_transaction
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
                self._commit(self.session)
            except BaseException as failure:
                self.error = failure
                self._roll_back(self.session, failure)
                raise

    @property
    def is_whole(self) -> bool:
        """Whether everything that was lost with the transaction belongs to this call."""
        return self.began and self.alone and self.session is not None

    def _commit(self, session: Session) -> None:
        session.flush()
        is_async = in_greenlet()
        if is_async:
            make_usable(self.made)
        if self.retriable:
            self.doubts = self.tracker.doubts()
        self.sent = True
        if is_async:
            with unexpired(session):
                session.commit()
        else:
            session.commit()
        for outer in _calls.get():  # an outer call cannot be run again: this part is committed
            outer.alone = False

    def _is_callers(self, session: Session) -> bool:
        """Whether the caller began the transaction by hand, in a session of the caller's own."""
        if self.tracker.owns_session:
            return False
        transaction = session.get_nested_transaction() or session.get_transaction()
        return (
            transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        )

    def _roll_back(self, session: Session, error: BaseException) -> None:
        # a hook may have committed the objects that were made before it
        self.alone &= session.get_transaction() is self.transaction
        lost = self.is_whole and self.tracker.may_pass(error)
        if not self.tracker.owns_session and not lost:
            return  # the caller may want to keep the earlier part of the transaction
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
    """The innermost running call of this context, of any tracker."""
    calls = _calls.get()
    return calls[-1] if calls and calls[-1].running else None


def running_call(tracker: ResourceTracker) -> Call | None:
    """The running call that will commit this tracker's session."""
    for call in _calls.get():
        if call.tracker is tracker and call.running:
            return call
    return None
