"""One commit per call that the test itself makes.

An application in another process must see an object whole or not at all: with its SubFactories'
rows and what its hooks added or changed. So whatever a call makes is flushed as it is made, and
committed once, when the outermost call returns.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Self

from sqlalchemy.orm import SessionTransactionOrigin

if TYPE_CHECKING:
    from contextvars import Token
    from types import TracebackType

    from sqlalchemy.orm import Session

    from tidyrows.tracking import ResourceTracker

_calls: ContextVar[tuple[Call, ...]] = ContextVar("tidyrows_calls", default=())


class Call:
    """An outermost call of a factory, and what it commits.

    Calls nest only where a hook enters another tracker's block: its rows must be committed before
    that block ends.

    Args:
        tracker: whose session is used.
        commits: whether the session is committed at the end.

    Attributes:
        session: the tracker's session, once the call has made an object in it.
        running: a task that a hook has started may outlive the call.
    """

    __slots__ = ("_commits", "_token", "running", "session", "tracker")

    def __init__(self, tracker: ResourceTracker, *, commits: bool = True) -> None:
        self.tracker = tracker
        self.session: Session | None = None
        self.running = False
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
        if self.session is None:
            return
        if error is not None:
            self._roll_back(self.session, error)
        elif self._commits and not self._is_callers(self.session):
            try:
                self.session.commit()
            except BaseException as failure:
                self._roll_back(self.session, failure)
                raise

    def _is_callers(self, session: Session) -> bool:
        """Whether the transaction was begun by hand in a session that is the caller's."""
        if self.tracker.owns_session:
            return False
        transaction = session.get_nested_transaction() or session.get_transaction()
        return (
            transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        )

    def _roll_back(self, session: Session, error: BaseException) -> None:
        if not self.tracker.owns_session:
            return  # the caller may want to keep what was there before
        try:
            session.rollback()
        except Exception as failure:  # noqa: BLE001 -- the test's own error must surface
            error.add_note(f"Afterwards the session could not be rolled back: {failure!r}")


def running_call(tracker: ResourceTracker) -> Call | None:
    """The call under way that will commit this tracker's session."""
    calls = _calls.get()
    if not calls:
        return None
    for call in calls:
        if call.tracker is tracker and call.running:
            return call
    return None
